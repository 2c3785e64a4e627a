"""Whether label sets hold what they promise, on test rows: makes benchmarks/coverage.md.

    python benchmarks/coverage.py --base FOLDER --data imdb=FOLDER sst5=FOLDER ag_news=FOLDER

A small LoRA is trained on each data set, label sets are calibrated on rows that chose nothing, and all test rows are
answered once. Let k = ceil((n_cal + 1) coverage). If test rows were drawn as the calibration rows were, the number of
a label's test rows whose set holds it follows the beta-binomial distribution BetaBin(n_test, k, n_cal + 1 - k). See
section 3.2 of Angelopoulos & Bates (2021), "A Gentle Introduction to Conformal Prediction". The page says whether the
achieved coverage lies within the central 99 % of it. For all rows together it is the sum of the labels' independent
counts. Each finished data set is a line of coverage.jsonl.
"""

import argparse
import datetime
import json
import math
import os
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from journal import Journal, Line
from numpy.typing import NDArray
from scipy.stats import betabinom

from lora_sentiment.adapter.folder import load_card
from lora_sentiment.adapter.predictions import load_predictions
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.tasks.label_sets import find_set_thresholds
from lora_sentiment.tasks.scores import softmax
from lora_sentiment.train import train

HERE = Path(__file__).parent
COVERAGES = (0.9, 0.95)
WITHIN = 0.99
SETTINGS: dict[str, tuple[tuple[str, ...], dict[str, Any], int]] = {
    "imdb": (("neg", "pos"), {"max_train_rows": 5000, "calibration_fraction": 0.4}, 32),
    "sst5": (
        ("very negative", "negative", "neutral", "positive", "very positive"),
        {"calibration_fraction": 0.4},
        64,
    ),
    "ag_news": (
        ("World", "Sports", "Business", "Sci/Tech"),
        {"max_train_rows": 6000, "calibration_fraction": 0.4},
        64,
    ),
}
"""Data set to its labels, what its `data` section adds, and its longest text in tokens."""


def measure(name: str, folder: Path, base: str, out: Path) -> Line:
    """Train, calibrate and judge one data set."""
    labels, data, max_length = SETTINGS[name]
    roles = [
        role for role in ("train", "validation", "test") if (folder / f"{role}.parquet").is_file()
    ]
    source = {role: str(folder / f"{role}.parquet") for role in roles}
    recipe = Recipe.model_validate(
        {
            "name": name,
            "data": {"source": source, "labels": labels, **data},
            "model": {"name": base, "max_length": max_length},
            "method": {"kind": "lora", "r": 4, "target_modules": "all-linear"},
            "train": {"num_train_epochs": 1, "learning_rate": 1e-3, "warmup_ratio": 0.06},
            "output": {"dir": str(out / name)},
        }
    )
    run = train(recipe)
    calibration: Any = load_card(run.adapter).calibration
    judged = load_predictions(run.adapter)["test"]
    scores = 1 - softmax(judged.logits, temperature=calibration["temperature"])
    num_calibration = [len(own) for own in calibration["label_scores"]]
    results = {}
    for coverage in COVERAGES:
        is_held = scores <= find_set_thresholds(calibration, coverage)
        results[f"{coverage:g}"] = describe(is_held, judged.labels, num_calibration, coverage)
    return {
        "key": name,
        "labels": list(labels),
        "train_rows": run.report["data"]["train"]["rows"],
        "calibration_rows": num_calibration,
        "test_rows": len(judged.labels),
        "max_length": max_length,
        "accuracy": run.report["test"]["accuracy"],
        "seconds": run.report["train"]["seconds"],
        "results": results,
        "versions": {
            package: version(package) for package in ("torch", "transformers", "peft", "scipy")
        },
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def describe(
    is_held: NDArray[np.bool_],
    labels: NDArray[np.int64],
    num_calibration: list[int],
    coverage: float,
) -> list[dict[str, Any]]:
    """Return the figures of all rows, then of each label.

    Args:
        is_held: Whether each row's set holds each label, (num_rows, num_labels).
        labels: The labels of the rows.
        num_calibration: Calibration rows of each label.
        coverage: What was promised.
    """
    sizes = is_held.sum(axis=1)
    has_own = is_held[np.arange(len(labels)), labels]
    every = np.ones(1)
    rows = []
    for label, num_rows in enumerate(num_calibration):
        own = labels == label
        chances = promise(int(own.sum()), num_rows, coverage)
        every = np.convolve(every, chances)
        rows.append(figures(has_own[own], sizes[own], chances))
    return [figures(has_own, sizes, every), *rows]


def promise(num_test: int, num_calibration: int, coverage: float) -> NDArray[np.float64]:
    """Return the probability of each number of test rows whose set holds their label."""
    rank = math.ceil(round((num_calibration + 1) * coverage, 9))
    if rank > num_calibration:
        return np.append(np.zeros(num_test), 1.0)
    return np.asarray(
        betabinom.pmf(np.arange(num_test + 1), num_test, rank, num_calibration + 1 - rank)
    )


def figures(
    has_own: NDArray[np.bool_], sizes: NDArray[np.int64], chances: NDArray[np.float64]
) -> dict[str, Any]:
    """Return the achieved coverage with the interval of the promise, and the sizes of the sets."""
    cumulated = chances.cumsum()
    low, high = np.searchsorted(cumulated, [(1 - WITHIN) / 2, (1 + WITHIN) / 2])
    return {
        "rows": len(has_own),
        "coverage": float(has_own.mean()),
        "low": float(low / len(has_own)),
        "high": float(high / len(has_own)),
        "size": float(sizes.mean()),
        "one_label": float((sizes == 1).mean()),
        "empty": float((sizes == 0).mean()),
    }


def render(lines: list[Line], command: str) -> str:
    """Return the page."""
    page = [
        "# What label sets hold",
        "",
        "```sh",
        command,
        "```",
        "",
        " ".join((__doc__ or "").split("\n\n")[2].split()).replace(
            "coverage.jsonl", "`coverage.jsonl`"
        ),
        "",
        "LoRA of rank 4 on all linears, one epoch at 1e-3, seed 42. *within*: whether the achieved coverage lies in "
        "the interval. *size*: labels in a set on average. *one label*: share of sets with exactly one. *empty*: with "
        "none.",
        "",
    ]
    for line in lines:
        accuracy = line["accuracy"]
        page += [
            f"## {line['key']}",
            "",
            f"{line['train_rows']:,} rows to train on, cut at {line['max_length']} tokens, "
            f"{sum(line['calibration_rows']):,} to calibrate on; {line['test_rows']:,} test rows, accuracy "
            f"{accuracy['value']:.4f} [{accuracy['low']:.4f}, {accuracy['high']:.4f}]. {line['date']}.",
            "",
            "| promised | rows with label | calibration | test | achieved | 99 % interval of the promise | within "
            "| size | one label | empty |",
            "|---:|---|---:|---:|---:|---|---|---:|---:|---:|",
        ]
        counts = [sum(line["calibration_rows"]), *line["calibration_rows"]]
        for coverage, rows in line["results"].items():
            for label, count, row in zip(["all", *line["labels"]], counts, rows, strict=True):
                within = "yes" if row["low"] <= row["coverage"] <= row["high"] else "**no**"
                cells = [
                    coverage,
                    label,
                    f"{count:,}",
                    f"{row['rows']:,}",
                    f"{row['coverage']:.4f}",
                    f"{row['low']:.4f} to {row['high']:.4f}",
                    within,
                    f"{row['size']:.2f}",
                    f"{row['one_label']:.1%}",
                    f"{row['empty']:.1%}",
                ]
                page.append(f"| {' | '.join(cells)} |")
        page.append("")
    every = [row for line in lines for rows in line["results"].values() for row in rows]
    outside = [row for row in every if not row["low"] <= row["coverage"] <= row["high"]]
    page.append(
        f"{len(every) - len(outside)} of {len(every)} achieved coverages lie in their interval. By chance "
        "alone one of a hundred does not."
    )
    for row in outside:
        nearest = min((row["low"], row["high"]), key=lambda end: abs(end - row["coverage"]))
        rows = round((row["coverage"] - nearest) * row["rows"])
        page.append(
            f"Outside: {row['coverage']:.4f} of {row['rows']:,} rows, beyond the end by {rows:+} row(s)."
        )
    page.append("")
    versions = ", ".join(f"{name} {number}" for name, number in lines[-1]["versions"].items())
    machine = f"{platform.system()}, {os.cpu_count()} cores, other work beside it"
    return "\n".join([*page, f"Measured: {lines[-1]['date']}, {machine}, {versions}.", ""])


def main() -> None:
    """Measure what is not finished, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="local/minilm-l6-distilbert", help="base model")
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="NAME=FOLDER", help=", ".join(SETTINGS)
    )
    parser.add_argument(
        "--out", type=Path, default=HERE, help="folder of coverage.jsonl and coverage.md"
    )
    parser.add_argument("--render", action="store_true", help="make the page of what is finished")
    arguments = parser.parse_args()
    journal = Journal(arguments.out / "coverage.jsonl")
    if not arguments.render:
        for item in arguments.data:
            name, _, folder = item.partition("=")
            if name not in journal.lines:
                with tempfile.TemporaryDirectory() as out:
                    journal.append(measure(name, Path(folder), arguments.base, Path(out)))
    lines = list(journal.lines.values())
    named = " ".join(f"{line['key']}=FOLDER" for line in lines)
    command = f"python benchmarks/coverage.py --base local/minilm-l6-distilbert --data {named}"
    (arguments.out / "coverage.md").write_text(render(lines, command), encoding="utf-8")
    print(json.dumps([line["key"] for line in lines]), file=sys.stderr)


if __name__ == "__main__":
    main()
