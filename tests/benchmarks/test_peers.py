"""The benchmark against the Trainer: every variant computes what it says, and a stopped script goes on."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_sentiment.models.dtype import resolve_dtype
from tests.conftest import FILLERS, toy_rows, write_csv

SCRIPT = Path(__file__).parents[2] / "benchmarks/peers.py"
sys.path.insert(0, str(SCRIPT.parent))
import peers  # noqa: E402
import peers_slice  # noqa: E402
from peers_levers import LEVERS  # noqa: E402


@pytest.fixture
def arguments(tiny_base, tmp_path):
    """The command line of a benchmark that takes seconds, on texts of many lengths."""
    rows = [
        (" ".join([text, *FILLERS * (i % 3)]), label)
        for i, (text, label) in enumerate(toy_rows(150))
    ]
    write_csv(tmp_path / "rows.csv", rows)
    return [
        f"--bases=toy={tiny_base}",
        "--datasets=imdb",
        f"--data=imdb={tmp_path}/rows.csv",
        "--length=40",
        f"--out={tmp_path}/out",
        f"--cache={tmp_path}/cache",
    ]


@pytest.fixture
def here(monkeypatch):
    """Measure in this process, and list what was measured."""
    measured = []

    def run(function, *given, log, huge_pages=False):
        measured.append(function.__name__)
        return function(*given)

    monkeypatch.setattr(peers, "run_isolated", run)
    return measured


def read(tmp_path):
    return [
        json.loads(line)
        for line in (tmp_path / "out/peers.jsonl").read_text(encoding="utf-8").splitlines()
    ]


CPU = torch.device("cpu")


def make_job(arguments, name, *, steps=2):
    """The slice of one variant."""
    found = peers.parse_arguments(arguments)
    cell = peers.Cell(
        "train" if name in {**peers.VARIANTS, **peers.NAMED} else "ablation", "toy", "imdb"
    )
    line = {**peers.describe(cell, name, 0, found), "steps": steps}
    return peers.make_job(line, cell, found, peers.Pools(found))


def test_every_variant_takes_its_steps_and_a_stopped_script_goes_on(arguments, here, tmp_path):
    peers.main([*arguments, "--quick"])
    lines = read(tmp_path)
    assert [line["variant"] for line in lines] == [*peers.VARIANTS, *peers.INFERENCE]
    for line in lines:
        assert line["seconds"] > 0
        assert line["tokens"] > 0
        if line["task"] == "train":
            assert (line["steps"], line["rows"]) == (1, 16)
            assert 0.1 < line["loss"] < 4
            assert line["tokens"] <= line["padded_tokens"]
            assert line["frozen_bytes"] > 0
            assert line["executed_flops"] > 0.5 * line["stock_flops"]
    page = (tmp_path / "out/peers.md").read_text(encoding="utf-8")
    assert "| ours, no dropout | float32" in page
    assert "No CUDA device" in page
    assert str(tmp_path) not in page + json.dumps(lines)
    # Without one line, that slice alone is measured again.
    kept = [json.dumps(line) for line in lines if line["variant"] != "B"]
    (tmp_path / "out/peers.jsonl").write_text(
        "".join(f"{line}\n" for line in kept), encoding="utf-8"
    )
    del here[:]
    peers.main([*arguments, "--quick"])
    assert here == ["measure_steps"]
    assert [line["variant"] for line in read(tmp_path)][-1] == "B"
    peers.main([*arguments, "--quick", "--render"])
    assert here == ["measure_steps"]


@pytest.mark.parametrize("name", ["D", "B, bf16", "ours"])
def test_an_engine_trains_the_same_adapters_on_its_own_batches(arguments, name):
    job = make_job(arguments, name)
    walk = (peers_slice.walk_trainer if name[0] in "DB" else peers_slice.walk_ours)(
        job, torch.device("cpu")
    )
    trained = {key: p.numel() for key, p in walk.model.named_parameters() if p.requires_grad}
    # Two layers of q and v at rank 8, and the head.
    assert sum(size for key, size in trained.items() if "lora_" in key) == 2 * 2 * 8 * (32 + 32)
    assert sum(size for key, size in trained.items() if "lora_" not in key) == 33 * 32 + 33 * 2
    assert walk.seconds > 0
    rows = np.concatenate(walk.micro_batches)
    assert sorted(rows) == sorted(np.concatenate(job.batches[job.warm_ups :]))
    assert len(walk.micro_batches) == (4 if "parts" in name else 1) * (
        len(job.batches) - job.warm_ups
    )
    auto = torch.float32 if name == "D" else resolve_dtype("auto", CPU)
    assert walk.dtype == (torch.bfloat16 if "bf16" in name else auto)


class Operations(TorchDispatchMode):
    """Counts what torch computes, by name and shapes."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        shapes = tuple(tuple(given.shape) for given in args if isinstance(given, torch.Tensor))
        self.seen[(func, shapes)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lever", LEVERS)
def test_a_part_that_is_off_changes_the_work_and_not_the_result(arguments, lever, monkeypatch):
    monkeypatch.setattr(peers_slice, "micro_batch_tokens", lambda *_, **__: 300)

    def walk(name, *, dropout):
        job = make_job(arguments, name, steps=1)
        job = replace(job, variant=replace(job.variant, dropout=dropout))
        with Operations() as operations:
            found = peers_slice.walk_ours(job, torch.device("cpu"))
        return operations.seen, found.loss

    work, _ = walk("ours", dropout=True)
    assert walk(f"without {lever}", dropout=True)[0] != work
    if lever != "rows of like length":
        _, loss = walk("ours", dropout=False)
        assert walk(f"without {lever}", dropout=False)[1] == pytest.approx(loss, abs=1e-5)


@pytest.mark.slow  # a server of its own, which imports everything
def test_a_slice_is_forked_from_a_server_that_has_imported(tmp_path):
    """The server of processes does not look into the script's folder by itself (Python 3.11)."""
    loaded = "'gpu_check' in __import__('sys').modules"
    code = f"""
import sys
from pathlib import Path

sys.path.insert(0, {str(SCRIPT.parent)!r})
import peers

if __name__ == "__main__":
    print(peers.run_isolated(eval, {loaded!r}, log=Path({str(tmp_path / "log.txt")!r}), preload="gpu_check"))
"""
    (tmp_path / "script.py").write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True"]
