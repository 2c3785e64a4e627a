import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F

from lora_sentiment.errors import DataError, RecipeError
from lora_sentiment.tasks.losses import loss_sum, make_class_weights, total_weight


@given(st.integers(2, 12), st.integers(1, 11), st.sampled_from([0.0, 0.1]))
def test_however_rows_are_cut_the_sum_is_that_of_all(num_rows, at, smoothing):
    generator = torch.Generator().manual_seed(num_rows)
    logits = torch.randn(num_rows, 3, generator=generator)
    labels = torch.arange(num_rows) % 3
    at = min(at, num_rows - 1)
    parts = [(logits[:at], labels[:at]), (logits[at:], labels[at:])]
    whole = F.cross_entropy(logits, labels, label_smoothing=smoothing) * num_rows
    assert float(
        sum(loss_sum(*part, label_smoothing=smoothing) for part in parts)
    ) == pytest.approx(float(whole), rel=1e-5)


def test_half_precision_logits_are_summed_in_fp32():
    logits = torch.zeros(3000, 2, dtype=torch.bfloat16)
    assert loss_sum(logits, torch.zeros(3000, dtype=torch.long)).dtype == torch.float32


@given(
    labels=st.lists(st.integers(0, 2), min_size=1, max_size=20),
    cuts=st.lists(st.integers(0, 20), max_size=4),
    weights=st.lists(st.floats(0.01, 100), min_size=3, max_size=3),
    smoothing=st.sampled_from([0.0, 0.1, 0.7]),
)
def test_however_a_step_is_cut_its_weighted_loss_is_torchs_mean(labels, cuts, weights, smoothing):
    """The parts are micro-batches or the shares of processes: each is divided by the weight of the whole step."""
    logits = torch.randn(
        len(labels), 3, generator=torch.Generator().manual_seed(len(labels)), dtype=torch.float32
    )
    own, given_weights = torch.tensor(labels), np.array(weights, dtype=np.float32)
    tensor = torch.from_numpy(given_weights)
    whole = F.cross_entropy(logits, own, weight=tensor, label_smoothing=smoothing)
    total = total_weight(own.numpy(), given_weights)
    ends = sorted({min(cut, len(labels)) for cut in cuts} | {0, len(labels)})
    parts = [
        loss_sum(logits[a:b], own[a:b], class_weights=tensor, label_smoothing=smoothing) / total
        for a, b in itertools.pairwise(ends)
    ]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weights_of_one_give_the_bits_of_none(smoothing):
    logits, labels = (
        torch.randn(37, 4, generator=torch.Generator().manual_seed(0)),
        torch.arange(37) % 4,
    )
    ones = np.ones(4, dtype=np.float32)
    weighted = loss_sum(
        logits, labels, class_weights=torch.from_numpy(ones), label_smoothing=smoothing
    )
    assert torch.equal(weighted, loss_sum(logits, labels, label_smoothing=smoothing))
    assert total_weight(labels.numpy(), ones) == total_weight(labels.numpy(), None) == 37


def test_balanced_weights_are_those_of_scikit_learn():
    labels = np.array([0] * 7 + [1] * 2 + [2] * 31)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert make_class_weights("balanced", labels=labels, names="abc").tolist() == pytest.approx(
        expected.tolist()
    )
    # Every label weighs as much as every other.
    assert [total_weight(labels[labels == i], expected) for i in range(3)] == pytest.approx(
        [40 / 3] * 3
    )


def test_a_list_of_weights_is_in_the_order_of_the_labels():
    labels = np.array([0, 1, 1])
    assert make_class_weights((0.5, 2.0), labels=labels, names=["no", "yes"]).tolist() == [0.5, 2.0]
    assert make_class_weights(None, labels=labels, names=["no", "yes"]) is None
    with pytest.raises(
        RecipeError,
        match="found 3 weights; give one for each of the 2 labels, in this order: no, yes",
    ):
        make_class_weights((1.0, 2.0, 3.0), labels=labels, names=["no", "yes"])


def test_a_label_without_a_row_cannot_be_balanced():
    with pytest.raises(DataError, match="balanced: no training row has the label 'c'"):
        make_class_weights("balanced", labels=np.array([0, 1]), names="abc")
