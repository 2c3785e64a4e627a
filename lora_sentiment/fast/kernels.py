"""The arithmetic of the fast forward pass: linears with adapters, the FFN, attention and dropout.

Everything here is a function of tensors. An operation for which autograd would keep too much has a
backward pass of its own. Without a gradient, nothing is kept.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import Function
from torch.nn import functional

from lora_sentiment.fast.attention import attention_backends

# From about this length, torch's fused attention is faster for fp32 inference on a CPU. In training
# it keeps less at the same speed (fp32, AVX2 cores). Shorter dtypes take explicit products at every
# length, which were faster on AMX cores. A constant, not a timing at run time: results must repeat.
FUSED_ATTENTION_FROM = 192

# Attention weights of one chunk: 2 MiB in fp32 stay in a core's cache between the passes over them.
# On two AVX-512 cores (fp32, dropout, forward and backward) a chunk of this size took 0.79 to 1.06
# times as long as one of four times the size (64 to 512 tokens, 12 heads of 32 or 64, best of 4).
CHUNK_ELEMENTS = 2**19


class Adapter(NamedTuple):
    """A low-rank pair: adds `scale * x A^T B^T` to output columns `start` to `stop` of a linear.

    A: (r, in_features), B: (stop - start, r), in any floating dtype; the trained ones are fp32.
    `dropout` is the probability of dropping an entry of this adapter's x. LoRA, Hu et al. 2021.
    """

    A: Tensor
    B: Tensor
    scale: float
    start: int
    stop: int
    dropout: float = 0.0


class Segment(NamedTuple):
    """A low-rank pair of the examples `first` to `last` only, for output columns `start` to `stop`.

    A: (r, in_features), B: (stop - start, r) with the scale in it, in the compute dtype. A segment
    has no backward pass: a batch of several adapters is only answered.
    """

    A: Tensor
    B: Tensor
    first: int
    last: int
    start: int
    stop: int


class Linear(NamedTuple):
    """A linear in the compute dtype, weight: (out_features, in_features), with its adapters.

    Each tensor is trained if it requires a gradient.

    `stack` holds the A of all adapters in one tensor, in the compute dtype, so that one product
    serves all of them. The scales are in their B. Weight and bias are frozen then.
    """

    weight: Tensor
    bias: Tensor
    adapters: tuple[Adapter, ...] = ()
    segments: tuple[Segment, ...] = ()
    stack: Tensor | None = None


def linear(x: Tensor, layer: Linear) -> Tensor:
    """Apply a linear to x: (..., in_features); returns (..., out_features).

    In fp32 the adapters are added to a copy of the weight: one product, exact to rounding. In a
    shorter dtype that would round small updates away, so the adapters are applied to x.
    """
    if layer.stack is not None:
        return _stacked_linear(x, layer, layer.stack)
    kept = tuple(adapter for adapter in layer.adapters if not adapter.dropout)
    plain = layer._replace(adapters=kept)
    trained = _trained(plain)
    if kept and _wants_grad(*trained):
        y: Tensor = _Linear.apply(x, plain, False, *trained)  # type: ignore[no-untyped-call]
    else:
        # Without adapters, autograd's own linear keeps x only if the weight is trained.
        y = functional.linear(x, _effective_weight(plain, x.dtype), plain.bias)
        _add_adapters(y, x, kept)
    for adapter in layer.adapters:
        if adapter.dropout:
            dropped = dropout(x, adapter.dropout)
            reduced = functional.linear(dropped, adapter.A.to(x.dtype)) * adapter.scale
            delta = functional.linear(reduced, adapter.B.to(x.dtype))
            y = y + functional.pad(delta, (adapter.start, y.shape[-1] - adapter.stop))
    for segment in layer.segments:
        examples = slice(segment.first, segment.last)
        _add_pair(y[examples], x[examples], segment)
    return y


def feed_forward(x: Tensor, lin1: Linear, lin2: Linear) -> Tensor:
    """Return lin2(gelu(lin1(x))) with the exact, erf-based GELU; x: (..., dim).

    For the backward pass only the pre-activation is kept. The activation is computed again.
    """
    drops = any(adapter.dropout for adapter in lin1.adapters + lin2.adapters)
    if drops or not _wants_grad(x, *_trained(lin1), *_trained(lin2)):
        return linear(functional.gelu(linear(x, lin1)), lin2)
    hidden = _Linear.apply(x, lin1, False, *_trained(lin1))  # type: ignore[no-untyped-call]
    y: Tensor = _Linear.apply(hidden, lin2, True, *_trained(lin2))  # type: ignore[no-untyped-call]
    return y


def _wants_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _trained(layer: Linear) -> tuple[Tensor, ...]:
    """Return the tensors that may be trained, in the order of `_Linear`'s gradients."""
    pairs = (tensor for adapter in layer.adapters for tensor in (adapter.A, adapter.B))
    return layer.weight, layer.bias, *pairs


def _is_folded(dtype: torch.dtype) -> bool:
    """Return whether adapters are added to the weight in this dtype."""
    return dtype == torch.float32


def _effective_weight(layer: Linear, dtype: torch.dtype) -> Tensor:
    if not layer.adapters or not _is_folded(dtype):
        return layer.weight
    weight = layer.weight.clone()
    for adapter in layer.adapters:
        rows = weight[adapter.start : adapter.stop]
        rows.addmm_(adapter.B.detach().to(dtype), adapter.A.detach().to(dtype), alpha=adapter.scale)
    return weight


def _add_adapters(y: Tensor, x: Tensor, adapters: Sequence[Adapter]) -> None:
    """Add the adapters to y in place, unless `_effective_weight` added them to the weight."""
    if not _is_folded(x.dtype):
        for adapter in adapters:
            _add_pair(y, x, adapter, adapter.scale)


def _add_pair(y: Tensor, x: Tensor, pair: Adapter | Segment, scale: float = 1.0) -> None:
    """Add `scale * x A^T B^T` to a pair's columns of y, in place."""
    reduced = functional.linear(x.reshape(-1, x.shape[-1]), pair.A.to(x.dtype))
    columns = y.view(-1, y.shape[-1])[:, pair.start : pair.stop]
    columns.addmm_(reduced, pair.B.to(x.dtype).t(), alpha=scale)


class _Linear(Function):
    """A linear of x, or of gelu(x) if `after_gelu`; x is the only activation that is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Linear, after_gelu: bool, *tensors: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inputs = functional.gelu(rows) if after_gelu else rows
        weight = _effective_weight(layer, x.dtype)
        y = torch.addmm(layer.bias, inputs, weight.t())
        _add_adapters(y, inputs, layer.adapters)
        keeps_rows = after_gelu or layer.adapters or layer.weight.requires_grad
        ctx.save_for_backward(rows if keeps_rows else None, weight, *tensors[2:])
        ctx.adapters, ctx.after_gelu, ctx.shape = layer.adapters, after_gelu, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, *pairs = ctx.saved_tensors
        needs_x, _, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        inputs = rows
        if ctx.after_gelu and (ctx.adapters or needs_weight):
            inputs = functional.gelu(rows)
        # The weight holds the adapters in fp32, so this gradient is the sum of both paths.
        grad_x = grad @ weight if needs_x else None
        grad_weight = grad.t() @ inputs if needs_weight else None
        grad_bias = grad.sum(0) if needs_bias else None
        grad_pairs = []
        # The saved A and B let autograd check that nobody changed them since the forward pass.
        for adapter, A, B in zip(ctx.adapters, pairs[::2], pairs[1::2], strict=True):
            down, up = A.to(grad.dtype), B.to(grad.dtype)
            grad_y = grad[:, adapter.start : adapter.stop]
            # The transposed, r-wide factor comes first: BLAS libraries run (r, tokens) x
            # (tokens, dim) several times faster than its transpose.
            grad_reduced = _scale(up, adapter.scale).t() @ grad_y.t()
            reduced = inputs @ _scale(down, adapter.scale).t()
            grad_pairs.append((grad_reduced @ inputs).to(A.dtype))
            grad_pairs.append((reduced.t() @ grad_y).t().to(B.dtype))
            if grad_x is not None and not _is_folded(grad.dtype):
                grad_x.addmm_(grad_reduced.t(), down)
        if grad_x is not None:
            if ctx.after_gelu:
                grad_x = torch.ops.aten.gelu_backward(grad_x, rows)
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, grad_weight, grad_bias, *grad_pairs


def _scale(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1.0 else tensor * scale


def cast_adapters(layers: Sequence[Linear], dtype: torch.dtype) -> list[Linear]:
    """Return linears whose adapters are in a 16-bit dtype, with their scale multiplied into B.

    Few operations cast all adapters. Gradients reach the given tensors in their own dtype. A linear
    gets a `stack` if its base is frozen and its adapters drop nothing.
    """
    adapters = [layer.adapters for layer in layers if layer.adapters]
    if not adapters:
        return list(layers)
    masters: list[Tensor] = []
    scales: list[float] = []
    for group in adapters:
        for adapter in group:
            masters += [adapter.A, adapter.B]
            scales += [1.0, adapter.scale]
    counts = [len(group) for group in adapters]
    outputs = _CastAdapters.apply(dtype, counts, scales, *masters)  # type: ignore[no-untyped-call]
    tensors = iter(outputs)
    cast = []
    for layer in layers:
        if not layer.adapters:
            cast.append(layer)
            continue
        stack = next(tensors)
        downs = stack.split_with_sizes([len(adapter.A) for adapter in layer.adapters])
        pairs = tuple(
            adapter._replace(A=down, B=next(tensors), scale=1.0)
            for adapter, down in zip(layer.adapters, downs, strict=True)
        )
        drops = any(adapter.dropout for adapter in pairs)
        is_trained = layer.weight.requires_grad or layer.bias.requires_grad
        has_stack = not (drops or layer.segments or is_trained)
        cast.append(layer._replace(adapters=pairs, stack=stack if has_stack else None))
    return cast


class _CastAdapters(Function):
    """Multiply A and B of adapters by a number each, and cast them to another dtype.

    `counts` has the number of adapters of each group. Returns for each group one tensor that stacks
    all A, and then each B.
    """

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, counts: list[int], scales: list[float], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.counts, ctx.scales = counts, scales
        ctx.like = [(tensor.shape, tensor.dtype) for tensor in tensors]
        outputs: list[Tensor] = []
        places: list[Tensor] = []  # of each tensor, in the outputs
        start = 0
        for count in counts:
            pairs = tensors[start : start + 2 * count]
            ranks = [len(down) for down in pairs[::2]]
            stack = pairs[0].new_empty(sum(ranks), pairs[0].shape[1], dtype=dtype)
            ups = [torch.empty_like(up, dtype=dtype) for up in pairs[1::2]]
            for down, up in zip(stack.split_with_sizes(ranks), ups, strict=True):
                places += [down, up]
            outputs += [stack, *ups]
            start += 2 * count
        torch._foreach_copy_(places, torch._foreach_mul(tensors, scales))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        parts: list[Tensor] = []
        rest = iter(grads)
        downs_like = iter(ctx.like[::2])
        for count in ctx.counts:
            ranks = [next(downs_like)[0][0] for _ in range(count)]
            for down in next(rest).split_with_sizes(ranks):
                parts += [down, next(rest)]
        outputs = []
        for part, (shape, dtype) in zip(parts, ctx.like, strict=True):
            outputs.append(part.new_empty(shape, dtype=dtype))
        torch._foreach_copy_(outputs, parts)
        torch._foreach_mul_(outputs, ctx.scales)
        return None, None, None, *outputs


def _stacked_linear(x: Tensor, layer: Linear, stack: Tensor) -> Tensor:
    spans = [(adapter.start, adapter.stop, len(adapter.A)) for adapter in layer.adapters]
    ups = [adapter.B for adapter in layer.adapters]
    rows = x.reshape(-1, x.shape[-1])
    tensors = (rows, layer.weight, layer.bias, stack)
    y: Tensor = _StackedLinear.apply(*tensors, spans, *ups)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


class _StackedLinear(Function):
    """x W^T + b, with x A^T B^T of each adapter added to its columns; W and b are frozen.

    `spans` has the first column, the end and the rank of each adapter.
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
        pieces = reduced.split_with_sizes(ranks, dim=1)
        grad_reduced = torch.empty_like(reduced)
        grad_pieces = grad_reduced.split_with_sizes(ranks, dim=1)
        grad_ups = []
        for (start, stop, _), piece, grad_piece, up in zip(
            ctx.spans, pieces, grad_pieces, ups, strict=True
        ):
            own = grad[:, start:stop]
            torch.mm(own, up, out=grad_piece)
            grad_ups.append(own.t() @ piece)
        grad_stack = grad_reduced.t() @ x
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
            grad_x.addmm_(grad_reduced, stack)
        return grad_x, None, None, grad_stack, None, *grad_ups


def attention(qkv: Tensor, mask: Tensor | None, *, num_heads: int, dropout_p: float) -> Tensor:
    """Multi-head self-attention of every token to every token.

    Args:
        qkv: Queries, keys and values side by side, shape (batch, length, 3 * dim).
        mask: Added to the scores, shape (batch, 1, 1, length), or None.
        num_heads: Number of heads.
        dropout_p: Probability of dropping an attention weight; 0 outside training.

    Returns:
        Shape (batch, length, dim).
    """
    batch, length, width = qkv.shape
    inputs = qkv.view(batch, length, 3, num_heads, -1)
    is_fused = qkv.dtype == torch.float32 and length >= FUSED_ATTENTION_FROM and not dropout_p
    if qkv.device.type != "cpu" or is_fused:
        q, k, v = inputs.permute(2, 0, 3, 1, 4).unbind(0)
        with attention_backends(qkv.device):
            mixed = functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout_p
            )
        return mixed.transpose(1, 2).reshape(batch, length, width // 3)
    if _wants_grad(qkv):
        y: Tensor = _Attention.apply(inputs, mask, dropout_p)  # type: ignore[no-untyped-call]
        return y
    return _attend(inputs, mask, dropout_p, None)


def first_token_attention(
    query: Tensor, keys_values: Tensor, mask: Tensor | None, *, num_heads: int, dropout_p: float
) -> Tensor:
    """Multi-head attention of one token of each example to all its tokens.

    Args:
        query: Shape (batch, 1, dim).
        keys_values: Keys and values side by side, shape (batch, length, 2 * dim).
        mask: Added to the scores, shape (batch, 1, 1, length), or None.
        num_heads: Number of heads.
        dropout_p: Probability of dropping an attention weight; 0 outside training.

    Returns:
        Shape (batch, 1, dim).
    """
    batch, length, _ = keys_values.shape
    q = query.view(batch, 1, num_heads, -1).transpose(1, 2)
    k, v = keys_values.view(batch, length, 2, num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    weights = dropout(torch.softmax(scores, dim=-1), dropout_p)
    return (weights @ v).transpose(1, 2).reshape(query.shape)


class _Attention(Function):
    """Attention by explicit products. It keeps its input and the attention weights."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
        batch, length, _, num_heads, _ = inputs.shape
        weights = inputs.new_empty(batch, num_heads, length, length)
        y = _attend(inputs, mask, dropout_p, weights)
        ctx.save_for_backward(inputs, weights)
        ctx.dropout_p = dropout_p
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weights = ctx.saved_tensors
        batch, length, _, num_heads, head_dim = inputs.shape
        grad_inputs = torch.empty_like(inputs)
        grad_y = grads[0].reshape(batch, length, num_heads, head_dim)
        for examples, heads in _chunks(inputs):
            chunk = _take_chunk(inputs, examples, heads)
            own = weights[examples, heads].flatten(0, 1)
            grad = grad_y[examples, :, heads].transpose(1, 2).flatten(0, 1).contiguous()
            grad_chunk = _attend_backward(chunk.flatten(1, 2), own, grad, ctx.dropout_p)
            grad_inputs[examples, :, :, heads] = grad_chunk.view(chunk.shape).permute(1, 3, 0, 2, 4)
        return grad_inputs, None, None


def _chunks(inputs: Tensor) -> list[tuple[slice, slice]]:
    """Return the examples and heads of each chunk: whole examples, or some heads of one example.

    inputs: (batch, length, 3, num_heads, head_dim).
    """
    batch, length, _, num_heads, _ = inputs.shape
    head_elements = length * length
    heads = min(num_heads, max(1, CHUNK_ELEMENTS // head_elements))
    examples = max(1, CHUNK_ELEMENTS // (head_elements * num_heads))
    chunks = [
        (slice(example, example + examples), slice(head, head + heads))
        for example in range(0, batch, examples)
        for head in range(0, num_heads, heads)
    ]
    # The memory estimate runs on tensors without values. Two chunks hold as much at once as all.
    return chunks[:2] if isinstance(inputs, FakeTensor) else chunks


def _take_chunk(inputs: Tensor, examples: slice, heads: slice) -> Tensor:
    """Return queries, keys and values of a chunk: (3, examples, heads, length, head_dim)."""
    return inputs[examples, :, :, heads].permute(2, 0, 3, 1, 4).contiguous()


def _attend(
    inputs: Tensor, mask: Tensor | None, dropout_p: float, weights: Tensor | None
) -> Tensor:
    """Attention by explicit products, chunk by chunk.

    Args:
        inputs: Queries, keys and values, shape (batch, length, 3, num_heads, head_dim).
        mask: Added to the scores, shape (batch, 1, 1, length), or None.
        dropout_p: Probability of dropping an attention weight.
        weights: Filled with the attention weights, shape (batch, num_heads, length, length). A
            dropped weight is negative, so that one tensor holds the weights and the dropout mask.

    Returns:
        Shape (batch, length, dim).
    """
    batch, length, _, num_heads, head_dim = inputs.shape
    y = inputs.new_empty(batch, length, num_heads, head_dim)
    for examples, heads in _chunks(inputs):
        chunk = _take_chunk(inputs, examples, heads)
        size = chunk.shape[1:3]
        q, k, v = chunk.flatten(1, 2).unbind(0)
        scale = head_dim**-0.5
        scores = torch.baddbmm(q.new_empty(1), q, k.transpose(1, 2), beta=0, alpha=scale)
        if mask is not None:
            scores.view(*size, length, length).add_(mask[examples])
        out = None if weights is None else weights[examples, heads].flatten(0, 1)
        own = torch.softmax(scores, dim=-1, out=out)
        if dropout_p:
            # The half avoids a difference of zero, which has no sign to copy.
            signs = _random_bytes(own.shape).to(own.dtype).sub_(_threshold(dropout_p) - 0.5)
            own = own.copysign_(signs).relu()
            v = v * (1.0 / keep_probability(dropout_p))
        mixed = torch.bmm(own, v).view(*size, length, head_dim)
        y[examples, :, heads] = mixed.transpose(1, 2)
    return y.view(batch, length, num_heads * head_dim)


def _attend_backward(heads: Tensor, weights: Tensor, grad: Tensor, dropout_p: float) -> Tensor:
    """Return the gradient of one chunk's queries, keys and values.

    Args:
        heads: Queries, keys and values, shape (3, num_heads, length, head_dim).
        weights: Attention weights, dropped ones negative, shape (num_heads, length, length).
        grad: Gradient of the output, shape (num_heads, length, head_dim).
        dropout_p: Probability with which weights were dropped.
    """
    q, k, v = heads.unbind(0)
    result = torch.empty_like(heads)
    grad_q, grad_k, grad_v = result.unbind(0)
    kept = weights
    if dropout_p:
        grad = grad * (1.0 / keep_probability(dropout_p))
        kept = weights.relu()
    torch.bmm(kept.transpose(1, 2), grad, out=grad_v)
    grad_weights = torch.bmm(grad, v.transpose(1, 2))
    if dropout_p:
        grad_weights = torch.ops.aten.threshold_backward(grad_weights, weights, 0)
        weights = weights.abs()
    grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
    scale = q.shape[-1] ** -0.5
    torch.baddbmm(grad_q, grad_scores, k, beta=0, alpha=scale, out=grad_q)
    torch.baddbmm(grad_k, grad_scores.transpose(1, 2), q, beta=0, alpha=scale, out=grad_k)
    return result


def dropout(x: Tensor, p: float) -> Tensor:
    """Drop entries of x with probability p, and scale the others so that the mean stays.

    On a CPU the mask comes from random bytes of torch's global generator, because `bernoulli_` is
    serial there. p is rounded to a multiple of 1/256, at least 1/256: 0.1 becomes 26/256 = 0.1016.
    The scale is that of the rounded p.
    """
    if not p:
        return x
    if x.device.type != "cpu":
        return functional.dropout(x, p)
    y: Tensor = _Dropout.apply(x, p)  # type: ignore[no-untyped-call]
    return y


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
    # Bytes are converted several times faster than bool, or than by torch.where.
    return keep.view(torch.uint8).to(dtype).mul_(scale)


def keep_probability(p: float) -> float:
    """Return the probability with which `dropout` on a CPU keeps an entry."""
    return 1.0 - _threshold(p) / 256


def _threshold(p: float) -> int:
    """Return the random byte from which on an entry is kept."""
    return min(max(round(p * 256), 1), 255)


def _random_bytes(shape: torch.Size) -> Tensor:
    words = torch.empty((shape.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    return words.view(torch.uint8)[: shape.numel()].view(shape)
