"""Likely label errors: which rows are written, and that nothing is trained for what is refused."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from lora_sentiment.cli import main
from lora_sentiment.commands import suspects
from lora_sentiment.commands.cross_validate import OUT_OF_FOLD
from lora_sentiment.commands.suspects import BOTH, DUPLICATE, LABEL_ERROR, find_suspects
from lora_sentiment.errors import DataError, ModelError
from lora_sentiment.recipe.recipe import Recipe

NUM_ROWS = 40
WRONG = [3, 8]
TWINS = [20, 21]
"""Positions of rows with one text and two labels, both of which the model finds likely."""


def make_recipe(task: str) -> Recipe:
    data = {"source": "bundled", "task": task}
    return Recipe.model_validate({"name": "toy", "data": data, "model": {"name": "bundled"}})


@pytest.fixture
def found(tmp_path, toy_adapter, monkeypatch):
    """Stand-in for the folds: the card of a model with two labels, and predictions to be set."""
    folder = tmp_path / "1-of-1"
    folder.mkdir()
    shutil.copy(toy_adapter / "card.json", folder)

    def save(labels: np.ndarray, logits: np.ndarray) -> None:
        text = np.arange(NUM_ROWS)
        text[TWINS] = TWINS[0]
        is_validation = np.zeros(NUM_ROWS, dtype=bool)
        is_validation[WRONG[1]] = True
        tensors = {"labels": labels, "logits": logits.astype(np.float32), "text": text}
        tensors |= {"row": np.arange(NUM_ROWS) + 100, "is_validation": is_validation}
        save_file(tensors, tmp_path / OUT_OF_FOLD)

    monkeypatch.setattr(suspects, "predict_out_of_fold", lambda recipe, num_folds: [folder])
    return save


def test_rows_that_the_others_contradict_are_suspects(found, tmp_path):
    truth = np.arange(NUM_ROWS) % 2
    logits = np.where(np.eye(2)[truth] > 0, 2.0, -2.0)
    logits[TWINS] = 0.0
    labels = truth.copy()
    labels[WRONG] = 1 - labels[WRONG]
    found(labels, logits)
    counts = find_suspects(make_recipe("single_label"), tmp_path / "out.csv", num_folds=5)
    assert counts == {LABEL_ERROR: 2, DUPLICATE: 2}
    table = pd.read_csv(tmp_path / "out.csv")
    assert list(table) == ["row", "role", "given", "likely", "score", "reason"]
    assert table["score"].is_monotonic_increasing
    first = table.sort_values("row").iloc[0]
    assert first.drop("score").tolist() == [103, "train", "negative", "positive", LABEL_ERROR]
    assert first["score"] == pytest.approx(1 / (1 + np.exp(4)))
    assert table["role"][table["row"] == 108].item() == "validation"
    assert sorted(table["row"][table["reason"] == DUPLICATE]) == [120, 121]


def test_sets_of_labels_are_suspects_too(found, tmp_path):
    truth = np.stack([np.arange(NUM_ROWS) % 2, np.arange(NUM_ROWS) // 2 % 2], axis=1)
    labels = truth.copy()
    labels[WRONG] = 1 - labels[WRONG]
    labels[TWINS] = [[1, 1], [0, 1]]
    found(labels, np.where(truth > 0, 4.0, -4.0))
    find_suspects(make_recipe("multi_label"), tmp_path / "out.csv", num_folds=5)
    table = pd.read_csv(tmp_path / "out.csv").set_index("row")
    for position in WRONG:
        row = table.loc[100 + position]
        assert row["reason"] == LABEL_ERROR
        sets = {name: set(json.loads(row[name])) for name in ("given", "likely")}
        assert sets["given"] | sets["likely"] == {"negative", "positive"}
        assert not sets["given"] & sets["likely"]
    assert {100 + position for position in TWINS} <= set(table.index)


def test_a_row_can_be_suspect_for_both_reasons_and_counts_are_json(found, tmp_path):
    truth = np.arange(NUM_ROWS) % 2
    labels = truth.copy()
    labels[TWINS[0]] = 1 - labels[TWINS[0]]
    labels[TWINS[1]] = 1 - labels[TWINS[0]]
    logits = np.where(np.eye(2)[truth] > 0, 2.0, -2.0)
    logits[TWINS[1]] = logits[TWINS[0]]
    found(labels, logits)
    counts = find_suspects(make_recipe("single_label"), tmp_path / "out.csv", num_folds=5)
    assert json.loads(json.dumps(counts)) == {BOTH: 1, DUPLICATE: 1}


@pytest.mark.parametrize("reason", ["regression", "exists", "folder", "extra"])
def test_what_cannot_be_answered_is_refused_before_anything_is_read(reason, tmp_path, monkeypatch):
    monkeypatch.setattr(suspects, "predict_out_of_fold", None)
    out = tmp_path / "out.csv"
    if reason == "regression":
        with pytest.raises(DataError, match="neither right nor wrong; cross-validate writes"):
            find_suspects(make_recipe("regression"), out, num_folds=5)
    elif reason == "exists":
        out.touch()
        with pytest.raises(DataError, match="exists already; give another name"):
            find_suspects(make_recipe("single_label"), out, num_folds=5)
    elif reason == "folder":
        with pytest.raises(DataError, match=r"there is no folder .*nowhere; make it first"):
            find_suspects(make_recipe("single_label"), tmp_path / "nowhere/out.csv", num_folds=5)
    else:
        monkeypatch.setitem(sys.modules, "cleanlab", None)
        with pytest.raises(ModelError, match=r"pip install 'lora_sentiment\[search\]'"):
            find_suspects(make_recipe("single_label"), out, num_folds=5)


def test_folds_without_suspects_are_refused(tmp_path, capsys):
    recipe = Path(__file__).parents[2] / "recipes/quickstart.yaml"
    with pytest.raises(SystemExit) as stopped:
        main(["data", str(recipe), "--folds", "3"])
    assert stopped.value.code == 1
    assert "--folds is for --suspects" in capsys.readouterr().err
