"""The Triton kernels of `fused.py`; importing this module needs Triton.

One row of activations is one token. A pointer that is None switches its part of a kernel off when
the kernel is compiled. The number of tokens is never compiled in, so a new one costs nothing.
"""

import triton
import triton.language as tl


def sizes(dim: int) -> dict[str, int]:
    """Return the constants of a kernel: dim, the power of 2 that holds a row, and its warps."""
    block = max(triton.next_power_of_2(dim), 4)
    return {"dim": dim, "block": block, "num_warps": min(max(block // 256, 4), 16)}


@triton.jit
def _is_kept(seed_ptr, row, p, block: tl.constexpr):
    """Return the keep mask of one row: (block,).

    Philox (Salmon et al. 2011) gives four numbers at once, so one call serves four entries. Both
    passes get the same mask, even with different grids.
    """
    fours = row * (block // 4) + tl.arange(0, block // 4)
    a, b, c, d = tl.rand4x(tl.load(seed_ptr), fours)
    return tl.join(tl.join(a, b), tl.join(c, d)).reshape(block) >= p


@triton.jit
def forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    seed_ptr,
    y_ptr,
    z_ptr,
    mean_ptr,
    rstd_ptr,
    p,
    scale,
    eps,
    dim: tl.constexpr,
    block: tl.constexpr,
):
    """Normalise one row for each program.

    Without seed_ptr nothing is dropped. Without z_ptr, mean_ptr and rstd_ptr nothing is kept.
    """
    # The product of row and dim may need more than 32 bits.
    row = tl.program_id(0).to(tl.int64)
    start = row * dim
    columns = tl.arange(0, block)
    inside = columns < dim
    z = tl.load(x_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
    if seed_ptr is not None:
        z = tl.where(_is_kept(seed_ptr, row, p, block), z * scale, 0.0)
    z += tl.load(residual_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(z, 0) / dim
    centred = tl.where(inside, z - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / dim + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + start + columns, centred * rstd * weight + bias, mask=inside)
    if z_ptr is not None:
        tl.store(z_ptr + start + columns, z, mask=inside)
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)


@triton.jit(do_not_specialize=["num_tokens"])
def backward_kernel(
    grad_ptr,
    weight_ptr,
    seed_ptr,
    z_ptr,
    mean_ptr,
    rstd_ptr,
    grad_x_ptr,
    grad_residual_ptr,
    weight_sums_ptr,
    bias_sums_ptr,
    num_tokens,
    p,
    scale,
    dim: tl.constexpr,
    block: tl.constexpr,
):
    """Compute the gradients of `forward_kernel`. Each program takes its share of the rows.

    With n = (z - mean) * rstd and g = grad * weight, the gradient of z is
    rstd * (g - mean(g) - n * mean(g * n)). Without weight_sums_ptr or bias_sums_ptr that gradient
    is not computed. Without seed_ptr there is no grad_x_ptr: it would equal grad_residual.
    """
    columns = tl.arange(0, block)
    inside = columns < dim
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((block,), tl.float32)
    bias_sum = tl.zeros((block,), tl.float32)
    first = tl.program_id(0).to(tl.int64)
    for row in range(first, num_tokens, tl.num_programs(0)):
        start = row * dim
        z = tl.load(z_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        n = (z - tl.load(mean_ptr + row)) * rstd
        weight_sum += grad * n
        bias_sum += grad
        g = grad * weight
        grad_z = (g - tl.sum(g, 0) / dim - n * (tl.sum(g * n, 0) / dim)) * rstd
        tl.store(grad_residual_ptr + start + columns, grad_z, mask=inside)
        if seed_ptr is not None:
            grad_x = tl.where(_is_kept(seed_ptr, row, p, block), grad_z * scale, 0.0)
            tl.store(grad_x_ptr + start + columns, grad_x, mask=inside)
    own = tl.program_id(0) * dim
    if weight_sums_ptr is not None:
        tl.store(weight_sums_ptr + own + columns, weight_sum, mask=inside)
    if bias_sums_ptr is not None:
        tl.store(bias_sums_ptr + own + columns, bias_sum, mask=inside)
