"""Adapters that older versions wrote still load, verify and answer as they did.

tests/saved/make.py wrote them. It says how to add one.
"""

import json
import os

import numpy as np
import pytest

from lora_sentiment.classifier import Classifier, load
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.tasks.single_label import softmax
from tests.saved.make import BASE, EXPECTED, SAVED, compute, open_saved

SAVED_ANSWERS = json.loads(EXPECTED.read_text(encoding="utf-8"))
TEXTS = SAVED_ANSWERS.pop("texts")
NAMES = sorted(
    path.name
    for path in SAVED.iterdir()
    if path.is_dir() and path.name not in ("base", "__pycache__")
)

# Of a logit: this much, and this share of it. With the instructions of torch, oneDNN and MKL
# limited to AVX2 or SSE, the largest difference was 6e-6.
FP32_TOLERANCE = 1e-5
# The 4-bit weights are multiplied in fp32, but rounding adds up to more: noise of 5e-7 in the
# embeddings, about twice the rounding of another CPU, changed a logit by 2e-5. This is what `load`
# allows for the probe.
FOUR_BIT_TOLERANCE = 1e-4
# Products in int8 round their input to 8 bits, so a tiny difference can move a value by a whole
# step. Noise of 1e-7 in the embeddings changed a logit by 0.09, and other instructions changed one
# of the probe by 0.012.
INT8_TOLERANCE = 0.2
TOLERANCES = {"int8": INT8_TOLERANCE, "nf4": FOUR_BIT_TOLERANCE, "fp4": FOUR_BIT_TOLERANCE}
# What a run in bf16 is allowed when it is saved: a share of the largest logit.
BF16_TOLERANCE = 0.1


@pytest.fixture(autouse=True)
def one_core(one_thread, monkeypatch):
    """Loading sets torch's threads to the usable cores, and for matrices this small threads only
    wait."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)


def check(classifier: Classifier, name: str, tolerance: float) -> None:
    """Hold labels, logits and probabilities of a loaded folder against the recorded ones."""
    expected = SAVED_ANSWERS[name]
    logits = np.array(expected["logits"])
    assert classifier.unverified == ()
    assert classifier.labels == tuple(expected["labels"])
    np.testing.assert_allclose(
        compute(classifier, TEXTS), logits, atol=tolerance, rtol=FP32_TOLERANCE
    )
    found = [
        [answer.scores[label] for label in expected["labels"]]
        for answer in classifier.predict(TEXTS)
    ]
    np.testing.assert_allclose(found, softmax(logits), atol=tolerance)


def test_every_folder_has_its_answers():
    assert sorted(SAVED_ANSWERS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_folder_answers_as_it_did(name, monkeypatch):
    if name == "int8":
        # `load` refuses an int8 folder on a CPU whose instructions are not those of training: its
        # probe differs.
        monkeypatch.setattr("lora_sentiment.adapter.folder.PROBE_TOLERANCE", INT8_TOLERANCE)
    check(open_saved(name, SAVED / name), name, TOLERANCES.get(name, FP32_TOLERANCE))


def test_a_folder_trained_in_bf16_answers_in_bf16():
    largest = np.abs(SAVED_ANSWERS["bfloat16"]["logits"]).max()
    classifier = load(SAVED / "bfloat16", base=str(BASE), dtype="bfloat16")
    difference = np.abs(compute(classifier, TEXTS) - SAVED_ANSWERS["bfloat16"]["logits"]).max()
    # Computed in bf16: in fp32 it would be nearer.
    assert 1e-4 < difference < BF16_TOLERANCE * max(1.0, largest)


@pytest.mark.parametrize(
    "name", [name for name in NAMES if (SAVED / name / "recipe.yaml").is_file()]
)
def test_a_saved_recipe_is_read_again(name):
    recipe = Recipe.load(SAVED / name / "recipe.yaml")
    assert recipe.name == name
