"""What makes ours fast, each part with what stands in for it when benchmarks/peers.py --ablation turns it off.

Nothing here is an option of the package: a slice's process replaces names in its modules before it trains. Every
replacement computes the same, `tests/benchmarks/test_peers.py` holds it.
"""

from collections.abc import Sequence

import torch
from torch import Size, Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import mm_flop, sdpa_flop

from lora_sentiment.fast import encoder, fused, kernels
from lora_sentiment.fast.kernels import Linear
from lora_sentiment.training import loop

Forward = encoder.FastForward
aten = torch.ops.aten


def _apart(x: Tensor, layer: Linear) -> Tensor:
    """A linear of stacked queries, keys and values as one product each, which PEFT's modules would be."""
    rows = x.shape[-1]
    parts = []
    for start in range(0, len(layer.weight), rows):
        weight, bias = layer.weight[start : start + rows], layer.bias[start : start + rows]
        own = [
            adapter._replace(start=0, stop=rows)
            for adapter in layer.adapters
            if adapter.start == start
        ]
        parts.append(kernels.linear(x, Linear(weight, bias, tuple(own))))
    return torch.cat(parts, dim=-1)


def _by_autograd(x: Tensor, layer: Linear) -> Tensor:
    """A linear as PEFT writes it: autograd keeps what each operation wants."""
    y = functional.linear(x, layer.weight, layer.bias)
    for adapter in layer.adapters:
        reduced = functional.linear(kernels.dropout(x, adapter.dropout), adapter.A.to(x.dtype))
        delta = functional.linear(reduced, adapter.B.to(x.dtype)) * adapter.scale
        y = y + functional.pad(delta, (adapter.start, y.shape[-1] - adapter.stop))
    return y


def _feed_forward_by_autograd(x: Tensor, lin1: Linear, lin2: Linear) -> Tensor:
    return _by_autograd(functional.gelu(_by_autograd(x, lin1)), lin2)


def _attend_by_sdpa(
    qkv: Tensor, mask: Tensor | None, *, num_heads: int, dropout_p: float
) -> Tensor:
    batch, length, width = qkv.shape
    q, k, v = qkv.view(batch, length, 3, num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)
    return mixed.transpose(1, 2).reshape(batch, length, width // 3)


def _bernoulli_bytes(shape: Size) -> Tensor:
    """Bytes of 255 and 0, as `bernoulli_` draws them: of a tenth, the shipped rate."""
    return torch.empty(shape).bernoulli_(0.9).mul_(255).to(torch.uint8)


def _stack_anew(
    self: encoder.FastForward, _: tuple[int, int, str], sources: tuple[Tensor, ...]
) -> Tensor:
    return encoder._stack(sources, self.dtype)


LEVERS: dict[str, tuple[tuple[object, str, object], ...]] = {
    "one product for q, k and v": ((encoder, "linear", _apart),),
    "the last layer for [CLS] alone": ((Forward, "_first_token_attends", Forward._all_attend),),
    "own backward passes of linears": (
        (encoder, "linear", _by_autograd),
        (encoder, "feed_forward", _feed_forward_by_autograd),
    ),
    "attention by the table": ((encoder, "attention", _attend_by_sdpa),),
    "masks from random bytes": ((kernels, "_random_bytes", _bernoulli_bytes),),
    "weights prepared once": ((Forward, "_stacked", _stack_anew),),
    # Nothing is replaced for these: the slice plans, cuts or computes otherwise.
    "rows of like length": (),
    "micro-batches": (),
    "the fast encoder": (),
}
"""Lever to (module, name, what stands in for it)."""


def _takes_none(model: nn.Module, device: torch.device | None = None) -> bool:
    """No model takes packed rows, so the fast forward pass gets padded ones."""
    del model, device
    return False


def _cast_each(layers: Sequence[Linear], dtype: torch.dtype) -> list[Linear]:
    """Adapters are cast where they are used, and each has products of its own."""
    del dtype
    return list(layers)


def _encode_all_tokens(
    self: encoder.FastForward,
    block: object,
    own: list[Linear],
    x: Tensor,
    cu_seq_lens: Tensor,
    max_length: int,
) -> Tensor:
    """The last block for every token, of packed rows."""
    query, keys_values, *others = own
    parts = [query, keys_values]
    qkv = torch.cat([kernels.linear(x, part) for part in parts], dim=-1)
    heads = block.attention.n_heads
    q, k, v = qkv.view(len(x), 3, heads, -1).unbind(1)
    mixed = encoder.packed_attention(
        q, k, v, cu_seq_lens_q=cu_seq_lens, cu_seq_lens_k=cu_seq_lens, max_length_q=max_length,
        max_length_k=max_length, dropout_p=self._p(block.attention.dropout),
    )  # fmt: skip
    y = self._after_attention(block, others, x, mixed)
    return y.index_select(0, cu_seq_lens[:-1].clamp(max=len(x) - 1))


CUDA_LEVERS: dict[str, tuple[tuple[object, str, object], ...]] = {
    "packed rows": ((loop, "takes_packed_rows", _takes_none), (loop, "packs_rows", _takes_none)),
    "dropout, residual and norm in one kernel": (
        (encoder, "dropout_add_norm", fused.plain_dropout_add_norm),
    ),
    "adapters cast and multiplied together": ((encoder, "cast_adapters", _cast_each),),
    "own backward passes": (
        (encoder, "cast_adapters", _cast_each),
        (encoder, "linear", _by_autograd),
        (encoder, "feed_forward", _feed_forward_by_autograd),
    ),
    "the last block for [CLS] alone": ((Forward, "_encode_first_tokens", _encode_all_tokens),),
    "weights prepared once for packed rows": ((Forward, "_stacked", _stack_anew),),
}
"""The same of what runs on a GPU alone, for benchmarks/gpu.py."""


def _count_add(_: Size, a: Size, b: Size, *args: object, **kwargs: object) -> int:
    del args, kwargs
    return int(mm_flop(a, b))


def _count_forward(q: Size, k: Size, v: Size, *args: object, **kwargs: object) -> int:
    del args, kwargs
    return int(sdpa_flop(q, k, v))


def _count_backward(_: Size, q: Size, k: Size, v: Size, *args: object, **kwargs: object) -> int:
    """Four products of fused attention's backward pass; the fifth computes the scores once more."""
    del args, kwargs
    return 2 * int(sdpa_flop(q, k, v))


COUNTED = {
    aten.addmm_: _count_add,
    aten._scaled_dot_product_flash_attention_for_cpu: _count_forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _count_backward,
}
"""Products that torch's counter does not know."""
