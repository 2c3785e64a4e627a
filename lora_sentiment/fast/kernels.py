"""The arithmetic of the fast encoder: a linear with low-rank adapters, the FFN, attention and dropout.

Everything here is a function of tensors. A function that would keep more than it needs for the backward pass has
one of its own; where no gradient is wanted the plain computation runs and nothing is kept.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import Function
from torch.nn import functional

from lora_sentiment.fast.attention import attention_backends

# On a CPU, fused attention is the faster one for fp32 inference from about this length, and keeps less for training at
# the same speed (measured in fp32 on AVX2 cores). Shorter dtypes take explicit products at every length, which earlier
# measurements on AMX cores favoured. A constant and never a timing at run time, because results must repeat.
FUSED_ATTENTION_FROM = 192

# Attention weights per chunk: 2 MiB in fp32 stay in a core's own cache between the passes over them. On two AVX-512
# cores, fp32, dropout on, forward and backward took 0.79 to 1.06 times as long as with four times as many, and less in
# six of eight cases (64 to 512 tokens, 12 heads of 32 or 64; the best of four).
CHUNK_ELEMENTS = 2**19


class Adapter(NamedTuple):
    """One low-rank pair that adds `scale * x A^T B^T` to output columns `start` to `stop` of a linear.

    A: (r, in_features), B: (stop - start, r), in any floating dtype (the masters are fp32).
    `dropout` is the probability with which entries of this adapter's x are dropped. LoRA, Hu et al. 2021.
    """

    A: Tensor
    B: Tensor
    scale: float
    start: int
    stop: int
    dropout: float = 0.0


class Segment(NamedTuple):
    """An adapter of some examples only: adds `x A^T B^T` for examples `first` to `last` to columns `start` to `stop`.

    A: (r, in_features), B: (stop - start, r) with the scale in it, in the compute dtype. Nothing is kept for a backward
    pass: examples of many adapters are only ever answered.
    """

    A: Tensor
    B: Tensor
    first: int
    last: int
    start: int
    stop: int


class Linear(NamedTuple):
    """A linear in the compute dtype, weight: (out_features, in_features), with its adapters.

    Each tensor is frozen or trained as its own `requires_grad` says.

    Where `stack` is given, it holds the A of all adapters one below the other, with their scale in B, in the compute
    dtype. One product then serves all of them. Weight and bias are frozen then.
    """

    weight: Tensor
    bias: Tensor
    adapters: tuple[Adapter, ...] = ()
    segments: tuple[Segment, ...] = ()
    stack: Tensor | None = None


def linear(x: Tensor, layer: Linear) -> Tensor:
    """Applies `layer` to x: (..., in_features) and returns (..., out_features).

    In fp32 the adapters are added to a copy of the weight (one product, exact to rounding). In a shorter dtype that
    would round small updates away, so there they are applied to x.
    """
    if layer.stack is not None:
        rows = x.reshape(-1, x.shape[-1])
        spans = [(adapter.start, adapter.stop, len(adapter.A)) for adapter in layer.adapters]
        ups = [adapter.B for adapter in layer.adapters]
        stacked: Tensor = _StackedLinear.apply(
            rows, layer.weight, layer.bias, layer.stack, spans, *ups
        )  # type: ignore[no-untyped-call]
        return stacked.view(*x.shape[:-1], -1)
    plain = layer._replace(
        adapters=tuple(adapter for adapter in layer.adapters if not adapter.dropout)
    )
    if plain.adapters and _wants_grad(*_tensors(plain)):
        y: Tensor = _Linear.apply(x, plain, *_tensors(plain))  # type: ignore[no-untyped-call]
    else:
        # Without adapters autograd's own linear keeps what is needed and no more: x only where the weight is trained.
        y = functional.linear(x, _effective_weight(plain, x.dtype), plain.bias)
        y = _add_low_rank(y, x, plain.adapters)
    for adapter in layer.adapters:
        if adapter.dropout:
            dropped = dropout(x, adapter.dropout)
            reduced = functional.linear(dropped, adapter.A.to(x.dtype)) * adapter.scale
            delta = functional.linear(reduced, adapter.B.to(x.dtype))
            y = y + functional.pad(delta, (adapter.start, y.shape[-1] - adapter.stop))
    for part in layer.segments:
        rows, own = x[part.first : part.last], y[part.first : part.last].view(-1, y.shape[-1])
        own[:, part.start : part.stop].addmm_(
            rows.reshape(-1, x.shape[-1]) @ part.A.t(), part.B.t()
        )
    return y


def cast_adapters(layers: Sequence[Linear], dtype: torch.dtype) -> list[Linear]:
    """Returns linears with adapters in a 16-bit dtype, their scale multiplied into B.

    All adapters are cast by few operations. Gradients reach the tensors that were given, in their own dtype. Linears
    whose base is frozen and whose adapters drop nothing get a `stack`.
    """
    adapters = [layer.adapters for layer in layers if layer.adapters]
    if not adapters:
        return list(layers)
    groups = [len(group) for group in adapters]
    masters = [
        tensor for group in adapters for adapter in group for tensor in (adapter.A, adapter.B)
    ]
    scales = [scale for group in adapters for adapter in group for scale in (1.0, adapter.scale)]
    tensors = iter(_CastAdapters.apply(dtype, groups, scales, *masters))  # type: ignore[no-untyped-call]
    found = []
    for layer in layers:
        if not layer.adapters:
            found.append(layer)
            continue
        stack = next(tensors)
        downs = stack.split_with_sizes([len(adapter.A) for adapter in layer.adapters])
        cast = [
            adapter._replace(A=down, B=next(tensors), scale=1.0)
            for adapter, down in zip(layer.adapters, downs, strict=True)
        ]
        drops = any(adapter.dropout for adapter in cast)
        stacks = (
            not drops
            and not layer.segments
            and not layer.weight.requires_grad
            and not layer.bias.requires_grad
        )
        found.append(layer._replace(adapters=tuple(cast), stack=stack if stacks else None))
    return found


def feed_forward(x: Tensor, lin1: Linear, lin2: Linear) -> Tensor:
    """Returns lin2(gelu(lin1(x))) with the exact, erf-based GELU; x: (..., dim). Keeps the pre-activation only."""
    tensors = _tensors(lin1) + _tensors(lin2)
    if any(adapter.dropout for adapter in lin1.adapters + lin2.adapters) or not _wants_grad(
        x, *tensors
    ):
        return linear(functional.gelu(linear(x, lin1)), lin2)
    y: Tensor = _FeedForward.apply(x, lin1, lin2, *tensors)  # type: ignore[no-untyped-call]
    return y


def attention(qkv: Tensor, mask: Tensor | None, *, num_heads: int, dropout_p: float) -> Tensor:
    """Multi-head self-attention of every token to every token.

    Args:
        qkv: (batch, length, 3 * dim), queries, keys and values side by side.
        mask: (batch, 1, 1, length), added to the scores, or None.
        num_heads: Heads that share dim.
        dropout_p: Probability of dropping an attention weight; 0 outside training.

    Returns:
        (batch, length, dim).
    """
    batch, length, width = qkv.shape
    fused = qkv.dtype == torch.float32 and length >= FUSED_ATTENTION_FROM and not dropout_p
    if qkv.device.type != "cpu" or fused:
        heads = qkv.view(batch, length, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)
        with attention_backends(qkv.device):
            mixed = functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout_p
            )
        return mixed.transpose(1, 2).reshape(batch, length, width // 3)
    if _wants_grad(qkv):
        y: Tensor = _Attention.apply(qkv, mask, num_heads, dropout_p)  # type: ignore[no-untyped-call]
        return y
    return _attend(qkv, mask, num_heads, dropout_p, None)


def first_token_attention(
    query: Tensor, keys_values: Tensor, mask: Tensor | None, *, num_heads: int, dropout_p: float
) -> Tensor:
    """Attention of one token per example to all of them.

    Args:
        query: (batch, 1, dim).
        keys_values: (batch, length, 2 * dim).
        mask: (batch, 1, 1, length), added to the scores, or None.
        num_heads: Heads that share dim.
        dropout_p: Probability of dropping an attention weight; 0 outside training.

    Returns:
        (batch, 1, dim).
    """
    batch, length, _ = keys_values.shape
    q = query.view(batch, 1, num_heads, -1).transpose(1, 2)
    k, v = keys_values.view(batch, length, 2, num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    weights = dropout(torch.softmax(scores, dim=-1), dropout_p)
    return (weights @ v).transpose(1, 2).reshape(query.shape)


def dropout(x: Tensor, p: float) -> Tensor:
    """Drops entries of x with probability p and scales the others so that the mean stays.

    On a CPU the mask comes from random bytes, because `bernoulli_` is serial there: p is rounded to a multiple of
    1/256 (0.1 becomes 26/256 = 0.1016; never below 1/256) and the scale is that of the rounded p. The bytes come from
    torch's global generator.
    """
    if not p:
        return x
    if x.device.type != "cpu":
        return functional.dropout(x, p)
    y: Tensor = _Dropout.apply(x, p)  # type: ignore[no-untyped-call]
    return y


def keep_probability(p: float) -> float:
    """The probability with which `dropout` on a CPU keeps an entry when asked to drop with probability p."""
    return 1.0 - _threshold(p) / 256


def _threshold(p: float) -> int:
    return min(max(round(p * 256), 1), 255)


def _random_bytes(shape: torch.Size) -> Tensor:
    words = torch.empty((shape.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    return words.view(torch.uint8)[: shape.numel()].view(shape)


def _wants_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _tensors(layer: Linear) -> tuple[Tensor, ...]:
    """All that may be trained in a layer, in the order of the gradients that `_project_backward` returns."""
    pairs = (tensor for adapter in layer.adapters for tensor in (adapter.A, adapter.B))
    return layer.weight, layer.bias, *pairs


def _is_folded(dtype: torch.dtype) -> bool:
    return dtype == torch.float32


def _effective_weight(layer: Linear, dtype: torch.dtype) -> Tensor:
    if not layer.adapters or not _is_folded(dtype):
        return layer.weight
    weight = layer.weight.clone()
    for adapter in layer.adapters:
        rows = weight[adapter.start : adapter.stop]
        rows.addmm_(adapter.B.detach().to(dtype), adapter.A.detach().to(dtype), alpha=adapter.scale)
    return weight


def _add_low_rank(y: Tensor, x: Tensor, adapters: tuple[Adapter, ...]) -> Tensor:
    """Adds to y in place what `_effective_weight` left out; x and y may have any number of leading dimensions."""
    if not adapters or _is_folded(x.dtype):
        return y
    rows = y.view(-1, y.shape[-1])
    for adapter in adapters:
        reduced = functional.linear(x.reshape(-1, x.shape[-1]), adapter.A.to(x.dtype))
        rows[:, adapter.start : adapter.stop].addmm_(
            reduced, adapter.B.to(x.dtype).t(), alpha=adapter.scale
        )
    return y


def _project(x: Tensor, layer: Linear) -> tuple[Tensor, Tensor]:
    """Returns the output for x: (tokens, in_features) and the weight that gave it, without recording anything."""
    weight = _effective_weight(layer, x.dtype)
    return _add_low_rank(torch.addmm(layer.bias, x, weight.t()), x, layer.adapters), weight


def _project_backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor,
    adapters: Sequence[Adapter],
    *,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of `_project` with respect to x, the weight, the bias and A, B of each adapter.

    `weight` is the one that `_project` returned: the adapters in it are added, so that its gradient is the base's too.
    `needs` says which of the first three are wanted; x is None where neither the weight nor an adapter is trained.
    The thin products are written with the transposed, r-wide factor first: BLAS libraries run (r, tokens) x
    (tokens, dim) several times faster than its transpose.
    """
    needs_x, needs_weight, needs_bias = needs
    grad_x = grad @ weight if needs_x else None
    grad_bias = grad.sum(0) if needs_bias else None
    if x is None:
        return [grad_x, None, grad_bias]
    grads = [grad_x, grad.t() @ x if needs_weight else None, grad_bias]
    for adapter in adapters:
        grad_y = grad[:, adapter.start : adapter.stop]
        down, up = adapter.A.to(grad.dtype), adapter.B.to(grad.dtype)
        grad_reduced = _times(up, adapter.scale).t() @ grad_y.t()
        reduced = x @ _times(down, adapter.scale).t()
        grads.append((grad_reduced @ x).to(adapter.A.dtype))
        grads.append((reduced.t() @ grad_y).t().to(adapter.B.dtype))
        if grad_x is not None and not _is_folded(grad.dtype):
            grad_x.addmm_(grad_reduced.t(), down)
    return grads


def _times(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1.0 else tensor * scale


def _restore(adapters: Sequence[Adapter], pairs: Sequence[Tensor]) -> list[Adapter]:
    """Puts the saved A and B back, so that autograd's check for changes made in between sees them."""
    return [
        old._replace(A=A, B=B) for old, A, B in zip(adapters, pairs[::2], pairs[1::2], strict=True)
    ]


class _CastAdapters(Function):
    """A and B of adapters, in turn, times a number each, in another dtype.

    Returns for each group of adapters their A one below the other, and then each B.
    """

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, groups: list[int], scales: list[float], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.groups, ctx.scales = groups, scales
        ctx.like = [(tensor.shape, tensor.dtype) for tensor in tensors]
        found: list[Tensor] = []
        places: list[Tensor] = []
        start = 0
        for count in groups:
            pairs = tensors[start : start + 2 * count]
            ranks = [len(down) for down in pairs[::2]]
            stack = pairs[0].new_empty(sum(ranks), pairs[0].shape[1], dtype=dtype)
            ups = [torch.empty_like(up, dtype=dtype) for up in pairs[1::2]]
            for down, up in zip(stack.split_with_sizes(ranks), ups, strict=True):
                places += [down, up]
            found += [stack, *ups]
            start += 2 * count
        torch._foreach_copy_(places, torch._foreach_mul(tensors, scales))
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        parts: list[Tensor] = []
        rest = iter(grads)
        sizes = iter(ctx.like[::2])
        for count in ctx.groups:
            downs = next(rest).split_with_sizes([next(sizes)[0][0] for _ in range(count)])
            for down in downs:
                parts += [down, next(rest)]
        found = [
            part.new_empty(shape, dtype=dtype)
            for part, (shape, dtype) in zip(parts, ctx.like, strict=True)
        ]
        torch._foreach_copy_(found, parts)
        torch._foreach_mul_(found, ctx.scales)
        return None, None, None, *found


class _StackedLinear(Function):
    """x W^T + b, and for each adapter x A^T B^T added to its columns; W and b are frozen.

    `spans` has (first column, end, rank) of each adapter.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        stack: Tensor,
        spans: list[tuple[int, int, int]],
        *ups: Tensor,
    ) -> Tensor:
        y = torch.addmm(bias, x, weight.t())
        reduced = x @ stack.t()
        pieces = reduced.split_with_sizes([rank for *_, rank in spans], dim=1)
        for (start, stop, _), piece, up in zip(spans, pieces, ups, strict=True):
            y[:, start:stop].addmm_(piece, up.t())
        ctx.save_for_backward(x, weight, stack, reduced, *ups)
        ctx.spans = spans
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight, stack, reduced, *ups = ctx.saved_tensors
        grad = grads[0]
        ranks = [rank for *_, rank in ctx.spans]
        grad_reduced = torch.empty_like(reduced)
        grad_ups = []
        pieces = zip(
            ctx.spans,
            reduced.split_with_sizes(ranks, dim=1),
            grad_reduced.split_with_sizes(ranks, dim=1),
            ups,
            strict=True,
        )
        for (start, stop, _), piece, grad_piece, up in pieces:
            own = grad[:, start:stop]
            torch.mm(own, up, out=grad_piece)
            grad_ups.append(own.t() @ piece)
        grad_stack = grad_reduced.t() @ x
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
            grad_x.addmm_(grad_reduced, stack)
        return grad_x, None, None, grad_stack, None, *grad_ups


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Linear, *tensors: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y, weight = _project(rows, layer)
        ctx.save_for_backward(rows, weight, *tensors[2:])
        ctx.adapters, ctx.shape = layer.adapters, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, *pairs = ctx.saved_tensors
        needs_x, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_x, *others = _project_backward(
            grads[0].reshape(-1, grads[0].shape[-1]),
            rows,
            weight,
            _restore(ctx.adapters, pairs),
            needs=(needs_x, needs_weight, needs_bias),
        )
        return (None if grad_x is None else grad_x.view(ctx.shape), None, *others)


class _FeedForward(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lin1: Linear, lin2: Linear, *tensors: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        hidden, weight1 = _project(rows, lin1)
        y, weight2 = _project(functional.gelu(hidden), lin2)
        ctx.split = len(_tensors(lin1))
        keeps_rows = lin1.adapters or lin1.weight.requires_grad
        pairs = (*tensors[2 : ctx.split], *tensors[ctx.split + 2 :])
        ctx.save_for_backward(rows if keeps_rows else None, hidden, weight1, weight2, *pairs)
        ctx.adapters, ctx.shape = (lin1.adapters, lin2.adapters), x.shape
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, hidden, weight1, weight2, *pairs = ctx.saved_tensors
        needs_x, _, _, *needs = ctx.needs_input_grad
        needs1, needs2 = needs[: ctx.split], needs[ctx.split :]
        adapters1 = _restore(ctx.adapters[0], pairs[: ctx.split - 2])
        adapters2 = _restore(ctx.adapters[1], pairs[ctx.split - 2 :])
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        inner = functional.gelu(hidden) if adapters2 or needs2[0] else None
        needs_inner = needs_x or any(needs1)
        grad_inner, *others2 = _project_backward(
            grad, inner, weight2, adapters2, needs=(needs_inner, *needs2[:2])
        )
        if grad_inner is None:
            return (None, None, None, *(None for _ in needs1), *others2)
        grad_hidden = torch.ops.aten.gelu_backward(grad_inner, hidden)
        grad_x, *others1 = _project_backward(
            grad_hidden, rows, weight1, adapters1, needs=(needs_x, *needs1[:2])
        )
        return (None if grad_x is None else grad_x.view(ctx.shape), None, None, *others1, *others2)


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, mask: Tensor | None, num_heads: int, dropout_p: float
    ) -> Tensor:
        batch, length, _ = qkv.shape
        weights = qkv.new_empty(batch, num_heads, length, length)
        y = _attend(qkv, mask, num_heads, dropout_p, weights)
        ctx.save_for_backward(qkv, weights)
        ctx.num_heads, ctx.dropout_p = num_heads, dropout_p
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, weights = ctx.saved_tensors
        batch, length, _ = qkv.shape
        split = (batch, length, 3, ctx.num_heads, -1)
        inputs, grad_qkv = qkv.view(split), torch.empty_like(qkv)
        grad_heads = grads[0].reshape(batch, length, ctx.num_heads, -1)
        for rows, some in _chunks(qkv, ctx.num_heads):
            heads = inputs[rows, :, :, some].permute(2, 0, 3, 1, 4).flatten(1, 2).contiguous()
            grad = grad_heads[rows, :, some].transpose(1, 2).flatten(0, 1).contiguous()
            part = _attend_backward(heads, weights[rows, some].flatten(0, 1), grad, ctx.dropout_p)
            part = part.view(3, rows.stop - rows.start, -1, length, part.shape[-1])
            grad_qkv.view(split)[rows, :, :, some] = part.permute(1, 3, 0, 2, 4)
        return grad_qkv, None, None, None


class _Dropout(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        keep = _random_bytes(x.shape) >= _threshold(p)
        ctx.save_for_backward(keep)
        ctx.scale = 1.0 / keep_probability(p)
        return x * _factors(keep, ctx.scale, x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (keep,) = ctx.saved_tensors
        return grads[0] * _factors(keep, ctx.scale, grads[0].dtype), None


def _factors(keep: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    # Converting from bytes is several times faster than from bool, and than torch.where.
    return keep.view(torch.uint8).to(dtype).mul_(scale)


def _chunks(qkv: Tensor, num_heads: int) -> list[tuple[slice, slice]]:
    """Returns examples and heads whose attention weights are one chunk: whole examples, or heads of a single one.

    qkv: (batch, length, 3 * dim).
    """
    batch, length, _ = qkv.shape
    of_a_head = length * length
    heads = min(num_heads, max(1, CHUNK_ELEMENTS // of_a_head))
    rows = max(1, CHUNK_ELEMENTS // (of_a_head * num_heads))
    chunks = [
        (slice(row, min(row + rows, batch)), slice(head, min(head + heads, num_heads)))
        for row in range(0, batch, rows)
        for head in range(0, num_heads, heads)
    ]
    # The memory estimate runs on tensors without values. Two chunks hold as much at once as all of them.
    return chunks[:2] if isinstance(qkv, FakeTensor) else chunks


def _attend(
    qkv: Tensor, mask: Tensor | None, num_heads: int, dropout_p: float, weights: Tensor | None
) -> Tensor:
    """Attention by explicit products; fills `weights`: (batch, heads, length, length) where it is given.

    A dropped weight is stored with its sign turned, so that one tensor holds the weights and the mask.
    """
    batch, length, width = qkv.shape
    inputs = qkv.view(batch, length, 3, num_heads, -1)
    y = qkv.new_empty(batch, length, num_heads, inputs.shape[-1])
    for rows, heads in _chunks(qkv, num_heads):
        q, k, v = (
            inputs[rows, :, :, heads].permute(2, 0, 3, 1, 4).flatten(1, 2).contiguous().unbind(0)
        )
        scores = torch.baddbmm(
            q.new_empty(1), q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5
        )
        if mask is not None:
            scores.view(rows.stop - rows.start, -1, length, length).add_(mask[rows])
        chunk = torch.softmax(
            scores, dim=-1, out=None if weights is None else weights[rows, heads].flatten(0, 1)
        )
        if dropout_p:
            # The half keeps the difference off zero, which has no sign to copy.
            signs = _random_bytes(chunk.shape).to(chunk.dtype).sub_(_threshold(dropout_p) - 0.5)
            chunk = chunk.copysign_(signs).relu()
            v = v * (1.0 / keep_probability(dropout_p))
        y[rows, :, heads] = (
            torch.bmm(chunk, v)
            .view(rows.stop - rows.start, -1, length, v.shape[-1])
            .transpose(1, 2)
        )
    return y.view(batch, length, width // 3)


def _attend_backward(heads: Tensor, weights: Tensor, grad: Tensor, dropout_p: float) -> Tensor:
    """The gradient of one chunk of `_attend` with respect to heads: (3, batch * heads, length, head_dim)."""
    q, k, v = heads.unbind(0)
    result = torch.empty_like(heads)
    scale = q.shape[-1] ** -0.5
    if dropout_p:
        grad = grad * (1.0 / keep_probability(dropout_p))
    kept = weights.relu() if dropout_p else weights
    torch.bmm(kept.transpose(1, 2), grad, out=result[2])
    grad_weights = torch.bmm(grad, v.transpose(1, 2))
    if dropout_p:
        grad_weights = torch.ops.aten.threshold_backward(grad_weights, weights, 0)
        weights = weights.abs()
    grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
    torch.baddbmm(result[0], grad_scores, k, beta=0, alpha=scale, out=result[0])
    torch.baddbmm(result[1], grad_scores.transpose(1, 2), q, beta=0, alpha=scale, out=result[1])
    return result
