"""Every metric against scikit-learn or by hand, its interval, its `evaluate` face and what is refused."""

import socket

import evaluate
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from lora_sentiment.errors import DataError, ModelError, RecipeError
from lora_sentiment.tasks import find_task
from lora_sentiment.tasks.metrics import (
    METRICS,
    ClassificationMetric,
    check_metric,
    confusion_matrix,
    find_metric,
    quick_score,
    score,
    score_calibrated,
)
from lora_sentiment.tasks.single_label import softmax

RANGES = {
    "accuracy": (0, 1),
    "macro_f1": (0, 1),
    "mcc": (-1, 1),
    "log_loss": (0, np.inf),
    "auroc": (0, 1),
    "ece": (0, 1),
}


def draw(num_rows, num_labels, *, seed=0, decimals=8):
    """Rows whose right label tends to have the greater logit; few decimals make tied logits."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(num_labels, size=num_rows)
    logits = generator.normal(size=(num_rows, num_labels)).round(decimals)
    logits[np.arange(num_rows), labels] += 1
    return logits, labels


def expected(probabilities, labels):
    """The figures of scikit-learn, for rows that hold every label; it has no calibration error."""
    predictions, num_labels = probabilities.argmax(axis=1), probabilities.shape[1]
    scores = probabilities[:, 1] if num_labels == 2 else probabilities
    return {
        "accuracy": reference.accuracy_score(labels, predictions),
        "macro_f1": reference.f1_score(labels, predictions, average="macro"),
        "mcc": reference.matthews_corrcoef(labels, predictions),
        "log_loss": reference.log_loss(labels, probabilities, labels=range(num_labels)),
        "auroc": reference.roc_auc_score(labels, scores, multi_class="ovr", average="macro"),
    }


def ece_by_definition(probabilities, labels):
    """Equation 3 of Guo et al. (2017), bin by bin."""
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    total = 0.0
    for edge in range(15):
        inside = (confidence > edge / 15) & (confidence <= (edge + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return total


@pytest.mark.parametrize("num_labels", [2, 5])
@pytest.mark.parametrize("decimals", [8, 0], ids=["distinct", "tied"])
def test_values_equal_scikit_learn(num_labels, decimals):
    logits, labels = draw(500, num_labels, decimals=decimals)
    probabilities = softmax(logits, temperature=1.7)
    intervals = score(logits, labels, temperature=1.7, num_resamples=1)
    values = {name: interval.value for name, interval in intervals.items()}
    assert values.pop("ece") == pytest.approx(ece_by_definition(probabilities, labels), abs=1e-12)
    assert values == pytest.approx(expected(probabilities, labels), abs=1e-12)


@pytest.mark.parametrize("num_labels", [2, 5])
def test_a_weighted_row_counts_as_often_as_its_weight(num_labels):
    logits, labels = draw(120, num_labels, decimals=1)
    probabilities = softmax(logits)
    weights = np.random.default_rng(1).integers(4, size=(3, 120)).astype(float)
    for name, metric in METRICS.items():
        repeated = [np.repeat(np.arange(120), row.astype(int)) for row in weights]
        one_by_one = [
            metric.values(probabilities[r], labels[r], np.ones((1, len(r))))[0] for r in repeated
        ]
        assert metric.values(probabilities, labels, weights) == pytest.approx(
            one_by_one, abs=1e-12
        ), name


@pytest.mark.parametrize("name", METRICS)
def test_quick_score_is_the_value_of_score(name):
    logits, labels = draw(60, 3)
    assert quick_score(logits, labels, name) == score(logits, labels, num_resamples=1)[name].value


@pytest.mark.parametrize("num_labels", [2, 3, 20])
@pytest.mark.parametrize("decimals", [1, 8])
def test_both_ways_of_auroc_are_equal_to_the_bit(num_labels, decimals, monkeypatch):
    found = []
    for most in (0, 7, 1000):
        monkeypatch.setattr("lora_sentiment.tasks.metrics.FEW_ROWS", most)
        logits, labels = draw(90, num_labels, decimals=decimals)
        found.append(score(logits, labels, names=["auroc"], num_resamples=50)["auroc"])
    assert found[0] == found[1] == found[2]


def test_auroc_by_hand_with_ties():
    probability = np.array([0.2, 0.5, 0.5, 0.8])
    logits = np.log(np.column_stack([1 - probability, probability]))
    # Label 1 has 0.5 and 0.8; of its four pairs with 0.2 and 0.5 it wins three and ties one.
    assert quick_score(logits, np.array([0, 0, 1, 1]), "auroc") == 3.5 / 4


def test_ece_by_hand():
    probability = np.array([0.9, 0.9, 0.9, 0.7])
    logits = np.log(np.column_stack([probability, 1 - probability]))
    # Three rows at 0.9, two of them right, and one at 0.7, wrong.
    by_hand = 3 / 4 * abs(2 / 3 - 0.9) + 1 / 4 * abs(0 - 0.7)
    assert quick_score(logits, np.array([0, 0, 1, 1]), "ece") == pytest.approx(by_hand, abs=1e-12)


def test_a_bin_of_confidence_holds_its_upper_edge():
    # 9/15 is an edge: with 8.5/15 it shares a bin, so that their two gaps cancel in part.
    probabilities = np.array([[9 / 15, 6 / 15], [8.5 / 15, 6.5 / 15]])
    value = METRICS["ece"].values(probabilities, np.array([0, 1]), np.ones((1, 2)))
    assert value[0] == pytest.approx(abs((1 - 9 / 15) + (0 - 8.5 / 15)) / 2, abs=1e-12)


def test_log_loss_of_an_impossible_label_is_finite():
    assert quick_score(np.array([[2000.0, 0.0]]), np.array([1]), "log_loss") == pytest.approx(
        36.04, abs=0.01
    )


def test_mcc_of_a_constant_prediction_is_zero():
    assert quick_score(np.array([[1.0, 0.0]] * 4), np.array([0, 1, 0, 1]), "mcc") == 0


def test_auroc_has_no_value_where_all_rows_hold_one_label():
    logits, _ = draw(20, 2)
    interval = score(logits, np.ones(20, dtype=int))["auroc"]
    assert (interval.value, interval.low, interval.high) == (None, None, None)
    assert interval.note == "no value: the rows hold one label only"
    with pytest.raises(DataError, match="auroc has no value: the rows hold one label only"):
        quick_score(logits, np.ones(20, dtype=int), "auroc")


def test_auroc_leaves_out_and_counts_resamples_with_one_label():
    logits, _ = draw(30, 2)
    labels = np.zeros(30, dtype=int)
    labels[0] = 1
    found = score(logits, labels, num_resamples=400)
    assert found["accuracy"].note is None
    assert found["auroc"].low is not None
    num_left_out = int(found["auroc"].note.split(" of 400 resamples left out")[0])
    assert num_left_out / 400 == pytest.approx((1 - 1 / 30) ** 30, abs=0.08)


@pytest.mark.parametrize("name", ["macro_f1", "auroc"])
def test_macro_averages_are_over_the_labels_that_occur(name):
    logits, labels = draw(80, 2)
    with_absent_label = np.column_stack([logits, np.full(80, -50.0)])
    assert quick_score(with_absent_label, labels, name) == pytest.approx(
        quick_score(logits, labels, name)
    )


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(1, 40),
    num_labels=st.integers(2, 5),
    spread=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_metric_keeps_to_its_range(num_rows, num_labels, spread, seed):
    logits, labels = draw(num_rows, num_labels, seed=seed, decimals=1)
    found = score(spread * logits, labels, num_resamples=20, seed=seed)
    assert list(found) == list(RANGES)
    for name, (least, greatest) in RANGES.items():
        value, low, high = found[name].value, found[name].low, found[name].high
        if value is None:
            assert len(set(labels.tolist())) == 1
            continue
        assert least - 1e-12 <= value <= greatest + 1e-12, name
        if low is not None:
            assert least - 1e-12 <= low <= high <= greatest + 1e-12, name


@pytest.mark.parametrize("name", METRICS)
def test_evaluate_face_works_without_network_or_disk(name, tmp_path, monkeypatch):
    def refuse(*args):
        raise AssertionError("a metric opened a connection")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    logits, labels = draw(40, 3)
    probabilities = softmax(logits)
    metric = ClassificationMetric(name, METRICS[name].values)
    want = {name: quick_score(logits, labels, name)}

    assert metric.compute(predictions=probabilities, references=labels) == want
    metric.add_batch(predictions=probabilities[:25].tolist(), references=labels[:25].tolist())
    metric.add_batch(predictions=probabilities[25:].tolist(), references=labels[25:].tolist())
    assert metric.compute() == want
    assert metric.name == name
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("logits", [[2.0, -1.0], [2.0, 1.0]])
def test_evaluate_face_refuses_logits(logits):
    with pytest.raises(ModelError, match="apply softmax"):
        METRICS["log_loss"].compute(predictions=[logits], references=[0])


def test_confusion_matrix_counts_truth_by_prediction():
    labels, predictions = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 0, 2, 2])
    assert confusion_matrix(labels, predictions, 4).tolist() == [
        [1, 1, 0, 0],
        [0, 1, 0, 0],
        [1, 0, 2, 0],
        [0, 0, 0, 0],
    ]


def test_confusion_matrix_refuses_what_does_not_fit():
    with pytest.raises(DataError, match=r"predictions: found 2 in row 1 .*allowed are 0 to 1"):
        confusion_matrix(np.array([0, 1]), np.array([0, 2]), 2)
    with pytest.raises(DataError, match="3 labels and 2 predictions"):
        confusion_matrix(np.array([0, 1, 1]), np.array([0, 1]), 2)


def test_unknown_metric_is_refused_with_the_names():
    with pytest.raises(
        RecipeError, match=r"'acuracy' is no metric; choose from accuracy, .*mean 'accuracy'"
    ):
        find_metric("acuracy")
    with pytest.raises(
        RecipeError, match=r"choose from accuracy, macro_f1, mcc, log_loss, auroc, ece$"
    ):
        quick_score(*draw(5, 2), "zzz")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused_with_their_rows(bad):
    logits, labels = draw(20, 2)
    logits[[4, 11], 1] = bad
    with pytest.raises(ModelError, match=r"nan or infinity in row 4, 11 \(counted from 0\)"):
        score(logits, labels)


@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        (np.zeros(4), np.zeros(4, dtype=int), ModelError, r"found shape \(4,\)"),
        (np.zeros((4, 1)), np.zeros(4, dtype=int), ModelError, r"found shape \(4, 1\)"),
        (np.zeros((0, 2)), np.zeros(0, dtype=int), DataError, "no rows"),
        (np.zeros((4, 2)), np.zeros(3, dtype=int), DataError, "4 rows of logits and 3 labels"),
        (np.zeros((4, 2)), np.zeros((4, 1), dtype=int), DataError, "one integer per row"),
        (np.zeros((4, 2)), np.zeros(4), DataError, "found float64 values"),
        (
            np.zeros((4, 2)),
            np.array([0, 1, 2, -1]),
            DataError,
            r"found -1, 2 in row 2, 3 .*allowed are 0 to 1",
        ),
        (
            np.zeros((9, 2)),
            np.full(9, 7),
            DataError,
            r"found 7 in row 0, 1, 2, 3, 4 .*; 9 rows in all",
        ),
    ],
)
def test_rows_that_do_not_fit_are_refused(logits, labels, error, message):
    with pytest.raises(error, match=message):
        score(logits, labels)
    with pytest.raises(error, match=message):
        quick_score(logits, labels, "accuracy")


@pytest.mark.parametrize(("logit", "is_told"), [(5.0, True), (0.0, False), (-5.0, False)])
def test_the_lowest_temperature_is_told(logit, is_told):
    logits = np.array([[logit, -logit], [-logit, logit]])
    _, shown = find_task("single_label").calibrate(logits, np.array([0, 1]), ["neg", "pos"])
    assert ("do not rely on calibrated probabilities" in shown) == is_told


@pytest.mark.parametrize("temperature", [0.0, -1.0, np.nan, np.inf])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ModelError, match="temperature: found"):
        score(*draw(5, 2), temperature=temperature)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_calibrated_metrics_stand_beside_the_plain_ones(temperature):
    logits, labels = draw(60, 3)
    intervals = score_calibrated(logits, labels, calibration={"temperature": temperature})
    assert list(intervals) == [*METRICS, "calibrated_log_loss", "calibrated_ece"]
    at_temperature = score(logits, labels, temperature=temperature)
    assert intervals["calibrated_log_loss"] == at_temperature["log_loss"]
    assert intervals["calibrated_ece"] == at_temperature["ece"]
    plain = score_calibrated(logits, labels, calibration=None)
    assert plain == score(logits, labels) == {name: intervals[name] for name in METRICS}


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    ("labels", "names", "missing"),
    [
        ([1, 1, 1], ("neg", "pos"), "'neg'"),
        ([0], ("neg", "pos"), "'pos'"),
        ([1, 1], ("bad", "so", "good"), "'bad', 'good'"),
        ([0, 1, 1], ("neg", "pos"), None),
        ([2, 0], ("bad", "so", "good"), None),
    ],
)
def test_a_metric_is_refused_on_rows_where_all_models_are_equal(name, labels, names, missing):
    labels = np.array(labels)
    right = np.eye(len(names))[labels]
    wrong = np.eye(len(names))[(labels + 1) % len(names)]
    values = {METRICS[name].value(right, labels), METRICS[name].value(wrong, labels)}
    is_useless = len(values) == 1 or np.isnan(list(values)).any()
    assert is_useless == (missing is not None and name in ("auroc", "mcc"))
    if not is_useless:
        check_metric(name, labels=labels, names=names)
        return
    present = names[labels[0]]
    message = (
        f"validation: all {len(labels)} rows have the label '{present}', none has {missing}, so "
        f"{name} cannot choose the best model; .* to accuracy, macro_f1, log_loss, ece"
    )
    with pytest.raises(DataError, match=message):
        check_metric(name, labels=labels, names=names)
