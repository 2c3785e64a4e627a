"""Cross-validation: each row is predicted once, by a model that was trained without its text."""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lora_sentiment.adapter.folder import load_card
from lora_sentiment.adapter.parent import choose_labels, resolve_parent
from lora_sentiment.adapter.predictions import load_predictions
from lora_sentiment.commands.runs import is_finished, leave_out_judged, train_run
from lora_sentiment.data.rows import Rows, load_data, make_table, make_table_config
from lora_sentiment.errors import AdapterError, DataError, show_names
from lora_sentiment.evaluation.metric import score_metrics
from lora_sentiment.evaluation.statistics import Interval, show_interval
from lora_sentiment.files import write_file_aside
from lora_sentiment.recipe.output import OutputConfig
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.tasks import Task, find_task
from lora_sentiment.tasks.task import Calibration
from lora_sentiment.training.processes import join_launch, run_on_main
from lora_sentiment.training.run_folder import name_run_folder

log = logging.getLogger("lora_sentiment")

OUT_OF_FOLD = "out_of_fold.safetensors"
ROLE = "held_out"
"""Role of a fold's rows in the run that does not train on them."""
LEFT = ("metric",)
"""Columns of the table that are aligned to the left."""


@dataclass(frozen=True)
class FoldedRows:
    """All rows of a recipe that are not judged, each in one fold.

    Attributes:
        recipe: The recipe, which reads `table`.
        rows: The rows in the order of their source.
        roles: Role of each row in the source: train or validation.
        table: The rows as `train` takes them from Python.
        names: Label names in order.
        folds: Fold of each row, counted from 1, (num_rows,).
    """

    recipe: Recipe
    rows: Rows
    roles: list[str]
    table: list[dict[str, Any]]
    names: tuple[str, ...]
    folds: NDArray[np.int64]

    @property
    def task(self) -> Task:
        """What a label is."""
        return find_task(self.recipe.data.task)

    @property
    def path(self) -> Path:
        """The file of the predictions."""
        return self.recipe.folder.with_name(self.recipe.folder.name + ".folds") / OUT_OF_FOLD

    def make_run(self, fold: int) -> Recipe:
        """Return the recipe of the run that predicts a fold."""
        output = OutputConfig(dir=str(self.path.with_name(f"fold-{fold}")))
        name = f"{self.recipe.name}-fold-{fold}"
        return self.recipe.model_copy(update={"name": name, "output": output})


@dataclass
class OutOfFold:
    """Predictions of the folds that have run.

    Attributes:
        logits: Shape (num_rows, num_labels), nan in the rows of folds that have not run.
        calibrations: Fold to what its run fitted on its validation rows.
    """

    logits: NDArray[np.float32]
    calibrations: dict[int, Calibration | None]


@dataclass(frozen=True)
class CrossValidation:
    """The figures of a finished cross-validation.

    Attributes:
        num_rows: Number of rows. Each was predicted once.
        predictions: The file of the predictions.
        folds: Metric to its value on the rows of each fold, None where it is undefined.
        means: Metric to the mean of `folds`, None where it is undefined in a fold.
        all_rows: Metric to its value on all rows, with a 95 % bootstrap interval over the rows.
    """

    num_rows: int
    predictions: Path
    folds: Mapping[str, Sequence[float | None]]
    means: Mapping[str, float | None]
    all_rows: Mapping[str, Interval]

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        return asdict(self) | {"predictions": str(self.predictions)}


def cross_validate(
    recipe: Recipe, *, num_folds: int, keep_models: bool = False
) -> CrossValidation | None:
    """Train a recipe once for each fold, without the rows of the fold, and score all predictions.

    Every process of a launch calls this. A call that was stopped goes on where it was.

    Args:
        recipe: The recipe. Runs and predictions are written to `<output.dir>.folds`.
        num_folds: Number of folds.
        keep_models: Whether to keep the adapter of each fold.

    Returns:
        The figures; None on all processes but the main one.

    Raises:
        LoraSentimentError: As `fold_rows` and `predict_folds`.
    """
    folded = fold_rows(recipe, num_folds=num_folds)
    found = predict_folds(folded, keep_models=keep_models)
    return _score(folded, found) if found else None


def fold_rows(recipe: Recipe, *, num_folds: int) -> FoldedRows:
    """Read the rows of train and validation, and deal them into folds. Judged rows are not read.

    Folds are stratified, and equal texts are in one fold, whatever their labels.

    Raises:
        DataError: As `load_data`, or if a label has too few texts.
    """
    recipe = resolve_parent(recipe)
    data = load_data(leave_out_judged(recipe.data), labels=choose_labels(recipe))
    second = "validation" if "validation" in data.source.roles else "train"
    roles, texts, table = [], [], []
    for role, rows in (("train", data.train), (second, data.validation)):
        roles += [role] * len(rows)
        texts += list(rows.texts)
        table += make_table(data.config, rows, role=role, names=data.labels)
    numbers = np.concatenate([data.train.numbers, data.validation.numbers])
    labels = np.concatenate([data.train.labels, data.validation.labels])
    # Rows that were carved out of train go back to their places.
    order = np.lexsort((numbers, np.array(roles)))
    rows = Rows(texts, labels, numbers).take(order)
    task = find_task(recipe.data.task)
    folds = make_folds(
        rows, task, num_folds=num_folds, seed=recipe.data.split_seed, names=data.labels
    )
    config = make_table_config(data.config, data.labels)
    return FoldedRows(
        # Bundled data must not decide on a recipe for other data.
        recipe.model_copy(update={"data": config, "offline": "error"}),
        rows,
        [roles[place] for place in order],
        [table[place] for place in order],
        data.labels,
        folds,
    )


def make_folds(
    rows: Rows, task: Task, *, num_folds: int, seed: int, names: Sequence[str]
) -> NDArray[np.int64]:
    """Deal rows into stratified folds. Equal texts are in one fold.

    Args:
        rows: The rows.
        task: The task of the labels.
        num_folds: Number of folds.
        seed: Decides which rows.
        names: Label names, for messages.

    Returns:
        The fold of each row, counted from 1, (num_rows,).

    Raises:
        DataError: Without some fold, fewer than two texts of a label are left: one to train on, and
            one to validate on. Or a fold is empty.
    """
    first = rows.find_first_equal()
    num_equal = np.bincount(first, minlength=len(rows))
    distinct = np.flatnonzero(num_equal)
    generator = np.random.default_rng(seed)
    fold_of = np.full(len(rows), num_folds)
    left = distinct
    for fold in range(1, num_folds):
        # A text that occurs under two labels counts for the label of its first row.
        is_chosen = task.choose_texts(
            rows.labels[left],
            num_equal[left],
            fraction=1 / (num_folds - fold + 1),
            generator=generator,
        )
        fold_of[left[is_chosen]] = fold
        left = left[~is_chosen]
    _, present = task.find_occurrences(rows.labels)
    rare: set[str] = set()
    for fold in range(1, num_folds + 1):
        kept = rows.labels[distinct[fold_of[distinct] != fold]]
        num_texts = np.bincount(task.find_occurrences(kept)[1], minlength=len(names))
        rare |= {names[label] for label in np.unique(present) if num_texts[label] < 2}
    if rare:
        raise DataError(
            f"{show_names(sorted(rare))}: too few distinct texts for {num_folds} folds, each of "
            "which leaves one to train on and one to validate on; add rows with these labels"
        )
    if len(np.unique(fold_of[distinct])) < num_folds:
        raise DataError(
            f"{len(distinct):,} distinct texts are too few for {num_folds} stratified folds; add "
            "rows, or set --folds lower"
        )
    return np.asarray(fold_of[first])


def predict_folds(folded: FoldedRows, *, keep_models: bool = False) -> OutOfFold | None:
    """Train the folds that have not run, and return the predictions of all rows.

    The file of predictions is replaced after each fold, and the adapter of the fold deleted.

    Args:
        folded: The rows.
        keep_models: Whether to keep the adapter of each fold.

    Returns:
        The predictions; None on all processes but the main one.

    Raises:
        AdapterError: The folder holds folds of another recipe or of other rows.
        LoraSentimentError: As `train`.
    """
    state = join_launch()
    done = run_on_main(lambda: list(_load(folded).calibrations))
    num_folds = int(folded.folds.max())
    for fold in range(1, num_folds + 1):
        run = folded.make_run(fold)
        if fold in done and not (keep_models and not run.folder.exists()):
            log.info("fold %d of %d: ran earlier", fold, num_folds)
            continue
        log.info("fold %d of %d", fold, num_folds)
        if not run_on_main(partial(is_finished, run)):
            is_held = folded.folds == fold
            data = {
                "train": [folded.table[i] for i in np.flatnonzero(~is_held)],
                ROLE: [folded.table[i] for i in np.flatnonzero(is_held)],
            }
            train_run(run, data=data)
        run_on_main(partial(_add_fold, folded, fold, keep_models=keep_models))
    state.destroy_process_group()
    return _load(folded) if state.is_main_process else None


def _add_fold(folded: FoldedRows, fold: int, *, keep_models: bool) -> None:
    """Add the predictions of a run to the file, and delete the run's adapter."""
    run = folded.make_run(fold)
    own = load_predictions(run.folder)[ROLE]
    is_held = folded.folds == fold
    if own.fingerprint != folded.rows.take(np.flatnonzero(is_held)).fingerprint:
        raise AdapterError(f"{run.folder}: predicted other rows; move it away, or delete it")
    found = _load(folded)
    if not found.calibrations:
        found.logits = np.full((len(folded.rows), own.logits.shape[1]), np.nan, dtype=np.float32)
    found.logits[is_held] = own.logits
    found.calibrations[fold] = load_card(run.folder).calibration
    record = {"facts": _list_facts(folded), "calibrations": found.calibrations}
    tensors = {
        "logits": found.logits,
        "labels": folded.rows.labels,
        "fold": folded.folds,
        "row": folded.rows.numbers,
        "is_validation": np.array([role == "validation" for role in folded.roles]),
    }
    with write_file_aside(folded.path) as aside:
        save_file(tensors, aside, metadata={"record": json.dumps(record)})
        aside.chmod(0o644)  # as the other files; safetensors makes it readable for its owner alone
    if not keep_models:
        shutil.rmtree(run.folder)
        shutil.rmtree(name_run_folder(run), ignore_errors=True)


def _load(folded: FoldedRows) -> OutOfFold:
    """Read the predictions of the folds that have run.

    Raises:
        AdapterError: The file cannot be read, or is of another recipe or of other rows.
    """
    path = folded.path
    if not path.exists():
        return OutOfFold(np.empty((0, 0), dtype=np.float32), {})
    try:
        with safe_open(path, framework="numpy") as file:
            logits = file.get_tensor("logits")
            record = json.loads(file.metadata()["record"])
        then, now = record["facts"], _list_facts(folded)
        calibrations = {int(fold): each for fold, each in record["calibrations"].items()}
    except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
        raise AdapterError(
            f"{path}: cannot be read ({error}); delete {path.parent} to run the folds again"
        ) from error
    differing = [name for name in then | now if then.get(name) != now.get(name)]
    if differing:
        raise AdapterError(
            f"{path}: holds folds with another {', '.join(differing)}; delete or move "
            f"{path.parent}, or set another output.dir"
        )
    return OutOfFold(logits, calibrations)


def _list_facts(folded: FoldedRows) -> dict[str, Any]:
    """Return what decides the predictions, by name."""
    facts: dict[str, Any] = {
        "number of folds": int(folded.folds.max()),
        "text or label of a row": folded.rows.fingerprint,
    }
    sections = folded.recipe.model_dump(mode="json", include={"data", "model", "method", "train"})
    for section, values in sections.items():
        for key, value in values.items():
            facts[f"{section}.{key}"] = value
    return facts


def _score(folded: FoldedRows, found: OutOfFold) -> CrossValidation:
    task = folded.task
    parts = []
    folds: dict[str, list[float | None]] = {name: [] for name in task.metrics}
    for fold, calibration in sorted(found.calibrations.items()):
        is_held = folded.folds == fold
        labels = folded.rows.labels[is_held]
        scores = task.make_metric_scores(found.logits[is_held], labels, calibration)
        parts.append((scores, labels))
        for name, metric in task.metrics.items():
            value = metric.value(scores, labels)
            folds[name].append(None if np.isnan(value) else value)
    means: dict[str, float | None] = {}
    for name, values in folds.items():
        defined = [value for value in values if value is not None]
        means[name] = float(np.mean(defined)) if len(defined) == len(values) else None
    scores, labels = (np.concatenate(each) for each in zip(*parts, strict=True))
    all_rows = score_metrics(list(task.metrics.values()), scores, labels)
    return CrossValidation(len(labels), folded.path, folds, means, all_rows)


def make_columns(done: CrossValidation) -> dict[str, list[str]]:
    """Return the table, heading to cells: one row for each metric."""
    columns = {"metric": list(done.folds)}
    for fold, values in enumerate(zip(*done.folds.values(), strict=True), start=1):
        columns[f"fold {fold}"] = [_show(value) for value in values]
    columns["mean"] = [_show(value) for value in done.means.values()]
    intervals = [interval.as_dict() for interval in done.all_rows.values()]
    columns["all rows (95 %)"] = [show_interval(interval) for interval in intervals]
    return columns


def make_notes(done: CrossValidation) -> list[str]:
    """Return what a reader must know of the figures."""
    return [
        f"{done.num_rows:,} rows of train and validation, each predicted once: {done.predictions}",
        "the interval is that of the rows; it does not hold what another split or seed changes",
    ]


def _show(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"
