"""What recipes and adapters cost, and what those that ran gave, side by side and without weights."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lora_sentiment.adapter.safe_files import read_object
from lora_sentiment.commands.estimate import BASELINE_BYTES, cut_rows, look_up, make_plan
from lora_sentiment.errors import AdapterError, RecipeError
from lora_sentiment.models.file_size import adapter_bytes
from lora_sentiment.models.memory import estimate_memory
from lora_sentiment.models.parameters import ParameterCounts, count_parameters
from lora_sentiment.recipe.method import LoraMethod, Method, PeftMethod, UnfreezeMethod
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.training.report import report_roles


@dataclass(frozen=True)
class Measured:
    """What a finished run measured, from its report.json.

    Attributes:
        role: What it was judged on: test where there is one.
        accuracy: Value and 95 % interval, as report.json holds them.
        macro_f1: The same for macro-F1.
        seconds: Time of training.
        tokens_per_second: Of training.
        peak_memory_bytes: Most memory that the whole run held.
    """

    role: str
    accuracy: Mapping[str, Any]
    macro_f1: Mapping[str, Any]
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Paired:
    """A run beside the first one, on the same rows.

    Attributes:
        difference: Accuracy minus that of the first, with its 95 % paired bootstrap interval.
        mcnemar: Exact two-sided p value of both being equally accurate.
        num_rows: Rows that both were judged on.
    """

    difference: Mapping[str, Any]
    mcnemar: float
    num_rows: int


@dataclass(frozen=True)
class Row:
    """One recipe or adapter.

    Attributes:
        name: Name of the run.
        folder: Its adapter folder where one exists, else None.
        base: Hub name, or the folder's last part.
        method: What is trained, in short.
        quantize: Precision of the frozen linears.
        counts: Trained and saved parameters.
        file_bytes: Size of the adapter's weights on disk.
        optimizer_bytes: AdamW's two moments.
        memory_bytes: Estimated peak of memory in use, interpreter and imports included.
        measured: What its run measured; None where it has not run.
        paired: It beside the first row; None where that cannot be said.
        notes: What was assumed, and why something is missing.
    """

    name: str
    folder: Path | None
    base: str
    method: str
    quantize: str
    counts: ParameterCounts
    file_bytes: int
    optimizer_bytes: int
    memory_bytes: int
    measured: Measured | None
    paired: Paired | None
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        return {**asdict(self), "folder": str(self.folder) if self.folder else None}


def compare(paths: Sequence[Path]) -> list[Row]:
    """Return a row for each recipe file or adapter folder, in the order given.

    Raises:
        LoraSentimentError: If one is neither, or its base's shape is not known.
    """
    rows = [_row(path) for path in paths]
    return [*rows[:1], *(_pair(row, rows[0]) for row in rows[1:])]


def _row(path: Path) -> Row:
    """Read one recipe or adapter."""
    notes: list[str] = []
    folder: Path | None
    if path.is_dir():
        if not (path / "recipe.yaml").is_file():
            raise AdapterError(f"{path}: is no adapter folder of this package (no recipe.yaml)")
        recipe, folder = Recipe.load(path / "recipe.yaml"), path
        labels: int | None = _num_labels(path)
    else:
        recipe = Recipe.load(path)
        folder, labels = recipe.folder, len(recipe.data.labels) if recipe.data.labels else None
        if folder.is_dir() and (reason := _why_other(folder, recipe)):
            notes.append(reason)
            folder = None
    if folder is not None and not (folder / "report.json").is_file():
        folder = None
    if folder is not None and labels is None:
        labels = _num_labels(folder)
    # Not what this machine has, so that the same recipes give the same table everywhere.
    facts = look_up(recipe.model, labels, this_machine=False)
    train = recipe.train
    plan = make_plan(
        facts,
        recipe.method,
        recipe.model,
        engine=train.engine,
        checkpointing=train.gradient_checkpointing,
    )
    length = recipe.model.max_length
    memory = estimate_memory(
        plan, rows=cut_rows(plan, recipe, length=length), length=length, batch_size=train.batch_size
    )
    return Row(
        name=recipe.name,
        folder=folder,
        base=Path(recipe.model.name).name
        if Path(recipe.model.name).is_absolute()
        else recipe.model.name,
        method=describe(recipe.method, recipe.model.head),
        quantize=recipe.model.quantize + (", double" if recipe.model.double_quant else ""),
        counts=count_parameters(
            facts.shape, recipe.method, recipe.model, num_labels=facts.num_labels
        ),
        file_bytes=(folder and _file_bytes(folder))
        or adapter_bytes(facts.shape, recipe.method, num_labels=facts.num_labels),
        optimizer_bytes=memory.optimizer,
        memory_bytes=BASELINE_BYTES + memory.peak,
        measured=_measured(folder) if folder else None,
        paired=None,
        notes=(*notes, *facts.assumed),
    )


def _num_labels(folder: Path) -> int:
    """Return how many labels the card of an adapter folder names."""
    labels = read_object(folder / "card.json").get("labels")
    if not isinstance(labels, list):
        raise AdapterError(f"{folder / 'card.json'}: has no list of labels")
    return len(labels)


def describe(method: Method, head: str) -> str:
    """Return a method in a few words, such as `lora r=8 q,v`."""
    words: list[str] = [method.kind]
    match method:
        case LoraMethod():
            flags = {
                "DoRA": method.use_dora,
                "rsLoRA": method.use_rslora,
                "LoRA+": method.loraplus_lr_ratio,
            }
            words = [*(name for name, given in flags.items() if given), f"r={method.r}"]
            words = [
                method.kind,
                *([str(method.init_lora_weights)] if method.changes_base else []),
                *words,
            ]
        case UnfreezeMethod():
            words.append(
                f"last {method.last_layers}"
                if method.last_layers
                else ",".join(method.patterns or ())
            )
    if isinstance(method, PeftMethod):
        targets = method.target_modules
        words.append(
            targets
            if isinstance(targets, str)
            else ",".join(name.removesuffix("_lin") for name in targets)
        )
    return " ".join([*words, *([f"head {head}"] if head != "full" else [])])


def _why_other(folder: Path, recipe: Recipe) -> str | None:
    """Return why what stands in a recipe's output folder is not what this recipe makes, or None where it is."""
    if not (folder / "recipe.yaml").is_file():
        return f"{folder} holds no run"
    ran = Recipe.load(folder / "recipe.yaml")
    if ran.model_dump(exclude={"output"}) != recipe.model_dump(exclude={"output"}):
        return f"{folder} was made by another version of this recipe and is not shown; name the folder to see it"
    return None


def _file_bytes(folder: Path) -> int:
    """Return the size of the weights in an adapter folder; 0 where there are none."""
    names = ("adapter_model.safetensors", "changed.safetensors")
    return sum((folder / name).stat().st_size for name in names if (folder / name).is_file())


def _measured(folder: Path) -> Measured:
    """Read what a run measured: on test, else on the last role that was judged."""
    path = folder / "report.json"
    report = read_object(path)
    roles = report_roles(report)
    if not roles:
        raise AdapterError(f"{path}: has no figures of any role; was it written by this package?")
    try:
        role = "test" if "test" in roles else roles[-1]
        train = report["train"]
        return Measured(
            role=role,
            accuracy=report[role]["accuracy"],
            macro_f1=report[role]["macro_f1"],
            seconds=train["seconds"],
            tokens_per_second=train["tokens_per_second"],
            peak_memory_bytes=train["peak_memory_bytes"],
        )
    except (KeyError, TypeError) as error:
        raise AdapterError(f"{path}: has no {error}; was it written by this package?") from error


def _pair(row: Row, first: Row) -> Row:
    """Hold a row against the first on the rows that both were judged on, where they are the same."""
    if not (row.measured and row.folder and first.measured and first.folder):
        return row
    # numpy and scipy, only where there is something to compute.
    from lora_sentiment.adapter.predictions import load_predictions
    from lora_sentiment.evaluation.statistics import mcnemar, paired_bootstrap

    role = row.measured.role
    own, other = (load_predictions(folder).get(role) for folder in (row.folder, first.folder))
    if own is None or other is None:
        return replace(
            row,
            notes=(*row.notes, f"not paired with {first.name}: no predictions of {role} in both"),
        )
    if own.fingerprint != other.fingerprint:
        return replace(
            row, notes=(*row.notes, f"not paired with {first.name}: judged on other rows")
        )
    difference = paired_bootstrap(own.correct, other.correct).as_dict()
    return replace(
        row, paired=Paired(difference, mcnemar(own.correct, other.correct), len(own.correct))
    )


def make_columns(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Return the table by column: heading to cells; columns that say nothing of any row are left out."""
    columns = {
        "name": [row.name for row in rows],
        "base": [row.base for row in rows],
        "method": [row.method for row in rows],
        "quantize": [row.quantize for row in rows],
        "adapter": [_count(row.counts.adapter) for row in rows],
        "encoder": [_count(row.counts.encoder) for row in rows],
        "head": [_count(row.counts.head) for row in rows],
        "trainable": [_count(row.counts.trainable) for row in rows],
        "share": [f"{row.counts.share:.2%}" for row in rows],
        "file": [_megabytes(row.file_bytes) for row in rows],
        "optimizer": [_megabytes(row.optimizer_bytes) for row in rows],
        "memory, est.": [_gibibytes(row.memory_bytes) for row in rows],
        **_measured_columns(rows),
    }
    if len(set(columns["base"])) == 1 and len(rows) > 1:
        del columns["base"]
    if set(columns["quantize"]) == {"none"}:
        del columns["quantize"]
    return {heading: cells for heading, cells in columns.items() if any(cells)}


def _measured_columns(rows: Sequence[Row]) -> dict[str, list[str]]:
    def cells(show: Any) -> list[str]:
        return [show(row.measured) if row.measured else "" for row in rows]

    return {
        "accuracy": cells(lambda found: _percent(found.accuracy)),
        "macro-F1": cells(lambda found: _percent(found.macro_f1)),
        "time": cells(lambda found: _time(found.seconds)),
        "tokens/s": cells(lambda found: f"{found.tokens_per_second:,.0f}"),
        "memory": cells(lambda found: _gibibytes(found.peak_memory_bytes)),
        "against the first": [
            f"{_percent(row.paired.difference, sign='+')}, p={row.paired.mcnemar:.2g}"
            if row.paired
            else ""
            for row in rows
        ],
    }


def make_notes(rows: Sequence[Row]) -> list[str]:
    """Return what a reader of the table must know, each with the rows that it is of."""
    notes: dict[str, list[str]] = {}
    for row in rows:
        for note in row.notes:
            notes.setdefault(note, []).append(row.name)
    lines = [
        f"{'all' if len(names) == len(rows) else ', '.join(names)}: {note}"
        for note, names in notes.items()
    ]
    if len({row.base for row in rows}) == 1 and len(rows) > 1:
        lines.insert(0, f"base: {rows[0].base}")
    lines.append(
        f"memory, est.: most in use at the recipe's longest length, {BASELINE_BYTES / 2**20:,.0f} MiB of interpreter "
        "and imports included; glibc keeps freed buffers on top (see lora-sentiment estimate)"
    )
    if measured := [row.measured for row in rows if row.measured]:
        roles = ", ".join(sorted({found.role for found in measured}))
        lines.append(
            f"accuracy and macro-F1 on {roles} in %, brackets hold 95 % intervals of one run over its rows"
        )
    if any(row.paired for row in rows):
        lines.append(
            f"against the first: accuracy minus that of {rows[0].name} on the same rows, paired; p by McNemar"
        )
    return lines


def to_markdown(rows: Sequence[Row]) -> str:
    """Return table and notes as Markdown."""
    columns = make_columns(rows)
    lines = [
        "| " + " | ".join(columns) + " |",
        "|" + "|".join("---" if heading in LEFT else "---:" for heading in columns) + "|",
        *("| " + " | ".join(cells) + " |" for cells in zip(*columns.values(), strict=True)),
    ]
    return "\n".join([*lines, "", *(f"- {note}" for note in make_notes(rows))])


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw trained parameters against accuracy, a point for each row that ran, sized by the memory it held.

    Raises:
        RecipeError: If none ran.
    """
    ran = [
        (row, row.measured)
        for row in rows
        if row.measured and row.measured.accuracy["value"] is not None
    ]
    if not ran:
        raise RecipeError(
            "--plot: none of these has a report.json, so there is no accuracy to draw; train one first"
        )
    from lora_sentiment.training.plots import ParetoPoint, plot_pareto

    points = [
        ParetoPoint(
            name=row.name,
            trainable=row.counts.trainable,
            accuracy=found.accuracy["value"],
            low=found.accuracy["low"],
            high=found.accuracy["high"],
            memory_bytes=found.peak_memory_bytes,
        )
        for row, found in ran
    ]
    roles = ", ".join(sorted({found.role for _, found in ran}))
    plot_pareto(
        points, path, title=f"Trained parameters and accuracy on {roles} (area: peak memory)"
    )


LEFT = ("name", "base", "method", "quantize")
"""Columns of words."""


def _count(count: int) -> str:
    return f"{count:,}" if count else ""


def _time(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds < 120 else f"{seconds / 60:,.0f} min"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.2f} MB"


def _gibibytes(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB"


def _percent(interval: Mapping[str, Any], sign: str = "") -> str:
    if interval["value"] is None:
        return "n/a"
    value, low, high = (100 * interval[key] for key in ("value", "low", "high"))
    return f"{value:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"
