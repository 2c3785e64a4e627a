"""Many adapters in one pass: the base is computed once, and every text gets its own low-rank pairs and head.

The idea is that of Punica (Chen et al. 2023), whose products over segments of a batch are plain ones here.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.distilbert.modeling_distilbert import TransformerBlock

from lora_sentiment.model.architecture import LINEARS
from lora_sentiment.model.encoder import FastForward, Linears, low_rank, named_linears
from lora_sentiment.model.kernels import Segment
from lora_sentiment.model.methods import head_layers

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
                pairs[layer, position] = (answer.A.detach().to(device, dtype), scaled.to(device, dtype))
    layers = head_layers(model)
    head = [layers[name].get_parameter(part).detach() for name in layers for part in ("weight", "bias")]
    pre_weight, pre_bias, weight, bias = (tensor.to(device, dtype) for tensor in head)
    return Parts(pairs, (pre_weight, pre_bias, weight, bias))


def compute_mixed(
    base: FastForward, input_ids: Tensor, attention_mask: Tensor | None, parts: Sequence[Parts]
) -> list[Tensor]:
    """Answer texts, each by its own adapter.

    The base is computed once for all. Texts of one adapter are put side by side, and its pairs and head are applied to
    them where they lie: nothing is copied or padded to another's rank.

    Args:
        base: The shared encoder, in eval mode.
        input_ids: (num_texts, length).
        attention_mask: Of the same shape, or None where no text is padded.
        parts: Each text's adapter.

    Returns:
        One tensor of logits a text: (num_labels of its adapter,), in fp32.
    """
    rows: dict[int, list[int]] = {}
    for row, part in enumerate(parts):
        rows.setdefault(id(part), []).append(row)
    order = [row for own in rows.values() for row in own]
    ends = list(itertools.accumulate(len(own) for own in rows.values()))
    groups = [_Group(parts[own[0]], end - len(own), end) for own, end in zip(rows.values(), ends, strict=True)]

    def linears(layer: int, block: TransformerBlock) -> Linears:
        own = base.linears(layer, block)
        beside = [_segments(groups, (layer, position)) for position in range(len(LINEARS))]
        return Linears(
            own.qkv._replace(segments=_one_below_the_other(beside[:3], rows=len(own.qkv.weight) // 3)),
            *(part._replace(segments=found) for part, found in zip(own[1:], beside[3:], strict=True)),
        )

    with torch.inference_mode():
        mask = None if attention_mask is None else attention_mask[order]
        hidden = base.encode(input_ids[order], mask, linears)[:, 0]
        logits = [found for group in groups for found in _apply_head(hidden[group.first : group.last], group.part)]
    return [found for _, found in sorted(zip(order, logits, strict=True), key=lambda pair: pair[0])]


@dataclass(frozen=True)
class _Group:
    """The texts of one adapter in a batch: from `first` to `last`."""

    part: Parts
    first: int
    last: int


def _segments(groups: Sequence[_Group], place: Place) -> tuple[Segment, ...]:
    return tuple(
        Segment(*group.part.pairs[place], group.first, group.last, 0, len(group.part.pairs[place][1]))
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


def _apply_head(hidden: Tensor, part: Parts) -> Tensor:
    pre_weight, pre_bias, weight, bias = part.head
    inner = functional.relu(functional.linear(hidden, pre_weight, pre_bias))
    return functional.linear(inner, weight, bias).float()
