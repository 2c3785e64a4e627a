"""Train a grid of recipes one after another, and choose the best on validation. Resumable."""

import hashlib
import itertools
import json
import logging
import math
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from lora_sentiment.commands.runs import is_finished, leave_out_judged, read_result, train_run
from lora_sentiment.errors import DataError, DivergedError, RecipeError
from lora_sentiment.files import write_file_aside
from lora_sentiment.recipe.data import DataConfig
from lora_sentiment.recipe.output import OutputConfig
from lora_sentiment.recipe.recipe import Recipe, make_schema
from lora_sentiment.recipe.yaml_reader import Dumper, parse_yaml

if TYPE_CHECKING:
    from lora_sentiment.tasks.task import Task

log = logging.getLogger("lora_sentiment")

MAX_RUNS = 1000
"""Most runs of one grid. A longer grid is taken for a mistake."""
LEFT = ("best", "note")
"""Columns of the table that are aligned to the left."""


@dataclass(frozen=True)
class Trial:
    """One combination of the grid.

    Attributes:
        values: Axis to its value.
        overrides: The overrides of the recipe, in the order given.
        recipe: The recipe with these overrides.
        run: The recipe that is trained: without rows to judge at the end, in a folder of its own.
    """

    values: Mapping[str, Any]
    overrides: tuple[str, ...]
    recipe: Recipe
    run: Recipe

    def __str__(self) -> str:
        return _show_all(self.values)


@dataclass(frozen=True)
class Row:
    """The result of one run. For a run that diverged, the scores are None.

    Attributes:
        values: Axis to its value.
        folder: The run's adapter folder.
        validation: Metric to value and 95 % interval, as in report.json.
        validation_sha256: Fingerprint of the validation rows.
        best_step: The optimizer step whose tensors were kept.
        seconds: Time of training.
        diverged: Where loss, gradient or logits stopped being finite, or None.
        earlier: Whether an earlier sweep ran it.
    """

    values: Mapping[str, Any]
    folder: Path
    validation: Mapping[str, Any] | None
    validation_sha256: str | None
    best_step: int | None
    seconds: float | None
    diverged: str | None
    earlier: bool


@dataclass(frozen=True)
class Sweep:
    """A finished sweep.

    Attributes:
        axes: Keys with several values, in the order given.
        metric: The deciding metric: the recipe's train.metric_for_best_model on validation.
        shown: The metrics that the table shows beside it.
        rows: Every run in the order of the grid, the last axis fastest.
        best: Position of the best in `rows`, or None if all diverged.
        command: The command that trains the best again and judges it, or None.
        notes: What a reader of the rows must know.
    """

    axes: tuple[str, ...]
    metric: str
    shown: tuple[str, ...]
    rows: tuple[Row, ...]
    best: int | None
    command: str | None
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        rows = [asdict(row) | {"folder": str(row.folder)} for row in self.rows]
        return asdict(self) | {"rows": rows}


def sweep(recipe_path: Path, assignments: Sequence[str]) -> Sweep:
    """Train every combination of a grid, one after another, and choose the best on validation.

    Each run has a folder of its own under `<output.dir>.sweep`. A run that finished or diverged
    there is not run again, so a stopped sweep goes on where it was.

    Args:
        recipe_path: Recipe file.
        assignments: `key=value` is an override. `key=[a, b]` is an axis of the grid. For a key that
            takes a list, a list of lists is an axis.

    Raises:
        LoraSentimentError: For all mistakes of the grid at once, before anything runs. Later for
            any error of a run but divergence.
    """
    launched = os.environ.get("WORLD_SIZE", "1")
    if launched != "1":
        # `train` ends the process group.
        raise RecipeError(
            f"sweep: found {launched} processes; it runs in one: start it without a launcher"
        )
    trials = make_trials(recipe_path, assignments)
    # All folders first: a fault of the last one must not show after the other runs.
    earlier = [_has_ended(trial.run) for trial in trials]
    rows = []
    for number, (trial, ended) in enumerate(zip(trials, earlier, strict=True), start=1):
        suffix = " (ran earlier)" if ended else ""
        log.info("run %d of %d: %s%s", number, len(trials), trial, suffix)
        if not ended:
            _run(trial.run)
        rows.append(_read_row(trial, earlier=ended))
    metric = trials[0].recipe.train.metric_for_best_model
    # Late: loads numpy, which a grid with a fault in it need not wait for.
    from lora_sentiment.tasks import find_task

    task = find_task(trials[0].recipe.data.task)
    best = _choose(rows, metric, task)
    command = None
    if best is not None:
        launch = ("accelerate", "launch", "-m", "lora_sentiment.train")
        command = shlex.join([*launch, str(recipe_path), *trials[best].overrides])
    notes = _make_notes(rows, best, trials[best or 0], tie=task.shown[-1])
    return Sweep(tuple(trials[0].values), metric, task.shown, tuple(rows), best, command, notes)


def make_trials(recipe_path: Path, assignments: Sequence[str]) -> list[Trial]:
    """Return every combination of a grid, the last axis fastest, without running anything.

    A Hub data set is asked for the names of its splits. No row is read.

    Raises:
        RecipeError: For all mistakes of recipe, assignments and combinations.
        DataError: If a data source cannot be found.
    """
    choices = _read_choices(assignments)
    if all(len(choice.values) == 1 for choice in choices):
        Recipe.load(recipe_path, [choice.texts[0] for choice in choices])
        raise RecipeError(_no_axis(recipe_path, choices))
    num_runs = math.prod(len(choice.values) for choice in choices)
    if num_runs > MAX_RUNS:
        raise RecipeError(
            f"the grid has {num_runs:,} combinations; at most {MAX_RUNS:,} are run; leave values "
            "out"
        )
    faults: dict[str, list[str]] = {}
    trials = []
    for picked in itertools.product(*(range(len(choice.values)) for choice in choices)):
        values = {}
        overrides = []  # in the order given: `method={..}` before `method.r=4` differs from after
        for choice, position in zip(choices, picked, strict=True):
            overrides.append(choice.texts[position])
            if len(choice.values) > 1:
                values[choice.key] = choice.values[position]
        try:
            recipe = Recipe.load(recipe_path, overrides)
        except RecipeError as error:
            for fault in error.faults:
                faults.setdefault(fault, []).append(_show_all(values))
        else:
            trials.append(Trial(values, tuple(overrides), recipe, run=recipe))
    if faults:
        raise RecipeError(*(_place(fault, where, num_runs) for fault, where in faults.items()))
    _refuse_unlike([trial.recipe for trial in trials])
    return _make_runs(trials)


class _Choice(NamedTuple):
    """One assignment: its key, its values, and each value as an override."""

    key: str
    values: list[Any]
    texts: list[str]


def _read_choices(assignments: Sequence[str]) -> list[_Choice]:
    """Tell axes from plain overrides.

    Raises:
        RecipeError: If a key stands twice or a list is empty.
    """
    choices, faults = [], []
    keys: Counter[str] = Counter()
    for text in assignments:
        key, _, written = text.partition("=")
        keys[key] += 1
        try:
            value = parse_yaml(written, key)
        except RecipeError:
            value = None  # loading the recipe reports it, with every other mistake
        if not isinstance(value, list) or _is_one_value(key, value):
            choices.append(_Choice(key, [value], [text]))
        elif value:
            choices.append(_Choice(key, value, [f"{key}={_show(item)}" for item in value]))
        else:
            faults.append(
                f"{key}: found an empty list; give it two values or more, or leave it out"
            )
    for key, count in keys.items():
        if count > 1:
            faults.append(f"{key}: stands {count} times; give it once")
    if faults:
        raise RecipeError(*faults)
    return choices


def _is_one_value(key: str, items: Sequence[Any]) -> bool:
    """Return whether a list is one value of a key, not several values."""
    # No list of a recipe holds lists or nulls, so a list that does holds values of the key.
    if any(item is None or isinstance(item, list) for item in items):
        return False
    return _takes_list(key)


def _takes_list(key: str) -> bool:
    """Return whether a list can be one value of a key, by the recipe's schema."""
    schema = make_schema()
    nodes: list[Any] = [schema]
    for part in key.split("."):
        inner = (node.get("properties", {}) for node in _alternatives(nodes, schema))
        nodes = [found[part] for found in inner if part in found]
    return any(node.get("type") == "array" for node in _alternatives(nodes, schema))


def _alternatives(nodes: Sequence[Any], schema: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the plain schemas behind a JSON schema's references and alternatives."""
    for node in nodes:
        inner = [*node.get("anyOf", ()), *node.get("oneOf", ())]
        if "$ref" in node:
            inner.append(schema["$defs"][node["$ref"].rsplit("/", 1)[1]])
        if inner:
            yield from _alternatives(inner, schema)
        else:
            yield node


def _no_axis(path: Path, choices: Sequence[_Choice]) -> str:
    hint = ""
    lists = [choice.key for choice in choices if isinstance(choice.values[0], list)]
    if lists:
        hint = (
            f"; to vary {', '.join(lists)}, which takes a list, give a list of lists: [[..], [..]]"
        )
    return (
        f"{path}: no key has several values; give one a list, such as 'train.learning_rate=[1e-4, "
        f"5e-4]'{hint}"
    )


def _place(fault: str, where: list[str], num_runs: int) -> str:
    """Say in which combinations a mistake is, unless it is in all."""
    if len(where) == num_runs:
        return fault
    more = f" and {len(where) - 1} more of {num_runs} combinations" if len(where) > 1 else ""
    return f"{fault} (with {where[0]}{more})"


def _refuse_unlike(recipes: Sequence[Recipe]) -> None:
    """Refuse axes that leave no choice between the runs."""
    if len({recipe.train.metric_for_best_model for recipe in recipes}) > 1:
        raise RecipeError(
            "train.metric_for_best_model: is no axis; one metric decides which run is best: choose "
            "it"
        )
    if len({(recipe.name, recipe.output.model_dump_json()) for recipe in recipes}) > 1:
        raise RecipeError(
            "name, output: are no axes; every run gets a folder of its own under <output.dir>.sweep"
        )


def _make_runs(trials: Sequence[Trial]) -> list[Trial]:
    """Give every trial its run: without rows to judge, in a folder named by values and hash."""
    data: dict[str, DataConfig] = {}
    made: dict[str, Trial] = {}
    faults = []
    for trial in trials:
        key = trial.recipe.data.model_dump_json()
        if key not in data:
            try:
                data[key] = leave_out_judged(trial.recipe.data)
            except DataError as error:
                raise DataError(f"{error} (with {trial})") from error
        run = trial.recipe.model_copy(update={"data": data[key]})
        facts = json.dumps(run.model_dump(mode="json", exclude={"name", "output"}), sort_keys=True)
        digest = hashlib.sha256(facts.encode()).hexdigest()
        if digest in made:
            faults.append(f"{made[digest]} and {trial} are the same run; leave one of them out")
        words = [f"{key.rsplit('.', 1)[-1]}-{_show(value)}" for key, value in trial.values.items()]
        safe = re.sub(r"[^A-Za-z0-9._]+", "-", "-".join(words).replace("+", ""))
        name = f"{safe[:60].strip('-._')}-{digest[:8]}"
        folder = trial.recipe.folder.with_name(trial.recipe.folder.name + ".sweep") / name
        run = run.model_copy(update={"name": name, "output": OutputConfig(dir=str(folder))})
        made[digest] = replace(trial, run=run)
    if faults:
        raise RecipeError(*faults)
    return list(made.values())


def _diverged_file(run: Recipe) -> Path:
    return run.folder.with_name(run.folder.name + ".diverged.txt")


def _has_ended(run: Recipe) -> bool:
    """Return whether a run finished or diverged earlier. Refuse a folder of something else."""
    return is_finished(run) or _diverged_file(run).is_file()


def _run(recipe: Recipe) -> None:
    """Train one run. It leaves its adapter folder, or a file that says where it diverged."""
    try:
        train_run(recipe)
    except DivergedError as error:
        log.warning("diverged: %s", error)
        with write_file_aside(_diverged_file(recipe)) as file:
            file.write_text(f"{error}\n", encoding="utf-8")


def _read_row(trial: Trial, *, earlier: bool) -> Row:
    """Read the result of a run that ended."""
    folder = trial.run.folder
    if folder.exists():
        result = asdict(read_result(folder))
        return Row(trial.values, folder, **result, diverged=None, earlier=earlier)
    reason = _diverged_file(trial.run).read_text(encoding="utf-8").strip()
    return Row(trial.values, folder, None, None, None, None, reason, earlier)


def _choose(rows: Sequence[Row], metric: str, task: "Task") -> int | None:
    """Return the position of the best row: by the metric, ties by the last one shown."""
    sign = 1 if task.find_metric(metric).greater_is_better else -1
    tie_sign = 1 if task.find_metric(task.shown[-1]).greater_is_better else -1
    best, best_rank = None, (-math.inf, -math.inf)
    for position, row in enumerate(rows):
        if not row.validation:
            continue
        tie = tie_sign * row.validation[task.shown[-1]]["value"]
        rank = (sign * row.validation[metric]["value"], tie)
        if rank > best_rank:
            best, best_rank = position, rank
    return best


def _make_notes(
    rows: Sequence[Row], best: int | None, trial: Trial, *, tie: str
) -> tuple[str, ...]:
    """Return what a reader must know of the rows.

    Args:
        rows: Every run.
        best: Position of the best, or None.
        trial: The trial of the best, or any.
        tie: The metric that settles ties.
    """
    recipe = trial.recipe
    notes = ["every run diverged; lower train.learning_rate, or set model.dtype=float32"]
    if best is not None:
        metric = recipe.train.metric_for_best_model
        notes = [f"best: by {metric} on validation, ties by {tie}; being chosen flatters its score"]
    if any(row.diverged for row in rows):
        notes.append(
            f"{rows[0].folder.parent}/*.diverged.txt say where a run diverged; delete such a file "
            "to run it again"
        )
    if len({row.validation_sha256 for row in rows if row.validation_sha256}) > 1:
        notes.append(
            "the runs were not judged on the same validation rows, so their figures are only "
            "roughly alike"
        )
    if trial.run.data.test_fraction:
        notes.append(
            "data.test_fraction: no run trained on the test split, nor did the choice look at it"
        )
    if best is not None and recipe.folder.exists() and not recipe.output.overwrite:
        notes.append(f"{recipe.folder} exists: set output.overwrite=true or another output.dir")
    return tuple(notes)


def make_columns(done: Sweep) -> dict[str, list[str]]:
    """Return the table, heading to cells, without columns whose cells are all empty."""
    # Loads numpy, which a grid with a fault in it need not wait for.
    from lora_sentiment.evaluation.statistics import show_interval

    metrics = dict.fromkeys([done.metric, *done.shown])
    headings = ["best", *done.axes, *metrics, "best step", "time", "note"]
    columns: dict[str, list[str]] = {heading: [] for heading in headings}
    for position, row in enumerate(done.rows):
        cells = {"best": "*"} if position == done.best else {}
        for axis in done.axes:
            cells[axis] = _show(row.values[axis])
        if row.validation is None:
            cells["note"] = "diverged"
        else:
            for metric in metrics:
                cells[metric] = show_interval(row.validation[metric])
            cells["best step"] = f"{row.best_step:,}"
            cells["time"] = f"{row.seconds:,.0f} s"
        for heading in headings:
            columns[heading].append(cells.get(heading, ""))
    return {heading: cells for heading, cells in columns.items() if any(cells)}


def _show(value: Any) -> str:
    """Return a value as YAML on one line, which an override reads back equal."""
    text = yaml.dump(
        [value],
        Dumper=Dumper,
        default_flow_style=True,
        width=sys.maxsize,
        sort_keys=False,
        allow_unicode=True,
    )
    return text.strip()[1:-1]


def _show_all(values: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={_show(value)}" for key, value in values.items())
