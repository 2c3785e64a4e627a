"""Many adapters in one pass: the base is computed once, and each text gets its own pairs and head.

The idea is that of Punica (Chen et al. 2023). The products over segments of a batch are plain.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from lora_sentiment.data.batches import split_types
from lora_sentiment.fast.encoder import FastForward, Linears, read_adapters
from lora_sentiment.fast.kernels import Segment
from lora_sentiment.fast.layouts import Block, head_activation, read_blocks
from lora_sentiment.fast.transfer import pack_on_device

Logits = NDArray[np.float32]
Place = tuple[int, int]
"""A linear of the encoder: its layer, and its position in `Block.linears`."""


@dataclass(frozen=True, eq=False)
class Parts:
    """The tensors that one adapter adds to its base, in the compute dtype.

    Attributes:
        pairs: A: (r, in_features) and B: (out_features, r) by linear. The scale is in B.
        head: Weight and bias of the first layer of the head: (dim, dim), and of the second:
            (num_labels, dim).
    """

    pairs: dict[Place, tuple[Tensor, Tensor]]
    head: tuple[Tensor, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        tensors = [*self.head, *itertools.chain(*self.pairs.values())]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def read_parts(
    model: nn.Module,
    *,
    head: Sequence[nn.Module],
    dtype: torch.dtype,
    device: torch.device,
) -> Parts:
    """Read the parts of an adapter from the model that was rebuilt from it.

    Args:
        model: In eval mode. The weights of its base are those that all adapters share.
        head: The two layers of its head.
        dtype: Compute dtype.
        device: Device that answers texts.

    Raises:
        UnsupportedModelError: If the adapter is not low-rank.
    """
    pairs: dict[Place, tuple[Tensor, Tensor]] = {}
    for layer, linears in enumerate(read_adapters(model)):
        for position, own in enumerate(linears):
            if own.A is not None and own.B is not None:
                scaled = own.B.detach() * own.scale
                pairs[layer, position] = (
                    own.A.detach().to(device, dtype),
                    scaled.to(device, dtype),
                )
    tensors = []
    for module in head:
        for name in ("weight", "bias"):
            tensors.append(module.get_parameter(name).detach().to(device, dtype))
    return Parts(pairs, tuple(tensors))


def compute_mixed(
    base: FastForward,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    parts: Sequence[Parts],
    token_type_ids: Tensor | None = None,
) -> list[Logits]:
    """Answer texts, each by its own adapter.

    The base is computed once for all texts. Texts of one adapter are put side by side, and its
    pairs and head are applied to their rows. Nothing is padded to another adapter's rank.

    Args:
        base: The shared encoder, in eval mode.
        input_ids: Shape (num_texts, length).
        attention_mask: Same shape, or None if no text is padded.
        parts: Each text's adapter.
        token_type_ids: Same shape, or None if all are 0.

    Returns:
        The logits of each text, shape (num_labels of its adapter,).
    """
    order, groups = _group_texts(parts)

    def linears(layer: int, block: Block) -> Linears:
        return _add_segments(base.linears(layer, block), layer, groups)

    with torch.inference_mode():
        mask = None if attention_mask is None else attention_mask[order]
        types = None if token_type_ids is None else token_type_ids[order]
        hidden = base.encode(input_ids[order], mask, linears, types)[:, 0]
        return _apply_heads(hidden, groups, order, activation=head_activation(base.encoder))


def compute_mixed_packed(
    base: FastForward,
    rows: Sequence[NDArray[np.int32]],
    parts: Sequence[Parts],
    *,
    pad_token_id: int,
    has_types: bool = False,
) -> list[Logits]:
    """Answer texts as `compute_mixed` does, without padding between them.

    Args:
        base: The shared encoder, in eval mode.
        rows: Token ids of each text.
        parts: Each text's adapter.
        pad_token_id: Fills up to a round number of tokens.
        has_types: As `Encoded.has_types`.

    Returns:
        The logits of each text, shape (num_labels of its adapter,).
    """
    order, groups = _group_texts(parts)
    ordered = [rows[row] for row in order]
    starts = [0, *itertools.accumulate(len(row) for row in ordered)]
    token_groups = [_Group(group.part, starts[group.first], starts[group.last]) for group in groups]
    blocks = read_blocks(base.encoder)
    with torch.inference_mode():
        packed = pack_on_device(ordered, device=base.encoder.device, pad_token_id=pad_token_id)
        types = None
        if has_types:
            input_ids, types = split_types(packed.input_ids)
            packed = packed._replace(input_ids=input_ids)
        plain = [base.linears(layer, block) for layer, block in enumerate(blocks)]
        layers = [_add_segments(own, layer, token_groups) for layer, own in enumerate(plain)]
        # The last layer computes one row of each text.
        first_tokens = _add_segments(plain[-1], len(plain) - 1, groups)
        hidden = base.encode_packed(
            *packed, token_type_ids=types, layers=layers, first_tokens=first_tokens
        )
        return _apply_heads(hidden, groups, order, activation=head_activation(base.encoder))


@dataclass(frozen=True)
class _Group:
    """The rows `first` to `last` of a batch, which are the texts, or the tokens, of one adapter."""

    part: Parts
    first: int
    last: int


def _group_texts(parts: Sequence[Parts]) -> tuple[list[int], list[_Group]]:
    """Put the texts of each adapter side by side.

    Returns:
        The new order of the texts, and the rows of each adapter in it.
    """
    rows: dict[int, list[int]] = {}
    for row, part in enumerate(parts):
        rows.setdefault(id(part), []).append(row)
    order: list[int] = []
    groups = []
    for own in rows.values():
        groups.append(_Group(parts[own[0]], len(order), len(order) + len(own)))
        order += own
    return order, groups


def _add_segments(own: Linears, layer: int, groups: Sequence[_Group]) -> Linears:
    """Return the base's linears of one layer with each adapter's pairs as segments."""
    dim = len(own.qkv.weight) // 3
    segments: list[list[Segment]] = [[] for _ in own]
    for group in groups:
        for position in range(len(own) + 2):
            pair = group.part.pairs.get((layer, position))
            if pair is None:
                continue
            A, B = pair
            # Query, key and value are stacked in the first linear.
            start = position * dim if position < 3 else 0
            place = max(0, position - 2)
            segments[place].append(Segment(A, B, group.first, group.last, start, start + len(B)))
    return Linears(
        *(each._replace(segments=tuple(added)) for each, added in zip(own, segments, strict=True))
    )


def _apply_heads(
    hidden: Tensor,
    groups: Sequence[_Group],
    order: Sequence[int],
    *,
    activation: Callable[[Tensor], Tensor],
) -> list[Logits]:
    """Apply each adapter's head to its texts.

    Args:
        hidden: The first token of each text, adapter by adapter, shape (at least num_texts, dim).
        groups: The adapters and their rows.
        order: The text of each row.
        activation: The function between the two layers of a head.

    Returns:
        The logits of each text.
    """
    logits = []
    for group in groups:
        weight1, bias1, weight2, bias2 = group.part.head
        inner = functional.linear(hidden[group.first : group.last], weight1, bias1)
        logits.append(functional.linear(activation(inner), weight2, bias2).float())
    # One copy for all adapters: each copy waits for the device.
    flat = torch.cat([each.flatten() for each in logits]).cpu().numpy()
    ends = list(itertools.accumulate(each.numel() for each in logits))
    answers: dict[int, Logits] = {}
    for group, each, end in zip(groups, logits, ends, strict=True):
        own = flat[end - each.numel() : end].reshape(each.shape)
        answers.update(zip(order[group.first : group.last], own, strict=True))
    return [answers[row] for row in range(len(order))]
