"""The package works without the fast forward pass."""

import pytest

from lora_sentiment import fast
from lora_sentiment.classifier import load
from lora_sentiment.commands.evaluate import evaluate
from lora_sentiment.fast import encoder
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.serve.pool import load_pool
from lora_sentiment.train import train


def test_training_evaluation_and_serving_work_if_the_fast_forward_pass_is_refused(
    toy_recipe, monkeypatch, caplog
):
    def fail(*arguments, **options):
        pytest.fail("the fast forward pass ran")

    monkeypatch.setattr(encoder, "FAST_DEVICES", ("cuda",))
    monkeypatch.setattr(fast.FastForward, "encode", fail)
    monkeypatch.setattr(fast.FastForward, "encode_packed", fail)
    run = train(Recipe.load(toy_recipe))
    assert run.report["train"]["engine"].startswith("stock (the device is cpu")
    with caplog.at_level("INFO", logger="lora_sentiment"):
        accuracy = evaluate(run.adapter).scores["accuracy"].value
        assert accuracy == run.report["test"]["accuracy"]["value"]
        assert len(load(run.adapter).predict(["a good film", "a bad one"])) == 2
        load_pool([run.adapter], watch=None, base=None, dtype="float32")
    assert "stock engine: the device is cpu" in caplog.text
    assert "served merged: the device is cpu" in caplog.text
