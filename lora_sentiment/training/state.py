"""The tensors that a run keeps between optimizer steps: taken out of it, and put back."""

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
"""AdamW's state of a tensor, beside its own count of steps."""
_IMPORTANCE = ("exp_avg_ipt", "exp_avg_unc")
"""What AdaLoRA's rank allocator keeps of a tensor: smoothed sensitivity and uncertainty (Zhang et al. 2023, 3.2)."""


def take_state(
    model: nn.Module,
    best: Mapping[str, torch.Tensor],
    *,
    optimizer: torch.optim.Optimizer,
    method: Method,
    accelerator: Accelerator,
) -> dict[str, torch.Tensor]:
    """Return every tensor that the next step depends on, and the best ones so far; all processes call this.

    The tensors are the run's own, not copies; a moment that does not exist yet is the zeros that it starts as.
    """
    found = {f"best.{name}": tensor for name, tensor in best.items()}
    for name, parameter in trainable_tensors(model).items():
        kept = optimizer.state.get(parameter, {})
        found[f"trained.{name}"] = parameter.detach()
        found[f"steps.{name}"] = kept.get("step", torch.zeros((), dtype=torch.float32))
        for moment in _MOMENTS:
            found[f"{moment}.{name}"] = kept[moment] if kept else torch.zeros_like(parameter)
    for key, sums in _importance(model, method).items():
        for name, parameter in _pruned(model).items():
            found[f"{key}.{name}"] = sums[name] if name in sums else torch.zeros_like(parameter)
    for name, state in take_rng(accelerator.device).items():
        rows = state.to(accelerator.device)[None]
        found[name] = accelerator.gather(rows) if accelerator.num_processes > 1 else rows
    return found


def put_state(
    tensors: Mapping[str, torch.Tensor],
    model: nn.Module,
    *,
    optimizer: torch.optim.Optimizer,
    method: Method,
    accelerator: Accelerator,
) -> dict[str, torch.Tensor]:
    """Put what `take_state` returned back into a run; return the best tensors so far.

    A process without generator states of its own, of a run on fewer processes or on another device, keeps its seed.
    """
    best = {}
    with torch.no_grad():
        for name, parameter in trainable_tensors(model).items():
            own = {
                key: tensors[f"{key}.{name}"].to(parameter.device, copy=True)
                for key in ("best", "steps", *_MOMENTS)
            }
            parameter.copy_(tensors[f"trained.{name}"])
            best[name] = own["best"]
            optimizer.state[parameter] = {
                "step": own["steps"],
                **{moment: own[moment] for moment in _MOMENTS},
            }
    for key, sums in _importance(model, method).items():
        for name, parameter in _pruned(model).items():
            sums[name] = tensors[f"{key}.{name}"].to(parameter.device, copy=True)
            # PEFT takes a tensor without a last importance for one that it has not seen, and starts its sums anew.
            _inner(model).rankallocator.ipt[name] = torch.zeros_like(parameter)
    generators = take_rng(accelerator.device)
    for name, state in generators.items():
        rows = tensors.get(name, state[:0])
        if accelerator.process_index < len(rows) and rows.shape[1:] == state.shape:
            generators[name] = rows[accelerator.process_index].clone()
    put_rng(generators, accelerator.device)
    return best


def take_rng(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of the generators that dropout draws from, each of shape (num_bytes,)."""
    states = {f"{RNG}cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[f"{RNG}{device.type}"] = torch.get_device_module(device).get_rng_state()
    return states


def put_rng(states: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Set the generators to what `take_rng` returned.

    Raises:
        TrainingError: If a state is none that a generator can be in.
    """
    try:
        torch.set_rng_state(states[f"{RNG}cpu"])
        if device.type != "cpu":
            torch.get_device_module(device).set_rng_state(states[f"{RNG}{device.type}"])
    except RuntimeError as error:
        raise TrainingError(
            f"no state of a generator: {error}; train.resume=never starts anew"
        ) from error


def take_ranks(model: nn.Module, method: Method) -> dict[str, list[bool]] | None:
    """Return which singular values AdaLoRA keeps, by tensor; None before its first pruning and for other methods."""
    if not isinstance(method, AdaloraMethod):
        return None
    pattern = _inner(model).peft_config["default"].rank_pattern
    return dict(pattern) if pattern else None


def put_ranks(ranks: dict[str, list[bool]] | None, model: nn.Module) -> None:
    """Give AdaLoRA back what `take_ranks` returned."""
    if ranks is not None:
        _inner(model).peft_config["default"].rank_pattern = ranks


def _importance(model: nn.Module, method: Method) -> dict[str, dict[str, torch.Tensor]]:
    """Return AdaLoRA's own sums, which PEFT keeps in plain dicts; nothing for other methods."""
    if not isinstance(method, AdaloraMethod):
        return {}
    allocator = _inner(model).rankallocator
    return {key: getattr(allocator, key) for key in _IMPORTANCE}


def _pruned(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name: p
        for name, p in _inner(model).model.named_parameters()
        if "lora_" in name and p.requires_grad
    }


def _inner(model: nn.Module) -> Any:
    return model.base_model
