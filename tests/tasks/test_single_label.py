"""The loss does not depend on how a step is cut; the temperature gives validation the lowest log loss."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F

from lora_sentiment.errors import DataError, ModelError, RecipeError
from lora_sentiment.tasks.single_label import (
    TEMPERATURE_BOUNDS,
    fit_temperature,
    loss_sum,
    make_class_weights,
    softmax,
    total_weight,
)

LOWEST, HIGHEST = TEMPERATURE_BOUNDS


def test_half_precision_logits_are_summed_in_fp32():
    logits = torch.zeros(3000, 2, dtype=torch.bfloat16)
    assert loss_sum(logits, torch.zeros(3000, dtype=torch.long)).dtype == torch.float32


@given(
    labels=st.lists(st.integers(0, 2), min_size=1, max_size=20),
    cuts=st.lists(st.integers(0, 20), max_size=4),
    weights=st.none() | st.lists(st.floats(0.01, 100), min_size=3, max_size=3),
    smoothing=st.sampled_from([0.0, 0.1, 0.7]),
)
def test_the_loss_of_a_step_is_torchs_mean_however_it_is_cut(labels, cuts, weights, smoothing):
    """The parts are micro-batches or the shares of processes. Each is divided by the weight of the whole step."""
    generator = torch.Generator().manual_seed(len(labels))
    logits = torch.randn(len(labels), 3, generator=generator, dtype=torch.float32)
    own = torch.tensor(labels)
    array = None if weights is None else np.array(weights, dtype=np.float32)
    tensor = None if weights is None else torch.from_numpy(array)
    whole = F.cross_entropy(logits, own, weight=tensor, label_smoothing=smoothing)
    total = total_weight(own.numpy(), array)
    ends = sorted({min(cut, len(labels)) for cut in cuts} | {0, len(labels)})
    parts = [
        loss_sum(logits[a:b], own[a:b], class_weights=tensor, label_smoothing=smoothing) / total
        for a, b in itertools.pairwise(ends)
    ]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weights_of_one_give_the_bits_of_no_weights(smoothing):
    logits = torch.randn(37, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(37) % 4
    ones = torch.ones(4)
    weighted = loss_sum(logits, labels, class_weights=ones, label_smoothing=smoothing)
    assert torch.equal(weighted, loss_sum(logits, labels, label_smoothing=smoothing))
    assert total_weight(labels.numpy(), ones.numpy()) == total_weight(labels.numpy(), None) == 37


def test_balanced_weights_are_those_of_scikit_learn():
    labels = np.array([0] * 7 + [1] * 2 + [2] * 31)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    weights = make_class_weights("balanced", labels=labels, names="abc")
    assert weights.tolist() == pytest.approx(expected.tolist())
    with pytest.raises(DataError, match="balanced: no training row has the label 'd', 'e'"):
        make_class_weights("balanced", labels=labels, names="abcde")


def test_a_list_of_weights_is_in_the_order_of_the_labels():
    labels = np.array([0, 1, 1])
    assert make_class_weights((0.5, 2.0), labels=labels, names=["no", "yes"]).tolist() == [0.5, 2.0]
    assert make_class_weights(None, labels=labels, names=["no", "yes"]) is None
    message = "found 3 weights; give one for each of the 2 labels, in this order: no, yes"
    with pytest.raises(RecipeError, match=message):
        make_class_weights((1.0, 2.0, 3.0), labels=labels, names=["no", "yes"])


def draw(num_rows, num_labels, *, seed):
    """Logits whose softmax is the true distribution of their labels."""
    generator = np.random.default_rng(seed)
    logits = 2 * generator.normal(size=(num_rows, num_labels))
    labels = (softmax(logits).cumsum(axis=1) < generator.random((num_rows, 1))).sum(axis=1)
    return logits, labels


@pytest.mark.parametrize("num_labels", [2, 5])
@pytest.mark.parametrize("factor", [0.4, 1.0, 3.0])
def test_the_factor_by_which_logits_are_too_large_is_the_temperature(factor, num_labels):
    logits, labels = draw(20_000, num_labels, seed=1)
    temperature = fit_temperature(factor * logits, labels)
    assert temperature == pytest.approx(factor, rel=0.05)
    assert temperature == fit_temperature(factor * logits, labels)
    shifted = fit_temperature(factor * logits + 7.5, labels)
    assert shifted == pytest.approx(temperature, rel=1e-9)


def exact_log_loss(logits, labels, temperature):
    """The log loss without clipped probabilities."""
    scaled = logits / temperature
    right = scaled[np.arange(len(labels)), labels]
    return float(np.mean(np.logaddexp.reduce(scaled, axis=1) - right))


@settings(max_examples=60)
@given(
    num_rows=st.integers(1, 40),
    num_labels=st.integers(2, 5),
    spread=st.sampled_from([0.1, 1.0, 30.0, 1e4]),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_other_temperature_has_a_lower_log_loss(num_rows, num_labels, spread, seed):
    logits, labels = draw(num_rows, num_labels, seed=seed)
    logits = spread * logits
    temperature = fit_temperature(logits, labels)
    assert LOWEST <= temperature <= HIGHEST
    best = minimize_scalar(
        lambda inverse: exact_log_loss(logits, labels, 1 / inverse),
        bounds=(1 / HIGHEST, 1 / LOWEST),
        method="bounded",
    ).fun
    assert exact_log_loss(logits, labels, temperature) <= best + 1e-9 * max(1, best)


def test_rows_all_right_all_wrong_or_all_equal_give_a_bound_or_one():
    labels = np.array([0, 1, 2, 1])
    assert fit_temperature(np.eye(3)[labels], labels) == LOWEST
    assert fit_temperature(-np.eye(3)[labels], labels) == HIGHEST
    assert fit_temperature(np.zeros((4, 3)), labels) == 1.0
    assert fit_temperature(1e5 * np.eye(3)[labels], labels) == 1.0


@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        (np.array([[0.0, np.nan]]), np.array([0]), ModelError, "nan or infinity"),
        (np.zeros((0, 2)), np.zeros(0, dtype=int), DataError, "no rows"),
    ],
)
def test_a_temperature_needs_finite_logits_and_rows(logits, labels, error, message):
    with pytest.raises(error, match=message):
        fit_temperature(logits, labels)
