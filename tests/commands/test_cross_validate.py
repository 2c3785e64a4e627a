"""Folds: every row is predicted once, by a run that has not seen its text, and a stopped call goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from lora_sentiment import train as train_module
from lora_sentiment.commands import cross_validate as validation
from lora_sentiment.commands.cross_validate import (
    OUT_OF_FOLD,
    cross_validate,
    predict_out_of_fold,
)
from lora_sentiment.commands.suspects import find_suspects
from lora_sentiment.data.rows import Data
from lora_sentiment.errors import AdapterError, DataError, RecipeError, TrainingError
from lora_sentiment.recipe.recipe import Recipe
from tests.commands.test_learning_curve import write_recipe
from tests.conftest import free_port, toy_rows, write_csv

ROOT = Path(__file__).parents[2]


def find_folds(
    path: Path, task: str, monkeypatch, num_folds: int = 5, split_seed: int = 0
) -> list[Data]:
    """The rows that the run of each fold would be given."""
    given = []
    monkeypatch.setattr(validation, "train_rows", lambda recipe, data, *_, **__: given.append(data))
    monkeypatch.setattr(validation, "is_main", lambda: False)
    data = {"source": str(path), "task": task, "split_seed": split_seed}
    document = {"name": "toy", "data": data, "model": {"name": "bundled"}}
    recipe = Recipe.model_validate(document)
    assert predict_out_of_fold(recipe, num_folds=num_folds) == []
    return given


def draw_labels(task: str, num_rows: int) -> list:
    """Labels of a task as a csv file has them, half of which are rare."""
    generator = np.random.default_rng(0)
    shares, names = [0.6, 0.3, 0.1], np.array(["x", "y", "z"])
    if task == "regression":
        return generator.normal(size=num_rows).round(3).tolist()
    if task == "single_label":
        return generator.choice(names, size=num_rows, p=shares).tolist()
    return [",".join(names[generator.random(3) < shares]) for _ in range(num_rows)]


@pytest.mark.parametrize(
    ("task", "spread"), [("single_label", 0.03), ("multi_label", 0.03), ("regression", 0.2)]
)
def test_folds_are_even_stratified_and_keep_equal_texts_together(
    task, spread, tmp_path, monkeypatch
):
    """Of 1,001 rows some texts stand twice, under labels that differ."""
    texts = [f"text {i % 950}" for i in range(1001)]
    table = pd.DataFrame({"text": texts, "label": draw_labels(task, 1001)})
    table.to_csv(tmp_path / "rows.csv", index=False)
    folds = find_folds(tmp_path / "rows.csv", task, monkeypatch)
    held = np.concatenate([data.carved_test.numbers for data in folds])
    assert sorted(held.tolist()) == list(range(1, 1002))
    assert [len(data.carved_test) for data in folds] == pytest.approx([200] * 5, abs=5)
    for data in folds:
        parts = [data.train, data.validation, data.carved_test]
        assert sum(map(len, parts)) == 1001
        assert len(data.validation) == pytest.approx(80, abs=5)
        train, validation, held = (set(part.texts) for part in parts)
        assert len(train | validation | held) == len(train) + len(validation) + len(held)
    shares = []
    for data in folds:
        labels = data.carved_test.labels
        shares.append((np.eye(3)[labels] if task == "single_label" else labels).mean(axis=0))
    assert np.ptp(shares, axis=0).max() < spread


@pytest.mark.parametrize("num_rows", [13, 20, 30, 40])
@pytest.mark.parametrize("num_values", [5, 1000])
def test_folds_of_few_numbers_are_even(num_rows, num_values, tmp_path, monkeypatch):
    rows = [(f"text {i}", str(i * 7 % num_rows % num_values)) for i in range(num_rows)]
    folds = find_folds(write_csv(tmp_path / "rows.csv", rows), "regression", monkeypatch)
    sizes = [len(data.carved_test) for data in folds]
    assert sum(sizes) == num_rows
    assert max(sizes) - min(sizes) <= 1
    assert all(len(data.validation) and len(data.train) for data in folds)


def test_too_few_numbers_for_the_folds_are_refused(tmp_path, monkeypatch):
    path = write_csv(tmp_path / "rows.csv", [("a", "1"), ("b", "2"), ("c", "3")])
    with pytest.raises(DataError, match=r"found \d rows, too few to carve \d+% out of"):
        find_folds(path, "regression", monkeypatch)


@pytest.mark.parametrize("seed", range(8))
def test_a_label_with_a_text_for_each_fold_is_in_each(seed, tmp_path, monkeypatch):
    """One of its texts stands eight times."""
    rows = [(f"text {i}", "pos") for i in range(40)]
    rows += [(f"other {i}", "neg") for i in range(4)] + [("often", "neg")] * 8
    path = write_csv(tmp_path / "rows.csv", rows)
    folds = find_folds(path, "single_label", monkeypatch, num_folds=3, split_seed=seed)
    assert [len(set(data.carved_test.labels)) for data in folds] == [2, 2, 2]


def test_a_label_with_too_few_texts_is_refused_before_training(tmp_path, monkeypatch):
    rows = [*((f"text {i}", "xy"[i % 2]) for i in range(40)), ("a", "z"), ("b", "z")]
    path = write_csv(tmp_path / "rows.csv", rows)
    with pytest.raises(DataError, match=r"label 'z' has too few .*(?s:.)* or lower --folds"):
        find_folds(path, "single_label", monkeypatch, num_folds=3)


def test_folds_do_not_go_on_from_an_adapter_which_may_have_seen_their_rows(toy_recipe):
    recipe = Recipe.load(toy_recipe, ["model.adapter=adapters/any"])
    with pytest.raises(RecipeError, match="may have learned from the rows of a fold"):
        cross_validate(recipe, num_folds=2)


@pytest.fixture(scope="module")
def recipe(tiny_base, tmp_path_factory) -> Recipe:
    """A recipe over 1,001 rows, some twice, and a test file that is not there."""
    folder = tmp_path_factory.mktemp("folds")
    rows = toy_rows(991)
    path = write_recipe(folder, tiny_base, [*rows, *rows[:10]])
    return Recipe.load(path)


@pytest.fixture(scope="module")
def done(recipe):
    """A cross-validation that stopped in its second fold, and went on."""
    train = train_module.train

    def fail_in_the_second(run, **values):
        if run.folder.name == "2-of-3":
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
    assert trained == ["2-of-3", "3-of-3"]
    return found


def test_each_of_1001_rows_has_one_prediction_and_no_model_is_kept(recipe, done):
    folder = Path(f"{recipe.folder}.folds")
    found = load_file(folder / OUT_OF_FOLD)
    assert sorted(found["row"].tolist()) == list(range(1, 1002))
    assert np.isfinite(found["logits"]).all()
    assert not found["is_validation"].any()
    sizes = np.bincount(found["fold"])[1:]
    assert sizes.tolist() == pytest.approx([333, 334, 334], abs=3)
    # Rows 992 to 1001 repeat the first ten, in the same fold.
    place = np.argsort(found["row"])
    assert (found["text"][place[:10]] == found["text"][place[-10:]]).all()
    assert (found["fold"][place[:10]] == found["fold"][place[-10:]]).all()
    assert not [*folder.glob("*/adapter*"), *folder.glob("*/token*")]
    is_right = found["logits"].argmax(axis=1) == found["labels"]
    accuracy = done.loc["accuracy"]
    assert accuracy["value"] == pytest.approx(is_right.mean())
    assert accuracy["low"] < accuracy["value"] < accuracy["high"]
    means = [is_right[found["fold"] == fold].mean() for fold in (1, 2, 3)]
    assert accuracy[["fold 1", "fold 2", "fold 3"]].tolist() == pytest.approx(means)
    assert accuracy["mean"] == pytest.approx(np.mean(means))


def test_a_finished_call_trains_nothing(recipe, done, monkeypatch):
    monkeypatch.setattr(train_module, "train", None)
    assert cross_validate(recipe, num_folds=3).equals(done)


@pytest.mark.parametrize("change", ["a key", "a label"])
def test_a_folder_of_other_folds_is_refused(recipe, done, change):
    source = Path(recipe.data.source["train"])
    text = source.read_text(encoding="utf-8")
    changed = recipe
    if change == "a key":
        changed = recipe.model_copy(
            update={"train": recipe.train.model_copy(update={"learning_rate": 0.5})}
        )
    else:
        source.write_text(text.replace("positive", "negative", 1), encoding="utf-8")
    with pytest.raises(AdapterError, match=r"1-of-3: holds something else .* delete it"):
        cross_validate(changed, num_folds=3)
    source.write_text(text, encoding="utf-8")


def test_suspects_take_the_finished_folds_and_hold_no_text(recipe, done, monkeypatch, tmp_path):
    monkeypatch.setattr(train_module, "train", None)
    find_suspects(recipe, tmp_path / "out.csv", num_folds=3)
    table = pd.read_csv(tmp_path / "out.csv")
    assert len(table)
    assert set(table["likely"]) <= {"positive", "negative"}
    assert not {text for text, _ in toy_rows(1001)} & set(table.astype(str).to_numpy().ravel())


@pytest.mark.slow  # two processes import everything
def test_two_processes_give_the_predictions_of_one(recipe, tmp_path):
    """Other rows are batched together, so the last bits of a logit differ."""
    overrides = ["model.dropout=0", "model.attention_dropout=0", "model.seq_classif_dropout=0"]
    overrides += [f"data.source={recipe.data.source['train']}"]
    (tmp_path / "toy.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(free_port()), "-m", "lora_sentiment.cli", "cross-validate"]
    command += [str(tmp_path / "toy.yaml"), "--folds", "3", "--json", *overrides]
    ended = subprocess.run(
        [*command, f"output.dir={tmp_path}/two"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert ended.returncode == 0, ended.stderr
    own = [*overrides, f"output.dir={tmp_path}/one"]
    figures = cross_validate(Recipe.load(tmp_path / "toy.yaml", own), num_folds=3)
    one, two = (load_file(tmp_path / f"{name}.folds" / OUT_OF_FOLD) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one.keys() - {"logits"}:
        assert (one[name] == two[name]).all(), name
    assert two["logits"] == pytest.approx(one["logits"], abs=1e-4)
    assert json.loads(ended.stdout)["accuracy"]["mean"] == pytest.approx(
        figures.loc["accuracy", "mean"], abs=1e-9
    )


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
    folders = predict_out_of_fold(recipe, num_folds=2)
    assert not (folders[0] / "README.md").exists()
    folders = predict_out_of_fold(recipe, num_folds=2, keep_models=True)
    predict_out_of_fold(recipe, num_folds=2)  # which another command does, too
    assert all((folder / "adapter_model.safetensors").is_file() for folder in folders)
    found = load_file(folders[0].with_name(OUT_OF_FOLD))
    assert sorted(found["row"][found["is_validation"]].tolist()) == list(range(1, 21))
    assert sorted(found["row"][~found["is_validation"]].tolist()) == list(range(1, 41))
    assert cross_validate(recipe, num_folds=2).loc["macro_f1"].notna().all()
