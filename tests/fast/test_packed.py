"""The forward pass over packed rows gives the numbers of the stock encoder over padded ones."""

import numpy as np
import pytest
import torch
from accelerate import PartialState
from hypothesis import given
from hypothesis import strategies as st

from lora_sentiment.data.batches import Encoded, pad
from lora_sentiment.fast.encoder import (
    takes_packed_rows,
    use_fast_encoder,
)
from lora_sentiment.fast.kernels import Adapter, Linear, cast_adapters, linear
from lora_sentiment.fast.transfer import round_size
from lora_sentiment.models import inference
from lora_sentiment.models.inference import (
    compute_packed,
    make_engine,
    packs_rows,
    predict_logits,
)
from lora_sentiment.models.load import load_base
from lora_sentiment.recipe.model import ModelConfig
from lora_sentiment.training.processes import make_accelerator
from tests.fast.toy_encoder import find_encoder, make_classifier

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def make_linear(*adapters, outputs=9):
    """A frozen linear of zeros, so that its output is that of the adapters alone."""
    return Linear(torch.zeros(outputs, 8), torch.zeros(outputs), adapters)


@pytest.mark.parametrize("scale", [1.0, 2.0, 7 / 3])
def test_adapters_are_cast_with_their_scale_and_masters_get_fp32_gradients(scale):
    torch.manual_seed(0)
    A, B = torch.randn(3, 8, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    other = torch.randn(2, 8, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    plain = make_linear()
    layer = make_linear(Adapter(A, B, scale, 0, 5), Adapter(*other, 1.0, 5, 9))
    first, found = cast_adapters([plain, layer], torch.bfloat16)
    assert first is plain
    assert torch.equal(found.stack, torch.cat([A, other[0]]).bfloat16())
    assert torch.equal(found.adapters[0].A, A.bfloat16())
    assert torch.equal(found.adapters[0].B, (B * scale).bfloat16())
    assert [(each.scale, each.start, each.stop) for each in found.adapters] == [
        (1.0, 0, 5),
        (1.0, 5, 9),
    ]
    direction = torch.randn(5, 8).bfloat16()
    up = torch.randn(5, 3).bfloat16()
    outputs = [found.stack, *(each.B for each in found.adapters)]
    torch.autograd.backward(outputs, [direction, up, torch.zeros(4, 2).bfloat16()])
    assert A.grad.dtype == B.grad.dtype == torch.float32
    assert torch.equal(A.grad, direction[:3].float())
    assert torch.equal(other[0].grad, direction[3:].float())
    torch.testing.assert_close(B.grad, up.float() * scale, rtol=1e-6, atol=0)
    assert not other[1].grad.any()


@pytest.mark.parametrize("scale", [2.0, 7 / 3])
def test_the_scale_of_bf16_adapters_counts_once(scale):
    torch.manual_seed(0)
    A, B, x = torch.randn(3, 8), torch.randn(5, 3), torch.randn(4, 8)
    (found,) = cast_adapters([make_linear(Adapter(A, B, scale, 0, 5), outputs=5)], torch.bfloat16)
    found = found._replace(weight=found.weight.bfloat16(), bias=found.bias.bfloat16())
    y = linear(x.bfloat16(), found).float()
    expected = scale * x @ A.t() @ B.t()
    assert (y - expected).norm() <= 0.02 * expected.norm()


def test_the_stacked_product_gives_the_values_and_gradients_of_the_adapters_one_by_one():
    torch.manual_seed(0)
    tensors = [torch.randn(size).requires_grad_() for size in [(3, 8), (4, 3), (5, 8), (3, 5)]]
    A1, B1, A2, B2 = tensors
    weight, bias = torch.randn(9, 8), torch.randn(9)
    layer = Linear(weight, bias, (Adapter(A1, B1, 1.7, 0, 4), Adapter(A2, B2, 0.3, 6, 9)))
    x = torch.randn(7, 8, requires_grad=True)
    expected = linear(x, layer)
    direction = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, [x, *tensors], direction)
    (stacked,) = cast_adapters([layer], torch.float32)
    assert stacked.stack is not None
    found = linear(x, stacked)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    own = torch.autograd.grad(found, [x, *tensors], direction)
    for gradient, other in zip(own, gradients, strict=True):
        assert (gradient - other).norm() <= 1e-5 * other.norm()
    frozen_input = linear(x.detach(), cast_adapters([layer], torch.float32)[0])
    torch.autograd.backward(frozen_input, direction)
    assert (A1.grad - gradients[1]).norm() <= 1e-5 * gradients[1].norm()


@pytest.mark.parametrize("case", ["dropout", "trained weight", "trained bias"])
def test_adapters_that_drop_and_trained_bases_are_not_stacked(case):
    weight, bias = torch.zeros(9, 8), torch.zeros(9)
    weight.requires_grad_(case == "trained weight")
    bias.requires_grad_(case == "trained bias")
    p = 0.1 if case == "dropout" else 0.0
    layer = Linear(
        weight, bias, (Adapter(torch.ones(3, 8), torch.ones(9, 3), 2.0, 0, 9, dropout=p),)
    )
    (found,) = cast_adapters([layer], torch.bfloat16)
    assert found.stack is None
    assert found.adapters[0].dropout == p
    assert found.adapters[0].scale == 1.0


def test_heads_of_a_width_that_a_gpu_does_not_take_are_not_packed():
    model = make_classifier()
    assert not takes_packed_rows(model)  # the stock forward pass
    use_fast_encoder(model, compute_dtype=torch.float32)
    assert takes_packed_rows(model)
    assert packs_rows(model, torch.device("cuda"))
    assert not packs_rows(model, CPU)
    find_encoder(model).config.n_heads = 8  # of 4 values each
    assert not takes_packed_rows(model)


@pytest.fixture
def toy(tiny_base):
    base = load_base(ModelConfig(name=str(tiny_base), max_length=64), labels=("no", "yes"))
    lengths = np.array([13, 3, 16, 4, 50, 8, 2])
    ids = np.random.default_rng(0).integers(5, 60, lengths.sum(), dtype=np.int32)
    labels = np.zeros(len(lengths), dtype=np.int64)
    encoded = Encoded(ids, np.concatenate([[0], lengths.cumsum()]), labels, 0, 0)
    assert use_fast_encoder(base.model, compute_dtype=torch.float32) is None
    return base.model.eval(), encoded


def test_logits_of_packed_rows_are_those_of_padded_ones(toy, monkeypatch):
    model, encoded = toy
    accelerator = make_accelerator(PartialState(), "float32")
    padded = predict_logits(model, encoded, accelerator=accelerator)
    rows = np.split(encoded.input_ids, encoded.offsets[1:-1])
    with torch.inference_mode():
        found = compute_packed(model, rows, device=CPU, pad_token_id=0)
    np.testing.assert_allclose(found.numpy(), padded, rtol=0, atol=1e-5)
    monkeypatch.setattr(inference, "packs_rows", lambda *_: True)
    monkeypatch.setattr(inference, "inference_tokens", lambda _: 40)
    calls = []
    plain = inference.compute_packed

    def spy(model, rows, **given):
        calls.append(sum(map(len, rows)))
        return plain(model, rows, **given)

    monkeypatch.setattr(inference, "compute_packed", spy)
    packed = predict_logits(model, encoded, accelerator=accelerator)
    np.testing.assert_allclose(packed, padded, rtol=0, atol=1e-5)
    assert sum(calls) == len(encoded.input_ids)
    assert sorted(calls)[-2] <= 40 < max(calls)  # one row is longer than that
    engine = make_engine(model)
    given = pad(encoded, np.arange(len(encoded)))
    np.testing.assert_allclose(engine.compute(*given), padded, rtol=0, atol=1e-5)
    alone = pad(encoded, np.array([2]))
    assert alone[1] is None
    np.testing.assert_allclose(engine.compute(*alone), padded[2:3], rtol=0, atol=1e-5)
    assert len(calls) > 2


@given(st.integers(1, 10**6))
def test_sizes_are_rounded_up_by_an_eighth_at_most(num_tokens):
    size = round_size(num_tokens)
    assert size % 8 == 0
    assert num_tokens <= size < max(num_tokens * 1.125, num_tokens + 8)
    assert round_size(size) == size


def test_rounded_sizes_are_few():
    assert len({round_size(num_tokens) for num_tokens in range(1, 32_769)}) <= 90


def list_dropouts(model):
    """The dropouts that a packed step draws, by name: what each drops changes the answer."""
    encoder = find_encoder(model)
    first, *_, last = encoder.transformer.layer
    return {
        "embeddings": encoder.embeddings.dropout,
        "attention of a block": first.attention.dropout,
        "feed-forward of a block": first.ffn.dropout,
        "attention of the last block": last.attention.dropout,
        "feed-forward of the last block": last.ffn.dropout,
    }


@pytest.mark.parametrize("name", list_dropouts(make_classifier()))
def test_every_dropout_of_the_model_drops_in_training_and_not_in_answers(name):
    model = make_classifier().train()
    assert use_fast_encoder(model, compute_dtype=torch.float32) is None
    rows = [np.arange(5, 25, dtype=np.int32)] * 3

    def compute():
        return inference.compute_packed(model, rows, device=CPU, pad_token_id=0).detach()

    plain = compute()
    list_dropouts(model)[name].p = 0.5
    assert (compute() - plain).abs().max() > 1e-3
    model.eval()
    torch.testing.assert_close(compute(), plain, rtol=0, atol=1e-6)
