"""A learning curve: nested parts of the training rows, judged on one set of validation rows."""

import itertools
import json
from pathlib import Path

import pandas as pd
import pytest

from lora_sentiment import train as train_module
from lora_sentiment.cli import main
from lora_sentiment.commands import learning_curve as curve_module
from lora_sentiment.commands.learning_curve import PICTURE, learning_curve
from lora_sentiment.evaluation.plots import plot_learning_curve
from lora_sentiment.recipe.recipe import Recipe
from tests.conftest import toy_rows, write_csv


def write_recipe(folder, tiny_base, rows) -> str:
    write_csv(folder / "train.csv", rows)
    path = folder / "toy.yaml"
    path.write_text(
        f"data: {{source: {{train: {folder}/train.csv, test: {folder}/test.csv}}}}\n"
        f"model: {{name: {tiny_base}, max_length: 16, dtype: float32}}\n"
        f"train: {{batch_size: 16, max_steps: 2}}\noutput: {{dir: {folder}/adapter}}\n",
        encoding="utf-8",
    )
    return str(path)


@pytest.fixture(scope="module")
def done(tiny_base, tmp_path_factory):
    """A recipe without its test file, its curve, and the rows of each run."""
    path = write_recipe(tmp_path_factory.mktemp("curve"), tiny_base, toy_rows(90))
    given = []
    train = train_module.train

    def note(recipe, **values):
        given.append(values["data"])
        return train(recipe, **values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "train", note)
        figures = learning_curve(Recipe.load(path))
    return path, figures, given


def test_parts_are_nested_and_stratified_and_all_are_judged_on_the_same_rows(done):
    _, figures, given = done
    assert figures.index.tolist() == [10, 20, 41, 82]
    for smaller, larger in itertools.pairwise(given):
        assert set(smaller.train.numbers) < set(larger.train.numbers)
    assert len({data.validation.fingerprint for data in given}) == 1
    for data in given:
        assert data.train.labels.mean() == pytest.approx(0.5, abs=1 / len(data.train))
    assert ((figures["low"] <= figures["value"]) & (figures["value"] <= figures["high"])).all()


def test_a_finished_curve_trains_nothing_and_is_drawn(done, monkeypatch, capsys):
    path, figures, _ = done
    monkeypatch.setattr(train_module, "train", None)
    picture = Path(path).with_name("adapter.curve") / PICTURE
    picture.unlink()
    with pytest.raises(SystemExit) as ended:
        main(["learning-curve", path, "--json"])
    assert ended.value.code == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["82"]["value"] == pytest.approx(figures.loc[82, "value"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_part_without_some_label_is_left_out_and_that_is_said(tiny_base, tmp_path, caplog):
    rows = [*toy_rows(90), *((f"rare {i}", "rare") for i in range(4))]
    path = write_recipe(tmp_path, tiny_base, rows)
    figures = learning_curve(Recipe.load(path, ["train.class_weights=balanced"]))
    left_out = caplog.text.count("rows are left out: these rows do not hold every label")
    assert left_out > 0
    assert len(figures) == 4 - left_out


def test_a_part_whose_numbers_are_all_equal_is_left_out(tiny_base, tmp_path, caplog):
    rows = [(text, "5") for text, _ in toy_rows(80)]
    rows[3:5] = [("seldom", "7"), ("rare", "8")]
    overrides = ["data.task=regression", "data.validation_fraction=0.2"]
    recipe = Recipe.load(write_recipe(tmp_path, tiny_base, rows), overrides)
    figures = learning_curve(recipe)
    left_out = caplog.text.count("every value is 5; a regression needs different values")
    assert left_out > 0
    assert len(figures) == 4 - left_out


def test_a_value_outside_of_its_interval_is_drawn(tmp_path):
    figures = pd.DataFrame({"value": [0.1, 0.2], "low": [0.11, 0.1], "high": [0.2, 0.3]}, [10, 20])
    plot_learning_curve(figures, tmp_path / "curve.png", metric="ece", title="toy")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_curve_that_cannot_be_drawn_is_shown(done, monkeypatch, capsys, caplog):
    def fail(*_, **__):
        raise ValueError("no fonts")

    monkeypatch.setattr(curve_module, "plot_learning_curve", fail)
    with pytest.raises(SystemExit) as ended:
        main(["learning-curve", done[0], "--json"])
    assert ended.value.code == 0
    assert "82" in json.loads(capsys.readouterr().out)
    assert "cannot be drawn: no fonts" in caplog.text
