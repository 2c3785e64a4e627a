"""Search the settings of a recipe with Optuna, and choose the best on validation. Resumable."""

import hashlib
import itertools
import logging
import math
import os
import re
import shlex
import shutil
import sqlite3
import statistics
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from lora_sentiment.commands.runs import (
    find_fingerprints,
    is_finished,
    leave_out_judged,
    read_result,
    train_run,
)
from lora_sentiment.errors import (
    DRAWING_FAULTS,
    AdapterError,
    DivergedError,
    LoraSentimentError,
    RecipeError,
    StoppedError,
    TrainingError,
    one_line,
)
from lora_sentiment.files import write_file_aside
from lora_sentiment.recipe.data import DataConfig
from lora_sentiment.recipe.output import OutputConfig
from lora_sentiment.recipe.recipe import Recipe, apply_overrides
from lora_sentiment.recipe.yaml_reader import parse_yaml, show_yaml

if TYPE_CHECKING:
    from lora_sentiment.training.history import EvalPoint

log = logging.getLogger("lora_sentiment")

Sampler = Literal["grid", "random", "tpe"]
Axis = CategoricalDistribution | FloatDistribution | IntDistribution
Point = dict[str, Any]
"""Axis to its value: a number, or the YAML of another value."""
Row = dict[str, Any]
"""How a trial ended: values, folder, state and reason. If it finished, score and `read_result`."""

MAX_TRIALS = 1000
"""Most trials. A longer grid is taken for a mistake."""
NUM_TRIALS = 20
"""Trials where nothing else ends the sweep."""
MAX_FAILURES = 3
"""Failed trials at the start of a sweep that end it: the mistake is in all of them."""
STATES = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
"""Optuna's states. All others are failures there."""
LEFT = ("best", "note")
"""Columns of the table that are aligned to the left."""


def sweep(
    recipe_path: Path,
    assignments: Sequence[str],
    *,
    sampler: Sampler | None = None,
    num_trials: int | None = None,
    budget: float | None = None,
    num_seeds: int = 1,
    write: Path | None = None,
    plots: Path | None = None,
) -> dict[str, Any]:
    """Train combinations of values one after another, and choose the best on validation.

    Each run has a folder of its own under `<output.dir>.sweep`, and the study is in `study.db`
    there. A trial that ended is not run again, so a stopped sweep goes on where it was.

    Args:
        recipe_path: Recipe file.
        assignments: `key=value` is an override. `key=[a, b]` is an axis; for a key that takes a
            list, a list of lists is one. `key=log(a, b)`, `key=uniform(a, b)` and `key=int(a, b)`
            are axes with a range.
        sampler: By default `grid` where all axes are lists and nothing else ends the sweep.
        num_trials: Trials, those of earlier starts included.
        budget: Seconds after which no further trial starts.
        num_seeds: Seeds of the best: it is trained again with the next ones.
        write: Where the recipe with the best values is written.
        plots: Folder for Optuna's plots.

    Returns:
        metrics: The deciding metric, then those that the table shows beside it.
        rows: Every trial in the order in which they ran.
        best: The best row, or None if no trial is finished.
        seeds: The best row, and those of its runs with other seeds.
        command: The command that trains the best and judges it.

    Raises:
        LoraSentimentError: For a mistake, before anything runs. Later if the first trials fail.
        StoppedError: If a signal stopped a run, after a checkpoint was saved.
    """
    deadline = time.monotonic() + (budget or math.inf)
    launched = os.environ.get("WORLD_SIZE", "1")
    if launched != "1":
        raise RecipeError(
            f"sweep: found {launched} processes; it runs in one: start it without a launcher"
        )
    space = Space.parse(recipe_path, assignments)
    points = space.list_points()
    if sampler is None:
        sampler = "tpe" if num_trials or budget or space.has_ranges else "grid"
    if sampler == "grid" and (space.has_ranges or len(points) > MAX_TRIALS):
        raise RecipeError(
            f"sweep: a grid has no ranges, and at most {MAX_TRIALS:,} combinations; give shorter "
            "lists, or --sampler tpe"
        )
    if not num_trials:
        num_trials = MAX_TRIALS if sampler == "grid" or budget else NUM_TRIALS
    if num_seeds > 1 and "train.seed" in space.axes:
        raise RecipeError("sweep: --seeds varies train.seed, which is an axis; leave one out")
    if write and not write.parent.is_dir():
        raise RecipeError(f"--write {write}: there is no folder {write.parent}; make it first")
    # Of a name that is too long, this is false; a later message says so.
    is_taken = write and os.path.exists(write)  # noqa: PTH110
    if write and is_taken and (not write.is_file() or write.samefile(recipe_path)):
        raise RecipeError(f"--write {write}: is the recipe itself, or no file; name another one")
    run = space.check(points)
    # Late: these load numpy and torch, which a mistake need not wait for.
    from lora_sentiment.tasks import find_task
    from lora_sentiment.training.run_folder import lock_folder

    metric = run.train.metric_for_best_model
    task = find_task(run.data.task)
    metrics = list(dict.fromkeys([metric, *task.shown]))
    sign = 1 if task.find_metric(metric).greater_is_better else -1
    folder = run.folder.parent

    def rank(row: Row) -> tuple[float, float]:
        # The metric that settles ties is a loss in every task.
        return sign * row["score"], -row["validation"][task.shown[-1]]["value"]

    with ExitStack() as locked:
        lock_folder(folder, locked)
        try:
            study = _load_study(folder, f"{run.name} {space.axes}", maximize=sign > 0)
            _enqueue(study, space, points if sampler == "grid" else [])
            rows = _search(study, space, metric, sampler, num_trials, deadline)
            if plots:
                _draw(study, plots, metric)
        except (optuna.exceptions.OptunaError, SQLAlchemyError) as error:
            raise AdapterError(
                f"{folder}/study.db: cannot be used ({one_line(str(error), limit=200)}); make room, "
                "or delete it: runs that are finished are read again"
            ) from error
        best = max((row for row in rows if "score" in row), key=rank, default=None)
        done: dict[str, Any] = {"metrics": metrics, "rows": rows, "best": best}
        done |= {"seeds": [], "command": ""}
        if best:
            chosen = space.apply(best["values"])
            verb = ["lora-sentiment", "train", str(recipe_path)]
            done["command"] = shlex.join([*verb, *chosen.values()])
            if write:
                _write(write, apply_overrides(recipe_path, chosen.values()))
            seeds = range(run.train.seed + 1, run.train.seed + num_seeds)
            done["seeds"] = [best, *_train_seeds(space, best, seeds, metric)]
    return done


@dataclass(frozen=True)
class Space:
    """The settings of a sweep.

    Attributes:
        recipe_path: Recipe file.
        overrides: Key to its assignment, in the order given.
        axes: Key to its axis, for those that have one.
    """

    recipe_path: Path
    overrides: Mapping[str, str]
    axes: Mapping[str, Axis]

    @classmethod
    def parse(cls, recipe_path: Path, assignments: Sequence[str]) -> "Space":
        """Tell axes from plain overrides.

        Raises:
            RecipeError: If there is no axis, a key stands twice, or an axis is wrong.
        """
        overrides = {text.partition("=")[0]: text for text in assignments}
        if len(overrides) < len(assignments):
            raise RecipeError("sweep: a key stands twice; give each key once")
        axes = {}
        for key, text in overrides.items():
            axis = _parse_axis(text)
            if axis:
                axes[key] = axis
        plain = [text for key, text in overrides.items() if key not in axes]
        for key in list(axes):
            # A list that the key itself takes is one value.
            if _loads(recipe_path, [*plain, overrides[key]]):
                del axes[key]
        if not axes:
            Recipe.load(recipe_path, assignments)
            raise RecipeError(
                f"{recipe_path}: no key has several values; give one a list, such as "
                "'train.learning_rate=[1e-4, 5e-4]', a list of lists if it takes a list, or a "
                "range, such as 'train.learning_rate=log(1e-4, 5e-3)'"
            )
        return cls(recipe_path, overrides, axes)

    @property
    def has_ranges(self) -> bool:
        """Whether an axis is a range."""
        return any(not isinstance(axis, CategoricalDistribution) for axis in self.axes.values())

    def list_points(self) -> list[Point]:
        """Return the combinations, the last axis fastest. A range has its ends there."""
        values: list[Sequence[Any]] = []
        for axis in self.axes.values():
            if isinstance(axis, CategoricalDistribution):
                values.append(axis.choices)
            else:
                values.append((axis.low, axis.high))
        return self._combine(values)

    def list_all_points(self) -> list[Point]:
        """Return the combinations if there are at most MAX_TRIALS, else nothing."""
        values: list[Sequence[Any]] = []
        for axis in self.axes.values():
            if isinstance(axis, FloatDistribution):
                return []
            if isinstance(axis, CategoricalDistribution):
                values.append(axis.choices)
            else:
                values.append(range(axis.low, axis.high + 1)[: MAX_TRIALS + 1])
        points = self._combine(values)
        return points if len(points) <= MAX_TRIALS else []

    def _combine(self, values: Sequence[Sequence[Any]]) -> list[Point]:
        points = itertools.islice(itertools.product(*values), MAX_TRIALS + 1)
        return [dict(zip(self.axes, point, strict=True)) for point in points]

    def apply(self, point: Point) -> dict[str, str]:
        """Return key to override, in the order given."""
        return {**self.overrides, **{key: f"{key}={value}" for key, value in point.items()}}

    def make_run(self, point: Point) -> Recipe:
        """Return the run of a point: without rows to judge, in a folder of its own."""
        recipe = Recipe.load(self.recipe_path, self.apply(point).values())
        data = _leave_out_judged(recipe.data.model_dump_json())
        run = recipe.model_copy(update={"data": data})
        facts = run.model_dump_json(exclude={"name", "output"})
        name = f"run-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"
        output = OutputConfig(dir=f"{recipe.folder}.sweep/{name}")
        return run.model_copy(update={"name": name, "output": output})

    def check(self, points: Sequence[Point]) -> Recipe:
        """Return the first run.

        Raises:
            RecipeError: If a combination is refused, or they cannot be compared.
            DataError: If a data source cannot be found.
        """
        runs = []
        for point in points:
            try:
                runs.append(self.make_run(point))
            except LoraSentimentError as error:
                raise type(error)(f"{error} (with {_show(point)})") from error
        if len({(run.folder.parent, run.train.metric_for_best_model) for run in runs}) > 1:
            raise RecipeError(
                "name, output and train.metric_for_best_model are no axes: one metric decides, and "
                "every run gets a folder of its own under <output.dir>.sweep"
            )
        return runs[0]


def _parse_axis(text: str) -> Axis | None:
    """Return the axis of an assignment, or None for a plain value.

    A number is a choice of Optuna as it is, so that plots have a numeric axis. Another value is
    its YAML: the study's file holds no lists.

    Raises:
        RecipeError: If the axis is wrong.
    """
    key, _, written = text.partition("=")
    found = re.fullmatch(r"\s*(log|uniform|int)\(([^,]*),([^,]*)\)\s*", written)
    try:
        if found:
            kind, low, high = found.groups()
            if kind == "int":
                return IntDistribution(int(low), int(high))
            return FloatDistribution(float(low), float(high), log=kind == "log")
        values = parse_yaml(written, key)
        if not isinstance(values, list) or not values:
            return None
        choices = []
        for value in values:
            choices.append(value if type(value) in (int, float) else show_yaml(value))
        return CategoricalDistribution(list(dict.fromkeys(choices)))
    except ValueError as error:
        raise RecipeError(
            f"{key}: found {one_line(written, limit=60)} ({error}); allowed: a list of values, "
            "log(LOW, HIGH), uniform(LOW, HIGH), or int(LOW, HIGH)"
        ) from error


def _loads(recipe_path: Path, overrides: Sequence[str]) -> bool:
    try:
        Recipe.load(recipe_path, overrides)
    except RecipeError:
        return False
    return True


@cache
def _leave_out_judged(data: str) -> DataConfig:
    """Return a `data` section without judged rows. The Hub is asked once for each section."""
    return leave_out_judged(DataConfig.model_validate_json(data))


def _load_study(folder: Path, settings: str, *, maximize: bool) -> optuna.Study:
    """Load the study of a folder, or make it.

    Raises:
        RecipeError: If it is a study of other settings.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = optuna.storages.RDBStorage(
        # The path is not in the URL, where some characters have a meaning.
        "sqlite:///study.db",
        engine_kwargs={"creator": lambda: sqlite3.connect(folder / "study.db")},
    )
    study = optuna.create_study(
        study_name="sweep",
        storage=storage,
        load_if_exists=True,
        direction="maximize" if maximize else "minimize",
        pruner=optuna.pruners.MedianPruner(),
    )
    if study.user_attrs.get("settings", settings) != settings:
        raise RecipeError(
            f"{folder}: holds a sweep of another recipe, other overrides or other axes; move it "
            "away, or set another output.dir"
        )
    study.set_user_attr("settings", settings)
    return study


def _enqueue(study: optuna.Study, space: Space, points: Sequence[Point]) -> None:
    """Enqueue the trials that were killed, those that failed, and what is left of a grid."""
    waiting = []
    for trial in study.get_trials(states=[TrialState.WAITING]):
        waiting.append(trial.system_attrs.get("fixed_params", {}))
    for trial in study.get_trials(states=[TrialState.RUNNING]):
        if "row" in trial.user_attrs:
            _tell(study, trial.number, trial.user_attrs["row"])
            continue
        fixed = trial.system_attrs.get("fixed_params", {})
        if trial.params.keys() == space.axes.keys():  # else it was killed while they were drawn
            fixed = fixed | trial.params
        again = optuna.trial.create_trial(
            state=TrialState.WAITING,
            system_attrs={"fixed_params": fixed},
            intermediate_values=trial.intermediate_values,
        )
        # In this order: what is enqueued twice is not run twice, and nothing is lost.
        if fixed not in waiting:
            study.add_trial(again)
        study.tell(trial.number, state=TrialState.FAIL)
    ended = [row["values"] for row in _read_rows(study)]
    for trial in study.get_trials(states=[TrialState.FAIL]):
        # What it failed of may be mended. The killed ones have no row, and wait already.
        if "row" in trial.user_attrs and trial.params not in [*ended, *waiting]:
            study.enqueue_trial(trial.params)
            waiting.append(trial.params)
    for point in points:
        study.enqueue_trial(point, skip_if_exists=True)


def _read_rows(study: optuna.Study) -> list[Row]:
    """Return how the trials ended, but for those that failed, which run again."""
    rows = [trial.user_attrs["row"] for trial in study.get_trials() if "row" in trial.user_attrs]
    return [row for row in rows if row["state"] != "failed"]


def _refuse_other_rows(facts: Sequence[Mapping[str, Any]], roles: Sequence[str]) -> None:
    """Refuse trials that were trained or judged on different rows.

    Raises:
        RecipeError: There are such trials.
    """
    for role in roles:
        key = f"{role}_sha256"
        if len({fact[key] for fact in facts if key in fact}) > 1:
            raise RecipeError(
                f"the {role} rows are not those of earlier trials, which cannot be compared with "
                "these: the rows have changed, or an axis chooses them; leave the axis out, or set "
                "another output.dir"
            )


def _tell(study: optuna.Study, number: int, row: Row) -> None:
    study.tell(number, row.get("score"), STATES.get(row["state"], TrialState.FAIL))


def _search(
    study: optuna.Study,
    space: Space,
    metric: str,
    sampler: Sampler,
    num_trials: int,
    deadline: float,
) -> list[Row]:
    """Run trials until there are enough, or the deadline has passed; return all, earlier ones too.

    Raises:
        TrainingError: If the first trials fail.
        RecipeError: If two trials have different rows, and their values do not say why.
    """
    samplers = optuna.samplers
    make_sampler = samplers.TPESampler if sampler == "tpe" else samplers.RandomSampler
    if sampler == "grid":
        study.pruner = optuna.pruners.NopPruner()
    rows = _read_rows(study)
    finished = [row for row in rows if "score" in row]
    if finished:
        last = finished[-1]
        now = find_fingerprints(space.make_run(last["values"]))
        _refuse_other_rows([last, now], ("train", "validation"))
    points = space.list_all_points()
    # An axis of `data` may choose the rows to learn from, but none those that judge.
    learns_the_same = not any(key.startswith("data.") for key in space.axes)
    fixed_roles = ["validation", *(["train"] if learns_the_same else [])]
    for number in range(len(rows), num_trials):
        ran = [row["values"] for row in rows]
        if time.monotonic() > deadline or (points and all(point in ran for point in points)):
            break
        # Seeded by number: a sweep that was killed draws what it would have drawn.
        study.sampler = make_sampler(seed=number)
        trial = study.ask(dict(space.axes))
        log.info("trial %d: %s", number + 1, _show(trial.params))
        row: Row = {"values": trial.params, "folder": "", "state": "repeated", "reason": "repeated"}
        if trial.params not in ran:
            row = _train(space, trial.params, metric, trial)
        _refuse_other_rows([*rows, row], fixed_roles)
        if row["reason"]:
            log.warning("%s", row["reason"])
        trial.set_user_attr("row", row)
        _tell(study, trial.number, row)
        rows.append(row)
        if len(rows) == MAX_FAILURES and all(row["state"] == "failed" for row in rows):
            reason = row["reason"].removeprefix("failed: ")
            raise TrainingError(f"the first {MAX_FAILURES} trials failed: {reason}")
    return rows


def _train(space: Space, values: Point, metric: str, trial: optuna.Trial | None = None) -> Row:
    """Train a point, unless its run is finished, and return how it ended.

    Args:
        space: The settings.
        values: The point.
        metric: The metric that decides.
        trial: Gets each evaluation, and may prune the run. Without one it runs to its end.
    """
    # Late, as torch.
    from lora_sentiment.training.run_folder import name_run_folder

    reported: list[float] = []
    if trial:
        reported += trial.study.get_trials()[trial.number].intermediate_values.values()

    def report(trial: optuna.Trial, evaluations: Sequence["EvalPoint"]) -> None:
        # By number: steps of different batch sizes cannot be compared.
        for point in evaluations[len(reported) :]:
            reported.append(point.metric)
            trial.report(point.metric, len(reported))
        if trial.should_prune():
            raise optuna.TrialPruned(f"pruned at step {evaluations[-1].step:,}")

    row: Row = {"values": values, "folder": ""}
    try:
        run = space.make_run(values)
        if not is_finished(run):
            train_run(run, on_evaluation=partial(report, trial) if trial else None)
        result = read_result(run.folder)
        score = result["validation"][metric]["value"]
        if score is None:
            raise TrainingError(f"{metric} is undefined on validation")
    except optuna.TrialPruned as pruned:
        shutil.rmtree(name_run_folder(run))
        return {**row, "state": "pruned", "reason": str(pruned)}
    except StoppedError:
        raise
    except LoraSentimentError as error:
        state = "diverged" if isinstance(error, DivergedError) else "failed"
        return {**row, "state": state, "reason": f"{state}: {one_line(str(error))}"}
    row |= {"folder": str(run.folder), "state": "finished", "reason": "", "score": score}
    return {**row, **result}


def _train_seeds(space: Space, best: Row, seeds: Iterable[int], metric: str) -> list[Row]:
    """Train the best with other seeds.

    Raises:
        RecipeError: The rows are not those of the best any more.
    """
    rows = []
    for seed in seeds:
        log.info("the best with seed %d", seed)
        row = _train(space, {**best["values"], "train.seed": seed}, metric)
        if row["reason"]:
            log.warning("%s", row["reason"])
        rows.append(row)
    _refuse_other_rows([best, *rows], ("train", "validation"))
    return rows


def _write(path: Path, text: str) -> None:
    """Write the best recipe.

    Raises:
        RecipeError: If this fails.
    """
    try:
        with write_file_aside(path) as aside:
            aside.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"--write {path}: cannot be written: {error.strerror}") from error


def make_columns(done: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the table, heading to cells."""
    # Loads numpy, which a mistake need not wait for.
    from lora_sentiment.evaluation.statistics import show_interval

    columns: dict[str, list[str]] = {}
    for row in done["rows"]:
        cells = {"best": "*" if row == done["best"] else ""}
        for axis, value in row["values"].items():
            cells[axis] = f"{value:.4g}" if isinstance(value, float) else str(value)
        for metric in done["metrics"]:
            cells[metric] = show_interval(row["validation"][metric]) if "score" in row else ""
        cells["time"] = f"{row['seconds']:,.0f} s" if "score" in row else ""
        cells["note"] = row["reason"]
        for heading, cell in cells.items():
            columns.setdefault(heading, []).append(cell)
    return columns


def make_notes(done: Mapping[str, Any]) -> list[str]:
    """Return what a reader of the table must know."""
    metric, *_, tie = done["metrics"]
    scores = [row["score"] for row in done["seeds"] if "score" in row]
    notes = []
    if scores:
        notes = [f"best: by {metric} on validation, ties by {tie}; being chosen flatters its score"]
    if len(scores) > 1:
        mean, deviation = statistics.mean(scores), statistics.stdev(scores)
        notes.append(
            f"the best with {len(scores)} seeds: {metric} {mean:.4f} on average, standard "
            f"deviation {deviation:.4f}"
        )
    return notes


def _draw(study: optuna.Study, folder: Path, metric: str) -> None:
    """Draw Optuna's plots. One that cannot be drawn is a warning."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as plots

    for name in ("optimization_history", "slice", "parallel_coordinate", "param_importances"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with matplotlib.rc_context(), warnings.catch_warnings(action="ignore"):
                getattr(plots, f"plot_{name}")(study, target_name=metric)
                with write_file_aside(folder / f"{name}.png") as aside:
                    pyplot.savefig(aside, bbox_inches="tight", dpi=80)
        except DRAWING_FAULTS as error:
            log.warning("%s.png cannot be drawn: %s", name, one_line(str(error)))
        pyplot.close("all")


def _show(values: Point) -> str:
    return " ".join(f"{key}={value}" for key, value in values.items())


def parse_seconds(text: str) -> float:
    """Return a time such as `90s`, `20min` or `1.5h` in seconds.

    Raises:
        RecipeError: If it is none.
    """
    found = re.fullmatch(r"([0-9]*\.?[0-9]+) ?(s|min|h)", text)
    if not found or not float(found[1]):
        raise RecipeError(f"--budget: found {text}; give a number with s, min or h, such as 20min")
    return float(found[1]) * {"s": 1, "min": 60, "h": 3600}[found[2]]
