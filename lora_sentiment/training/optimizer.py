"""AdamW as a recipe sets it: what is decayed, and what takes a rate of its own."""

from collections.abc import Mapping

import torch
from torch import nn

from lora_sentiment.training.config import TrainConfig


def make_optimizer(
    parameters: dict[str, nn.Parameter], config: TrainConfig, *, ratios: Mapping[str, float]
) -> torch.optim.Optimizer:
    """Return fused AdamW (Loshchilov & Hutter 2019); biases and norms (one axis) are not decayed.

    Args:
        parameters: What is trained, by name.
        config: The recipe's `train` section.
        ratios: Names of the tensors that take another rate than the rest, and how many times it.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((ratios.get(name, 1.0), decay), []).append(parameter)
    # The first group is one at the plain rate: that is the rate which is logged.
    ordered = sorted(groups.items(), key=lambda group: group[0][0] != 1.0)
    return torch.optim.AdamW(
        [
            {"params": members, "lr": config.learning_rate * ratio, "weight_decay": decay}
            for (ratio, decay), members in ordered
        ],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )
