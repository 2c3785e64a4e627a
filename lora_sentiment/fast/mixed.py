"""Many adapters in one pass: the base is computed once, and every text gets its own low-rank pairs and head.

The idea is that of Punica (Chen et al. 2023), whose products over segments of a batch are plain ones here.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.distilbert.modeling_distilbert import TransformerBlock

from lora_sentiment.fast.encoder import FastForward, Linears, low_rank, named_linears
from lora_sentiment.fast.kernels import Segment
from lora_sentiment.models.inference import pack_on_device
from lora_sentiment.models.wrap import head_layers
from lora_sentiment.recipe.method import LINEARS

Logits = NDArray[np.float32]
Place = tuple[int, int]
"""A linear of the encoder: its layer, and its position in LINEARS."""


@dataclass(frozen=True, eq=False)
class Parts:
    """What one adapter adds to its base, as tensors in the compute dtype.

    Attributes:
        pairs: A: (r, in_features) and B: (out_features, r) with the scale in it, by the linear that they add to.
        head: Weight and bias of pre_classifier: (dim, dim), and of classifier: (num_labels, dim).
    """

    pairs: dict[Place, tuple[Tensor, Tensor]]
    head: tuple[Tensor, Tensor, Tensor, Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        tensors = [*self.head, *(tensor for pair in self.pairs.values() for tensor in pair)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def read_parts(model: nn.Module, *, dtype: torch.dtype, device: torch.device) -> Parts | str:
    """Take an adapter out of the model that was rebuilt from it, or say why it is not low-rank.

    Args:
        model: In eval mode; its base's own weights must be those that other adapters share.
        dtype: Compute dtype.
        device: Where texts are computed.
    """
    inner: Any = model.base_model.model if isinstance(model, PeftModel) else model
    pairs: dict[Place, tuple[Tensor, Tensor]] = {}
    for layer, block in enumerate(inner.distilbert.transformer.layer):
        for position, (name, module) in enumerate(named_linears(block)):
            answer = low_rank(module)
            if isinstance(answer, str):
                return f"transformer.layer.{layer}.{name}: {answer}"
            if answer.A is not None and answer.B is not None:
                scaled = answer.B.detach() * answer.scale
                pairs[layer, position] = (
                    answer.A.detach().to(device, dtype),
                    scaled.to(device, dtype),
                )
    layers = head_layers(model)
    head = [
        layers[name].get_parameter(part).detach() for name in layers for part in ("weight", "bias")
    ]
    pre_weight, pre_bias, weight, bias = (tensor.to(device, dtype) for tensor in head)
    return Parts(pairs, (pre_weight, pre_bias, weight, bias))


def compute_mixed(
    base: FastForward, input_ids: Tensor, attention_mask: Tensor | None, parts: Sequence[Parts]
) -> list[Logits]:
    """Answer texts, each by its own adapter.

    The base is computed once for all. Texts of one adapter are put side by side, and its pairs and head are applied to
    them where they lie: nothing is copied or padded to another's rank.

    Args:
        base: The shared encoder, in eval mode.
        input_ids: (num_texts, length).
        attention_mask: Of the same shape, or None where no text is padded.
        parts: Each text's adapter.

    Returns:
        The logits of each text: (num_labels of its adapter,).
    """
    order, groups = _put_side_by_side(parts)

    def linears(layer: int, block: TransformerBlock) -> Linears:
        return _with_segments(base.linears(layer, block), layer, groups)

    with torch.inference_mode():
        mask = None if attention_mask is None else attention_mask[order]
        hidden = base.encode(input_ids[order], mask, linears)[:, 0]
        return _apply_heads(hidden, groups, order)


def compute_mixed_packed(
    base: FastForward,
    rows: Sequence[NDArray[np.int32]],
    parts: Sequence[Parts],
    *,
    pad_token_id: int,
) -> list[Logits]:
    """Answer texts as `compute_mixed`, without padding between them.

    Args:
        base: The shared encoder, in eval mode.
        rows: Token ids of each text.
        parts: Each text's adapter.
        pad_token_id: Fills up to a round number of tokens.

    Returns:
        The logits of each text: (num_labels of its adapter,).
    """
    order, groups = _put_side_by_side(parts)
    ordered = [rows[row] for row in order]
    starts = [0, *itertools.accumulate(len(row) for row in ordered)]
    groups_in_tokens = [
        _Group(group.part, starts[group.first], starts[group.last]) for group in groups
    ]
    blocks = cast(list[TransformerBlock], list(base.encoder.transformer.layer))
    with torch.inference_mode():
        packed = pack_on_device(ordered, device=base.encoder.device, pad_token_id=pad_token_id)
        plain = [base.linears(layer, block) for layer, block in enumerate(blocks)]
        layers = [_with_segments(own, layer, groups_in_tokens) for layer, own in enumerate(plain)]
        # In the last layer one row is left of each text.
        first_tokens = _with_segments(plain[-1], len(plain) - 1, groups)
        hidden = base.encode_packed(*packed, layers=layers, first_tokens=first_tokens)
        return _apply_heads(hidden, groups, order)


@dataclass(frozen=True)
class _Group:
    """The texts of one adapter in a batch, or their tokens: from `first` to `last`."""

    part: Parts
    first: int
    last: int


def _put_side_by_side(parts: Sequence[Parts]) -> tuple[list[int], list[_Group]]:
    """Return an order of the texts in which those of one adapter are neighbours, and the adapters' places in it."""
    rows: dict[int, list[int]] = {}
    for row, part in enumerate(parts):
        rows.setdefault(id(part), []).append(row)
    order = [row for own in rows.values() for row in own]
    ends = list(itertools.accumulate(len(own) for own in rows.values()))
    groups = [
        _Group(parts[own[0]], end - len(own), end)
        for own, end in zip(rows.values(), ends, strict=True)
    ]
    return order, groups


def _with_segments(own: Linears, layer: int, groups: Sequence[_Group]) -> Linears:
    """Return the base's linears of one layer with each adapter's pairs beside them."""
    beside = [_segments(groups, (layer, position)) for position in range(len(LINEARS))]
    return Linears(
        own.qkv._replace(segments=_one_below_the_other(beside[:3], rows=len(own.qkv.weight) // 3)),
        *(part._replace(segments=found) for part, found in zip(own[1:], beside[3:], strict=True)),
    )


def _segments(groups: Sequence[_Group], place: Place) -> tuple[Segment, ...]:
    return tuple(
        Segment(
            *group.part.pairs[place], group.first, group.last, 0, len(group.part.pairs[place][1])
        )
        for group in groups
        if place in group.part.pairs
    )


def _one_below_the_other(parts: Sequence[tuple[Segment, ...]], *, rows: int) -> tuple[Segment, ...]:
    """Shift the pairs of q_lin, k_lin and v_lin to their rows of the stacked linear."""
    return tuple(
        segment._replace(start=position * rows, stop=(position + 1) * rows)
        for position, segments in enumerate(parts)
        for segment in segments
    )


def _apply_heads(hidden: Tensor, groups: Sequence[_Group], order: Sequence[int]) -> list[Logits]:
    """Apply each adapter's head to its texts, and return their logits in the order in which they were asked.

    Args:
        hidden: The first token of each text, adapter by adapter, shape (at least num_texts, dim).
        groups: The adapters and their rows.
        order: The text of each row.
    """
    logits = [_apply_head(hidden[group.first : group.last], group.part) for group in groups]
    # One copy for all adapters: each one waits for the device.
    flat = torch.cat([found.flatten() for found in logits]).cpu().numpy()
    answers: dict[int, Logits] = {}
    place = 0
    for group, found in zip(groups, logits, strict=True):
        num_labels = found.shape[1]
        for row in range(group.first, group.last):
            answers[order[row]] = flat[place : place + num_labels]
            place += num_labels
    return [answers[row] for row in range(len(order))]


def _apply_head(hidden: Tensor, part: Parts) -> Tensor:
    pre_weight, pre_bias, weight, bias = part.head
    inner = functional.relu(functional.linear(hidden, pre_weight, pre_bias))
    return functional.linear(inner, weight, bias).float()
