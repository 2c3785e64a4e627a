"""A grid of runs, one after another: chosen on validation, resumable, built on the same `train`."""

import gc
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lora_sentiment.errors import AdapterError, DataError, DivergedError, RecipeError
from lora_sentiment.recipe.data import DataConfig
from lora_sentiment.recipe.output import OutputConfig
from lora_sentiment.recipe.recipe import Recipe, make_schema
from lora_sentiment.recipe.yaml_reader import Dumper, parse_yaml

log = logging.getLogger("lora_sentiment")

MAX_RUNS = 1000
"""Runs of one grid; a longer one is a slip of the pen."""
LEFT = ("best", "note")
"""Columns of words."""


@dataclass(frozen=True)
class Trial:
    """One combination of the grid.

    Attributes:
        values: Axis to its value here.
        overrides: The assignments as a recipe takes them, in the order given.
        recipe: What the recipe file and they make.
        run: What is run instead: nothing judged at the end is in it, and its folder is its own.
    """

    values: Mapping[str, Any]
    overrides: tuple[str, ...]
    recipe: Recipe
    run: Recipe

    def __str__(self) -> str:
        return _show_all(self.values)


@dataclass(frozen=True)
class Row:
    """What one run gave; all but the first two and the last are None where it diverged.

    Attributes:
        values: Axis to its value.
        folder: The run's adapter folder.
        validation: Metric to value and 95 % interval, as report.json holds them.
        validation_sha256: Fingerprint of the rows that they are of.
        best_step: The optimizer step whose tensors were kept.
        seconds: Time of training.
        diverged: Where loss, gradient or logits stopped being finite; None where they did not.
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
        axes: Keys that take several values, in the order given.
        metric: Validation metric that decides: the recipe's train.metric_for_best_model.
        rows: Every run in the order of the grid, the last axis fastest.
        best: Position of the best in `rows`; None where all diverged.
        command: What trains the best once more and judges it; None where all diverged.
        notes: What a reader of the rows must know.
    """

    axes: tuple[str, ...]
    metric: str
    rows: tuple[Row, ...]
    best: int | None
    command: str | None
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        return {
            **asdict(self),
            "rows": [{**asdict(row), "folder": str(row.folder)} for row in self.rows],
        }


def sweep(recipe_path: Path, assignments: Sequence[str]) -> Sweep:
    """Run every combination of a grid, one after another, and choose the best on validation.

    Each run stands in a folder of its own under `<output.dir>.sweep`. One that finished or diverged there is not run
    again, so a stopped sweep goes on where it was.

    Args:
        recipe_path: Recipe file.
        assignments: `key=value` as overrides are, or `key=[a, b]`, an axis of the grid. Where the key takes a list
            itself, a list of lists is an axis.

    Raises:
        LoraSentimentError: For every fault of the grid at once, before anything runs; then for whatever stops a run,
            but for a loss that is not finite.
    """
    if (launched := os.environ.get("WORLD_SIZE", "1")) != "1":
        # `train` ends with Accelerate's end_training, which leaves the process group for good.
        raise RecipeError(
            f"sweep: found {launched} processes; it runs in one: start it without a launcher"
        )
    trials = make_trials(recipe_path, assignments)
    # All of them first: what stands in the way of the last run must not show after the others.
    earlier = [_has_ended(trial.run) for trial in trials]
    rows = []
    for number, (trial, ended) in enumerate(zip(trials, earlier, strict=True), start=1):
        log.info(
            "run %d of %d: %s%s", number, len(trials), trial, " (ran earlier)" if ended else ""
        )
        if not ended:
            _run(trial.run)
        rows.append(_read_row(trial, earlier=ended))
    metric = trials[0].recipe.train.metric_for_best_model
    best = _choose(rows, metric)
    command = None
    if best is not None:
        launch = ("accelerate", "launch", "-m", "lora_sentiment.train")
        command = shlex.join([*launch, str(recipe_path), *trials[best].overrides])
    notes = _make_notes(rows, best, trials[best or 0])
    return Sweep(tuple(trials[0].values), metric, tuple(rows), best, command, notes)


def make_trials(recipe_path: Path, assignments: Sequence[str]) -> list[Trial]:
    """Return every combination of a grid, the last axis fastest, without running anything.

    A Hub data set is asked for the names of its splits; no row is read.

    Raises:
        RecipeError: For all faults of recipe, assignments and combinations, each with where it holds.
        DataError: If a data source cannot be found.
    """
    choices = _read_choices(assignments)
    if all(len(choice.values) == 1 for choice in choices):
        Recipe.load(recipe_path, [choice.texts[0] for choice in choices])
        raise RecipeError(_no_axis(recipe_path, choices))
    num_runs = math.prod(len(choice.values) for choice in choices)
    if num_runs > MAX_RUNS:
        raise RecipeError(
            f"the grid has {num_runs:,} combinations; at most {MAX_RUNS:,} are run; leave values out"
        )
    faults: dict[str, list[str]] = {}
    trials = []
    for picked in itertools.product(*(range(len(choice.values)) for choice in choices)):
        pairs = list(zip(choices, picked, strict=True))
        values = {choice.key: choice.values[i] for choice, i in pairs if len(choice.values) > 1}
        # In the order given: `method={..}` before `method.r=[4, 8]` is not what it is after it.
        overrides = tuple(choice.texts[i] for choice, i in pairs)
        try:
            recipe = Recipe.load(recipe_path, overrides)
            trials.append(Trial(values, overrides, recipe, run=recipe))
        except RecipeError as error:
            for fault in str(error).splitlines():
                faults.setdefault(fault, []).append(_show_all(values))
    if faults:
        raise RecipeError(
            "\n".join(_place(fault, where, num_runs) for fault, where in faults.items())
        )
    _refuse_unlike([trial.recipe for trial in trials])
    return _make_runs(trials)


class _Choice(NamedTuple):
    """One assignment: its key, its values, and each as an override."""

    key: str
    values: list[Any]
    texts: list[str]


def _read_choices(assignments: Sequence[str]) -> list[_Choice]:
    """Tell axes from plain overrides.

    Raises:
        RecipeError: If a key stands twice or a list is empty.
    """
    choices, faults = [], []
    for text in assignments:
        key, _, written = text.partition("=")
        try:
            value = parse_yaml(written, key)
        except RecipeError:
            value = None  # loading the recipe tells, with every other fault
        # No list of a recipe holds lists or nulls, so one that does holds values of the key.
        is_own = (
            isinstance(value, list)
            and not any(v is None or isinstance(v, list) for v in value)
            and _takes_list(key)
        )
        if is_own or not isinstance(value, list):
            choices.append(_Choice(key, [value], [text]))
        elif value:
            choices.append(_Choice(key, value, [f"{key}={_show(item)}" for item in value]))
        else:
            faults.append(
                f"{key}: found an empty list; give it two values or more, or leave it out"
            )
    keys = [text.partition("=")[0] for text in assignments]
    faults += [
        f"{key}: stands {count} times; give it once"
        for key, count in Counter(keys).items()
        if count > 1
    ]
    if faults:
        raise RecipeError("\n".join(faults))
    return choices


def _takes_list(key: str) -> bool:
    """Return whether a list can be one value of a key, by the recipe's schema."""
    schema = make_schema()
    nodes: list[Any] = [schema]
    for part in key.split("."):
        inner = (node.get("properties", {}) for node in _alternatives(nodes, schema))
        nodes = [found[part] for found in inner if part in found]
    return any(node.get("type") == "array" for node in _alternatives(nodes, schema))


def _alternatives(nodes: Sequence[Any], schema: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what a JSON schema's references and alternatives come down to."""
    for node in nodes:
        inner = [*node.get("anyOf", ()), *node.get("oneOf", ())]
        if "$ref" in node:
            inner.append(schema["$defs"][node["$ref"].rsplit("/", 1)[1]])
        if inner:
            yield from _alternatives(inner, schema)
        else:
            yield node


def _no_axis(path: Path, choices: Sequence[_Choice]) -> str:
    lists = [choice.key for choice in choices if isinstance(choice.values[0], list)]
    hint = (
        f"; to vary {', '.join(lists)}, which takes a list, give a list of lists: [[..], [..]]"
        if lists
        else ""
    )
    return f"{path}: no key has several values; give one a list, such as 'train.learning_rate=[1e-4, 5e-4]'{hint}"


def _place(fault: str, where: list[str], num_runs: int) -> str:
    """Say in which combinations a fault is, unless it is in all."""
    if len(where) == num_runs:
        return fault
    more = f" and {len(where) - 1} more of {num_runs} combinations" if len(where) > 1 else ""
    return f"{fault} (with {where[0]}{more})"


def _refuse_unlike(recipes: Sequence[Recipe]) -> None:
    """Refuse axes that a choice cannot be made over."""
    if len({recipe.train.metric_for_best_model for recipe in recipes}) > 1:
        raise RecipeError(
            "train.metric_for_best_model: is no axis; one metric decides which run is best: choose it"
        )
    if len({(recipe.name, recipe.output.model_dump_json()) for recipe in recipes}) > 1:
        raise RecipeError(
            "name, output: are no axes; every run gets a folder of its own under <output.dir>.sweep"
        )


def _make_runs(trials: Sequence[Trial]) -> list[Trial]:
    """Give every trial its run: without what is judged, in a folder named by values and hash."""
    known: dict[str, DataConfig] = {}
    made: dict[str, Trial] = {}
    faults = []
    for trial in trials:
        asked = trial.recipe.data.model_dump_json()
        if asked not in known:
            known[asked] = _leave_out_judged(trial.recipe.data, where=str(trial))
        run = trial.recipe.model_copy(update={"data": known[asked]})
        facts = json.dumps(run.model_dump(mode="json", exclude={"name", "output"}), sort_keys=True)
        digest = hashlib.sha256(facts.encode()).hexdigest()
        words = "-".join(
            f"{key.rsplit('.', 1)[-1]}-{_show(value)}" for key, value in trial.values.items()
        )
        name = (
            re.sub(r"[^A-Za-z0-9._]+", "-", words.replace("+", ""))[:60].strip("-._")
            + "-"
            + digest[:8]
        )
        folder = trial.recipe.folder.with_name(trial.recipe.folder.name + ".sweep") / name
        run = run.model_copy(update={"name": name, "output": OutputConfig(dir=str(folder))})
        if digest in made:
            faults.append(f"{made[digest]} and {trial} are the same run; leave one of them out")
        made[digest] = replace(trial, run=run)
    if faults:
        raise RecipeError("\n".join(faults))
    return list(made.values())


def _leave_out_judged(config: DataConfig, *, where: str) -> DataConfig:
    """Return a `data` section that gives the same train and validation, and nothing to judge."""
    from lora_sentiment.data.sources import find_source, is_on_hub
    from lora_sentiment.hub import prepare_hub

    if is_on_hub(config.source):
        prepare_hub()  # as each run does before its own clients ask
    try:
        source = find_source(config)
    except DataError as error:
        raise DataError(f"{error} (with {where})") from error
    if not source.judged:
        return config
    kept = [role for role in source.roles if role not in source.judged]
    # Without a role to judge, test_fraction would now carve a test out of train.
    update: dict[str, Any] = {"test_fraction": 0.0, "max_test_rows": None}
    if source.hub:
        update["splits"] = {role: source.hub_splits[role] for role in kept}
    elif isinstance(config.source, dict):
        update["source"] = {role: config.source[role] for role in kept}
    else:  # what ships: one name for a file of each role
        update["source"] = {role: str(source.files[role][0]) for role in kept}
    return config.model_copy(update=update)


def _has_ended(run: Recipe) -> bool:
    """Return whether a run finished or diverged earlier; refuse a folder of something else."""
    if not run.folder.exists():
        return _diverged_file(run).is_file()
    if (run.folder / "report.json").is_file() and (run.folder / "recipe.yaml").is_file():
        ran = Recipe.load(run.folder / "recipe.yaml")
        if ran.model_dump(exclude={"output"}) == run.model_dump(exclude={"output"}):
            return True
    raise AdapterError(
        f"{run.folder}: holds something else than this sweep's run; move it away, or delete it"
    )


def _diverged_file(run: Recipe) -> Path:
    return run.folder.with_name(run.folder.name + ".diverged.txt")


def _run(recipe: Recipe) -> None:
    """Train one run; leave its adapter folder, or a line beside it that says where it diverged."""
    from lora_sentiment.train import train
    from lora_sentiment.training.checkpoint import list_checkpoints
    from lora_sentiment.training.processes import join_launch
    from lora_sentiment.training.report import reset_peak_memory
    from lora_sentiment.training.run_folder import name_run_folder

    left = name_run_folder(recipe)
    if left.exists() and not list_checkpoints(left):
        # Without a checkpoint to go on from, `train` would not go over what may be a finished adapter.
        shutil.rmtree(left)
    reset_peak_memory(
        join_launch().device
    )  # else every report would hold the peak of the runs before it
    try:
        # A choice made on rows that stood in would be one for other data.
        train(recipe.model_copy(update={"offline": "error"}))
    except DivergedError as error:
        log.warning("diverged: %s", error)
        _diverged_file(recipe).write_text(f"{error}\n", encoding="utf-8")
    gc.collect()  # a model holds itself in cycles; the next one needs the room


def _read_row(trial: Trial, *, earlier: bool) -> Row:
    """Read what a run that ended left."""
    folder = trial.run.folder
    if not folder.exists():
        reason = _diverged_file(trial.run).read_text(encoding="utf-8").strip()
        return Row(trial.values, folder, None, None, None, None, reason, earlier)
    try:
        report, card = (
            json.loads((folder / name).read_text(encoding="utf-8"))
            for name in ("report.json", "card.json")
        )
        scores, hashed, train = (
            report["validation"],
            card["data"]["validation_sha256"],
            report["train"],
        )
        return Row(
            trial.values,
            folder,
            scores,
            hashed,
            train["best_step"],
            train["seconds"],
            None,
            earlier,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(
            f"{folder}: its figures cannot be read ({error}); delete it to run it again"
        ) from error


def _choose(rows: Sequence[Row], metric: str) -> int | None:
    """Return the position of the best row: by the metric, then by log-loss, then the earliest."""
    # Loads `evaluate`, which a grid with a fault in it need not wait for.
    from lora_sentiment.tasks.metrics import METRICS

    sign = 1 if METRICS[metric].greater_is_better else -1
    ranks = {
        position: (sign * row.validation[metric]["value"], -row.validation["log_loss"]["value"])
        for position, row in enumerate(rows)
        if row.validation
    }
    return max(ranks, key=ranks.__getitem__, default=None)


def _make_notes(rows: Sequence[Row], best: int | None, trial: Trial) -> tuple[str, ...]:
    """Return what a reader must know of rows and best, whose trial this is."""
    recipe = trial.recipe
    notes = []
    how = f"best: by {recipe.train.metric_for_best_model} on validation, ties by log_loss; being chosen flatters it"
    all_diverged = "every run diverged; lower train.learning_rate, or set model.dtype=float32"
    notes.append(all_diverged if best is None else how)
    if any(row.diverged for row in rows):
        notes.append(
            f"a run that diverged is not run again unless {rows[0].folder.parent}/*.diverged.txt is deleted"
        )
    if len({row.validation_sha256 for row in rows if row.validation_sha256}) > 1:
        notes.append(
            "the runs were not judged on the same validation rows, so their figures are only roughly alike"
        )
    if trial.run.data.test_fraction:
        notes.append(
            "data.test_fraction: no run trained on the test it carves, nor did the choice look at it"
        )
    if best is not None and recipe.folder.exists() and not recipe.output.overwrite:
        notes.append(f"{recipe.folder} exists: set output.overwrite=true or another output.dir")
    return tuple(notes)


def make_columns(found: Sweep) -> dict[str, list[str]]:
    """Return the table by column: heading to cells; columns that say nothing of any row are left out."""
    # Loads numpy, which a grid with a fault in it need not wait for.
    from lora_sentiment.evaluation.statistics import show_interval

    rows = found.rows
    columns = {"best": ["*" if position == found.best else "" for position in range(len(rows))]}
    columns |= {axis: [_show(row.values[axis]) for row in rows] for axis in found.axes}
    for metric in dict.fromkeys([found.metric, "accuracy", "macro_f1", "log_loss"]):
        columns[metric] = [
            show_interval(row.validation[metric]) if row.validation else "" for row in rows
        ]
    columns["best step"] = [
        f"{row.best_step:,}" if row.best_step is not None else "" for row in rows
    ]
    columns["time"] = [f"{row.seconds:,.0f} s" if row.seconds is not None else "" for row in rows]
    # Up to the row numbers and the advice, which the log and the file hold.
    reasons = [
        re.split(r" on the step|; ", row.diverged)[0] if row.diverged else "" for row in rows
    ]
    columns["note"] = [f"diverged: {reason}" if reason else "" for reason in reasons]
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
