"""Rows whose labels are likely wrong, by the predictions of runs that did not train on them."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from lora_sentiment.adapter.folder import load_card
from lora_sentiment.commands.cross_validate import OUT_OF_FOLD, predict_out_of_fold
from lora_sentiment.errors import DataError, ModelError
from lora_sentiment.files import check_new_file, write_file_aside
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.tasks import find_task

LABEL_ERROR, DUPLICATE = "label error", "duplicate with another label"
BOTH = f"{LABEL_ERROR}, {DUPLICATE}"


def find_suspects(recipe: Recipe, out: Path, *, num_folds: int) -> dict[str, int]:
    """Write the rows whose labels are likely wrong to a csv file, without their texts.

    Label errors are those of confident learning: Northcutt, Jiang & Chuang (2021), "Confident
    Learning: Estimating Uncertainty in Dataset Labels". Folds that ran earlier are not run again.

    Args:
        recipe: The recipe.
        out: The csv file: the `row` in its source, counted from 1, and its `role` there; the
            `given` and the `likely` label; the `score` of the given one, from 0 to 1, lowest first;
            and the `reason`.
        num_folds: Number of folds.

    Returns:
        Reason to its number of rows. Nothing on all processes of a launch but the main one.

    Raises:
        LoraSentimentError: If the task is regression, the file exists, `cleanlab` is missing, or as
            `predict_out_of_fold`.
    """
    task = find_task(recipe.data.task)
    if not task.has_wrong_labels:
        raise DataError(
            "--suspects: a number is near the predicted one or far from it, but neither right nor "
            "wrong; cross-validate writes the predicted number of each row"
        )
    check_new_file(out)
    try:
        from cleanlab import multilabel_classification, rank
        from cleanlab.filter import find_label_issues
    except ModuleNotFoundError as error:
        raise ModelError(
            f"--suspects needs an extra ({error}): pip install 'lora_sentiment[search]'"
        ) from error
    folders = predict_out_of_fold(recipe, num_folds=num_folds)
    if not folders:
        return {}
    found = load_file(folders[0].with_name(OUT_OF_FOLD))
    names = load_card(folders[0]).labels
    scores = task.compute_scores(found["logits"])
    labels: Any = found["labels"]
    is_multi = labels.ndim == 2
    quality, truth = rank, np.eye(len(names))[labels]
    if is_multi:
        quality, truth = multilabel_classification, labels
        labels = [np.flatnonzero(row).tolist() for row in labels]
    is_error = find_label_issues(labels, scores, multi_label=is_multi, n_jobs=1)

    def name(each: Any) -> Any:
        return task.to_columns(task.make_answer(each, names, None))[0]

    pairs = np.unique([found["text"], task.find_strata(found["labels"])], axis=1)
    is_contradicted = np.bincount(pairs[0], minlength=len(truth))[found["text"]] > 1
    suspects = pd.DataFrame(
        {
            "row": found["row"],
            "role": np.where(found["is_validation"], "validation", "train"),
            "given": list(map(name, truth)),
            "likely": list(map(name, scores)),
            "score": quality.get_label_quality_scores(labels, scores),
            "reason": np.select(
                [is_error & is_contradicted, is_error], [BOTH, LABEL_ERROR], DUPLICATE
            ),
        }
    )
    suspects = suspects[is_error | is_contradicted].sort_values("score")
    try:
        with write_file_aside(out) as aside:
            suspects.to_csv(aside, index=False)
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror or error}") from error
    return suspects["reason"].value_counts().to_dict()  # type: ignore[no-any-return]
