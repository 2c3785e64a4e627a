"""Cross-validation: each row is predicted once, by a model that was trained without its text."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import save_file

from lora_sentiment.adapter.folder import load_card
from lora_sentiment.adapter.predictions import PREDICTIONS, load_predictions
from lora_sentiment.commands.runs import leave_out_judged, train_rows
from lora_sentiment.console import is_main
from lora_sentiment.data.rows import Data, Rows, carve, load_data
from lora_sentiment.errors import RecipeError
from lora_sentiment.evaluation.metric import score_metrics
from lora_sentiment.files import write_file_aside
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.tasks import find_task
from lora_sentiment.training.processes import join_launch

OUT_OF_FOLD = "out_of_fold.safetensors"
RECORDS = ("card.json", "recipe.yaml", "report.json", PREDICTIONS)
"""Files that stay of a fold whose model is not kept."""


def cross_validate(recipe: Recipe, *, num_folds: int, keep_models: bool = False) -> pd.DataFrame:
    """Train a recipe once for each fold, without the rows of the fold, and score all predictions.

    Args:
        recipe: The recipe.
        num_folds: Number of folds.
        keep_models: Whether to keep the adapter of each fold.

    Returns:
        A row for each metric: the `value` of all rows with the ends of its 95 % bootstrap interval
        over the rows (`low`, `high`), the value of each fold and their `mean`. nan is undefined. No
        row on all processes of a launch but the main one.

    Raises:
        LoraSentimentError: As `predict_out_of_fold`.
    """
    folders = predict_out_of_fold(recipe, num_folds=num_folds, keep_models=keep_models)
    if not folders:
        return pd.DataFrame()
    task = find_task(recipe.data.task)
    metrics = list(task.metrics.values())
    parts = []
    for folder in folders:
        own = load_predictions(folder)["test"]
        # Each row is decided by the thresholds of its own run.
        calibration = load_card(folder).calibration
        parts.append((task.make_metric_scores(own.logits, own.labels, calibration), own.labels))
    scores, labels = map(np.concatenate, zip(*parts, strict=True))
    all_rows = score_metrics(metrics, scores, labels)
    figures = pd.DataFrame(map(vars, all_rows.values()), index=list(all_rows))
    figures = figures.drop(columns="note").astype(float)
    for fold, part in enumerate(parts, start=1):
        figures[f"fold {fold}"] = [metric.value(*part) for metric in metrics]
    figures["mean"] = figures.iloc[:, 3:].mean(axis=1, skipna=False)
    return figures


def predict_out_of_fold(recipe: Recipe, *, num_folds: int, keep_models: bool = False) -> list[Path]:
    """Predict each row that is not judged by a run without the rows of its fold.

    Folds are stratified, and equal texts are in one fold, whatever their labels.

    Every process of a launch calls this. Folds that ran earlier are not run again. All predictions
    are written to `<output.dir>.folds/out_of_fold.safetensors`, fold after fold: `logits` and
    `labels`; the `row` in its source, counted from 1; whether its role there `is_validation`; its
    `fold`; and `text`, a number that rows with equal texts share.

    Args:
        recipe: The recipe.
        num_folds: Number of folds.
        keep_models: Whether to keep the adapter of each fold.

    Returns:
        The folder of each fold. Nothing on all processes but the main one.

    Raises:
        RecipeError: The recipe names a `model.adapter`.
        DataError: As `load_data`, or if a label has fewer distinct texts than there are folds.
        AdapterError: A folder holds a fold of another recipe or of other rows.
        LoraSentimentError: As `train`.
    """
    if recipe.model.adapter is not None:
        raise RecipeError(
            "model.adapter: the adapter may have learned from the rows of a fold; leave it out"
        )
    data = load_data(leave_out_judged(recipe.data))
    # Rows of a validation file are numbered on from those of train.
    num_read = data.counts["train"].read
    parts = dict(data.seen)
    if "validation" in data.source.roles:
        numbers = data.validation.numbers + num_read
        parts["validation"] = replace(data.validation, numbers=numbers)
    left = _join(parts.values())
    task = find_task(recipe.data.task)
    split = partial(carve, names=data.labels, task=task, seed=data.config.split_seed)
    folds = []
    for number in range(num_folds, 1, -1):
        left, held = split(left, fraction=1 / number, key="--folds")
        folds.append(held)
    folds.append(left)
    # All folds first: a label with too few rows must not show after other folds have run.
    key = "data.validation_fraction"
    runs = {}
    for number, held in enumerate(folds, start=1):
        others = _join(fold for fold in folds if fold is not held)
        train, validation = split(others, fraction=data.config.validation_fraction, key=key)
        folder = Path(f"{recipe.folder}.folds/{number}-of-{num_folds}")
        runs[folder] = Data(data.config, data.labels, train, validation, (), held, {}, data.source)
    for folder, own in runs.items():
        is_new = train_rows(recipe, own, folder, needed="README.md" if keep_models else PREDICTIONS)
        # A model that an earlier call was told to keep stays.
        if is_new and is_main() and not keep_models:
            for path in folder.iterdir():
                if path.name not in RECORDS:
                    path.unlink()
    join_launch().destroy_process_group()
    if not is_main():
        return []
    rows = _join(folds)
    is_validation = rows.numbers > num_read
    tensors = {
        "logits": np.concatenate([load_predictions(folder)["test"].logits for folder in runs]),
        "labels": rows.labels,
        "row": rows.numbers - num_read * is_validation,
        "is_validation": is_validation,
        "fold": np.repeat(range(1, num_folds + 1), list(map(len, folds))),
        "text": rows.find_first_equal(),
    }
    with write_file_aside(Path(f"{recipe.folder}.folds", OUT_OF_FOLD)) as aside:
        save_file(tensors, aside)
    return list(runs)


def _join(parts: Iterable[Rows]) -> Rows:
    rows = list(parts)
    return Rows(
        list(chain(*[part.texts for part in rows])),
        np.concatenate([part.labels for part in rows]),
        np.concatenate([part.numbers for part in rows]),
    )
