"""The table of `benchmarks/methods.py`: what every method gave and cost, held against full fine-tuning."""

import shlex
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from journal import Line

from lora_sentiment.evaluation.statistics import Interval, percentile_interval, resample_weights

MARGIN = 0.003
"""Accuracy that a method may lose and still be called not worse."""
NUM_RESAMPLES = 2000


@dataclass
class Row:
    """One method on one data set.

    Attributes:
        dataset: One of methods.DATASETS.
        method: One of methods.METHODS.
        tries: Finished tries.
        finals: Finished runs at the rate that held, one a seed.
        dropped: Finished runs at rates that did not hold.
        right: What the final runs had right: (seeds, rows).
    """

    dataset: str
    method: str
    tries: list[Line] = field(default_factory=list)
    finals: list[Line] = field(default_factory=list)
    dropped: list[Line] = field(default_factory=list)
    right: npt.NDArray[np.bool_] | None = None

    @property
    def rates(self) -> list[float]:
        """The tried rates that converged, best first: by validation accuracy, then by log-loss."""
        scored = [
            (line["metrics"]["validation"], line["rate"])
            for line in self.tries
            if "metrics" in line
        ]
        scored.sort(key=lambda found: (-found[0]["accuracy"], found[0]["log_loss"]))
        return [rate for _, rate in scored]

    def holds(self, final: Line) -> bool:
        """Return whether a run on more rows chose at least as well on validation as the try that it goes back to."""
        (tried,) = [line for line in self.tries if line["rate"] == final["rate"]]
        return "metrics" in final and validation_accuracy(final) >= validation_accuracy(tried)


def validation_accuracy(line: Line) -> float:
    """Return a run's accuracy on the rows that it chose on; -1 where it failed."""
    return float(line["metrics"]["validation"]["accuracy"]) if "metrics" in line else -1.0


def judged_role(blocks: dict[str, Any]) -> str:
    """Return the split that the table judges on: test, or dev where test has no labels."""
    return "test" if "test" in blocks else "dev"


def compare_rows(ours: npt.NDArray[np.bool_], reference: npt.NDArray[np.bool_]) -> Interval:
    """Return how much more accurate we are than the reference on the same rows and seeds, with a 95 % interval.

    Both rows and seeds are resampled (Efron & Tibshirani 1993, ch. 8), paired. With one seed this is the paired
    bootstrap over rows; of few seeds the interval shows too little of how much they differ.

    Args:
        ours: What we have right: (num_seeds, num_rows).
        reference: What the reference has right, of the same shape.
    """
    difference = ours.astype(np.float64) - reference
    num_seeds, num_rows = difference.shape
    generator = np.random.default_rng(0)
    resampled = []
    for weights in resample_weights(num_rows, num_resamples=NUM_RESAMPLES, seed=0):
        drawn = (
            generator.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=len(weights))
            / num_seeds
        )
        resampled.append(((weights @ difference.T / num_rows) * drawn).sum(axis=1))
    return percentile_interval(float(difference.mean()), np.concatenate(resampled), confidence=0.95)


def is_not_worse(difference: Interval) -> bool:
    """Return whether a method's accuracy is shown to be no more than MARGIN below the reference's."""
    return difference.low is not None and difference.low > -MARGIN


def render(rows: Sequence[Row], arguments: Namespace) -> str:
    """Return benchmarks/methods.md of what is finished."""
    parts = [
        f"# What each method gives and what it costs: {', '.join(arguments.datasets)}",
        describe(rows, arguments),
    ]
    for dataset in arguments.datasets:
        own = [row for row in rows if row.dataset == dataset]
        parts += [f"## {dataset}", describe_data(own), results_table(own), tries_table(own)]
    return "\n\n".join(filter(None, parts)) + "\n"


def describe(rows: Sequence[Row], arguments: Namespace) -> str:
    """Return what holds for every run, and how to read the tables."""
    lines = [line for row in rows for line in (*row.tries, *row.finals)]
    dates = sorted({line["date"] for line in lines})
    versions = sorted(
        {
            ", ".join(f"{name} {number}" for name, number in line["versions"].items())
            for line in lines
        }
    )
    seeds = (
        "and seeds, both resampled"
        if arguments.seeds > 1
        else "only: one seed says nothing of other seeds"
    )
    facts = [
        f"Base `{short(arguments.base)}`",
        *sorted({line["machine"] for line in lines}),
        *versions,
        " to ".join(dict.fromkeys([*dates[:1], *dates[-1:]])),
    ]
    note = f"\n- {arguments.note}" if arguments.note else ""
    return f"""```sh
{command(arguments)}
```

{"; ".join(filter(None, facts))}.

- Every method: {arguments.tries} learning rate(s) tried for one epoch of {arguments.tries_rows:,} rows; the one
  with the best validation accuracy is run for {arguments.epochs:g} epoch(s) with {arguments.seeds} seed(s) and judged.
  A rate whose run ends below its own try on validation did not hold, and the next best one is run; test decides
  nothing. "edge": the rate was the lowest or highest tried, and a better one may lie beyond.
- Brackets are 95 % bootstrap intervals; the difference to full fine-tuning is paired over rows
  {seeds}.
- "not worse" is said only where the interval's lower end is above {-100 * MARGIN:.1f} points, "worse" only where its
  upper end is below 0.
- Trainable counts hold the head, bytes are the saved tensors. Every run has its own process: peak is its most resident
  memory, imported libraries included, or on a GPU the most allocated.{note}"""


def command(arguments: Namespace) -> str:
    """Return the command that makes this table, folders by their last part."""
    parts = [
        "python benchmarks/methods.py",
        f"--base {short(arguments.base)}",
        f"--datasets {' '.join(arguments.datasets)}",
    ]
    parts += [f"--data {dataset}={short(where)}" for dataset, where in arguments.data.items()]
    parts += [
        f"--seeds {arguments.seeds} --tries {arguments.tries} --tries-rows {arguments.tries_rows}"
    ]
    parts += [
        f"--epochs {arguments.epochs:g}",
        *([f"--rows {arguments.rows}"] if arguments.rows else []),
    ]
    parts += [f"--methods {shlex.join(arguments.methods)}"] if arguments.methods else []
    parts += [f"--name {arguments.name}"] if arguments.name != "methods" else []
    return " ".join([*parts, *(f"--set {item}" for item in arguments.set)])


def describe_data(rows: Sequence[Row]) -> str:
    """Return which rows one data set's final runs had."""
    finals = [line for row in rows for line in row.finals if "metrics" in line]
    if not finals:
        return "No final run is finished."
    counts, role = finals[0]["rows"], judged_role(finals[0]["metrics"])
    seeds = ", ".join(map(str, sorted({line["seed"] for line in finals})))
    return (
        f"`{finals[0]['source']}`: {counts['train']:,} rows to train on, {counts['validation']:,} to choose on; "
        f"judged on the {counts[role]:,} of {role}; seeds {seeds}."
    )


def results_table(rows: Sequence[Row]) -> str:
    """Return the table of final runs: means over seeds."""
    reference = next((row.right for row in rows if row.method == "full"), None)
    table = [
        "| method | trainable | share | bytes | rate | accuracy | macro-F1 | points against full | | training s | "
        "tokens/s | peak MiB | engine |",
        "|---|---:|---:|---:|---|---|---:|---|---|---:|---:|---:|---|",
    ]
    proven: list[tuple[int, str]] = []
    for row in rows:
        if row.right is None:
            failed = [line["failed"] for line in (*row.tries, *row.finals) if "failed" in line]
            table.append(
                f"| {row.method} | {failed[0] if failed else 'not finished'} " + "| " * 11 + "|"
            )
            continue
        against = (
            compare_rows(row.right, reference)
            if reference is not None and row.method != "full"
            else None
        )
        if against and is_not_worse(against):
            proven.append((row.finals[0]["parameters"]["trainable"], row.method))
        table.append(result_cells(row, row.right, against))
    if reference is not None:
        none = (
            "No method is shown to be not worse than full fine-tuning here: no lower end is above "
            f"{-100 * MARGIN:.1f}."
        )
        smallest = (
            f"The smallest that is not worse than full fine-tuning: {min(proven)[1]}."
            if proven
            else none
        )
        table += ["", smallest]
    return "\n".join(table)


def result_cells(row: Row, right: npt.NDArray[np.bool_], against: Interval | None) -> str:
    """Return one row of the table of final runs."""

    def mean(block: str, name: str) -> float:
        return float(np.mean([line[block][name] for line in row.finals]))

    accuracy = compare_rows(right, np.zeros_like(right))
    macro_f1 = np.mean(
        [line["metrics"][judged_role(line["metrics"])]["macro_f1"] for line in row.finals]
    )
    tried = sorted(line["rate"] for line in row.tries)
    rate = row.finals[0]["rate"]
    edge = " (edge)" if len(tried) > 2 and rate in (tried[0], tried[-1]) else ""
    difference = verdict = ""
    if against is not None:
        value, low, high = (100 * float(getattr(against, end)) for end in ("value", "low", "high"))
        difference = f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
        verdict = "not worse" if is_not_worse(against) else "worse" if high < 0 else ""
    cells = [
        row.method,
        f"{mean('parameters', 'trainable'):,.0f}",
        f"{mean('parameters', 'share'):.3%}",
        f"{mean('parameters', 'adapter_bytes'):,.0f}",
        f"{rate:g}{edge}",
        f"{accuracy.value:.4f} [{accuracy.low:.4f}, {accuracy.high:.4f}]",
        f"{macro_f1:.4f}",
        difference,
        verdict,
        f"{mean('train', 'seconds'):,.0f}",
        f"{mean('train', 'tokens_per_second'):,.0f}",
        f"{mean('train', 'peak_memory_bytes') / 2**20:,.0f}",
        row.finals[0]["train"]["engine"].partition(" ")[0],
    ]
    return f"| {' | '.join(cells)} |"


def tries_table(rows: Sequence[Row]) -> str:
    """Return what every tried rate gave on validation."""
    table = [
        "| method | rates tried and their validation accuracy | runs whose rate did not hold |",
        "|---|---|---|",
    ]
    for row in rows:
        shown = [
            f"{line['rate']:g}: {line['metrics']['validation']['accuracy']:.4f}"
            if "metrics" in line
            else f"{line['rate']:g}: failed"
            for line in sorted(row.tries, key=lambda line: float(line["rate"]))
        ]
        dropped = [f"{line['rate']:g}: {validation_accuracy(line):.4f}" for line in row.dropped]
        table.append(f"| {row.method} | {', '.join(shown)} | {', '.join(dropped)} |")
    return "\n".join(table)


def short(name: str) -> str:
    """Return a base's or data set's name for people: of a folder, its last part."""
    return Path(name).resolve().name if Path(name).is_dir() else name
