import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from lora_sentiment.training.losses import loss_sum


@given(st.integers(2, 12), st.integers(1, 11), st.sampled_from([0.0, 0.1]))
def test_however_rows_are_cut_the_sum_is_that_of_all(num_rows, at, smoothing):
    generator = torch.Generator().manual_seed(num_rows)
    logits = torch.randn(num_rows, 3, generator=generator)
    labels = torch.arange(num_rows) % 3
    at = min(at, num_rows - 1)
    parts = [(logits[:at], labels[:at]), (logits[at:], labels[at:])]
    whole = F.cross_entropy(logits, labels, label_smoothing=smoothing) * num_rows
    assert float(sum(loss_sum(*part, label_smoothing=smoothing) for part in parts)) == pytest.approx(
        float(whole), rel=1e-5
    )


def test_half_precision_logits_are_summed_in_fp32():
    logits = torch.zeros(3000, 2, dtype=torch.bfloat16)
    assert loss_sum(logits, torch.zeros(3000, dtype=torch.long)).dtype == torch.float32
