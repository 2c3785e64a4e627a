"""The page of benchmarks/gpu.py, made of the lines of its journal and of nothing else."""

from collections.abc import Callable, Sequence

from journal import Line

Parts = dict[str, list[Line]]
"""Name of a part to its lines, of one run."""
MIB = 2**20
TITLES = {"imdb": "IMDB", "sst2": "SST-2", "ag_news": "AG News"}
COMPILED = "IMDB, beside the compiled Trainer"
NOTES = """\
`python benchmarks/gpu.py` makes this; its head says what the rows are. One run each: no interval, and no second seed.
Every ratio is taken of rows of the same run. Speeds are of real tokens, padding left out. The first steps are those in
which shapes are new and graphs are captured; they are timed apart. Training and inference are measured on
distilbert-base-uncased's exact shape with random weights. D is transformers' Trainer in fp32 with random batches, B the
same in bf16 with rows grouped by length and fused AdamW. Ours trains a whole epoch; D and B take as many steps as their
columns say, drawn evenly by size from a whole epoch. Memory is the most allocated on the card."""


def render(lines: Sequence[Line]) -> str:
    """Return the page: a section for each run of the script, the newest first."""
    page = ["# One GPU", "", NOTES, ""]
    runs: dict[str, Parts] = {}
    for line in reversed(lines):
        runs.setdefault(line["run"], {})
    for line in lines:
        runs[line["run"]].setdefault(line["part"], []).append(line)
    page += show_aims(list(runs.values()))
    for parts in runs.values():
        page += show_run(parts)
    return "\n".join(page)


def show_run(parts: Parts) -> list[str]:
    """Return the section of one run."""
    page = []
    for head in parts.get("machine", []):
        versions = ", ".join(f"{name} {value}" for name, value in head["versions"].items())
        driver = f", driver {head['driver']}" if head.get("driver") else ""
        page += [
            f"## {head['machine']}, {head['date']}",
            "",
            f"`{head['command']}`",
            "",
            f"{head['machine']}{driver}; {versions}; code {head['code']}; started {head['run']}.",
            "",
        ]
        if head["quick"]:
            page += [
                "**Made by `--quick`: tiny sizes that show that every part runs. No figure here means anything.**",
                "",
            ]
    if "whole" in parts:
        page += show_whole(parts["whole"])
    for dataset in TITLES:
        if dataset in parts:
            page += show_training(dataset, parts[dataset])
    if "inference" in parts:
        page += show_inference(parts["inference"])
    if "memory" in parts:
        page += show_memory(parts["memory"])
    if "ablation" in parts:
        page += show_ablation(parts["ablation"])
    if "compiled" in parts:
        page += show_training("compiled", parts["compiled"])
    return page


def show_missing(lines: Sequence[Line]) -> list[str]:
    """Return a list of what was skipped or failed, with reasons."""
    found = []
    for line in lines:
        name = f"{line['row']} at {line['length']}" if line["part"] == "memory" else line["row"]
        for kind in ("skipped", "failed"):
            if kind in line:
                found.append(f"- {name}: {kind}: {line[kind]}")
    return [*found, ""] if found else []


def is_done(line: Line) -> bool:
    """Whether a row has figures."""
    return "skipped" not in line and "failed" not in line


def show_whole(lines: Sequence[Line]) -> list[str]:
    """Return the table of whole commands."""
    page = [
        "### Whole commands",
        "",
        "| | base | whole command, s | training, s | tokens/s in training | train rows | test accuracy | test rows |",
        "|---|---|---:|---:|---:|---:|---|---:|",
    ]
    for line in filter(is_done, lines):
        accuracy = line["accuracy"]
        page.append(
            f"| {line['row']} | {line['base']} | {line['wall_seconds']:.1f} | {line['seconds']:.1f} "
            f"| {line['tokens_per_second']:,.0f} | {line['train_rows']:,} "
            f"| {accuracy['value']:.4f} [{accuracy['low']:.4f}, {accuracy['high']:.4f}] | {line['test_rows']:,} |"
        )
    return [*page, "", *show_missing(lines)]


def speed(line: Line | None, *, first: bool = False) -> float | None:
    """Return real tokens a second after the first steps, or of those; None where there is no such figure."""
    tokens, seconds = ("first_tokens", "first_seconds") if first else ("tokens", "seconds")
    if line is None or not line.get(seconds):
        return None
    return float(line[tokens] / line[seconds])


def find(lines: Sequence[Line], row: str) -> Line | None:
    """Return a row's line; None where it is not there."""
    return next((line for line in lines if line["row"] == row), None)


def fastest_b(lines: Sequence[Line]) -> float | None:
    """Return the speed of the fastest row of B."""
    speeds = [speed(line) for line in lines if line["row"].partition(",")[0] == "B"]
    return max((each for each in speeds if each is not None), default=None)


def divide(own: float | None, other: float | None) -> float | None:
    """Return a ratio; None where one side is missing."""
    return own / other if own is not None and other else None


def show(value: float | None, form: str) -> str:
    """Return a figure for a cell, or nothing."""
    return "" if value is None else format(value, form)


def show_training(dataset: str, lines: Sequence[Line]) -> list[str]:
    """Return the table of a data set."""
    rows = [line for line in lines if "first_steps" in line]
    page: list[str] = []
    if rows:
        like = rows[0]
        title = TITLES.get(dataset, COMPILED)
        page = [
            f"### Training: {title} at {like['length']}, batches of {like['batch_size']}, LoRA r=8, q and v",
            "",
            "| | dtype | first steps | their s | their tokens/s | steps after them | tokens/s | times D "
            "| times the fastest B | peak MiB | mean loss |",
            "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
    for line in rows:
        own = speed(line)
        steps = f"{line['steps']:,}"
        if line["steps"] < line["steps_wanted"]:
            steps += f" of {line['steps_wanted']:,}, then its time was up"
        cells = [
            line["row"],
            line["dtype"],
            f"{line['first_steps']}",
            f"{line['first_seconds']:.2f}",
            show(speed(line, first=True), ",.0f"),
            steps,
            show(own, ",.0f"),
            show(divide(own, speed(find(lines, "D"))), ".2f"),
            show(divide(own, fastest_b(lines)), ".2f"),
            f"{line['peak_bytes'] / MIB:,.0f}",
            f"{line['loss']:.4f}",
        ]
        page.append(f"| {' | '.join(cells)} |")
    page += [""] if rows else [f"### Training: {TITLES.get(dataset, COMPILED)}", ""]
    for line in lines:
        if "num_rows" in line:
            read = f"read and tokenised in {line['seconds']:.1f} s"
            page += [f"{line['num_rows']:,} rows of {line['tokens']:,} tokens, {read}.", ""]
    return page + show_missing(lines)


def show_ablation(lines: Sequence[Line]) -> list[str]:
    """Return the table of what each part of the fast forward pass gives."""
    rows = [line for line in lines if "first_steps" in line]
    whole = find(rows, "all parts, again") or find(rows, "all parts")
    page = [
        "### What each part gives: IMDB at 512, 150 steps",
        "",
        "| | tokens/s after the first steps | of all parts | peak MiB | of all parts |",
        "|---|---:|---:|---:|---:|",
    ]
    for line in rows:
        memory = line["peak_bytes"] / whole["peak_bytes"] if whole else None
        cells = [
            line["row"],
            show(speed(line), ",.0f"),
            show(divide(speed(line), speed(whole)), ".2f"),
            f"{line['peak_bytes'] / MIB:,.0f}",
            show(memory, ".2f"),
        ]
        page.append(f"| {' | '.join(cells)} |")
    return [*page, "", *show_missing(lines)]


def show_inference(lines: Sequence[Line]) -> list[str]:
    """Return the table of answers."""
    rows = [line for line in lines if "texts" in line]
    page = [
        "### Inference on IMDB",
        "",
        "| | texts | first pass, tokens/s | tokens/s | texts/s | times the pipeline in the fastest dtype | peak MiB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for line in rows:
        cells = [
            line["row"],
            f"{line['texts']:,}",
            show(speed(line, first=True), ",.0f"),
            show(speed(line), ",.0f"),
            f"{line['texts'] / line['seconds']:,.1f}",
            show(divide(speed(line), fastest_pipeline(lines)), ".2f"),
            f"{line['peak_bytes'] / MIB:,.0f}",
        ]
        page.append(f"| {' | '.join(cells)} |")
    return [
        *page,
        "",
        'All but the row that says "forward alone" include tokenising.',
        "",
        *show_missing(lines),
    ]


def fastest_pipeline(lines: Sequence[Line]) -> float | None:
    """Return the speed of the pipeline in the dtype that is fastest."""
    speeds = [speed(line) for line in lines if line["row"].startswith("pipeline")]
    return max((each for each in speeds if each is not None), default=None)


def error(line: Line) -> float:
    """Return how far an estimate is off, as a share of what was measured."""
    return float(line["estimated_bytes"] / line["measured_bytes"] - 1)


def show_memory(lines: Sequence[Line]) -> list[str]:
    """Return the table of estimates."""
    page = [
        "### Memory: two real steps of distilbert's shape at the longest length, and the estimate",
        "",
        "| recipe | tokens of a text | texts of a micro-batch | measured MiB | estimated MiB | off by |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for line in filter(is_done, lines):
        page.append(
            f"| {line['row']} | {line['length']} | {line['rows']} | {line['measured_bytes'] / MIB:,.0f} "
            f"| {line['estimated_bytes'] / MIB:,.0f} | {error(line):+.1%} |"
        )
    return [*page, "", *show_missing(lines)]


def training(
    dataset: str, other: Callable[[Sequence[Line]], float | None]
) -> Callable[[Parts], float | None]:
    """Return what gives the speed of ours over another speed of the same table."""

    def value(parts: Parts) -> float | None:
        lines = parts.get(dataset, [])
        return divide(speed(find(lines, "ours")), other(lines))

    return value


def of_row(
    part: str, start: str, figure: Callable[[Line], float | None]
) -> Callable[[Parts], float | None]:
    """Return what gives a figure of the row whose name starts so."""

    def value(parts: Parts) -> float | None:
        found = [
            line for line in parts.get(part, []) if line["row"].startswith(start) and is_done(line)
        ]
        return figure(found[0]) if found else None

    return value


def speed_of_d(lines: Sequence[Line]) -> float | None:
    """Return the speed of D."""
    return speed(find(lines, "D"))


def answers_over_pipeline(parts: Parts) -> float | None:
    """Return ours from texts to answers over the pipeline in the dtype that is fastest."""
    lines = parts.get("inference", [])
    return divide(speed(find(lines, "ours, texts to answers")), fastest_pipeline(lines))


def worst_estimate(parts: Parts) -> float | None:
    """Return the largest error of an estimate, in percent."""
    errors = [abs(error(line)) for line in parts.get("memory", []) if is_done(line)]
    return 100 * max(errors) if errors else None


AIMS: tuple[tuple[str, Callable[[Parts], float | None], float, bool], ...] = (
    (
        "IMDB at 512, ours, tokens/s after the first steps",
        of_row("imdb", "ours", speed),
        1_200_000,
        True,
    ),
    ("the same, times D", training("imdb", speed_of_d), 15, True),
    ("the same, times the fastest B", training("imdb", fastest_b), 3, True),
    (
        "IMDB at 512, ours, s of the first 50 steps",
        of_row("imdb", "ours", lambda line: line["first_seconds"]),
        10,
        False,
    ),
    ("SST-2 at 128, ours, times D", training("sst2", speed_of_d), 6, True),
    ("AG News at 128, ours, times D", training("ag_news", speed_of_d), 6, True),
    (
        "imdb_lora.yaml, s of the whole command",
        of_row("whole", "recipes/imdb", lambda line: line["wall_seconds"]),
        45,
        False,
    ),
    (
        "quickstart.yaml, s of training",
        of_row("whole", "recipes/quick", lambda line: line["seconds"]),
        5,
        False,
    ),
    (
        "inference on IMDB at 512, forward alone, second pass, tokens/s",
        of_row("inference", "ours, forward", speed),
        3e6,
        True,
    ),
    (
        "inference, texts to answers, times the pipeline with batches of 16",
        answers_over_pipeline,
        10,
        True,
    ),
    ("memory, the worst estimate, % off", worst_estimate, 10, False),
)
"""What is aimed at: its name, its figure, the aim, and whether that is the least (else the most)."""


def show_aims(runs: Sequence[Parts]) -> list[str]:
    """Return the aims beside the newest figures; what is missed stays.

    Args:
        runs: The newest first. Tiny sizes and CPUs are left out.
    """
    measured = []
    for parts in runs:
        heads = parts.get("machine", [])
        if heads and heads[0]["cuda"] and not heads[0]["quick"]:
            measured.append(parts)
    if not measured:
        return []
    page = [
        "## Aims",
        "",
        "Each figure is of the newest run below that measured it.",
        "",
        "| aim | wanted | measured | |",
        "|---|---:|---:|---|",
    ]
    for name, figure, aim, is_least in AIMS:
        wanted = f"{'≥' if is_least else '≤'} {aim:,.0f}"
        figures = [found for found in map(figure, measured) if found is not None]
        if not figures:
            page.append(f"| {name} | {wanted} | | not measured |")
            continue
        found = figures[0]
        met = found >= aim if is_least else found <= aim
        shown = f"{found:,.0f}" if found >= 1000 else f"{found:.2f}"
        page.append(f"| {name} | {wanted} | {shown} | {'met' if met else 'missed'} |")
    return [*page, ""]
