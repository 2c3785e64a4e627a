"""Label sets: the promise by counting, what is refused, and the way from rows to every form of a model."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_sentiment.adapter.folder import load_card
from lora_sentiment.classifier import load
from lora_sentiment.data.rows import load_data
from lora_sentiment.errors import ModelError, RecipeError
from lora_sentiment.recipe.data import DataConfig
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.tasks import SINGLE_LABEL
from lora_sentiment.tasks.label_sets import (
    MAX_SCORES,
    describe_short_labels,
    find_set_thresholds,
    fit_label_scores,
    make_label_set,
)
from lora_sentiment.train import train

NAMES = ("no", "yes")


def make_probabilities(scores, label):
    """Probabilities of two labels; `scores` are 1 minus that of `label`."""
    own = 1 - np.array(scores)
    return np.stack([own, 1 - own] if label == 0 else [1 - own, own], axis=1)


def make_calibration(num_rows):
    """Label sets from rows of `no` with evenly spread scores, and from one row of `yes`."""
    scores = (np.arange(num_rows) + 0.5) / num_rows
    probabilities = np.concatenate([make_probabilities(scores, 0), make_probabilities([0.1], 1)])
    labels = np.array([0] * num_rows + [1])
    return {"temperature": 1.0, "label_scores": fit_label_scores(probabilities, labels)}


@given(st.integers(1, 40), st.sampled_from(range(50, 100)))
def test_of_rows_that_each_stand_aside_once_enough_have_their_label_in_the_set(num_rows, percent):
    """Each of n + 1 exchangeable rows is equally likely to be the new one, so counting them is the promise."""
    scores = np.random.default_rng(num_rows).permutation(num_rows + 1) / (num_rows + 2)
    num_covered = 0
    for new in range(num_rows + 1):
        others = np.delete(scores, new)
        labels = np.zeros(num_rows, dtype=np.int64)
        calibration = {"label_scores": fit_label_scores(make_probabilities(others, 0), labels)}
        thresholds = find_set_thresholds(calibration, percent / 100)
        (row,) = make_probabilities(scores[[new]], 0)
        num_covered += "no" in make_label_set(row, thresholds, NAMES)
    assert num_covered == math.ceil((num_rows + 1) * percent / 100 - 1e-9)


@pytest.mark.parametrize(("coverage", "num_needed"), [(0.5, 1), (0.9, 9), (0.95, 19), (0.99, 99)])
def test_a_label_with_too_few_rows_stands_in_every_set_and_is_named(coverage, num_needed):
    enough, short = make_calibration(num_needed), make_calibration(num_needed - 1)
    certain_yes = np.array([0.0, 1.0])
    for calibration, is_short in ((enough, False), (short, True)):
        thresholds = find_set_thresholds(calibration, coverage)
        assert ("no" in make_label_set(certain_yes, thresholds, NAMES)) is is_short
    told = describe_short_labels(short, coverage, NAMES)
    assert f"needs {num_needed} calibration rows" in told
    assert f"no ({num_needed - 1})" in told
    told = describe_short_labels(enough, coverage, NAMES)
    assert told is None if num_needed == 1 else told.endswith("stand in every set: yes (1)")


def test_the_smallest_coverage_gives_the_smallest_threshold():
    lowest = find_set_thresholds(make_calibration(30), 0.01)
    assert find_set_thresholds(make_calibration(30), 1e-12) == pytest.approx(lowest)


@pytest.mark.parametrize("coverage", [0.0, 1.0, 95.0, -0.1, float("nan")])
def test_what_is_no_coverage_is_refused(coverage):
    with pytest.raises(ModelError, match=r"coverage: found .* allowed: more than 0, less than 1"):
        find_set_thresholds(make_calibration(30), coverage)


@pytest.mark.parametrize("calibration", [None, {"temperature": 1.0}, {"thresholds": [0.5, 0.5]}])
def test_a_model_without_label_sets_says_what_to_do(calibration):
    with pytest.raises(ModelError, match=r"train single labels with data\.calibration_fraction"):
        find_set_thresholds(calibration, 0.95)


@pytest.mark.parametrize("scores", [[[0.1]], [[0.1]] * 3, [0.1, 0.2]])
def test_scores_that_do_not_fit_the_labels_are_refused(scores):
    sound = make_calibration(30)
    assert SINGLE_LABEL.check_answers(NAMES, sound) is None
    fault = SINGLE_LABEL.check_answers(NAMES, {**sound, "label_scores": scores})
    assert fault.startswith("label_scores: allowed: one list of numbers for each of 2 labels")


def test_a_card_holds_a_bounded_number_of_scores_spread_over_all_rows():
    scores = np.linspace(0, 1, 10 * MAX_SCORES)
    (held, _) = fit_label_scores(make_probabilities(scores, 0), np.zeros(len(scores), dtype=int))
    assert MAX_SCORES // 2 < len(held) <= MAX_SCORES
    assert held == sorted(held)
    assert held[len(held) // 2] == pytest.approx(0.5, abs=0.01)


# From rows to a model


def test_calibration_rows_are_carved_last_and_share_no_text(toy):
    values = {"source": str(toy / "train.csv"), "test_fraction": 0.2, "validation_fraction": 0.25}
    before = load_data(DataConfig(**values))
    data = load_data(DataConfig(**values, calibration_fraction=0.5))
    assert data.validation.fingerprint == before.validation.fingerprint
    assert data.carved_test.fingerprint == before.carved_test.fingerprint
    assert len(data.calibration) == len(before.train) // 2
    parts = [data.train, data.validation, data.calibration, data.carved_test]
    assert len(set().union(*(part.texts for part in parts))) == sum(map(len, parts)) == 120
    assert set(data.calibration.digests.tolist()) <= set(data.seen_texts.tolist())
    assert before.calibration is None


@pytest.mark.parametrize("task", ["multi_label", "regression"])
def test_calibration_rows_of_another_task_are_refused(toy_recipe, task):
    with pytest.raises(RecipeError, match=f"task {task} does not have"):
        Recipe.load(toy_recipe, [f"data.task={task}", "data.calibration_fraction=0.1"])


def test_a_trained_adapter_gives_label_sets(toy_recipe, caplog):
    """`benchmarks/coverage.md` measures the promise; `test_every_task.py` has the other forms of a model."""
    caplog.set_level("INFO", "lora_sentiment")
    done = train(Recipe.load(toy_recipe, ["data.calibration_fraction=0.3"]))
    assert "calibrated on rows that chose nothing; coverage 0.95 needs 19" in caplog.text
    card = load_card(done.adapter)
    assert [len(scores) for scores in card.calibration["label_scores"]] == [16, 16]
    assert done.report["data"]["calibration"]["rows"] == 32
    assert [role for role in done.report if role in ("validation", "calibration", "test")] == [
        "validation",
        "test",
    ]
    texts = ["a good film", "the plot was bad", "so it was", "warm cold", " "]
    adapter = load(done.adapter)
    answers = adapter.predict(texts, coverage=0.8)
    scores = [answer.score for answer in adapter.predict(texts, calibrated=True)]
    assert [answer.score for answer in answers] == scores
    assert answers[-1].label_set is None
    for answer in answers[:-1]:
        assert answer.is_certain is (len(answer.label_set) == 1)
    everything = adapter.predict(texts, coverage=0.95)[0]
    assert (everything.label_set, everything.is_certain) == (["negative", "positive"], False)
    assert adapter.predict(texts)[0].label_set is None
    with pytest.raises(ModelError, match="leave out stride or coverage"):
        adapter.predict(texts, coverage=0.8, stride=2)


def test_the_thresholds_decide_an_answer_and_so_the_hash(toy_adapter):
    card = load_card(toy_adapter)
    sets = {**card.calibration, "label_scores": make_calibration(30)["label_scores"]}
    changed = card.model_copy(update={"calibration": sets})
    again = changed.model_validate(json.loads(changed.model_dump_json(by_alias=True)))
    assert again.sha256 == changed.sha256 != card.sha256
