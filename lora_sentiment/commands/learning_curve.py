"""A learning curve: the metric on the same validation rows after training on more and more rows."""

import logging
from dataclasses import replace
from pathlib import Path

import pandas as pd

from lora_sentiment.adapter.parent import choose_labels, resolve_parent
from lora_sentiment.commands.runs import leave_out_judged, read_result, train_rows
from lora_sentiment.console import is_main
from lora_sentiment.data.rows import Rows, load_data, sample
from lora_sentiment.errors import DRAWING_FAULTS, one_line
from lora_sentiment.evaluation.plots import plot_learning_curve
from lora_sentiment.files import write_file_aside
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.tasks import Task, find_task
from lora_sentiment.training.processes import join_launch

log = logging.getLogger("lora_sentiment")

PICTURE = "learning_curve.png"


def learning_curve(recipe: Recipe) -> pd.DataFrame:
    """Train a recipe on an eighth, a quarter, a half and all of its training rows.

    The parts are stratified, and each holds the smaller ones. Judged rows are not read. Every
    process of a launch calls this. Runs and a picture are written to `<output.dir>.curve`. Runs
    that finished earlier are not run again.

    Args:
        recipe: The recipe. Its `train.metric_for_best_model` is measured.

    Returns:
        A row for each number of training rows: the `value` of the metric on validation, and the
        ends of its 95 % bootstrap interval over the validation rows (`low`, `high`). No row on all
        processes of a launch but the main one.

    Raises:
        LoraSentimentError: As `load_data` and `train`.
    """
    recipe = resolve_parent(recipe)
    data = load_data(leave_out_judged(recipe.data), labels=choose_labels(recipe))
    task = find_task(recipe.data.task)
    parts = [data.train]
    for _ in range(3):
        num_rows = max(2, len(parts[0]) // 2)
        parts.insert(0, sample(parts[0], task, num_rows=num_rows, seed=recipe.data.split_seed))
    out = Path(f"{recipe.folder}.curve")
    metric = recipe.train.metric_for_best_model
    found = {}
    for rows in parts:
        fault = task.check_train(rows.labels, data.labels, data.config)
        if _find_labels(task, rows) != _find_labels(task, data.train):
            fault = "these rows do not hold every label"
        if fault:
            log.warning("%s rows are left out: %s", f"{len(rows):,}", fault)
            continue
        folder = out / f"{len(rows)}-rows"
        train_rows(recipe, replace(data, train=rows, judged=(), carved_test=None), folder)
        if is_main():
            found[len(rows)] = read_result(folder)["validation"][metric]
    join_launch().destroy_process_group()
    figures = pd.DataFrame(found, index=["value", "low", "high"], dtype=float).T.rename_axis("rows")
    if is_main():
        try:
            with write_file_aside(out / PICTURE) as picture:
                plot_learning_curve(figures, picture, metric=metric, title=recipe.name)
        except DRAWING_FAULTS as error:
            log.warning("%s cannot be drawn: %s", PICTURE, one_line(str(error)))
    return figures


def _find_labels(task: Task, rows: Rows) -> set[int]:
    return set(task.find_occurrences(rows.labels)[1].tolist())
