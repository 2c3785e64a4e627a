"""Many adapters in one pass: the base is computed once, and every text gets its own low-rank pairs and head.

The idea of gathering a batch's pairs is that of Punica (Chen et al. 2023) and S-LoRA (Sheng et al. 2023).
"""

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
from lora_sentiment.model.kernels import Gathered
from lora_sentiment.model.methods import head_layers

Place = tuple[int, int]
"""A linear of the encoder: its layer, and its position in LINEARS."""


@dataclass(frozen=True)
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


class Mixed:
    """Adapters of one base, side by side. It never changes: other adapters make another one.

    Pairs of like place lie in one tensor, filled up with zeros to the largest rank among them: A: (num_adapters, r,
    in_features), B: (num_adapters, out_features, r).
    """

    def __init__(self, base: FastForward, parts: Sequence[Parts]) -> None:
        self.base = base
        self.parts, self.stacks = _stack(parts)

    def compute(self, input_ids: Tensor, attention_mask: Tensor | None, which: Sequence[int]) -> list[Tensor]:
        """Answer texts, each by its own adapter.

        Args:
            input_ids: (num_texts, length).
            attention_mask: Of the same shape, or None where no text is padded.
            which: The place of each text's adapter in `parts`.

        Returns:
            One tensor of logits a text: (num_labels of its adapter,), in fp32.
        """
        with torch.inference_mode():
            gather = _Gather(self, which, input_ids.device)
            hidden = self.base.encode(input_ids, attention_mask, gather.linears)[:, 0]
            logits: list[Tensor] = [hidden.new_empty(0)] * len(which)
            for adapter in sorted(set(which)):
                rows = [row for row, own in enumerate(which) if own == adapter]
                pre_weight, pre_bias, weight, bias = self.parts[adapter].head
                inner = functional.relu(functional.linear(hidden[rows], pre_weight, pre_bias))
                for row, found in zip(rows, functional.linear(inner, weight, bias).float(), strict=True):
                    logits[row] = found
        return logits


class _Gather:
    """The linears of the base with the pairs of one batch beside them."""

    def __init__(self, mixed: Mixed, which: Sequence[int], device: torch.device) -> None:
        self.mixed = mixed
        self.index = torch.tensor(which, device=device)
        self.ranks: dict[Place, int] = {}
        for adapter in set(which):
            for place, (down, _) in mixed.parts[adapter].pairs.items():
                self.ranks[place] = max(self.ranks.get(place, 0), len(down))

    def linears(self, layer: int, block: TransformerBlock) -> Linears:
        own = self.mixed.base.linears(layer, block)
        beside = [self._gathered(layer, position) for position in range(len(LINEARS))]
        return Linears(
            own.qkv._replace(gathered=_one_below_the_other(beside[:3])),
            *(part._replace(gathered=found) for part, found in zip(own[1:], beside[3:], strict=True)),
        )

    def _gathered(self, layer: int, position: int) -> tuple[Gathered, ...]:
        rank = self.ranks.get((layer, position))
        if not rank:
            return ()
        down, up = self.mixed.stacks[layer, position]
        return (Gathered(down[:, :rank][self.index], up[:, :, :rank][self.index], 0, up.shape[1]),)


def _one_below_the_other(parts: list[tuple[Gathered, ...]]) -> tuple[Gathered, ...]:
    """Shift the pairs of q_lin, k_lin and v_lin, which are square, to their rows of the stacked linear."""
    return tuple(
        pair._replace(start=position * pair.stop, stop=(position + 1) * pair.stop)
        for position, pairs in enumerate(parts)
        for pair in pairs
    )


def _stack(parts: Sequence[Parts]) -> tuple[tuple[Parts, ...], dict[Place, tuple[Tensor, Tensor]]]:
    """Return the adapters with their pairs inside the stacks, which hold the only copy, and the stacks."""
    pairs: list[dict[Place, tuple[Tensor, Tensor]]] = [{} for _ in parts]
    stacks: dict[Place, tuple[Tensor, Tensor]] = {}
    for place in sorted({place for part in parts for place in part.pairs}):
        found = {i: part.pairs[place] for i, part in enumerate(parts) if place in part.pairs}
        rank = max(len(down) for down, _ in found.values())
        some_down, some_up = next(iter(found.values()))
        downs = some_down.new_zeros(len(parts), rank, some_down.shape[1])
        ups = some_up.new_zeros(len(parts), some_up.shape[0], rank)
        for i, (down, up) in found.items():
            own = len(down)
            downs[i, :own], ups[i, :, :own] = down, up
            pairs[i][place] = (downs[i, :own], ups[i, :, :own])
        stacks[place] = (downs, ups)
    return tuple(Parts(own, part.head) for own, part in zip(pairs, parts, strict=True)), stacks
