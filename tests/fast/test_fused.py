"""The fused kernels give what the plain formula gives; on CPU tensors Triton interprets them."""

import math
import os
import subprocess
import sys
from importlib.util import find_spec
from subprocess import CalledProcessError

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from lora_sentiment.fast import fused
from lora_sentiment.fast.fused import (
    dropout_add_norm,
    has_triton,
    plain_dropout_add_norm,
    triton_dropout_add_norm,
)

pytestmark = pytest.mark.usefixtures("one_thread")
NO_TRITON = find_spec("triton") is None
needs_triton = pytest.mark.skipif(NO_TRITON, reason="Triton is not installed here")
EPS = 1e-12
P = 0.1


def make_inputs(
    num_tokens: int,
    dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    trained: str = "x residual weight bias",
    device: str = "cpu",
) -> tuple[Tensor, ...]:
    """x and residual in `dtype`, weight and bias in fp32; `trained` names those with a gradient."""
    torch.manual_seed(0)
    tensors = {
        "x": torch.randn(num_tokens, dim).to(dtype),
        "residual": torch.randn(num_tokens, dim).to(dtype),
        "weight": torch.randn(dim),
        "bias": torch.randn(dim),
    }
    for name in tensors:
        tensors[name] = tensors[name].to(device).requires_grad_(name in trained.split())
    return tuple(tensors.values())


def gradients(y: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad(y, inputs, direction.to(y))


def assert_near(found: Tensor, expected: Tensor, bound: float) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert (found - expected).norm() <= bound * expected.norm()


def check_without_dropout(num_tokens: int, dim: int, device: str) -> None:
    inputs = make_inputs(num_tokens, dim, device=device)
    found = triton_dropout_add_norm(*inputs, p=0.0, eps=EPS)
    expected = plain_dropout_add_norm(*inputs, p=0.0, eps=EPS)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    pairs = zip(gradients(found, inputs), gradients(expected, inputs), strict=True)
    for found_gradient, expected_gradient in pairs:
        assert_near(found_gradient, expected_gradient, 1e-6)


def check_dropout(num_tokens: int, dim: int, device: str) -> None:
    inputs = make_inputs(num_tokens, dim, device=device)
    found = triton_dropout_add_norm(*inputs, p=P, eps=EPS)
    found_gradients = gradients(found, inputs)
    grad_x, grad_residual = found_gradients[:2]
    kept = grad_x != 0
    deviation = math.sqrt(P * (1 - P) / kept.numel())
    assert abs(kept.float().mean().item() - (1 - P)) <= 4 * deviation
    torch.testing.assert_close(grad_x[kept], grad_residual[kept] / (1 - P))
    # Neither rows nor columns share their draws. Two short rows may be equal by chance.
    counts = kept.unique(dim=0, return_counts=True)[1].double()
    equal_pairs = (counts * (counts - 1) / 2).sum().item()
    probability = ((1 - P) ** 2 + P**2) ** dim
    expected_pairs = probability * num_tokens * (num_tokens - 1) / 2
    assert equal_pairs <= 1 + 3 * expected_pairs
    assert len(kept.unique(dim=1).T) > dim / 2
    x, residual, weight, bias = inputs
    z = x * kept / (1 - P) + residual
    expected = functional.layer_norm(z, (dim,), weight, bias, EPS)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    pairs = zip(found_gradients, gradients(expected, inputs), strict=True)
    for found_gradient, expected_gradient in pairs:
        assert_near(found_gradient, expected_gradient, 1e-6)


def check_short_dtype(dtype: torch.dtype, device: str) -> None:
    inputs = make_inputs(9, 384, dtype=dtype, device=device)
    longer = tuple(tensor.detach().float().requires_grad_() for tensor in inputs)
    found = triton_dropout_add_norm(*inputs, p=0.0, eps=EPS)
    expected = plain_dropout_add_norm(*longer, p=0.0, eps=EPS)
    assert found.dtype == dtype
    rounding = torch.finfo(dtype).eps
    # Half of the last bit. Triton's interpreter cuts bfloat16 off where a GPU rounds it.
    bits = 0.51 if device != "cpu" or dtype == torch.float16 else 1.0
    torch.testing.assert_close(found.float(), expected, rtol=bits * rounding, atol=1e-5)
    pairs = zip(inputs, gradients(found, inputs), gradients(expected, longer), strict=True)
    for tensor, found_gradient, expected_gradient in pairs:
        assert found_gradient.dtype == tensor.dtype
        assert_near(found_gradient.float(), expected_gradient, rounding)


def check_seeds(device: str) -> None:
    inputs = make_inputs(4, 64, device=device)
    torch.manual_seed(3)
    first = triton_dropout_add_norm(*inputs, p=0.5, eps=EPS)
    second = triton_dropout_add_norm(*inputs, p=0.5, eps=EPS)
    torch.manual_seed(3)
    again = triton_dropout_add_norm(*inputs, p=0.5, eps=EPS)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@needs_triton
@pytest.mark.parametrize("dim", [32, 45, 384, 768])
def test_without_dropout_it_is_the_plain_formula(dim):
    check_without_dropout(7, dim, "cpu")


@needs_triton
@pytest.mark.parametrize("dim", [45, 384])
def test_with_dropout_it_is_the_plain_formula_with_the_mask_that_backward_uses(dim):
    check_dropout(24, dim, "cpu")


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes_are_rounded_once(dtype):
    check_short_dtype(dtype, "cpu")


@needs_triton
def test_two_calls_differ_and_a_seed_repeats_them():
    check_seeds("cpu")


@needs_triton
def test_without_dropout_no_random_number_is_drawn():
    inputs = make_inputs(2, 32)
    before = torch.get_rng_state()
    triton_dropout_add_norm(*inputs, p=0.0, eps=EPS)
    assert torch.equal(torch.get_rng_state(), before)


@needs_triton
@pytest.mark.parametrize("p", [0.0, P])
def test_more_tokens_than_programs(p, monkeypatch):
    inputs = make_inputs(8, 32)
    torch.manual_seed(3)
    expected = gradients(triton_dropout_add_norm(*inputs, p=p, eps=EPS), inputs)
    monkeypatch.setattr(fused, "NUM_PROGRAMS", 3)
    torch.manual_seed(3)
    found = gradients(triton_dropout_add_norm(*inputs, p=p, eps=EPS), inputs)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert_near(found[2], expected[2], 1e-6)
    assert_near(found[3], expected[3], 1e-6)


@needs_triton
@pytest.mark.parametrize("trained", ["x residual", "x weight", "residual bias", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient(trained):
    inputs = make_inputs(3, 32, trained=trained)
    (triton_dropout_add_norm(*inputs, p=0.0, eps=EPS) ** 2).sum().backward()
    found = [tensor.grad for tensor in inputs]
    for tensor in inputs:
        tensor.grad = None
    (plain_dropout_add_norm(*inputs, p=0.0, eps=EPS) ** 2).sum().backward()
    for tensor, gradient in zip(inputs, found, strict=True):
        assert (gradient is None) == (not tensor.requires_grad)
        if gradient is not None:
            assert_near(gradient, tensor.grad, 1e-5)


@needs_triton
def test_a_gradient_that_is_not_contiguous():
    inputs = make_inputs(3, 32)
    # That of a sum is one number, expanded.
    y = triton_dropout_add_norm(*inputs, p=0.0, eps=EPS)
    bias_gradient = torch.autograd.grad(y.sum(), inputs)[3]
    assert torch.equal(bias_gradient, torch.full((32,), 3.0))


@needs_triton
def test_gradients_of_both_inputs_add_up_where_they_are_one_tensor():
    x, _, weight, bias = make_inputs(3, 32)
    found = triton_dropout_add_norm(x, x, weight, bias, p=0.0, eps=EPS)
    expected = plain_dropout_add_norm(x, x, weight, bias, p=0.0, eps=EPS)
    assert_near(gradients(found, (x,))[0], gradients(expected, (x,))[0], 1e-6)


@needs_triton
def test_what_is_kept_for_the_backward_pass():
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    short = torch.bfloat16
    inputs = make_inputs(3, 32, dtype=short)
    frozen = make_inputs(3, 32, dtype=short, trained="")
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.no_grad():
            assert not triton_dropout_add_norm(*inputs, p=P, eps=EPS).requires_grad
        assert not triton_dropout_add_norm(*frozen, p=P, eps=EPS).requires_grad
        assert kept == []
        triton_dropout_add_norm(*inputs, p=P, eps=EPS)
    weight, seed = ((32,), torch.float32), ((1,), torch.int64)
    z, mean, rstd = ((3, 32), short), ((3,), torch.float32), ((3,), torch.float32)
    assert kept == [weight, seed, z, mean, rstd]


@needs_triton
def test_without_a_gradient_only_the_output_is_written(monkeypatch):
    made = []
    plain_empty_like = torch.empty_like

    def empty_like(tensor: Tensor) -> Tensor:
        made.append(plain_empty_like(tensor))
        return made[-1]

    monkeypatch.setattr(torch, "empty_like", empty_like)
    inputs = make_inputs(3, 32)
    with torch.no_grad():
        triton_dropout_add_norm(*inputs, p=P, eps=EPS)
    assert len(made) == 1
    triton_dropout_add_norm(*inputs, p=P, eps=EPS)
    assert len(made) == 3


def test_a_cpu_takes_the_plain_formula():
    assert has_triton() == (find_spec("triton") is not None)
    inputs = make_inputs(3, 32)
    torch.manual_seed(3)
    found = dropout_add_norm(*inputs, p=P, eps=EPS)
    torch.manual_seed(3)
    assert torch.equal(found, plain_dropout_add_norm(*inputs, p=P, eps=EPS))


def test_the_plain_formula_takes_weights_of_another_dtype():
    x, residual, *masters = make_inputs(3, 32)
    weight, bias = (tensor.detach().bfloat16().requires_grad_() for tensor in masters)
    inputs = (x, residual, weight, bias)
    y = plain_dropout_add_norm(*inputs, p=0.0, eps=EPS)
    assert y.dtype == torch.float32
    for tensor, gradient in zip(inputs, gradients(y, inputs), strict=True):
        assert gradient.dtype == tensor.dtype


# What the interpreter lets pass a compiler may refuse. Compiling needs no GPU.
COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lora_sentiment.fast.fused_kernels import backward_kernel, forward_kernel, sizes

KINDS = {
    "p": "fp32", "scale": "fp32", "eps": "fp32", "num_tokens": "i32", "seed_ptr": "*i64",
    "mean_ptr": "*fp32", "rstd_ptr": "*fp32", "weight_sums_ptr": "*fp32", "bias_sums_ptr": "*fp32",
}
NO_GRADIENT = {"seed_ptr": None, "z_ptr": None, "mean_ptr": None, "rstd_ptr": None}
FROZEN = {"seed_ptr": None, "grad_x_ptr": None, "weight_sums_ptr": None, "bias_sums_ptr": None}
for kernel, absent in (
    (forward_kernel, {}),
    (forward_kernel, NO_GRADIENT),
    (backward_kernel, {}),
    (backward_kernel, FROZEN),
):
    constants = sizes(768)
    options = {"num_warps": constants.pop("num_warps")}
    constants = {**constants, **absent}
    signature = {name: KINDS.get(name, "*bf16") for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constants)
    assert compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]
    for parameter in kernel.params:
        assert parameter.name != "num_tokens" or parameter.do_not_specialize
    assert [name for name, kind in signature.items() if kind == "i32"] in ([], ["num_tokens"])
"""


@needs_triton
def test_they_compile_for_an_h100_and_the_number_of_tokens_is_not_compiled_in(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", COMPILE], env=environment, check=True)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dim", [45, 312, 384, 768, 1024, 8192])
@pytest.mark.parametrize("num_tokens", [1, 2000])
def test_a_gpu_gives_the_plain_formula_without_dropout(num_tokens, dim, gpu):
    check_without_dropout(num_tokens, dim, gpu)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dim", [45, 312, 768])
def test_a_gpu_gives_the_plain_formula_with_the_mask_that_backward_uses(dim, gpu):
    check_dropout(2000, dim, gpu)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gpu_rounds_short_dtypes_once(dtype, gpu):
    check_short_dtype(dtype, gpu)


@pytest.mark.gpu
@needs_triton
def test_on_a_gpu_a_seed_repeats_the_mask(gpu):
    check_seeds(gpu)


@pytest.mark.gpu
@needs_triton
def test_on_a_gpu_gradients_repeat_to_the_bit(gpu):
    inputs = make_inputs(2000, 768, dtype=torch.bfloat16, device=gpu)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(gradients(dropout_add_norm(*inputs, p=P, eps=EPS), inputs))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.gpu
@needs_triton
def test_every_replay_of_a_graph_draws_another_mask(gpu):
    inputs = make_inputs(64, 768, device=gpu)
    direction = torch.ones_like(inputs[0])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = dropout_add_norm(*inputs, p=P, eps=EPS)
        torch.autograd.grad(y, inputs, direction)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = dropout_add_norm(*inputs, p=P, eps=EPS)
        grad_x = torch.autograd.grad(y, inputs, direction)[0]
    masks = []
    for _ in range(2):
        graph.replay()
        kept = grad_x != 0
        z = inputs[0] * kept / (1 - P) + inputs[1]
        expected = functional.layer_norm(z, (768,), inputs[2], inputs[3], EPS)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        masks.append(kept)
    assert not torch.equal(*masks)


@pytest.mark.gpu
@needs_triton
def test_a_new_number_of_tokens_compiles_nothing(gpu):
    from lora_sentiment.fast.fused_kernels import backward_kernel, forward_kernel

    def count_compiled() -> int:
        kernels = (forward_kernel, backward_kernel)
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    counts = []
    # 1 and multiples of 16 are what Triton would compile for.
    for num_tokens in (37, 1, 16, 4096, 4097):
        inputs = make_inputs(num_tokens, 200, device=gpu)
        gradients(dropout_add_norm(*inputs, p=P, eps=EPS), inputs)
        counts.append(count_compiled())
    assert counts[0] >= 2
    assert set(counts) == {counts[0]}


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler.\nPlease specify"),
        FileNotFoundError("gcc"),
        CalledProcessError(1, ["gcc"]),
    ],
    ids=str,
)
def test_where_triton_cannot_compile_the_reason_is_one_line(error, monkeypatch):
    def fail(*tensors, **options):
        raise error

    ones = torch.ones
    monkeypatch.setattr(fused, "has_triton", lambda: True)
    monkeypatch.setattr(fused, "triton_dropout_add_norm", fail)
    monkeypatch.setattr(torch, "ones", lambda *sizes, device: ones(*sizes))
    fused.why_not_fused.cache_clear()
    try:
        reason = fused.why_not_fused()
    finally:
        fused.why_not_fused.cache_clear()
    assert reason.startswith("Triton cannot compile: ")
    assert "\n" not in reason


def test_without_triton_the_reason_says_so(monkeypatch):
    monkeypatch.setattr(fused, "has_triton", lambda: False)
    fused.why_not_fused.cache_clear()
    try:
        assert fused.why_not_fused() == "Triton is not installed"
    finally:
        fused.why_not_fused.cache_clear()
