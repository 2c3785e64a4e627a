"""Which linears a method adapts and which tensors it unfreezes, by full name."""

import fnmatch
import re
from typing import Any, cast

from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from lora_sentiment.errors import ModelError
from lora_sentiment.models.families import Family, choose_targets, family_of
from lora_sentiment.models.load import encoder_tensors
from lora_sentiment.recipe.method import Ia3Method, PeftMethod, UnfreezeMethod


def find_targets(model: nn.Module, method: PeftMethod) -> dict[str, nn.Linear]:
    """Return the linears of an unwrapped classifier that a method adapts, by full name.

    They are in the order of the forward pass. PEFT's own rule decides, on the linears of the
    encoder's blocks alone.

    Raises:
        ModelError: If the target matches no linear or matches the head, or the base has fewer
            blocks.
    """
    family = family_of(model.config)
    wanted = target_names(method, family)
    if isinstance(wanted, str):
        head = [name for name in family.head if re.fullmatch(wanted, name)]
        if head:
            raise ModelError(
                f"method.target_modules {wanted!r} matches {head[0]}, which is a layer of the "
                "head. The head gets no adapter; model.head sets what of it is trained"
            )
    linears = encoder_linears(model)
    layers = None if isinstance(method, Ia3Method) else method.layers_to_transform
    num_blocks = _count_blocks(model)
    if layers and max(layers) >= num_blocks:
        raise ModelError(
            f"method.layers_to_transform: found layer {max(layers)}; the base has {num_blocks} "
            f"layers, 0 to {num_blocks - 1}"
        )
    config: Any = PeftConfig()
    config.target_modules = wanted
    config.layers_to_transform = list(layers) if layers else None
    targets = {
        name: linear for name, linear in linears.items() if check_target_module_exists(config, name)
    }
    if not targets:
        raise ModelError(
            f"method.target_modules {method.target_modules!r} matches no linear of the encoder; "
            f"full names look like {next(iter(linears))}"
        )
    return targets


def target_names(method: PeftMethod, family: Family) -> list[str] | str:
    """Return `target_modules` as PEFT takes it: a sorted list of names, or a regular expression."""
    names = choose_targets(method, family)
    if names == "all-linear":
        # PEFT's own all-linear takes the head too.
        return sorted(family.linears)
    return names if isinstance(names, str) else sorted(names)


def resolve_pattern(patterns: dict[str, int], field: str, targets: list[str]) -> dict[str, int]:
    """Return rank_pattern or alpha_pattern by full name.

    The first pattern that matches a name counts, as in PEFT.

    Raises:
        ModelError: If a pattern matches no adapted linear.
    """
    values: dict[str, int] = {}
    for pattern, value in patterns.items():
        matching = [name for name in targets if re.match(rf"(.*\.)?({pattern})$", name)]
        if not matching:
            raise ModelError(
                f"method.{field}: {pattern!r} matches no adapted linear; one is {targets[0]}"
            )
        for name in matching:
            values.setdefault(name, value)
    return values


def find_unfrozen(model: nn.Module, method: UnfreezeMethod) -> list[str]:
    """Return the encoder's tensors that `unfreeze` trains, under the checkpoint's own names.

    Raises:
        ModelError: If a pattern matches no tensor, or the base has fewer blocks.
    """
    family = family_of(model.config)
    names = [name for name, _ in encoder_tensors(model)]
    if method.last_layers is not None:
        num_blocks = _count_blocks(model)
        if method.last_layers > num_blocks:
            raise ModelError(
                f"method.last_layers: found {method.last_layers}; allowed: 1 to {num_blocks}"
            )
        last = range(num_blocks - method.last_layers, num_blocks)
        prefixes = tuple(f"{family.blocks}.{i}." for i in last)
        return [name for name in names if name.startswith(prefixes)]
    unfrozen: set[str] = set()
    for pattern in method.patterns or ():
        matching = fnmatch.filter(names, pattern)
        if not matching:
            raise ModelError(
                f"method.patterns: {pattern!r} matches no tensor of the encoder; they have names "
                f"such as {names[-1]} (model.head sets what of the head is trained)"
            )
        unfrozen.update(matching)
    return [name for name in names if name in unfrozen]


def encoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linears of an unwrapped classifier's blocks by full name, in forward order."""
    family = family_of(model.config)
    prefix = f"{family.encoder}.{family.blocks}."
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith(prefix) and isinstance(module, nn.Linear)
    }


def _count_blocks(model: nn.Module) -> int:
    num_blocks: int = cast(Any, model).config.num_hidden_layers
    return num_blocks
