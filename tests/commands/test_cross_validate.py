"""Folds: every row is predicted once, by a run that has not seen its text, and a stopped call goes on."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_sentiment import train as train_module
from lora_sentiment.commands.cross_validate import (
    OUT_OF_FOLD,
    cross_validate,
    fold_rows,
    make_columns,
    make_folds,
    predict_folds,
)
from lora_sentiment.data.rows import Rows, load_data, make_table, make_table_config
from lora_sentiment.data.sources import make_source
from lora_sentiment.errors import AdapterError, DataError, TrainingError
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.tasks import find_task
from tests.conftest import toy_rows, write_csv

NAMES = ("a", "b", "c")


def make_labels(task: str, num_rows: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    if task == "multi_label":
        return (generator.random((num_rows, 3)) < [0.5, 0.2, 0.05]).astype(np.int64)
    if task == "regression":
        return generator.normal(size=num_rows)
    return generator.choice(3, size=num_rows, p=[0.6, 0.3, 0.1])


def fold_toy(task: str, texts: list[str], num_folds: int) -> tuple[Rows, np.ndarray]:
    rows = Rows(texts, make_labels(task, len(texts)), np.arange(1, len(texts) + 1))
    folds = make_folds(rows, find_task(task), num_folds=num_folds, seed=0, names=NAMES)
    return rows, folds


@pytest.mark.parametrize("task", ["single_label", "multi_label", "regression"])
def test_folds_are_even_stratified_and_keep_equal_texts_together(task):
    # Every seventh text stands three times, under labels that differ.
    texts = [f"text {i if i % 7 else i % 21}" for i in range(1001)]
    rows, folds = fold_toy(task, texts, 5)
    of_text: dict[str, set] = {}
    for text, fold in zip(texts, folds.tolist(), strict=True):
        of_text.setdefault(text, set()).add(fold)
    assert all(len(found) == 1 for found in of_text.values())

    _, folds = fold_toy(task, [f"text {i}" for i in range(1001)], 5)
    sizes = np.bincount(folds)[1:]
    assert sizes.sum() == 1001
    assert sizes.min() >= 190
    means = [rows.labels[folds == fold].mean(axis=0) for fold in range(1, 6)]
    # One row of a label more or less in two hundred; regression deals within ten ranges.
    assert np.ptp(means, axis=0).max() < (0.15 if task == "regression" else 0.025)


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        (list("abcdefg"), [0, 0, 0, 0, 1, 1, 2], "b, c: too few distinct texts for 2 folds"),
        (list("abcdee"), [0, 0, 0, 0, 1, 1], "b: too few distinct texts for 2 folds"),
    ],
)
def test_a_label_with_too_few_texts_is_refused_before_training(texts, labels, message):
    rows = Rows(texts, np.array(labels), np.arange(1, len(texts) + 1))
    with pytest.raises(DataError, match=message):
        make_folds(rows, find_task("single_label"), num_folds=2, seed=0, names=NAMES)


def test_more_folds_than_texts_are_refused():
    rows = Rows(list("aabb"), np.array([1.0, 1.0, 2.0, 2.0]), np.arange(1, 5))
    with pytest.raises(DataError, match="2 distinct texts are too few for 3 stratified folds"):
        make_folds(rows, find_task("regression"), num_folds=3, seed=0, names=("stars",))


@pytest.mark.parametrize(
    ("header", "cells", "values"),
    [
        ("label", ["1", "2", "2"], {"labels": ["2", "1"]}),
        ("label", ["x,y", "", "y"], {"task": "multi_label"}),
        ("x,y", ["1,0", "0,0", "1,1"], {"task": "multi_label", "label_columns": ["x", "y"]}),
        ("label", ["0.1", "-3", "1e9"], {"task": "regression"}),
    ],
)
def test_a_table_of_rows_reads_back_equal(tmp_path, header, cells, values):
    """With texts that cleaning changes, and would change again."""
    path = tmp_path / "rows.csv"
    texts = ["a &amp;lt; b", "one<br>two", "c"] * 20
    lines = [f"text,{header}"]
    for i, text in enumerate(texts):
        cell = cells[i % 3] if header == "x,y" else f'"{cells[i % 3]}"'
        lines.append(f'"{text} {i}",{cell}')
    path.write_text("\n".join(lines), encoding="utf-8")
    document = {"data": {"source": str(path), **values}, "model": {"name": "bundled"}}
    config = Recipe.model_validate(document | {"name": "toy"}).data
    data = load_data(config)
    tables = {
        role: make_table(data.config, rows, role="train", names=data.labels)
        for role, rows in (("train", data.train), ("validation", data.validation))
    }
    source = make_source(tables, for_training=True)
    again = load_data(make_table_config(data.config, data.labels), source=source)
    assert again.labels == data.labels
    assert again.train.fingerprint == data.train.fingerprint
    assert again.validation.fingerprint == data.validation.fingerprint


@pytest.fixture(scope="module")
def recipe(tiny_base, tmp_path_factory) -> Recipe:
    """A recipe over 1,001 rows, some twice, and a test file that is not there."""
    folder = tmp_path_factory.mktemp("folds")
    rows = toy_rows(991)
    write_csv(folder / "train.csv", [*rows, *rows[:10]])
    path = folder / "toy.yaml"
    path.write_text(
        f"data: {{source: {{train: {folder}/train.csv, test: {folder}/test.csv}}}}\n"
        f"model: {{name: {tiny_base}, max_length: 16, dtype: float32}}\n"
        f"train: {{batch_size: 16, max_steps: 2}}\noutput: {{dir: {folder}/adapter}}\n",
        encoding="utf-8",
    )
    return Recipe.load(path)


@pytest.fixture(scope="module")
def done(recipe):
    """A cross-validation that stopped in its second fold, and went on."""
    train = train_module.train

    def fail_in_the_second(run, **values):
        if run.folder.name == "fold-2":
            raise TrainingError("stopped")
        return train(run, **values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "train", fail_in_the_second)
        with pytest.raises(TrainingError):
            cross_validate(recipe, num_folds=3)
    trained = []

    def note(run, **values):
        trained.append(run.folder.name)
        return train(run, **values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "train", note)
        found = cross_validate(recipe, num_folds=3)
    assert trained == ["fold-2", "fold-3"]
    return found


def test_each_of_1001_rows_has_one_prediction_and_no_model_is_kept(recipe, done):
    found = load_file(done.predictions)
    assert found["row"].tolist() == list(range(1, 1002))
    assert np.isfinite(found["logits"]).all()
    assert not found["is_validation"].any()
    assert np.bincount(found["fold"]).tolist()[1:] == pytest.approx([333, 334, 334], abs=3)
    assert [path.name for path in done.predictions.parent.iterdir()] == [OUT_OF_FOLD]
    is_right = found["logits"].argmax(axis=1) == found["labels"]
    assert done.all_rows["accuracy"].value == pytest.approx(is_right.mean())
    means = [is_right[found["fold"] == fold].mean() for fold in (1, 2, 3)]
    assert done.folds["accuracy"] == pytest.approx(means)
    assert done.means["accuracy"] == pytest.approx(np.mean(means))
    assert json.loads(json.dumps(done.as_dict()))["num_rows"] == 1001
    assert make_columns(done)["metric"][0] == "accuracy"


def test_a_finished_call_trains_nothing_and_other_folds_are_refused(recipe, done, monkeypatch):
    monkeypatch.setattr(train_module, "train", None)
    again = cross_validate(recipe, num_folds=3)
    assert again.as_dict() == done.as_dict()
    changes = {
        "number of folds": (recipe, 4),
        "train.learning_rate": (
            recipe.model_copy(
                update={"train": recipe.train.model_copy(update={"learning_rate": 0.5})}
            ),
            3,
        ),
    }
    for name, (changed, num_folds) in changes.items():
        with pytest.raises(AdapterError, match=f"folds with another {name}; delete or move"):
            cross_validate(changed, num_folds=num_folds)


def test_other_rows_and_a_broken_file_are_refused(recipe, done, tmp_path):
    folder = Path(f"{recipe.folder}.folds")
    source = recipe.data.source["train"]
    written = Path(source).read_text(encoding="utf-8")
    saved = (folder / OUT_OF_FOLD).read_bytes()
    try:
        Path(source).write_text(written.replace("good", "bad", 1), encoding="utf-8")
        with pytest.raises(AdapterError, match="another text or label of a row"):
            cross_validate(recipe, num_folds=3)
        Path(source).write_text(written, encoding="utf-8")
        (folder / OUT_OF_FOLD).write_bytes(saved[:100])
        with pytest.raises(AdapterError, match="cannot be read"):
            cross_validate(recipe, num_folds=3)
    finally:
        Path(source).write_text(written, encoding="utf-8")
        (folder / OUT_OF_FOLD).write_bytes(saved)


def test_rows_of_a_validation_file_are_in_folds_too_and_models_can_be_kept(tiny_base, tmp_path):
    rows = toy_rows(60)
    values = {"positive": "2", "negative": "1"}
    write_csv(tmp_path / "train.csv", [(text, values[label]) for text, label in rows[:40]])
    write_csv(tmp_path / "validation.csv", [(text, values[label]) for text, label in rows[40:]])
    document = {
        "name": "toy",
        "data": {
            "task": "multi_label",
            "source": {role: str(tmp_path / f"{role}.csv") for role in ("train", "validation")},
        },
        "model": {"name": str(tiny_base), "max_length": 16, "dtype": "float32"},
        "train": {"max_steps": 1, "batch_size": 16},
        "output": {"dir": str(tmp_path / "adapter")},
    }
    recipe = Recipe.model_validate(document)
    folded = fold_rows(recipe, num_folds=2)
    found = predict_folds(folded, keep_models=True)
    assert np.isfinite(found.logits).all()
    assert folded.roles == ["train"] * 40 + ["validation"] * 20
    assert folded.rows.numbers.tolist() == [*range(1, 41), *range(1, 21)]
    for fold in (1, 2):
        assert (tmp_path / f"adapter.folds/fold-{fold}/card.json").is_file()
    assert cross_validate(recipe, num_folds=2).num_rows == 60
