"""Parameter counts of a method on a base, read from the real model without values."""

import copy
import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from lora_sentiment.models.families import family_of
from lora_sentiment.models.load import Base, bitsandbytes_config, encoder_tensors
from lora_sentiment.models.parameters import ParameterCounts
from lora_sentiment.models.wrap import head_layers, make_trainable
from lora_sentiment.recipe.method import Method
from lora_sentiment.recipe.model import ModelConfig

MANY_STEPS = 10**6
"""Steps of a run that is only sized: AdaLoRA prunes after it."""


def make_meta_model(
    config: Any, method: Method, model: ModelConfig, *, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Return a base wrapped as training wraps it, on the meta device: shapes without values.

    Args:
        config: The base's config; its `num_labels` sizes the head.
        method: The recipe's `method` section.
        model: The recipe's `model` section. Quantised linears are bitsandbytes' modules, whose
            weights still have the shape and dtype of unquantised ones. With DoRA they are plain
            linears: DoRA unpacks the weights when it wraps them, and these have no values.
        dtype: Compute dtype.

    Raises:
        ModelError: If the method does not fit the base.
    """
    config = copy.deepcopy(config)
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        plain: Any = AutoModelForSequenceClassification.from_config(config)  # type: ignore[no-untyped-call]
        plain.name_or_path = model.name
        if model.quantize != "none" and not is_quantised_dora(method, model):
            # bitsandbytes is not on every system, and takes time to import.
            from transformers.integrations.bitsandbytes import replace_with_bnb_linear

            family = family_of(config)
            quantisation = bitsandbytes_config(model, family, dtype=dtype)
            replace_with_bnb_linear(
                plain, modules_to_not_convert=list(family.head), quantization_config=quantisation
            )
            # PEFT looks at these, as transformers sets them.
            plain.is_loaded_in_8bit = model.quantize == "int8"
            plain.is_loaded_in_4bit = model.quantize != "int8"
        tokenizer = cast(PreTrainedTokenizerFast, None)  # wrapping needs none
        base = Base(plain, tokenizer, model.name, model.revision, sha256="", new_layers=())
        unquantised = model.model_copy(update={"quantize": "none", "double_quant": False})
        return make_trainable(base, method, unquantised, dtype=dtype, num_steps=MANY_STEPS)


def is_quantised_dora(method: Method, model: ModelConfig) -> bool:
    """Return whether DoRA adapts quantised linears."""
    return model.quantize != "none" and getattr(method, "use_dora", False)


def count_parameters(model: nn.Module) -> ParameterCounts:
    """Count what is trained of a model that `make_trainable` wrapped, with or without values."""
    head = sum(_count_trained(layer.parameters()) for layer in head_layers(model).values())
    encoder = _count_trained(tensor for _, tensor in encoder_tensors(model))
    trainable = _count_trained(model.parameters())
    # A low-rank head is counted dense.
    dense_head = 0
    for layer in head_layers(model).values():
        tensors: list[Any] = [layer.weight, layer.bias]
        dense_head += sum(tensor.numel() for tensor in tensors if tensor is not None)
    base = sum(_num_values(tensor) for _, tensor in encoder_tensors(model)) + dense_head
    return ParameterCounts(
        adapter=trainable - encoder - head,
        encoder=encoder,
        head=head,
        trainable=trainable,
        base=base,
        share=trainable / base,
    )


def weight_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yield all parameters of a model, and the scales of its quantised weights."""
    yield from model.parameters()
    for module in model.modules():
        # 8 bits: the weight holds the scales, and after the first forward pass the module's state.
        # 4 bits: the weight's state holds them. Double quantisation adds a second state.
        weight = getattr(module, "weight", None)
        scales = [
            getattr(getattr(module, "state", None), "SCB", None),
            getattr(weight, "SCB", None),
        ]
        state = getattr(weight, "quant_state", None)
        while state is not None:
            scales += [state.absmax, state.code]
            state = state.state2
        yield from (scale for scale in scales if scale is not None)


def _count_trained(tensors: Any) -> int:
    return sum(tensor.numel() for tensor in tensors if tensor.requires_grad)


def _num_values(tensor: Tensor) -> int:
    """Count the values of a tensor; bitsandbytes packs two 4-bit values into a byte."""
    state = getattr(tensor, "quant_state", None)
    return tensor.numel() if state is None else math.prod(state.shape)
