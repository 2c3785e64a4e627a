"""Costs and results of recipes and adapters, side by side. No weights are loaded."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

from lora_sentiment.adapter.file_size import adapter_bytes
from lora_sentiment.adapter.parent import resolve_parent
from lora_sentiment.adapter.predictions import load_predictions
from lora_sentiment.adapter.safe_files import read_object
from lora_sentiment.commands.estimate import BASELINE_BYTES, cut_rows, plan_recipe, resolve_recipe
from lora_sentiment.errors import DRAWING_FAULTS, AdapterError, RecipeError, one_line
from lora_sentiment.evaluation.metric import show_metric
from lora_sentiment.files import write_file_aside
from lora_sentiment.models.memory import estimate_memory
from lora_sentiment.models.parameters import ParameterCounts
from lora_sentiment.models.sizes import count_parameters, make_meta_model
from lora_sentiment.recipe.method import LoraMethod, Method, PeftMethod, UnfreezeMethod
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.tasks import Task, find_task
from lora_sentiment.training.report import report_roles

log = logging.getLogger("lora_sentiment")

UNFINISHED = (".run", ".sweep")
"""Ends of folders beside adapters: an unfinished run, the runs of a sweep."""
LEFT = ("name", "base", "method", "quantize")
"""Columns of words."""


@dataclass(frozen=True)
class Row:
    """One recipe or adapter.

    Attributes:
        name: Name of the run.
        task: What its labels are.
        folder: Its adapter folder where one exists, else None.
        base: Hub name, or the folder's last part.
        method: What is trained, in short.
        quantize: Precision of the frozen linears.
        counts: Trained parameters.
        file_bytes: Size of the adapter's weights on disk.
        optimizer_bytes: AdamW's two moments.
        memory_bytes: Estimated peak of memory in use, interpreter and imports included.
        measured: What its run measured, from its report.json; None where it has not run. `role`
            (test where there is one), the first two of the task's `shown` metrics with 95 %
            intervals, such as `accuracy` and `macro_f1`, and of the training `seconds`,
            `tokens_per_second` and `peak_memory_bytes`.
        paired: The run beside the first one on the same rows; None where that cannot be said.
            `difference` is its first metric minus that of the first, with a 95 % paired bootstrap
            interval. `mcnemar` is the exact two-sided p value of both being equally accurate, and
            `wilcoxon` that of a regression's absolute errors being alike.
            `num_rows` counts the rows.
        notes: What was assumed, and why something is missing.
    """

    name: str
    task: Task
    folder: Path | None
    base: str
    method: str
    quantize: str
    counts: ParameterCounts
    file_bytes: int
    optimizer_bytes: int
    memory_bytes: int
    measured: Mapping[str, Any] | None
    paired: Mapping[str, Any] | None
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        fields = {field.name: getattr(self, field.name) for field in dataclass_fields(self)}
        fields |= {"task": self.task.name, "counts": asdict(self.counts)}
        return {**fields, "folder": str(self.folder) if self.folder else None}


def compare(paths: Sequence[Path]) -> list[Row]:
    """Return a row for each recipe file or adapter folder, in the order given.

    Folders of unfinished runs and of sweeps, which a pattern such as `adapters/*` also matches, are
    left out with a warning.

    Raises:
        LoraSentimentError: If one is neither, or its base's shape is not known.
    """
    runs = []
    for path in paths:
        if path.is_dir() and path.suffix in UNFINISHED:
            log.warning("%s: left out, because it holds no finished run", path)
        else:
            runs.append(path)
    if not runs:
        raise AdapterError("compare: no finished run is left to show; name recipes or adapters")
    rows = _name_apart([_make_row(path) for path in runs], runs)
    return [*rows[:1], *(_pair(row, rows[0]) for row in rows[1:])]


def _name_apart(rows: list[Row], paths: Sequence[Path]) -> list[Row]:
    """Name rows by the last parts of their paths where their own names do not tell them apart."""
    parts = [path.resolve().parts for path in paths]
    names = [row.name for row in rows]
    depth = 0
    while len(set(names)) < len(set(parts)):
        depth += 1
        num_rows = Counter(names)
        for place, own in enumerate(parts):
            if num_rows[names[place]] > 1:
                names[place] = str(Path(*own[-depth:]))
    return [replace(row, name=name) for row, name in zip(rows, names, strict=True)]


def _make_row(path: Path) -> Row:
    """Read one recipe or adapter."""
    recipe, folder, notes = _find_run(path)
    task = find_task(recipe.data.task)
    num_labels = _num_labels(folder) if folder else None
    # Not what this machine has, so that the same recipes give the same table everywhere.
    plan, assumed = plan_recipe(recipe, num_labels, this_machine=False)
    length = recipe.model.max_length
    rows = cut_rows(plan, recipe, length=length)
    memory = estimate_memory(plan, rows=rows, length=length, batch_size=recipe.train.batch_size)
    finished = folder is not None and (folder / "report.json").is_file()
    file_bytes = _file_bytes(folder) if folder and finished else 0
    base = recipe.model.name
    if Path(base).is_absolute():
        base = Path(base).name
    return Row(
        name=one_line(recipe.name),
        task=task,
        folder=folder if finished else None,
        base=base,
        method=describe(plan.method, recipe.model.head),
        quantize=recipe.model.quantize + (", double" if recipe.model.double_quant else ""),
        counts=count_parameters(make_meta_model(plan.config, recipe.method, recipe.model)),
        file_bytes=file_bytes or adapter_bytes(plan.config, recipe.method, recipe.model),
        optimizer_bytes=memory.optimizer,
        memory_bytes=BASELINE_BYTES + memory.peak,
        measured=_read_report(folder, task) if folder and finished else None,
        paired=None,
        notes=(*notes, *assumed),
    )


def _find_run(path: Path) -> tuple[Recipe, Path | None, list[str]]:
    """Return the recipe of a file or adapter folder, the folder of its run or None, and notes."""
    if path.is_dir():
        if not (path / "recipe.yaml").is_file():
            raise AdapterError(f"{path}: is no adapter folder of this package (no recipe.yaml)")
        return Recipe.load(path / "recipe.yaml"), path, []
    recipe = resolve_parent(Recipe.load(path))
    if not recipe.folder.is_dir():
        return recipe, None, []
    reason = _why_other(recipe.folder, recipe)
    if reason:
        return recipe, None, [reason]
    has_report = (recipe.folder / "report.json").is_file()
    return recipe, recipe.folder if has_report else None, []


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
            if method.changes_base:
                words.append(str(method.init_lora_weights))
            flags = {
                "DoRA": method.use_dora,
                "rsLoRA": method.use_rslora,
                "LoRA+": method.loraplus_lr_ratio,
            }
            words += [name for name, given in flags.items() if given]
            words.append(f"r={method.r}")
        case UnfreezeMethod() if method.last_layers:
            words.append(f"last {method.last_layers}")
        case UnfreezeMethod():
            words.append(",".join(method.patterns or ()))
    if isinstance(method, PeftMethod):
        targets = method.target_modules
        if isinstance(targets, tuple):
            targets = ",".join(name.removesuffix("_lin") for name in targets)
        if targets:
            words.append(targets)
    if head != "full":
        words.append(f"head {head}")
    return " ".join(words)


def _why_other(folder: Path, recipe: Recipe) -> str | None:
    """Return why a recipe's output folder is not what this recipe makes, or None where it is."""
    if not (folder / "recipe.yaml").is_file():
        return f"{folder} holds no run"
    ran = Recipe.load(folder / "recipe.yaml")
    wanted = resolve_recipe(recipe)
    if ran.model_dump(exclude={"output"}) != wanted.model_dump(exclude={"output"}):
        return (
            f"{folder} was made by another version of this recipe and is not shown; name the "
            "folder to see it"
        )
    return None


def _file_bytes(folder: Path) -> int:
    """Return the size of the weights in an adapter folder; 0 where there are none."""
    names = ("adapter_model.safetensors", "changed.safetensors")
    paths = [folder / name for name in names]
    return sum(path.stat().st_size for path in paths if path.is_file())


def _read_report(folder: Path, task: Task) -> dict[str, Any]:
    """Read what a run measured: on test, else on the last role that was judged."""
    path = folder / "report.json"
    report = read_object(path)
    roles = report_roles(report)
    if not roles:
        raise AdapterError(f"{path}: has no figures of any role; was it written by this package?")
    role = "test" if "test" in roles else roles[-1]
    try:
        train = report["train"]
        return {
            "role": role,
            **{name: report[role][name] for name in task.shown[:2]},
            "seconds": train["seconds"],
            "tokens_per_second": train["tokens_per_second"],
            "peak_memory_bytes": train["peak_memory_bytes"],
        }
    except (KeyError, TypeError) as error:
        raise AdapterError(f"{path}: has no {error}; was it written by this package?") from error


def _pair(row: Row, first: Row) -> Row:
    """Compare a row with the first one, if both were judged on the same rows."""
    if not (row.measured and row.folder and first.measured and first.folder):
        return row
    role = row.measured["role"]
    own = load_predictions(row.folder).get(role)
    other = load_predictions(first.folder).get(role)
    if own is None or other is None:
        note = f"not paired with {first.name}: no predictions of {role} in both"
        return replace(row, notes=(*row.notes, note))
    if own.fingerprint != other.fingerprint:
        note = f"not paired with {first.name}: judged on other rows"
        return replace(row, notes=(*row.notes, note))
    if row.task is not first.task:
        note = f"not paired with {first.name}: its task is {first.task.name}"
        return replace(row, notes=(*row.notes, note))
    difference, p = row.task.compare_runs(
        (own.logits, _read_calibration(row.folder)),
        (other.logits, _read_calibration(first.folder)),
        own.labels,
    )
    paired = {
        "difference": difference.as_dict(),
        row.task.test[0]: p,
        "num_rows": len(own.labels),
    }
    return replace(row, paired=paired)


def _read_calibration(folder: Path) -> Any:
    return read_object(folder / "card.json").get("calibration")


def make_columns(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Return the table by column: heading to cells. Columns without a value are left out."""
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
    }
    metrics: dict[str, None] = {}
    for row in rows:
        metrics |= dict.fromkeys(row.task.shown[:2])
    measured = [_measured_cells(row, list(metrics)) for row in rows]
    for heading in measured[0]:
        columns[heading] = [cells[heading] for cells in measured]
    if len(set(columns["base"])) == 1 and len(rows) > 1:
        del columns["base"]
    if set(columns["quantize"]) == {"none"}:
        del columns["quantize"]
    return {heading: cells for heading, cells in columns.items() if any(cells)}


def _measured_cells(row: Row, metrics: Sequence[str]) -> dict[str, str]:
    """Return a row's cells of what its run measured, by heading; empty where it has not run."""
    shown = [show_metric(name) for name in metrics]
    headings = (*shown, "time", "tokens/s", "memory", "against the first")
    cells = dict.fromkeys(headings, "")
    if row.measured:
        for name in row.task.shown[:2]:
            cells[show_metric(name)] = _show(row.measured[name], row.task)
        cells["time"] = _time(row.measured["seconds"])
        cells["tokens/s"] = f"{row.measured['tokens_per_second']:,.0f}"
        cells["memory"] = _gibibytes(row.measured["peak_memory_bytes"])
    if row.paired:
        difference = _show(row.paired["difference"], row.task, sign="+")
        cells["against the first"] = f"{difference}, p={row.paired[row.task.test[0]]:.2g}"
    return cells


def make_notes(rows: Sequence[Row]) -> list[str]:
    """Return what a reader of the table must know, each with the rows that it is of."""
    names_by_note: dict[str, list[str]] = {}
    for row in rows:
        for note in row.notes:
            names_by_note.setdefault(note, []).append(row.name)
    lines = []
    if len({row.base for row in rows}) == 1 and len(rows) > 1:
        lines.append(f"base: {rows[0].base}")
    for note, names in names_by_note.items():
        who = "all" if len(names) == len(rows) else ", ".join(names)
        lines.append(f"{who}: {note}")
    lines.append(
        f"memory, est.: most in use at the recipe's longest length, {BASELINE_BYTES / 2**20:,.0f} "
        "MiB of interpreter and imports included; glibc keeps freed buffers on top (see "
        "lora-sentiment estimate)"
    )
    roles = _measured_roles(rows)
    if roles:
        lines.append(
            f"{_list_metrics(rows)} on {roles}, brackets hold 95 % intervals of one run over its rows"
        )
    if any(row.paired for row in rows):
        lines.append(
            f"against the first: {show_metric(rows[0].task.shown[0])} minus that of {rows[0].name} "
            f"on the same rows, paired; p by {rows[0].task.test[1]}"
        )
    return lines


def _list_metrics(rows: Sequence[Row]) -> str:
    """Return the metrics of the table with their units, such as `accuracy and macro-F1 in %`."""
    listed: dict[str, None] = {}
    for row in rows:
        names = " and ".join(show_metric(name) for name in row.task.shown[:2])
        listed[f"{names} in %" if row.task.in_percent else names] = None
    return "; ".join(listed)


def _measured_roles(rows: Sequence[Row]) -> str:
    return ", ".join(sorted({row.measured["role"] for row in rows if row.measured}))


def to_markdown(rows: Sequence[Row]) -> str:
    """Return table and notes as Markdown."""
    columns = make_columns(rows)
    lines = [
        "| " + " | ".join(columns) + " |",
        "|" + "|".join("---" if heading in LEFT else "---:" for heading in columns) + "|",
        *(
            "| " + " | ".join(map(_escape, cells)) + " |"
            for cells in zip(*columns.values(), strict=True)
        ),
    ]
    return "\n".join([*lines, "", *(f"- {note}" for note in make_notes(rows))])


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw trained parameters against accuracy, a point for each row that ran.

    The size of a point is the memory that the run held.

    Raises:
        RecipeError: If none ran, or the plot cannot be drawn or written.
    """
    # matplotlib, only where there is something to draw.
    from lora_sentiment.evaluation.plots import ParetoPoint, plot_pareto

    task = rows[0].task
    metric = task.shown[0]
    if not task.in_percent:
        raise RecipeError(f"--plot: draws shares, and {task.name} has none; leave it out")
    points = []
    for row in rows:
        if row.measured and row.measured.get(metric, {}).get("value") is not None:
            accuracy = row.measured[metric]
            point = ParetoPoint(
                name=row.name,
                trainable=row.counts.trainable,
                accuracy=accuracy["value"],
                low=accuracy["low"],
                high=accuracy["high"],
                memory_bytes=row.measured["peak_memory_bytes"],
            )
            points.append(point)
    if not points:
        raise RecipeError(
            "--plot: none of these has a report.json, so there is no accuracy to draw; train one "
            "first"
        )
    name = show_metric(metric)
    title = f"Trained parameters and {name} on {_measured_roles(rows)} (area: peak memory)"
    try:
        with write_file_aside(path) as aside:
            plot_pareto(points, aside, title=title, metric=name)
    except DRAWING_FAULTS as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise RecipeError(
            f"--plot: {path} cannot be drawn: {reason or one_line(str(error))}"
        ) from error


def _count(count: int) -> str:
    return f"{count:,}" if count else ""


def _time(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds < 120 else f"{seconds / 60:,.0f} min"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.2f} MB"


def _gibibytes(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB"


def _show(interval: Mapping[str, Any], task: Task, sign: str = "") -> str:
    """Show an interval in per cent, or in the units of the task."""
    if interval["value"] is None:
        return "n/a"
    factor = 100 if task.in_percent else 1
    value, low, high = (factor * interval[key] for key in ("value", "low", "high"))
    return f"{value:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"
