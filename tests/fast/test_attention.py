"""Attention on a GPU never goes to cuDNN; over packed rows it is that of each row alone."""

import math
import sys

import numpy as np
import pytest
import torch
from accelerate import PartialState
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from lora_sentiment.adapter.folder import compute_probe
from lora_sentiment.data.batches import Encoded, pad
from lora_sentiment.fast import attention, kernels
from lora_sentiment.fast.attention import BACKENDS, attention_backends, packed_attention
from lora_sentiment.fast.encoder import use_fast_encoder
from lora_sentiment.models.inference import make_engine, predict_logits
from lora_sentiment.models.load import load_base
from lora_sentiment.models.memory import Plan
from lora_sentiment.models.quantisation import measure_quantisation
from lora_sentiment.recipe.method import LoraMethod
from lora_sentiment.recipe.model import ModelConfig
from lora_sentiment.tasks.single_label import loss_sum
from lora_sentiment.training import micro_batch
from lora_sentiment.training.backward import PaddedBackward
from lora_sentiment.training.processes import make_accelerator

pytestmark = pytest.mark.usefixtures("one_thread")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LENGTHS = np.array([5, 12, 1, 7])
NUM_HEADS, HEAD_DIM = 3, 8


def test_cudnn_is_not_among_the_backends():
    assert SDPBackend.CUDNN_ATTENTION not in BACKENDS
    assert set(BACKENDS) == {
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    }


def test_within_the_context_of_a_gpu_they_are_allowed_and_no_others():
    before = _cur_sdpa_kernel_backends()
    assert SDPBackend.CUDNN_ATTENTION in before
    with attention_backends(CPU):
        assert _cur_sdpa_kernel_backends() == before
    with attention_backends(CUDA):
        assert set(_cur_sdpa_kernel_backends()) == set(BACKENDS)
    assert _cur_sdpa_kernel_backends() == before


@pytest.fixture
def backends(monkeypatch):
    """Let every device pass for a GPU; return the backends that each call could have taken."""
    for name, module in list(sys.modules.items()):
        own = name.startswith("lora_sentiment") and not name.endswith("fast.attention")
        if own and "attention_backends" in vars(module):
            monkeypatch.setattr(module, "attention_backends", lambda _: attention_backends(CUDA))
    found = []
    plain = functional.scaled_dot_product_attention

    def spy(*given, **more):
        found.append(set(_cur_sdpa_kernel_backends()))
        return plain(*given, **more)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
    return found


@pytest.fixture
def base(tiny_base):
    return load_base(ModelConfig(name=str(tiny_base), max_length=16), labels=("no", "yes"))


@pytest.fixture
def encoded():
    ids = np.random.default_rng(0).integers(5, 40, LENGTHS.sum(), dtype=np.int32)
    labels = np.array([0, 1, 0, 1])
    return Encoded(ids, np.concatenate([[0], LENGTHS.cumsum()]), labels, 0, 0)


def assert_without_cudnn(found):
    assert found
    assert all(each == set(BACKENDS) for each in found)


def test_a_forward_pass_outside_of_it_is_seen(base, backends):
    base.model(input_ids=torch.tensor([[2, 5, 3]]))
    assert SDPBackend.CUDNN_ATTENTION in backends[0]


def test_training_on_padded_rows_runs_without_cudnn(base, encoded, backends):
    accelerator = make_accelerator(PartialState(), "float32")
    settings = {"loss_sum": loss_sum, "accelerator": accelerator, "lengths": (8, 16)}
    padded = PaddedBackward(base.model.train(), encoded, **settings)
    padded.add_gradients(np.arange(4), total=4.0)
    assert_without_cudnn(backends)


def test_evaluation_runs_without_cudnn(base, encoded, backends):
    predict_logits(base.model, encoded, accelerator=make_accelerator(PartialState(), "float32"))
    assert_without_cudnn(backends)


def test_an_engine_runs_without_cudnn(base, encoded, backends):
    make_engine(base.model.eval()).compute(*pad(encoded, np.arange(4)))
    assert_without_cudnn(backends)


def test_a_probe_runs_without_cudnn(base, backends):
    compute_probe(base.model.eval(), [[2, 5, 6, 3], [2, 3]])
    assert_without_cudnn(backends)


def test_measuring_quantisation_runs_without_cudnn(base, tiny_base, backends):
    config = ModelConfig(name=str(tiny_base), max_length=16, dtype="float32")
    plan = Plan(base.config, LoraMethod(), config, engine="stock")
    measure_quantisation(
        base,
        plan,
        rows=2,
        length=16,
        batch_size=2,
        input_ids=[[2, 5, 6, 3], [2, 9, 3]],
        dtype=torch.float32,
        device=CPU,
    )
    assert_without_cudnn(backends)


def test_measuring_a_micro_batch_runs_without_cudnn(base, backends, monkeypatch):
    for name in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda _: 0)
    accelerator = make_accelerator(PartialState(), "float32")
    micro_batch._peak(base.model.train(), accelerator, 2, 9)
    assert_without_cudnn(backends)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_fast_forward_on_padded_rows_runs_without_cudnn(backends, device):
    length = kernels.FUSED_ATTENTION_FROM if device == "cpu" else 9
    qkv = torch.randn(2, length, 3 * 32, device=device)
    kernels.attention(qkv, None, num_heads=4, dropout_p=0.0)
    assert_without_cudnn(backends)


def test_packed_rows_need_no_context(base, encoded, backends):
    """The kernel is named where packed rows are attended to: on a GPU nothing chooses one."""
    assert use_fast_encoder(base.model, compute_dtype=torch.float32) is None
    with torch.no_grad():
        base.model(
            input_ids=torch.from_numpy(encoded.input_ids)[None],
            position_ids=torch.zeros(1, len(encoded.input_ids), dtype=torch.int32),
            cu_seq_lens_q=torch.from_numpy(encoded.offsets).int(),
            max_length_q=12,
        )
    assert len(backends) == 2  # the masks of a CPU, one a layer


def make_inputs(lengths, *, dtype=torch.float32, device="cpu"):
    """Queries, keys and values in a leaf of their own each, and where the sequences are."""
    torch.manual_seed(0)
    shape = (sum(lengths), NUM_HEADS, HEAD_DIM)
    inputs = [torch.randn(shape).to(device, dtype).requires_grad_() for _ in range(3)]
    ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)
    return inputs, ends


def attend_alone(q: Tensor, k: Tensor, v: Tensor, queries, keys) -> Tensor:
    """Attention of each sequence by itself, one after another, in fp32."""
    parts = []
    sequences = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    for some in sequences:
        heads = [each.float().transpose(0, 1)[None] for each in some]
        if heads[0].shape[2]:
            parts.append(functional.scaled_dot_product_attention(*heads)[0].transpose(0, 1))
    return torch.cat(parts)


def check_packed(lengths, *, first_only, bound, dtype=torch.float32, device="cpu"):
    (q, k, v), ends = make_inputs(lengths, dtype=dtype, device=device)
    queries, cu_seq_lens_q, longest = lengths, ends, max(lengths)
    if first_only:
        queries, longest = [1] * len(lengths), 1
        q = q[: len(lengths)]
        cu_seq_lens_q = torch.arange(len(lengths) + 1, dtype=torch.int32, device=device)
    found = packed_attention(
        q,
        k,
        v,
        cu_seq_lens_q=cu_seq_lens_q,
        cu_seq_lens_k=ends,
        max_length_q=longest,
        max_length_k=max(lengths),
        dropout_p=0.0,
    )
    assert found.shape == q.shape
    assert found.dtype == dtype
    expected = attend_alone(q, k, v, list(queries), list(lengths))
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=bound)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(expected)
    gradients = torch.autograd.grad(found, (q, k, v), direction.to(dtype))
    wanted = torch.autograd.grad(expected, (q, k, v), direction)
    for gradient, other in zip(gradients, wanted, strict=True):
        assert gradient.dtype == dtype
        difference = (gradient.float() - other.float()).norm()
        assert difference <= 10 * bound * other.float().norm() + bound


MANY = {
    "one": [9],
    "several": [5, 12, 1, 7],
    "empty ones at the end": [5, 12, 1, 7, 0, 0],
    "an empty one between": [5, 0, 12],
}


@pytest.mark.parametrize("name", MANY)
def test_packed_attention_is_that_of_each_sequence_alone(name):
    check_packed(MANY[name], first_only=False, bound=1e-6)


@pytest.mark.parametrize("name", ["one", "several"])
def test_one_query_of_each_sequence_attends_to_its_own_keys(name):
    check_packed(MANY[name], first_only=True, bound=1e-6)


def check_empty(device, dtype, bound):
    """What comes of a query without keys is cut off later, and must be finite until then."""
    (q, k, v), ends = make_inputs([5, 12, 0], dtype=dtype, device=device)
    found = packed_attention(
        q[:3],
        k,
        v,
        cu_seq_lens_q=torch.arange(4, dtype=torch.int32, device=device),
        cu_seq_lens_k=ends,
        max_length_q=1,
        max_length_k=12,
        dropout_p=0.0,
    )
    expected = attend_alone(q[:2], k, v, [1, 1], [5, 12])
    torch.testing.assert_close(found[:2].float(), expected, rtol=0, atol=bound)
    assert found.isfinite().all()
    gradients = torch.autograd.grad(found[:2].sum(), (q, k, v))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_query_of_an_empty_sequence_disturbs_no_other():
    check_empty(CPU, torch.float32, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.02), (torch.float32, 1e-5)])
def test_on_a_gpu_a_query_of_an_empty_sequence_disturbs_no_other(gpu, dtype, bound):
    check_empty(gpu, dtype, bound)


class PoisonQueries(Function):
    """Make the output and the gradient of some queries NaN, as a kernel may that never sets them."""

    @staticmethod
    def forward(ctx, q, rows):
        ctx.rows = rows
        return q.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[ctx.rows] = math.nan
        return grad, None


def test_what_a_kernel_leaves_unset_for_a_query_without_keys_is_zero(monkeypatch):
    plain = attention._masked_attention

    def leave_unset(q, k, v, cu_seq_lens_q, cu_seq_lens_k, dropout_p):
        rows = cu_seq_lens_k.diff() == 0  # one query of each sequence
        mixed = plain(PoisonQueries.apply(q, rows), k, v, cu_seq_lens_q, cu_seq_lens_k, dropout_p)
        return mixed.masked_fill(rows[:, None, None], math.nan)

    monkeypatch.setattr(attention, "_masked_attention", leave_unset)
    check_empty(CPU, torch.float32, 1e-6)


@pytest.mark.gpu
def test_on_a_gpu_no_gradient_is_read_from_memory_that_nothing_wrote(gpu):
    """All memory is NaN until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        for dtype, bound in ((torch.bfloat16, 0.02), (torch.float32, 1e-5)):
            check_empty(gpu, dtype, bound)
            lengths = MANY["empty ones at the end"]
            check_packed(lengths, first_only=False, bound=bound, dtype=dtype, device=gpu)
    finally:
        torch.use_deterministic_algorithms(False)


def check_dropout(device, dtype, length=256, p=0.1):
    """Equal scores and values of one: an output is the kept share over 1 - p."""
    lengths = [length] * 16
    (_, _, _), ends = make_inputs(lengths, device=device)
    shape = (sum(lengths), NUM_HEADS, HEAD_DIM)
    q = torch.zeros(shape, device=device, dtype=dtype)
    v = torch.ones(shape, device=device, dtype=dtype, requires_grad=True)
    settings = {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": length,
        "max_length_k": length,
        "dropout_p": p,
    }
    found = packed_attention(q, q, v, **settings)
    other = packed_attention(q, q, v, **settings)
    assert not torch.equal(found, other)
    each = found[..., 0].detach().float()
    # A weight is dropped or not. The mean of one row has this deviation.
    deviation = (p / (1 - p) / length) ** 0.5
    assert abs(float(each.mean()) - 1) < 5 * deviation / each.numel() ** 0.5 + 2e-3
    assert float(each.std()) == pytest.approx(deviation, rel=0.1)
    # Backward takes the same mask: attention is linear in v.
    (gradient,) = torch.autograd.grad(found, v, torch.ones_like(found))
    assert float(gradient.sum()) == pytest.approx(float(found.detach().sum()), rel=2e-3)


def test_weights_are_dropped_with_the_probability_asked_for():
    torch.manual_seed(0)
    check_dropout(CPU, torch.float32, length=64)


@pytest.mark.gpu
@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize("name", ["one", "several", "empty ones at the end"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.02), (torch.float32, 1e-5)])
def test_a_gpu_attends_within_each_sequence(gpu, name, first_only, dtype, bound):
    """Flash attention in bfloat16, the memory-efficient kernel in float32."""
    lengths = MANY[name]
    if first_only:
        lengths = [length for length in lengths if length]
    check_packed(lengths, first_only=first_only, bound=bound, dtype=dtype, device=gpu)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_drops_with_the_probability_asked_for(gpu, dtype):
    torch.manual_seed(0)
    check_dropout(gpu, dtype)
