"""The metrics of several labels and of numbers, beside scikit-learn and scipy; thresholds; stratified splits."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sk

from lora_sentiment.recipe.train import TrainConfig
from lora_sentiment.tasks import find_task
from lora_sentiment.tasks.multi_label import choose_threshold, stratify

SEVERAL, NUMBER = find_task("multi_label"), find_task("regression")
NAMES = ("a", "b", "c")


def draw(seed=0, num_rows=60):
    generator = np.random.default_rng(seed)
    labels = (generator.random((num_rows, 3)) < [0.5, 0.2, 0.1]).astype(np.int64)
    # Rounded, so that some logits are equal.
    logits = np.round(generator.normal(size=(num_rows, 3)) + 1.5 * labels, 1).astype(np.float32)
    return logits, labels


def test_metrics_of_several_labels_are_those_of_scikit_learn():
    logits, labels = draw()
    calibration = {"thresholds": [0.3, 0.5, 0.8]}
    found = SEVERAL.score(logits, labels, names=NAMES, calibration=calibration)
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    given = (probabilities >= calibration["thresholds"]).astype(np.int64)
    expected = {
        "macro_f1": sk.f1_score(labels, given, average="macro"),
        "micro_f1": sk.f1_score(labels, given, average="micro"),
        "samples_f1": sk.f1_score(labels, given, average="samples", zero_division=1.0),
        "subset_accuracy": sk.accuracy_score(labels, given),
        "average_precision": sk.average_precision_score(labels, probabilities, average="macro"),
        "log_loss": np.mean([sk.log_loss(labels[:, k], probabilities[:, k]) for k in range(3)]),
    }
    for k, name in enumerate(NAMES):
        own = sk.average_precision_score(labels[:, k], probabilities[:, k])
        expected[f"average_precision/{name}"] = own
    for name, value in expected.items():
        assert found[name].value == pytest.approx(value, abs=1e-9), name
        assert found[name].low <= found[name].value <= found[name].high


def test_metrics_of_numbers_are_those_of_scipy_and_scikit_learn():
    generator = np.random.default_rng(1)
    labels = generator.integers(5, size=80).astype(np.float64)
    logits = (labels + generator.normal(size=80))[:, None].astype(np.float32)
    values = logits[:, 0].astype(np.float64)
    found = NUMBER.score(logits, labels, names=("stars",), calibration=None)
    grades = np.clip(np.round(values), 0, 4)
    expected = {
        "mae": sk.mean_absolute_error(labels, values),
        "rmse": sk.root_mean_squared_error(labels, values),
        "r2": sk.r2_score(labels, values),
        "pearson": stats.pearsonr(labels, values).statistic,
        "spearman": stats.spearmanr(labels, values).statistic,
        "quadratic_kappa": sk.cohen_kappa_score(labels, grades, weights="quadratic"),
    }
    for name, value in expected.items():
        assert found[name].value == pytest.approx(value, abs=1e-9), name
    assert "quadratic_kappa" not in NUMBER.score(
        logits, labels + 0.5, names=("x",), calibration=None
    )


def test_a_weighted_row_counts_as_often_as_its_weight():
    logits, labels = draw(num_rows=12)
    generator = np.random.default_rng(2)
    weights = generator.integers(4, size=(1, 12)).astype(np.float64)
    repeated = np.repeat(np.arange(12), weights[0].astype(int))
    scores = SEVERAL.make_metric_scores(logits, labels, None)
    for metric in SEVERAL.metrics.values():
        own = metric.values(scores, labels, weights)[0]
        assert own == pytest.approx(metric.value(scores[repeated], labels[repeated])), metric.name
    numbers, values = labels.sum(axis=1).astype(np.float64), logits[:, :1].astype(np.float64)
    for metric in NUMBER.metrics.values():
        own = metric.values(values, numbers, weights)[0]
        assert own == pytest.approx(metric.value(values[repeated], numbers[repeated])), metric.name


def test_a_threshold_has_the_best_f1_of_all():
    for seed in range(5):
        logits, labels = draw(seed)
        probabilities, truth = 1 / (1 + np.exp(-logits[:, 0].astype(np.float64))), labels[:, 0]
        best = sk.f1_score(truth, probabilities >= choose_threshold(probabilities, truth))
        assert best == max(sk.f1_score(truth, probabilities >= t) for t in probabilities)
    assert choose_threshold(np.array([0.1, 0.9]), np.array([0, 0])) == 0.5


def test_a_carved_part_keeps_the_share_of_each_label():
    generator = np.random.default_rng(0)
    labels = (generator.random((1000, 5)) < [0.5, 0.2, 0.1, 0.05, 0.01]).astype(np.int64)
    sizes = generator.integers(1, 4, size=1000)
    chosen = stratify(labels, sizes, fraction=0.2, generator=generator)
    weighted = labels * sizes[:, None]
    shares = weighted[chosen].sum(axis=0) / weighted.sum(axis=0)
    assert np.abs(shares - 0.2).max() < 0.06
    assert sizes[chosen].sum() / sizes.sum() == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("setting", [None, "balanced", (1.0, 2.0, 3.0)])
def test_the_mean_loss_of_several_labels_is_torchs(setting):
    logits, labels = draw()
    objective = SEVERAL.make_objective(
        TrainConfig(class_weights=setting), labels=labels, names=NAMES, device=torch.device("cpu")
    )
    padded = np.concatenate([labels, np.full((2, 3), -100)])
    rows = torch.from_numpy(np.concatenate([logits, np.ones((2, 3), dtype=np.float32)]))
    mean = float(
        objective.loss_sum(rows, torch.from_numpy(padded)) / objective.total_weight(labels)
    )
    weights = np.ones((2, 3)) if objective.weights is None else objective.weights
    weight = torch.from_numpy(np.where(labels > 0, weights[1], weights[0]))
    losses = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.from_numpy(logits), torch.from_numpy(labels).float(), reduction="none"
    )
    assert mean == pytest.approx(float((losses * weight).sum() / weight.sum()), rel=1e-6)


@pytest.mark.parametrize("delta", [None, 1.0])
def test_the_scale_of_numbers_is_folded_into_the_head(delta):
    labels = np.array([1000.0, 2000.0, 4000.0])
    objective = NUMBER.make_objective(
        TrainConfig(huber_delta=delta), labels=labels, names=("x",), device=torch.device("cpu")
    )
    layer = torch.nn.Linear(4, 1)
    inputs = torch.randn(3, 4)
    before = layer(inputs)
    units = objective.to_units(before.detach().numpy())
    loss = objective.loss_sum(
        torch.cat([before, before[:1]]), torch.from_numpy(np.append(labels, np.nan))
    )
    assert torch.isfinite(loss)
    loss.backward()
    assert torch.isfinite(layer.weight.grad).all()
    objective.fold_into(layer)
    np.testing.assert_allclose(layer(inputs).detach().numpy(), units, rtol=1e-6)
