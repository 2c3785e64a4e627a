"""The page of benchmarks/peers.py: every variant's cost, as ratios taken round by round."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from journal import Line

Rounds = dict[int, Line]
"""Round to a variant's line."""


@dataclass(frozen=True)
class Target:
    """What the aim is: a figure of a cell, at least or at most.

    Attributes:
        title: What is measured, in words.
        task: Table that it stands in.
        dataset: Data set that it is of.
        variant: Row that it is of.
        value: From (rows by variant, this row) to the median figure; None where something is not measured.
        at_least: The aim.
        at_most: The aim, where less is better.
    """

    title: str
    task: str
    dataset: str
    variant: str
    value: Callable[[dict[str, Rounds], Rounds], float | None]
    at_least: float | None = None
    at_most: float | None = None


def times(*names: str) -> Callable[[dict[str, Rounds], Rounds], float | None]:
    """Return what gives a row's speed over that of another row, or the fastest of some, in the median of rounds."""

    def value(rows: dict[str, Rounds], own: Rounds) -> float | None:
        common = set(own) & set(rows.get(names[0], {}))
        # One that was measured in some of the rounds only is left out, for the median is of all.
        others = [rows[name] for name in names if common <= rows.get(name, {}).keys()]
        found = [
            speed(own[number]) / max(speed(other[number]) for other in others) for number in common
        ]
        return statistics.median(found) if found else None

    return value


def executed_share(_: dict[str, Rounds], own: Rounds) -> float | None:
    """Return the arithmetic that was executed over what the machine's products would have done in that time."""
    return statistics.median(share(line, "executed_flops") for line in own.values())


def memory_share(rows: dict[str, Rounds], own: Rounds) -> float | None:
    """Return a row's peak memory above imports and frozen weights over D's."""
    return working_memory(own) / working_memory(rows["D"]) if "D" in rows else None


def allocated(_: dict[str, Rounds], own: Rounds) -> float | None:
    """Return a row's peak memory with its frozen weights, in GiB."""
    return float(max(line["peak_bytes"] for line in own.values()) / 2**30)


CPU_TARGETS = (
    Target("IMDB, times D", "train", "imdb", "ours", times("D"), at_least=25),
    Target(
        "IMDB, times B (the fastest of its rows), dropout on in both",
        "train",
        "imdb",
        "ours",
        times("B", "B, compiled", "B, in 4 parts", "B, bf16"),
        at_least=10,
    ),
    Target(
        "IMDB, times B, dropout off in both",
        "train",
        "imdb",
        "ours, no dropout",
        times("B, no dropout"),
        at_least=3,
    ),
    Target(
        "IMDB, executed arithmetic over the GEMM rate",
        "train",
        "imdb",
        "ours",
        executed_share,
        at_least=0.6,
    ),
    Target(
        "IMDB, memory above imports and frozen weights over D's",
        "train",
        "imdb",
        "ours",
        memory_share,
        None,
        0.2,
    ),
    Target("SST-2, times D", "train", "sst2", "ours", times("D"), at_least=20),
    Target("AG News, times D", "train", "ag_news", "ours", times("D"), at_least=20),
    Target(
        "inference on IMDB, times the pipeline",
        "inference",
        "imdb",
        "ours",
        times("pipeline"),
        at_least=8,
    ),
)
CUDA_TARGETS = (
    Target("IMDB, times D", "train", "imdb", "ours", times("D"), at_least=5),
    Target(
        "IMDB, times B, compiled where faster",
        "train",
        "imdb",
        "ours",
        times("B", "B, compiled"),
        at_least=2,
    ),
    Target("IMDB at 512, batch 32, GiB allocated", "train", "imdb", "ours", allocated, at_most=1),
    Target(
        "the same in fp16 within 4 GB, GiB",
        "train",
        "imdb",
        "ours, fp16 within 4 GB",
        allocated,
        at_most=4e9 / 2**30,
    ),
)


def render(lines: Sequence[Line], note: str) -> str:
    """Return the page: one part for every machine, one table for every base and data set."""
    bases = ", ".join(dict.fromkeys(line["base"] for line in lines))
    page = [
        f"# Ours beside the Trainer with PEFT: {bases}",
        "",
        NOTES,
        *([note, ""] if note else []),
    ]
    machines: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        machines[line["machine"]].append(line)
    for name, own in machines.items():
        dates = sorted({line["date"] for line in own})
        versions = ", ".join(f"{key} {value}" for key, value in own[-1]["versions"].items())
        threads = ", ".join(str(count) for count in sorted({line["threads"] for line in own}))
        page += [
            f"## {name}",
            "",
            f"{threads} threads; {versions}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}.",
            "",
        ]
        cells = group(own)
        for (task, base, dataset, length, steps), rows in cells.items():
            page += TABLES[task](f"{base}, {dataset} at {length}", steps, rows) + show_code(rows)
        page += show_whole(own) + show_targets(
            cells, is_cuda=any(line.get("device", "CPU") != "CPU" for line in own)
        )
    if not any(line.get("device", "CPU") != "CPU" for line in lines):
        page += [
            "## GPU",
            "",
            "No CUDA device was at hand: the same command measures one, and no figure is written.",
            "",
        ]
    return "\n".join(page)


def group(lines: Sequence[Line]) -> dict[tuple[str, str, str, int, int], dict[str, Rounds]]:
    """Return the lines by what is compared, then by variant, then by round."""
    cells: dict[tuple[str, str, str, int, int], dict[str, Rounds]] = {}
    for line in lines:
        if line["task"] != "whole":
            key = (line["task"], line["base"], line["dataset"], line["length"], line["steps"])
            cells.setdefault(key, {}).setdefault(line["variant"], {})[line["round"]] = line
    return cells


def speed(line: Line) -> float:
    """Return real tokens a second."""
    return float(line["tokens"] / line["seconds"])


def share(line: Line, name: str) -> float:
    """Return arithmetic over what the products alone would have done in that time, measured in the same process."""
    return float(line[name] / line["seconds"] / line["gemm_flops_per_second"])


def ratios(own: Rounds, other: Rounds) -> list[float]:
    """Return own speed over the other's, round by round."""
    return [speed(line) / speed(other[number]) for number, line in own.items() if number in other]


def working_memory(own: Rounds) -> float:
    """Return the most that a row held above imports and frozen weights, in bytes."""
    return float(max(line["peak_bytes"] - line["frozen_bytes"] for line in own.values()))


def show_ratio(own: Rounds, other: Rounds | None) -> str:
    """Return the median of the ratios with the lowest and the highest."""
    found = ratios(own, other) if other else []
    return f"{statistics.median(found):.2f} [{min(found):.2f}, {max(found):.2f}]" if found else ""


def median(own: Rounds, value: Callable[[Line], float]) -> float:
    """Return the median of a figure over rounds."""
    return statistics.median(value(line) for line in own.values())


def show_training(title: str, steps: int, rows: dict[str, Rounds]) -> list[str]:
    """Return the table of a base on a data set."""
    page = [
        f"### {title}, batches of {batch_size(rows)}, {steps} steps a round",
        "",
        "| | dtype | rounds | rows/s | tokens/s | times D | times B with like dropout | padded/real "
        "| MiB above imports and frozen weights | over D's | frozen MiB | loss | executed over GEMM rate "
        "| stock's over GEMM rate |",
        "|---|---|---:|---:|---:|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, own in rows.items():
        line = next(iter(own.values()))
        like = rows.get("B, no dropout" if "no dropout" in name else "B")
        cells = [
            name,
            show_dtype(name, line),
            str(len(own)),
            f"{median(own, lambda line: line['rows'] / line['seconds']):.2f}",
            f"{median(own, speed):,.0f}",
            show_ratio(own, rows.get("D")),
            show_ratio(own, like),
            f"{sum(line['padded_tokens'] for line in own.values()) / sum(line['tokens'] for line in own.values()):.2f}",
            f"{working_memory(own) / 2**20:,.0f}",
            f"{working_memory(own) / working_memory(rows['D']):.2f}" if "D" in rows else "",
            f"{line['frozen_bytes'] / 2**20:,.0f}",
            f"{median(own, lambda line: line['loss']):.4f}",
            f"{median(own, lambda line: share(line, 'executed_flops')):.1%}",
            f"{median(own, lambda line: share(line, 'stock_flops')):.1%}",
        ]
        page.append(f"| {' | '.join(cells)} |")
    rates = [line["gemm_flops_per_second"] / 1e9 for own in rows.values() for line in own.values()]
    return [
        *page,
        "",
        f"GEMM rate {min(rates):,.0f} to {max(rates):,.0f} GFLOP/s over the slices.",
        "",
    ]


def batch_size(rows: dict[str, Rounds]) -> int:
    """Return the rows of an optimizer step."""
    return int(next(iter(next(iter(rows.values())).values()))["batch_size"])


def show_dtype(name: str, line: Line) -> str:
    """Return the dtype, and that a row would have taken a shorter one if there were one."""
    return (
        line["dtype"]
        if name == "D" or line["dtype"] != "float32"
        else "float32 (auto, on a CPU without AMX)"
    )


def show_inference(title: str, _: int, rows: dict[str, Rounds]) -> list[str]:
    """Return the table of texts that were answered."""
    count = next(iter(next(iter(rows.values())).values()))["rows"]
    page = [
        f"### {title}: {count} texts answered a round",
        "",
        "| | rounds | texts/s | tokens/s | times the pipeline | times its batches of 16 | MiB above imports |",
        "|---|---:|---:|---:|---|---|---:|",
    ]
    for name, own in rows.items():
        peak = max(line["peak_bytes"] for line in own.values()) / 2**20
        page.append(
            f"| {name} | {len(own)} | {median(own, lambda line: line['rows'] / line['seconds']):.2f} "
            f"| {median(own, speed):,.0f} | {show_ratio(own, rows.get('pipeline'))} "
            f"| {show_ratio(own, rows.get('pipeline, batches of 16'))} | {peak:,.0f} |"
        )
    return [*page, ""]


def show_ablation(title: str, steps: int, rows: dict[str, Rounds]) -> list[str]:
    """Return the table of what each part of ours gives."""
    page = [
        f"### One part off at a time, or one more on: {title}, batches of {batch_size(rows)}, {steps} steps a round",
        "",
        "| | rounds | tokens/s | speed over ours | MiB above imports and frozen weights | padded/real |",
        "|---|---:|---:|---|---:|---:|",
    ]
    for name, own in rows.items():
        padded, real = (
            sum(line[key] for line in own.values()) for key in ("padded_tokens", "tokens")
        )
        shared = [number for number in own if number in rows.get("ours", {})]
        alike = [
            own[number]["micro_batches"] == rows["ours"][number]["micro_batches"]
            for number in shared
        ]
        uncut = name == "without micro-batches" and bool(alike) and all(alike)
        # What changes nothing shows what the machine's own noise is.
        shown = f"{name} (no step here has more than one: the same work)" if uncut else name
        page.append(
            f"| {shown} | {len(own)} | {median(own, speed):,.0f} | {show_ratio(own, rows.get('ours'))} "
            f"| {working_memory(own) / 2**20:,.0f} | {padded / real:.2f} |"
        )
    return [*page, ""]


TABLES = {"train": show_training, "inference": show_inference, "ablation": show_ablation}


def show_code(rows: dict[str, Rounds]) -> list[str]:
    """Return a line that names the states of the code which a table's slices were taken by."""
    states = sorted(
        {line.get("code", "not noted") for own in rows.values() for line in own.values()}
    )
    return [f"Code: {', '.join(states)}.", ""]


def show_whole(lines: Sequence[Line]) -> list[str]:
    """Return the table of whole runs."""
    runs = [line for line in lines if line["task"] == "whole"]
    if not runs:
        return []
    page = [
        "### Whole runs on IMDB to a validation accuracy, start-up counted",
        "",
        "| base | tokens | accuracy wanted | | seconds | of them before the first step | steps "
        "| accuracy there | validation rows | code |",
        "|---|---:|---:|---|---:|---:|---:|---:|---:|---|",
    ]
    for line in runs:
        reached = f"{line['seconds']:,.0f}" if line["reached"] else f"not in {line['seconds']:,.0f}"
        page.append(
            f"| {line['base']} | {line['length']} | {line['target']} | {line['variant']} | {reached} "
            f"| {line['start_seconds']:,.0f} | {line['steps']} | {line['accuracy']:.4f} "
            f"| {line['validation_rows']:,} | {line.get('code', 'not noted')} |"
        )
    return [
        *page,
        "",
        "One run each: at which step so few rows are judged well enough is chance in part.",
        "",
    ]


def show_targets(
    cells: dict[tuple[str, str, str, int, int], dict[str, Rounds]], *, is_cuda: bool
) -> list[str]:
    """Return what was aimed at beside what was measured; what is missed stays."""
    page = [
        "| aim"
        + (" on a GPU" if is_cuda else " on two AMX cores")
        + " | base | aim | measured here | |"
    ]
    page.append("|---|---|---:|---:|---|")
    for target in CUDA_TARGETS if is_cuda else CPU_TARGETS:
        for (task, base, dataset, *_), rows in cells.items():
            if (task, dataset) != (target.task, target.dataset) or target.variant not in rows:
                continue
            found = target.value(rows, rows[target.variant])
            if found is None:
                continue
            aim = target.at_least if target.at_least is not None else target.at_most
            met = (
                found >= target.at_least
                if target.at_least is not None
                else found <= (target.at_most or 0)
            )
            sign = "≥" if target.at_least is not None else "≤"
            page.append(
                f"| {target.title} | {base} | {sign} {aim:.3g} | {found:.2f} | {'met' if met else 'missed'} |"
            )
    return [*page, ""] if len(page) > 2 else []


NOTES = """\
`python benchmarks/peers.py` makes this; its head says what D, B and ours are and how batches are drawn. Speeds are of
real tokens, padding left out, in the median over rounds. A ratio is taken round by round: the median, in brackets the
lowest and highest. Memory is the most resident at any time of the steps (on a GPU the most allocated). The imports, a
toy model's step and the frozen weights are not in it; the weights have a column of their own. The loss is the mean over
a slice's few steps and only shows that all variants compute: they are too few to learn. The GEMM rate is that of the
encoder's three products, measured in the slice's own process right after its steps. It is the best of fifteen passes.
Before 2026-11-22 it was the median of five; some slices came out above 100 %, for the machine's speed wanders. Executed
arithmetic counts the matrix products that were done, padding too; stock's is what transformers' own forward and
backward would need for the same real tokens, unpadded. Code is a hash of the package and of what takes a slice: under
one that differs "ours" is another state of ours.
"""
