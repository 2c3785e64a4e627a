"""The temperature is the one that makes validation's log-loss least, within its bounds, and changes no decision."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from lora_sentiment.errors import DataError, ModelError
from lora_sentiment.tasks.calibration import TEMPERATURE_BOUNDS, fit_temperature, score_calibrated
from lora_sentiment.tasks.metrics import METRICS, score
from lora_sentiment.tasks.probabilities import softmax

LEAST, GREATEST = TEMPERATURE_BOUNDS


def log_loss(logits, labels, temperature):
    """Without a floor under the probabilities."""
    scaled = logits / temperature
    return float(
        np.mean(np.logaddexp.reduce(scaled, axis=1) - scaled[np.arange(len(labels)), labels])
    )


def drawn_as_told(num_rows, num_labels, *, seed):
    """Logits whose softmax is the true distribution of their labels."""
    generator = np.random.default_rng(seed)
    logits = 2 * generator.normal(size=(num_rows, num_labels))
    labels = (softmax(logits).cumsum(axis=1) < generator.random((num_rows, 1))).sum(axis=1)
    return logits, labels


@pytest.mark.parametrize("num_labels", [2, 5])
@pytest.mark.parametrize("factor", [0.4, 1.0, 3.0])
def test_the_factor_by_which_logits_are_too_sure_is_found(factor, num_labels):
    logits, labels = drawn_as_told(20_000, num_labels, seed=1)
    assert fit_temperature(factor * logits, labels) == pytest.approx(factor, rel=0.05)


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(1, 40),
    num_labels=st.integers(2, 5),
    spread=st.sampled_from([0.1, 1.0, 30.0, 1e4]),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_other_temperature_has_a_lower_log_loss(num_rows, num_labels, spread, seed):
    logits, labels = drawn_as_told(num_rows, num_labels, seed=seed)
    logits = spread * logits
    found = fit_temperature(logits, labels)
    assert LEAST <= found <= GREATEST
    best = minimize_scalar(
        lambda inverse: log_loss(logits, labels, 1 / inverse),
        bounds=(1 / GREATEST, 1 / LEAST),
        method="bounded",
    ).fun
    assert log_loss(logits, labels, found) <= best + 1e-9 * max(1, best)


def test_it_is_the_same_every_time_and_for_shifted_logits():
    logits, labels = drawn_as_told(300, 3, seed=2)
    assert fit_temperature(logits, labels) == fit_temperature(logits, labels)
    assert fit_temperature(logits + 7.5, labels) == pytest.approx(
        fit_temperature(logits, labels), rel=1e-9
    )


def test_all_right_all_wrong_and_all_alike_have_stated_ends():
    labels = np.array([0, 1, 2, 1])
    assert fit_temperature(np.eye(3)[labels], labels) == LEAST
    assert fit_temperature(-np.eye(3)[labels], labels) == GREATEST
    assert fit_temperature(np.zeros((4, 3)), labels) == 1.0
    assert fit_temperature(1e5 * np.eye(3)[labels], labels) == 1.0


def test_calibrated_figures_stand_beside_the_plain_ones():
    logits, labels = drawn_as_told(400, 3, seed=3)
    logits = 3 * logits
    temperature = fit_temperature(logits, labels)
    found = score_calibrated(logits, labels, calibration={"temperature": temperature})
    assert list(found) == [*METRICS, "calibrated_log_loss", "calibrated_ece"]
    assert {name: found[name] for name in METRICS} == score(logits, labels)
    at_temperature = score(logits, labels, temperature=temperature)
    assert found["calibrated_log_loss"] == at_temperature["log_loss"]
    assert found["calibrated_ece"] == at_temperature["ece"]
    assert found["calibrated_log_loss"].value < found["log_loss"].value
    assert found["calibrated_ece"].high < found["ece"].low


def test_an_adapter_without_calibration_has_no_such_figures():
    logits, labels = drawn_as_told(50, 2, seed=4)
    assert list(score_calibrated(logits, labels, calibration=None)) == list(METRICS)


@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        (np.array([[0.0, np.nan]]), np.array([0]), ModelError, "nan or infinity"),
        (np.zeros((0, 2)), np.zeros(0, dtype=int), DataError, "no rows"),
        (np.zeros((2, 2)), np.array([0, 2]), DataError, "found 2 in row 1"),
    ],
)
def test_rows_that_do_not_fit_are_refused(logits, labels, error, message):
    with pytest.raises(error, match=message):
        fit_temperature(logits, labels)
