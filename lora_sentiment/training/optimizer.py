"""The optimizer of a recipe: AdamW, its parameter groups and its learning rate schedule."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import get_scheduler

from lora_sentiment.fast import GraphRunner
from lora_sentiment.recipe.train import TrainConfig


def count_steps(num_rows: int, config: TrainConfig) -> int:
    """Return the optimizer steps of a run over this many training rows."""
    steps_per_epoch = math.ceil(num_rows / config.batch_size)
    return config.max_steps or math.ceil(config.num_train_epochs * steps_per_epoch)


def make_optimizer(
    parameters: dict[str, nn.Parameter], config: TrainConfig, *, ratios: Mapping[str, float]
) -> torch.optim.Optimizer:
    """Make fused AdamW (Loshchilov & Hutter 2019). Biases and norms (one axis) are not decayed.

    Args:
        parameters: The trained parameters by name.
        config: The recipe's `train` section.
        ratios: Learning rate, as a multiple of the recipe's, of tensors that have their own.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((ratios.get(name, 1.0), decay), []).append(parameter)
    # A group at the recipe's rate comes first, because the rate of the first group is logged.
    ordered = sorted(groups.items(), key=lambda group: group[0][0] != 1.0)
    options = []
    for (ratio, decay), members in ordered:
        rate = config.learning_rate * ratio
        options.append({"params": members, "lr": rate, "weight_decay": decay})
    on_cuda = any(parameter.device.type == "cuda" for parameter in parameters.values())
    return torch.optim.AdamW(
        options,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
        capturable=on_cuda,
    )


def make_schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig, *, num_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Make transformers' schedule of the learning rate over a run's steps."""
    warmup = math.ceil(num_steps * config.warmup_ratio)
    schedule: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
        config.lr_scheduler_type, optimizer, warmup, num_steps
    )
    return schedule


class GraphedUpdate:
    """Clip gradients, step AdamW and set the gradients to zero, as one graph.

    Args:
        optimizer: AdamW whose step can be captured.
        parameters: Its parameters. Each gets a gradient of zeros that keeps its place in memory.
        max_norm: The global norm that gradients are clipped to; infinity for no clipping.
        graphs: Replays the update.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
        *,
        max_norm: float,
        graphs: GraphRunner,
    ) -> None:
        self.optimizer = optimizer
        self.parameters = parameters
        self.max_norm = max_norm
        self.graphs = graphs
        device = parameters[0].device
        self._gradients = [torch.zeros_like(parameter) for parameter in parameters]
        for parameter, gradient in zip(parameters, self._gradients, strict=True):
            parameter.grad = gradient
        self._norm = torch.zeros((), device=device)
        # The schedule writes plain numbers into the groups. The graph reads them from here.
        self._rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]

    def __call__(self) -> torch.Tensor:
        """Update the parameters and return the gradients' norm before it was clipped."""
        for rate, group in zip(self._rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        self.graphs.run("update", self._update)
        return self._norm.clone()

    def _update(self) -> None:
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_norm, foreach=True)
        self._norm.copy_(norm)
        numbers = [group["lr"] for group in self.optimizer.param_groups]
        try:
            for rate, group in zip(self._rates, self.optimizer.param_groups, strict=True):
                group["lr"] = rate
            self.optimizer.step()
        finally:
            for number, group in zip(numbers, self.optimizer.param_groups, strict=True):
                group["lr"] = number
        torch._foreach_zero_(self._gradients)
