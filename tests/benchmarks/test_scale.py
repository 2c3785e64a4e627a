"""The benchmark of rows: that it walks what a run walks, and what its table claims."""

import json
import logging
import sys
from pathlib import Path

import pytest

from lora_sentiment.data import cache

SCRIPT = Path(__file__).parents[2] / "benchmarks/scale.py"
sys.path.insert(0, str(SCRIPT.parent))
import scale  # noqa: E402


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_a_walk_counts_rows_and_tokens(form, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "cache_folder", lambda: tmp_path / "ids")
    level = logging.getLogger("lora_sentiment").level
    path = scale.make_table(tmp_path / f"rows.{form}", 300, 12)
    made, again = scale.walk(path), scale.walk(path)
    logging.getLogger("lora_sentiment").setLevel(level)
    assert made["rows"] == 300
    assert made["tokens"] == again["tokens"] > 300 * 12
    assert made["train_sha256"] == again["train_sha256"]
    assert tuple(made["seconds"]) == scale.STAGES


def line(rows, peak, **values):
    key = {
        "format": "csv",
        "cached": False,
        "rows": rows,
        "tokens": rows * 10,
        "baseline_kib": 1024,
    }
    facts = {"date": "2030-01-01", "system": "Linux", "cores": 2, "versions": {"torch": "2"}}
    measured = {
        "seconds": dict.fromkeys(scale.STAGES, rows / 1e6),
        "peaks_kib": dict.fromkeys(scale.STAGES, peak),
    }
    return {**key, **facts, **measured, **values}


def test_growth_is_that_of_the_largest_over_the_smallest_of_one_kind():
    lines = [
        line(100, 1000),
        line(1000, 1050),
        line(100, 2000, cached=True),
        line(1000, 3000, cached=True),
    ]
    assert scale.growths(lines) == {("csv", False): pytest.approx(0.05), ("csv", True): 0.5}
    text = scale.render(lines, 12)
    assert "csv, made +5.0%; csv, cached +50.0%" in text
    assert "| csv | made | 1,000 | 10,000 | 0.0 | 0.0 | 0.0 | 0.0 | 0.0 | 0.0 | 0.50 | 1 |" in text


def test_the_table_that_stands_there_is_of_the_lines_beside_it_and_keeps_what_it_claims():
    path = SCRIPT.with_suffix(".jsonl")
    if not path.is_file():
        pytest.skip("not measured yet")
    lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    assert max(scale.growths(lines).values()) < scale.MOST_GROWTH
    rows = {line["rows"] for line in lines}
    assert max(rows) == 10 * min(rows)
    assert scale.render(lines, 40) == SCRIPT.with_suffix(".md").read_text(encoding="utf-8")
