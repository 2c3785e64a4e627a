"""The tensors that a run needs between optimizer steps: get them and set them."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from lora_sentiment.errors import TrainingError
from lora_sentiment.models.wrap import trainable_tensors
from lora_sentiment.recipe.method import AdaloraMethod, Method
from lora_sentiment.training.checkpoint import RNG

_MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a tensor, beside its count of steps."""
_IMPORTANCE = ("exp_avg_ipt", "exp_avg_unc")
"""AdaLoRA's state of a tensor: smoothed sensitivity and uncertainty (Zhang et al. 2023, 3.2)."""


def get_training_state(
    model: nn.Module,
    best: Mapping[str, torch.Tensor],
    *,
    optimizer: torch.optim.Optimizer,
    method: Method,
    accelerator: Accelerator,
) -> dict[str, torch.Tensor]:
    """Return every tensor that the next step depends on, and the best ones so far.

    All processes call this. The tensors are the run's own, not copies. A moment that AdamW has not
    made yet is zeros, which it starts from.
    """
    tensors = {f"best.{name}": tensor for name, tensor in best.items()}
    for name, parameter in trainable_tensors(model).items():
        adamw = optimizer.state.get(parameter, {})
        tensors[f"trained.{name}"] = parameter.detach()
        tensors[f"steps.{name}"] = adamw.get("step", torch.zeros((), dtype=torch.float32))
        for moment in _MOMENTS:
            tensors[f"{moment}.{name}"] = adamw.get(moment, torch.zeros_like(parameter))
    for key, averages in _importance(model, method).items():
        for name, parameter in _prunable_tensors(model).items():
            tensors[f"{key}.{name}"] = averages.get(name, torch.zeros_like(parameter))
    for name, state in get_rng_state(accelerator.device).items():
        rows = state.to(accelerator.device)[None]
        if accelerator.num_processes > 1:
            rows = accelerator.gather(rows)
        tensors[name] = rows
    return tensors


def set_training_state(
    tensors: Mapping[str, torch.Tensor],
    model: nn.Module,
    *,
    optimizer: torch.optim.Optimizer,
    method: Method,
    accelerator: Accelerator,
) -> dict[str, torch.Tensor]:
    """Set what `get_training_state` returned; return the best tensors so far.

    A generator keeps its seed if its state was not saved: the run had fewer processes, or ran on
    another device.
    """
    best = {}
    with torch.no_grad():
        for name, parameter in trainable_tensors(model).items():
            device = parameter.device
            parameter.copy_(tensors[f"trained.{name}"])
            best[name] = tensors[f"best.{name}"].to(device, copy=True)
            adamw = {"step": tensors[f"steps.{name}"].to(device, copy=True)}
            for moment in _MOMENTS:
                adamw[moment] = tensors[f"{moment}.{name}"].to(device, copy=True)
            optimizer.state[parameter] = adamw
    for key, averages in _importance(model, method).items():
        for name, parameter in _prunable_tensors(model).items():
            averages[name] = tensors[f"{key}.{name}"].to(parameter.device, copy=True)
            # PEFT starts the averages anew for a tensor that has no last importance.
            _peft_model(model).rankallocator.ipt[name] = torch.zeros_like(parameter)
    states = get_rng_state(accelerator.device)
    for name, state in states.items():
        rows = tensors.get(name, state[:0])
        if accelerator.process_index < len(rows) and rows.shape[1:] == state.shape:
            states[name] = rows[accelerator.process_index].clone()
    set_rng_state(states, accelerator.device)
    return best


def get_rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of the generators that dropout draws from, each of shape (num_bytes,)."""
    states = {f"{RNG}cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[f"{RNG}{device.type}"] = torch.get_device_module(device).get_rng_state()
    return states


def set_rng_state(states: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Set what `get_rng_state` returned.

    Raises:
        TrainingError: If a generator does not accept a state.
    """
    try:
        torch.set_rng_state(states[f"{RNG}cpu"])
        if device.type != "cpu":
            torch.get_device_module(device).set_rng_state(states[f"{RNG}{device.type}"])
    except RuntimeError as error:
        raise TrainingError(
            f"a generator does not accept the checkpoint's state: {error}; train.resume=never "
            "starts anew"
        ) from error


def get_ranks(model: nn.Module, method: Method) -> dict[str, list[bool]] | None:
    """Return the singular values that AdaLoRA keeps, by tensor.

    None for other methods, and before the first pruning.
    """
    if not isinstance(method, AdaloraMethod):
        return None
    pattern = _peft_model(model).peft_config["default"].rank_pattern
    return dict(pattern) if pattern else None


def set_ranks(ranks: dict[str, list[bool]] | None, model: nn.Module) -> None:
    """Set what `get_ranks` returned."""
    if ranks is not None:
        _peft_model(model).peft_config["default"].rank_pattern = ranks


def _importance(model: nn.Module, method: Method) -> dict[str, dict[str, torch.Tensor]]:
    """Return AdaLoRA's averages by name, which PEFT keeps in dicts; none for other methods."""
    if not isinstance(method, AdaloraMethod):
        return {}
    allocator = _peft_model(model).rankallocator
    return {key: getattr(allocator, key) for key in _IMPORTANCE}


def _prunable_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    tensors = {}
    for name, parameter in _peft_model(model).model.named_parameters():
        if "lora_" in name and parameter.requires_grad:
            tensors[name] = parameter
    return tensors


def _peft_model(model: nn.Module) -> Any:
    return model.base_model
