"""Dropout, residual and LayerNorm in one kernel.

A post-LayerNorm block ends each half with LayerNorm(dropout(x) + residual). Plain torch reads and
writes the activations once for each of the three, and keeps a mask. One kernel reads and writes
each activation once. The mask is never stored: it is a function of a seed and of the position, so
the backward pass draws it again.
"""

from functools import cache
from subprocess import CalledProcessError
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

# Programs of the backward pass if a weight is trained: four on each of the 132 multiprocessors of
# an H100. Each program sums its own rows.
NUM_PROGRAMS = 528


def dropout_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    p: float,
    eps: float,
) -> Tensor:
    """Return LayerNorm(dropout(x, p) + residual) * weight + bias.

    LayerNorm: Ba et al. 2016, dropout: Srivastava et al. 2014. CUDA tensors take the fused kernels
    if Triton works. Other tensors take the plain formula.

    Args:
        x: (num_tokens, dim), contiguous, in float32, bfloat16 or float16.
        residual: (num_tokens, dim), contiguous, in the dtype of x.
        weight: (dim,), contiguous, in any floating dtype, frozen or trained.
        bias: (dim,), contiguous, in any floating dtype, frozen or trained.
        p: Probability of dropping an entry of x, at least 0 and below 1; 0 outside training.
        eps: Added to the variance.

    Returns:
        (num_tokens, dim), in the dtype of x.
    """
    # A grid of no programs cannot be launched.
    if x.is_cuda and x.numel() and why_not_fused() is None:
        return triton_dropout_add_norm(x, residual, weight, bias, p=p, eps=eps)
    return plain_dropout_add_norm(x, residual, weight, bias, p=p, eps=eps)


def has_triton() -> bool:
    """Return whether Triton can be imported."""
    return _kernels() is not None


@cache
def why_not_fused() -> str | None:
    """Return why CUDA tensors take the plain formula, or None if they take the fused kernels."""
    if not has_triton():
        return "Triton is not installed"
    x = torch.ones(1, 16, device="cuda")
    try:
        triton_dropout_add_norm(x, x, x[0], x[0], p=0.0, eps=1e-5)
    except (RuntimeError, OSError, CalledProcessError) as error:
        # No C compiler, no Python.h or no driver.
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        return f"Triton cannot compile: {first_line}"
    return None


def plain_dropout_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    p: float,
    eps: float,
) -> Tensor:
    """Compute `dropout_add_norm` with torch's operations, on any device."""
    dropped = functional.dropout(x, p) if p else x
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    return functional.layer_norm(dropped + residual, weight.shape, weight, bias, eps)


def triton_dropout_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    p: float,
    eps: float,
) -> Tensor:
    """Compute `dropout_add_norm` with the fused kernels, for CUDA tensors of at least one token.

    All arithmetic is in fp32. The seed comes from torch's CUDA generator: `torch.manual_seed`
    repeats it, and every replay of a CUDA graph draws another one. If a gradient is wanted, the
    sum dropout(x) + residual is kept, rounded to the dtype of x. The forward pass normalises the
    sum before it is rounded. The backward pass uses the rounded sum.
    """
    inputs = (x, residual, weight, bias)
    assert all(tensor.is_contiguous() for tensor in inputs)
    assert residual.shape == x.shape
    assert residual.dtype == x.dtype
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        y: Tensor = _DropoutAddNorm.apply(*inputs, p, eps)  # type: ignore[no-untyped-call]
        return y
    return _run_forward(*inputs, p, eps, keeps=False)[0]


@cache
def _kernels() -> Any:
    """Return the module of the Triton kernels, or None if Triton is not installed."""
    try:
        from lora_sentiment.fast import fused_kernels
    except ImportError:
        return None
    return fused_kernels


class _DropoutAddNorm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor,
        p: float,
        eps: float,
    ) -> Tensor:
        y, *kept = _run_forward(x, residual, weight, bias, p, eps, keeps=True)
        ctx.save_for_backward(weight, *kept)
        ctx.p, ctx.bias_dtype = p, bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, seed, z, mean, rstd = ctx.saved_tensors
        num_tokens, dim = z.shape
        _, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        programs = num_tokens
        if needs_weight or needs_bias:
            programs = min(num_tokens, NUM_PROGRAMS)
        # One row of sums for each program. They are added in a fixed order, so that results repeat.
        weight_sums = z.new_empty(programs, dim, dtype=torch.float32) if needs_weight else None
        bias_sums = z.new_empty(programs, dim, dtype=torch.float32) if needs_bias else None
        grad_residual = torch.empty_like(z)
        # Without dropout both gradients are equal, and one tensor is returned twice. That is safe:
        # torch's addition does so too, and autograd adds in place only to tensors without another
        # reference.
        grad_x = None if seed is None else torch.empty_like(z)
        _kernels().backward_kernel[(programs,)](
            grads[0].contiguous(),
            weight,
            seed,
            z,
            mean,
            rstd,
            grad_x,
            grad_residual,
            weight_sums,
            bias_sums,
            num_tokens,
            ctx.p,
            1.0 / (1.0 - ctx.p),
            **_kernels().sizes(dim),
        )
        return (
            grad_residual if grad_x is None else grad_x,
            grad_residual,
            None if weight_sums is None else weight_sums.sum(0).to(weight.dtype),
            None if bias_sums is None else bias_sums.sum(0).to(ctx.bias_dtype),
            None,
            None,
        )


def _run_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    p: float,
    eps: float,
    *,
    keeps: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return y, the seed, z, and the mean and 1 / deviation of each row; None if not kept."""
    num_tokens, dim = x.shape
    y = torch.empty_like(x)
    z = torch.empty_like(x) if keeps else None
    mean = x.new_empty(num_tokens, dtype=torch.float32) if keeps else None
    rstd = x.new_empty(num_tokens, dtype=torch.float32) if keeps else None
    # The seed stays on the device, where each replay of a graph draws another one.
    seed = torch.randint(2**62, (1,), device=x.device) if p else None
    if isinstance(x, FakeTensor):
        # The memory estimate runs on tensors without values, which no kernel can read.
        return y, seed, z, mean, rstd
    # Triton launches on the current device, which may be another one than that of x.
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _kernels().forward_kernel[(num_tokens,)](
            x,
            residual,
            weight,
            bias,
            seed,
            y,
            z,
            mean,
            rstd,
            p,
            1.0 / (1.0 - p),
            eps,
            **_kernels().sizes(dim),
        )
    return y, seed, z, mean, rstd
