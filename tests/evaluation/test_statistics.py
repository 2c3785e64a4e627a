"""Bootstrap intervals and the two paired comparisons."""

import json

import numpy as np
import pytest

from lora_sentiment.errors import DataError, RecipeError
from lora_sentiment.evaluation.statistics import (
    Interval,
    mcnemar,
    paired_bootstrap,
    percentile_interval,
    resample_weights,
)


def draw_correct(num_rows, accuracy, *, seed):
    return np.random.default_rng(seed).random(num_rows) < accuracy


def test_interval_goes_to_json_with_a_note_only_where_there_is_one():
    assert (
        json.dumps(Interval(0.5, 0.25, 0.75).as_dict())
        == '{"value": 0.5, "low": 0.25, "high": 0.75}'
    )
    assert Interval(None, None, None, "no value: x").as_dict()["note"] == "no value: x"


@pytest.mark.parametrize("num_rows", [1, 7, 300_000])
def test_each_resample_draws_as_many_rows_as_there_are(num_rows):
    chunks = list(resample_weights(num_rows, num_resamples=15, seed=0))
    assert sum(len(weights) for weights in chunks) == 15
    for weights in chunks:
        assert weights.shape[1] == num_rows
        assert (weights.sum(axis=1) == num_rows).all()
        assert weights.nbytes <= 2**24


def test_percentiles_are_those_of_the_resamples():
    interval = percentile_interval(0.4, np.arange(101.0), confidence=0.9)
    assert (interval.value, interval.note) == (0.4, None)
    assert (interval.low, interval.high) == pytest.approx((5, 95))


def test_undefined_resamples_are_left_out_and_counted():
    resampled = np.array([1.0, np.nan, 3.0, np.nan])
    interval = percentile_interval(2.0, resampled, confidence=0.5, undefined_if="one label only")
    assert (interval.low, interval.high) == (1.5, 2.5)
    assert interval.note == "2 of 4 resamples left out: one label only"
    nothing_left = percentile_interval(
        2.0, np.full(3, np.nan), confidence=0.5, undefined_if="one label only"
    )
    assert nothing_left == Interval(2.0, None, None, "3 of 3 resamples left out: one label only")
    assert percentile_interval(np.nan, resampled, confidence=0.5).value is None


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    num_covered = 0
    for seed in range(100):
        correct_a, correct_b = (
            draw_correct(200, 0.8, seed=2 * seed),
            draw_correct(200, 0.7, seed=2 * seed + 1),
        )
        interval = paired_bootstrap(
            correct_a, correct_b, confidence=0.9, num_resamples=200, seed=seed
        )
        num_covered += interval.low <= 0.1 <= interval.high
    assert 0.83 <= num_covered / 100 <= 0.96


def test_paired_bootstrap_is_the_difference_a_minus_b():
    correct_a, correct_b = draw_correct(400, 0.9, seed=0), draw_correct(400, 0.6, seed=1)
    interval = paired_bootstrap(correct_a, correct_b)
    assert interval.value == pytest.approx(correct_a.mean() - correct_b.mean())
    assert 0 < interval.low < interval.value < interval.high
    mirrored = paired_bootstrap(correct_b, correct_a)
    assert (mirrored.low, mirrored.high) == pytest.approx((-interval.high, -interval.low))
    assert interval == paired_bootstrap(correct_a, correct_b)


@pytest.mark.parametrize(
    ("num_only_a", "num_only_b", "p"),
    [(0, 0, 1.0), (5, 5, 1.0), (1, 0, 1.0), (5, 0, 2 / 32), (8, 2, 2 * (1 + 10 + 45) / 1024)],
)
def test_mcnemar_by_hand(num_only_a, num_only_b, p):
    both = [True, False] * 10
    correct_a = np.array([True] * num_only_a + [False] * num_only_b + both)
    correct_b = np.array([False] * num_only_a + [True] * num_only_b + both)
    assert mcnemar(correct_a, correct_b) == pytest.approx(p)
    assert mcnemar(correct_b, correct_a) == pytest.approx(p)


@pytest.mark.parametrize("compare", [mcnemar, paired_bootstrap])
def test_comparisons_refuse_what_is_not_paired(compare):
    yes = np.ones(4, dtype=bool)
    with pytest.raises(DataError, match="4 rows for A and 3 for B"):
        compare(yes, yes[:3])
    with pytest.raises(DataError, match="correct_b: found int64"):
        compare(yes, np.ones(4, dtype=np.int64))
    with pytest.raises(DataError, match="correct_a: found bool values of shape"):
        compare(yes[:0], yes[:0])


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95, float("nan")])
def test_confidence_is_a_share(confidence):
    with pytest.raises(RecipeError, match="confidence: found"):
        percentile_interval(0.5, np.ones(3), confidence=confidence)


def test_resampling_needs_rows_and_resamples():
    with pytest.raises(DataError, match="no rows"):
        next(resample_weights(0, num_resamples=5, seed=0))
    with pytest.raises(RecipeError, match="num_resamples: found 0"):
        next(resample_weights(5, num_resamples=0, seed=0))
