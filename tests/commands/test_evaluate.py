import json

import pytest

from lora_sentiment.commands.evaluate import evaluate
from lora_sentiment.errors import AdapterError, DataError, ModelError
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.train import train


@pytest.fixture
def trained(toy_recipe):
    return train(Recipe.load(toy_recipe, ["train.num_train_epochs=2"]))


def test_the_folder_alone_gives_the_reports_figures(trained):
    for split in ("test", "validation"):
        found = evaluate(trained.adapter, split=split, dtype="float32")
        for name, interval in found.scores.items():
            assert interval.value == pytest.approx(
                trained.report[split][name]["value"], abs=1e-5
            ), name


def test_another_file_can_be_judged(trained, toy):
    found = evaluate(trained.adapter, source=str(toy / "train.csv"))
    assert found.num_rows == 120
    assert found.as_dict()["accuracy"]["value"] == found.scores["accuracy"].value


def test_a_source_without_the_split_says_what_to_do(toy_recipe, toy):
    run = train(Recipe.load(toy_recipe, [f"data.source={toy}/train.csv"]))
    assert "test" not in run.report
    with pytest.raises(
        DataError, match="use --split validation; other rows can be named with --source"
    ):
        evaluate(run.adapter)


def test_rows_that_changed_since_training_are_refused(trained, toy):
    with (toy / "train.csv").open("a") as file:
        file.write("another,positive\n")
    with pytest.raises(AdapterError, match="changed since training"):
        evaluate(trained.adapter, split="validation")


def test_an_unknown_split_or_dtype_is_refused(trained):
    with pytest.raises(DataError, match="found 'train'; allowed: test, validation"):
        evaluate(trained.adapter, split="train")
    with pytest.raises(ModelError, match="found 'bf16'; allowed: auto, float32"):
        evaluate(trained.adapter, dtype="bf16")


def test_a_carved_test_split_is_carved_again(toy_recipe, toy):
    run = train(Recipe.load(toy_recipe, [f"data.source={toy}/train.csv", "data.test_fraction=0.2"]))
    found = evaluate(run.adapter, dtype="float32")
    assert found.num_rows == 24
    assert found.scores["log_loss"].value == pytest.approx(
        run.report["test"]["log_loss"]["value"], abs=1e-5
    )


@pytest.fixture
def with_dev(toy_recipe, toy):
    lines = (toy / "test.csv").read_text().splitlines(keepends=True)
    (toy / "dev.csv").write_text("".join(lines[:22]))
    return train(
        Recipe.load(toy_recipe, [f"data.source={{train: {toy}/train.csv, dev: {toy}/dev.csv}}"])
    )


def test_every_judged_role_can_be_judged_again(with_dev):
    found = evaluate(with_dev.adapter, split="dev", dtype="float32")
    assert (found.split, found.num_rows) == ("dev", 21)
    assert (
        set(found.scores)
        == set(with_dev.report["dev"])
        >= {"calibrated_log_loss", "calibrated_ece"}
    )
    for name, interval in found.scores.items():
        assert interval.value == pytest.approx(with_dev.report["dev"][name]["value"], abs=1e-5), (
            name
        )
    assert evaluate(with_dev.adapter, split="validation").num_rows == 12


def test_a_role_that_was_not_judged_is_refused_with_those_that_were(with_dev):
    with pytest.raises(DataError, match="found 'test'; allowed: dev, validation"):
        evaluate(with_dev.adapter)


def test_hidden_labels_cannot_be_judged_again(with_dev, toy):
    (toy / "dev.csv").write_text("text,label\nfine,-1\n")
    with pytest.raises(DataError, match=r"the 1 rows of dev have no labels \(all are -1\)"):
        evaluate(with_dev.adapter, split="dev")


def test_an_adapter_without_a_temperature_is_judged_without(trained):
    path = trained.adapter / "card.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "calibration": None}))
    assert set(trained.report["test"]) - set(evaluate(trained.adapter).scores) == {
        "calibrated_log_loss",
        "calibrated_ece",
    }


@pytest.mark.parametrize("method", ["{kind: head}", "{kind: lora}"])
@pytest.mark.parametrize(("quantize", "dtype"), [("nf4", "bfloat16"), ("int8", "float32")])
def test_a_quantised_adapter_is_rebuilt_and_judged(toy_recipe, method, quantize, dtype):
    overrides = [
        f"method={method}",
        f"model.quantize={quantize}",
        f"model.dtype={dtype}",
        "train.max_steps=2",
    ]
    run = train(Recipe.load(toy_recipe, overrides))
    found = evaluate(run.adapter, dtype=dtype)
    tolerance = 1e-4 if dtype == "float32" else 0.02
    assert found.scores["log_loss"].value == pytest.approx(
        run.report["test"]["log_loss"]["value"], abs=tolerance
    )
