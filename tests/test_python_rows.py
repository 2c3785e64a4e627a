"""Rows that a Python program gives: `train(recipe, data=...)` and `evaluate(folder, data=...)`."""

import json

import numpy as np
import pandas as pd
import pytest
import yaml
from datasets import ClassLabel, Dataset, DatasetDict

from lora_sentiment import evaluate
from lora_sentiment.data.rows import load_data, load_judged
from lora_sentiment.data.sources import make_source, mark_as_given
from lora_sentiment.errors import DataError, TrainingError
from lora_sentiment.recipe.data import FROM_PYTHON, DataConfig
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.train import train
from lora_sentiment.training import loop
from tests.conftest import toy_rows, write_csv, write_toy, write_toy_recipe
from tests.test_docs import ROOT, find_fences

KINDS = {
    "frame": pd.DataFrame,
    "data set": Dataset.from_list,
    "dicts": list,
}
"""The three kinds of tables, each made of a list of dicts."""
ROWS = [{"text": text, "label": label} for text, label in toy_rows(161)]
TRAIN, TEST = ROWS[:120], ROWS[120:]
WEIGHTS = "adapter_model.safetensors"


def given(make, train_rows=TRAIN, test_rows=TEST):
    return {"train": make(train_rows), "test": make(test_rows)}


def load(recipe, folder, *overrides):
    own = (f"output.dir={folder}", "train.max_steps=3", *overrides)
    return Recipe.load(recipe, own)


def read(data, **values):
    return load_data(
        mark_as_given(DataConfig(source="not read", **values)),
        source=make_source(data, for_training=True),
    )


@pytest.fixture(scope="module")
def of_file(tmp_path_factory, tiny_base):
    """A run of three steps on the same rows in files; do not change its folder."""
    folder = tmp_path_factory.mktemp("of_file")
    return train(load(write_toy_recipe(write_toy(folder), tiny_base), folder / "adapter"))


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_a_table_trains_the_adapter_of_the_same_rows_in_a_file(toy_recipe, of_file, tmp_path, make):
    # The file that the recipe names is not read.
    recipe = load(toy_recipe, tmp_path / "python", "data.source=absent.csv")
    of_python = train(recipe, data=given(make))
    for name in (WEIGHTS, "predictions.safetensors"):
        assert (of_python.adapter / name).read_bytes() == (of_file.adapter / name).read_bytes()
    assert of_python.report["test"] == of_file.report["test"]
    assert of_python.report["data"] == of_file.report["data"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_base):
    """A folder that was trained on rows from Python; do not change its files."""
    folder = tmp_path_factory.mktemp("python_rows")
    recipe = Recipe.model_validate(
        {
            "name": "mine",
            "data": {"source": "absent.csv"},
            "model": {"name": str(tiny_base), "max_length": 16, "dtype": "float32"},
            "train": {"max_steps": 8, "batch_size": 16, "learning_rate": 1e-2},
            "output": {"dir": str(folder / "adapter")},
        }
    )
    return train(recipe, data=given(list)).adapter


def test_the_folder_says_that_its_rows_came_from_python(adapter):
    recipe = yaml.safe_load((adapter / "recipe.yaml").read_text(encoding="utf-8"))
    card = json.loads((adapter / "card.json").read_text(encoding="utf-8"))
    model_card = (adapter / "README.md").read_text(encoding="utf-8")
    assert recipe["data"]["source"] == card["data"]["config"]["source"] == FROM_PYTHON
    assert f"on `{FROM_PYTHON}`" in model_card
    assert f"name: {FROM_PYTHON}" in model_card
    for role in ("train", "validation"):
        assert card["data"][f"{role}_sha256"] in model_card


def test_a_folder_is_evaluated_on_rows_from_python_and_never_on_others(adapter):
    report = json.loads((adapter / "report.json").read_text(encoding="utf-8"))
    found = evaluate(adapter, data={"test": pd.DataFrame(TEST)}, dtype="float32")
    assert found.num_rows == 41
    assert found.scores["accuracy"].value == pytest.approx(report["test"]["accuracy"]["value"])
    renamed = [{"words": row["text"], "label": row["label"]} for row in TEST]
    other = evaluate(adapter, data={"dev": renamed}, split="dev", text_column="words")
    assert other.scores["accuracy"].value == found.scores["accuracy"].value
    for split in ("test", "validation"):
        with pytest.raises(
            DataError, match=r"not stored; give them again in Python as data=.*--source"
        ):
            evaluate(adapter, split=split)
    with pytest.raises(DataError, match="data: is empty"):
        evaluate(adapter, data={})
    with pytest.raises(DataError, match="split: found 'test'; data has dev"):
        evaluate(adapter, data={"dev": TEST})
    for more in ({"source": "test.csv"}, {"encoding": "latin-1"}):
        with pytest.raises(DataError, match="data replaces source, and has no encoding"):
            evaluate(adapter, data={"test": TEST}, **more)


def test_a_saved_recipe_does_not_train_without_its_rows(adapter, tmp_path):
    recipe = Recipe.load(adapter / "recipe.yaml", [f"output.dir={tmp_path}/again"])
    with pytest.raises(DataError, match=r"^data\.source 'rows from Python': these rows are not"):
        train(recipe)


def test_a_stopped_run_resumes_on_the_same_rows_alone(toy_recipe, of_file, tmp_path, monkeypatch):
    recipe = load(toy_recipe, tmp_path / "stopped", "train.save_steps=2")
    step = loop._Loop._step

    def stop(self, number, *arguments):
        if number == 3:
            raise TrainingError("stopped here")
        return step(self, number, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "_step", stop)
        with pytest.raises(TrainingError, match="stopped here"):
            train(recipe, data=given(pd.DataFrame))
    changed = [{**TRAIN[0], "text": "a fine film"}, *TRAIN[1:]]
    with pytest.raises(TrainingError, match="train_sha256"):
        train(recipe, data=given(list, changed))
    # Equal rows in another kind of table are the same rows.
    resumed = train(recipe, data=given(list))
    assert resumed.history.resumed == [2]
    assert (resumed.adapter / WEIGHTS).read_bytes() == (of_file.adapter / WEIGHTS).read_bytes()


def test_the_rules_of_the_data_section_hold(tmp_path):
    rows = [*TRAIN, {"text": " ", "label": "positive"}, {"text": "a<br />film", "label": "bad"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    values = {
        "labels": ["positive", "negative"],
        "on_bad_row": "drop",
        "max_train_rows": 60,
        "test_fraction": 0.2,
    }
    of_file = load_data(DataConfig(source=str(path), **values))
    for make in KINDS.values():
        found = read({"train": make(rows)}, **values)
        assert found.labels == ("positive", "negative")
        assert found.counts == of_file.counts
        for part in ("train", "validation", "carved_test"):
            assert getattr(found, part).fingerprint == getattr(of_file, part).fingerprint


@pytest.mark.parametrize(
    ("task", "labels", "dtype"),
    [
        ("single_label", [0, 1], "int64"),
        ("single_label", [True, False], "bool"),
        ("single_label", ["good", "bad"], "category"),
        ("multi_label", [["a", "b"], []], "object"),
        ("regression", [1.5, 4], "float32"),
    ],
)
def test_cells_of_numpy_and_pandas_are_read_as_those_of_python(task, labels, dtype):
    texts = [f"text {i}" for i in range(40)]
    column = [labels[i % 2] for i in range(40)]
    rows = [{"text": text, "label": label} for text, label in zip(texts, column, strict=True)]
    expected = read({"train": rows}, task=task)
    frame = pd.DataFrame({"label": pd.Series(column, dtype=dtype), "text": texts})
    frame.index = [7] * 40
    of_numpy = [row | {"label": np.array(row["label"])[()]} for row in rows]
    for table in (frame, of_numpy, Dataset.from_list(rows)):
        found = read({"train": table}, task=task)
        assert found.labels == expected.labels
        assert found.train.fingerprint == expected.train.fingerprint


def test_a_data_set_with_splits_and_label_names_of_its_own():
    coded = [{"text": text, "label": i % 2} for i, (text, _) in enumerate(toy_rows(40))]
    table = Dataset.from_list(coded).cast_column("label", ClassLabel(names=["up", "down"]))
    data = read(DatasetDict({"train": table, "dev": table.select(range(10))}))
    assert data.labels == data.config.labels == ("up", "down")
    assert data.judged == ("dev",)
    rows, _ = load_judged(data.config, role="dev", labels=data.labels, source=data.source)
    assert rows.labels.tolist() == [0, 1] * 5


def test_missing_cells_are_bad_rows():
    rows = [*TRAIN, {"text": None, "label": "positive"}, {"text": "a film", "label": None}]
    for make in KINDS.values():
        with pytest.raises(DataError) as caught:
            read({"train": make(rows)})
        assert "data['train']: row 121: text is missing" in str(caught.value)
        assert "data['train']: row 122: label is missing" in str(caught.value)


def test_where_no_cell_holds_labels_the_first_one_is_shown():
    rows = [{"text": f"text {i}", "label": [0.5, 1.5]} for i in range(40)]
    with pytest.raises(
        DataError, match=r"row 1, column 'label': found \[0.5, 1.5\]; allowed: a list"
    ):
        read({"train": rows}, task="multi_label")


FRAME = pd.DataFrame(TRAIN)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (FRAME, "data: found DataFrame; allowed: a dict from role to table"),
        ({}, "data: has no 'train'"),
        ({"test": FRAME}, "data: has no 'train'"),
        ({"train": FRAME, "tets": FRAME}, "data: found split 'tets'; did you mean 'test'?"),
        ({"train": FRAME, 3: FRAME}, "data: found split '3'; allowed: train, validation, test"),
        (
            {"train": "train.csv"},
            r"data\['train'\]: found str; allowed: a pandas DataFrame, a datasets.Dataset or a list",
        ),
        ({"train": TRAIN, "test": iter(TEST)}, r"data\['test'\]: found list_iterator; allowed"),
        ({"train": [TRAIN[0], "text"]}, r"data\['train'\]: row 2 is str, not a dict"),
        ({"train": []}, r"data\['train'\]: has no rows"),
        ({"train": FRAME[:0]}, r"data\['train'\]: has no rows; use another file, split or table"),
        ({"train": pd.DataFrame([("a", "b")])}, r"data\['train'\]: the column name 0 is int"),
        (
            {"train": pd.concat([FRAME, FRAME], axis=1)},
            r"data\['train'\]: column 3 of 4 has the name of column 1, 'text'",
        ),
        (
            {"train": FRAME, "test": FRAME.rename(columns={"label": "labels"})},
            r"data\['test'\]: no column 'label'; the columns are text, labels; did you mean",
        ),
        (
            {"train": [*TRAIN, {"text": 5, "label": "positive"}]},
            r"data\['train'\]: row 121: text is int, not a string",
        ),
    ],
)
def test_what_is_no_table_is_told_in_one_message(toy_recipe, tmp_path, data, message):
    recipe = load(toy_recipe, tmp_path / "none")
    with pytest.raises(DataError, match=f"^{message}"):
        train(recipe, data=data)
    assert not recipe.folder.exists()


def test_the_example_of_the_page_runs(toy_recipe, tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    example = next(fence.text for fence in find_fences(page) if fence.language == "python")
    (tmp_path / "recipes").mkdir()
    toy_recipe.rename(tmp_path / "recipes/mine.yaml")
    write_csv(tmp_path / "recipes/my_data.csv", toy_rows(60))
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert "'value'" in capsys.readouterr().out
