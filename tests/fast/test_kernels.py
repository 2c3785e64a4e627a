"""The fused operations have the gradients of the plain ones and keep for them what is needed."""

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from lora_sentiment.fast.kernels import (
    CHUNK_ELEMENTS,
    Adapter,
    Linear,
    attention,
    dropout,
    feed_forward,
    keep_probability,
    linear,
)

pytestmark = pytest.mark.usefixtures("one_thread")
TRAINED = [{}, {"weight": True}, {"bias": True}, {"weight": True, "bias": True}]


def draw(*shape: int, trained: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=trained)


def make_linear(
    out_features: int, *slots: tuple[int, int], weight: bool = False, bias: bool = False
) -> Linear:
    """A linear of 4 inputs, with an adapter for each slot of its outputs."""
    adapters = tuple(
        Adapter(draw(2, 4), draw(stop - start, 2), 0.5, start, stop) for start, stop in slots
    )
    return Linear(draw(out_features, 4, trained=weight), draw(out_features, trained=bias), adapters)


def trained(x: Tensor, *layers: Linear) -> tuple[Tensor, ...]:
    tensors = [x]
    for layer in layers:
        tensors += [
            layer.weight,
            layer.bias,
            *(tensor for adapter in layer.adapters for tensor in adapter[:2]),
        ]
    return tuple(tensor for tensor in tensors if tensor.requires_grad)


def cast(layer: Linear, dtype: torch.dtype) -> Linear:
    adapters = tuple(
        adapter._replace(A=adapter.A.to(dtype), B=adapter.B.to(dtype)) for adapter in layer.adapters
    )
    return Linear(layer.weight.to(dtype), layer.bias.to(dtype), adapters)


def plain_linear(x: Tensor, layer: Linear) -> Tensor:
    y = functional.linear(x, layer.weight, layer.bias)
    for adapter in layer.adapters:
        delta = x @ adapter.A.t() @ adapter.B.t() * adapter.scale
        y = y + functional.pad(delta, (adapter.start, len(layer.weight) - adapter.stop))
    return y


def assert_same_gradients(found: Tensor, expected: Tensor, inputs: tuple[Tensor, ...]) -> None:
    assert torch.allclose(found, expected, atol=1e-5)
    assert found.requires_grad == bool(inputs)
    if inputs:
        direction = torch.randn_like(expected)
        mine = torch.autograd.grad(found, inputs, direction)
        theirs = torch.autograd.grad(expected, inputs, direction)
        assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(mine, theirs, strict=True))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32], ids=["added to y", "folded into the weight"]
)
@pytest.mark.parametrize("slots", [[], [(0, 4), (8, 12)]], ids=["plain", "adapted"])
@pytest.mark.parametrize("trains", TRAINED, ids=str)
def test_a_linear_has_exact_gradients(
    trains: dict[str, bool], slots: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layer = make_linear(12, *slots, **trains)
    for x in (draw(2, 3, 4), draw(2, 3, 4, trained=False)):
        found = linear(x.to(dtype), cast(layer, dtype)).double()
        assert_same_gradients(found, plain_linear(x, layer), trained(x, layer))


@pytest.mark.parametrize(
    "slots", [([], []), ([(0, 4)], []), ([], [(0, 4)]), ([(0, 4)], [(0, 4)])], ids=str
)
def test_the_feed_forward_has_exact_gradients(
    slots: tuple[list[tuple[int, int]], list[tuple[int, int]]],
) -> None:
    torch.manual_seed(0)
    for trains1, trains2, x_trained in product(TRAINED, TRAINED, [False, True]):
        lin1, lin2 = make_linear(4, *slots[0], **trains1), make_linear(4, *slots[1], **trains2)
        x = draw(2, 3, 4, trained=x_trained)
        expected = plain_linear(functional.gelu(plain_linear(x, lin1)), lin2)
        assert_same_gradients(feed_forward(x, lin1, lin2), expected, trained(x, lin1, lin2))


def test_the_feed_forward_keeps_its_input_and_the_pre_activation_only() -> None:
    x = draw(100, 4)
    lin1, lin2 = make_linear(4, weight=True, bias=True), make_linear(4, weight=True, bias=True)
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        feed_forward(x, lin1, lin2)
    activations = {
        tensor.untyped_storage().data_ptr(): tensor for tensor in kept if len(tensor) == 100
    }
    assert len(activations) == 2
    assert x.data_ptr() in activations


@pytest.mark.parametrize(
    "chunk", [2 * 3 * 5 * 5, 2 * 5 * 5, 1], ids=["two examples", "two heads", "one head"]
)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_attention_by_explicit_products_has_exact_gradients(
    p: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_sentiment.fast.kernels.CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    mask = torch.zeros(3, 1, 1, 5, dtype=torch.float64)
    mask[1, ..., 3:] = torch.finfo(torch.float64).min

    def run(qkv: Tensor) -> Tensor:
        torch.manual_seed(3)
        return attention(qkv, mask, num_heads=3, dropout_p=p)

    assert torch.autograd.gradcheck(run, (draw(3, 5, 18),), fast_mode=True)


@pytest.mark.parametrize("length", [33, 200, 512])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_attention_at_real_shapes_is_the_formulas(
    length: int, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in training with dropout: DistilBERT's heads, fp32, and more weights than a chunk holds."""
    monkeypatch.setattr("lora_sentiment.fast.kernels.FUSED_ATTENTION_FROM", 10**9)
    torch.manual_seed(0)
    batch, heads, width = 2 + CHUNK_ELEMENTS // (12 * length**2), 12, 8
    qkv = torch.randn(batch, length, 3 * heads * width, requires_grad=True)
    mask = torch.zeros(batch, 1, 1, length)
    mask[1, ..., length // 2 :] = torch.finfo(torch.float32).min
    found = attention(qkv, mask, num_heads=heads, dropout_p=p)
    weights = found.grad_fn.saved_tensors[1]  # type: ignore[union-attr]
    q, k, v = qkv.view(batch, length, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
    expected = torch.softmax(q @ k.transpose(2, 3) * width**-0.5 + mask, dim=-1)
    assert torch.allclose(weights.abs(), expected, atol=1e-6)
    if p:
        dropped = weights.signbit()
        assert abs(float(dropped[0].float().mean()) - (1 - keep_probability(p))) < 0.02
        expected = expected.masked_fill(dropped, 0) / keep_probability(p)
    y = (expected @ v).transpose(1, 2).flatten(2)
    assert torch.allclose(found, y, atol=1e-5)
    direction = torch.randn_like(y)
    (mine,), (theirs,) = (torch.autograd.grad(each, qkv, direction) for each in (found, y))
    assert float((mine - theirs).norm() / theirs.norm()) <= 1e-5


def test_dropout_keeps_the_mean_and_drops_the_same_entries_of_the_gradient() -> None:
    torch.manual_seed(0)
    x = torch.ones(400, 500, requires_grad=True)
    y = dropout(x, 0.1)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach())
    assert abs(float((y == 0).float().mean()) - (1 - keep_probability(0.1))) < 0.003
    assert abs(float(y.detach().mean()) - 1) < 0.003


def test_attention_dropout_keeps_the_mean() -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, 6, 24)
    expected = attention(qkv, None, num_heads=2, dropout_p=0.0)
    draws = torch.stack([attention(qkv, None, num_heads=2, dropout_p=0.2) for _ in range(1500)])
    standard_error = draws.std(0) / 1500**0.5
    assert ((draws.mean(0) - expected).abs() < 5 * standard_error).all()
