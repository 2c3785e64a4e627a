"""What is trained: each method of the recipe's union, applied to a base."""

from typing import assert_never

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn

from lora_sentiment.model.architecture import HEAD
from lora_sentiment.model.base import Base
from lora_sentiment.model.config import FullMethod, LoraMethod


def make_trainable(base: Base, method: LoraMethod | FullMethod, *, dtype: torch.dtype) -> nn.Module:
    """Wrap a base with its method: adapters and head trainable in fp32, all else frozen in `dtype`.

    The base's own model is used, not copied. Initial values come from torch's global generator.

    Args:
        base: A freshly loaded base.
        method: The recipe's `method` section.
        dtype: Compute dtype that the frozen tensors are cast to, once.

    Returns:
        A `PeftModel` for methods that PEFT knows, else the base's model itself.
    """
    match method:
        case LoraMethod():
            model: nn.Module = get_peft_model(base.model, peft_config(base, method))
        case FullMethod():
            model = base.model.requires_grad_(True)
        case _:
            assert_never(method)
    for parameter in model.parameters():
        # Half-precision trainable tensors train badly (peft#341): small updates round away.
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
    return model


def peft_config(base: Base, method: LoraMethod) -> LoraConfig:
    """Return PEFT's own configuration of a method on a base, the head named as fully trained."""
    return LoraConfig(
        task_type=TaskType.SEQ_CLS,
        base_model_name_or_path=base.name,
        revision=base.revision,
        r=method.r,
        lora_alpha=method.lora_alpha,
        lora_dropout=method.lora_dropout,
        use_rslora=method.use_rslora,
        target_modules=list(method.linears),
        modules_to_save=list(HEAD),
    )


def trainable_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name, sorted."""
    return {name: p for name, p in sorted(model.named_parameters()) if p.requires_grad}


def frozen_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the frozen parameters by name, sorted."""
    return {name: p for name, p in sorted(model.named_parameters()) if not p.requires_grad}
