"""Which linears a method adapts, by full name and rank: decided from shapes alone, as PEFT decides it."""

import re
from dataclasses import dataclass

from lora_sentiment.errors import ModelError
from lora_sentiment.models.families import HEAD, Shape
from lora_sentiment.recipe.method import (
    LINEARS,
    AdaloraMethod,
    Ia3Method,
    LoraMethod,
    PeftMethod,
    VeraMethod,
)


@dataclass(frozen=True)
class Target:
    """One adapted linear.

    Attributes:
        in_features: Width of its input.
        out_features: Width of its output.
        rank: Rank of its adapter; 0 where the method has none.
        alpha: Its lora_alpha; 0 where the method has none.
        feed_forward: Whether it is lin1 or lin2.
    """

    in_features: int
    out_features: int
    rank: int
    alpha: int
    feed_forward: bool


def find_targets(shape: Shape, method: PeftMethod) -> dict[str, Target]:
    """Return the linears that a method adapts, by their full names in the order of the forward.

    Raises:
        ModelError: If a pattern matches no linear, one matches the head, or there is no such block.
    """
    wanted = target_names(method)
    if isinstance(wanted, str) and (head := [name for name in HEAD if re.fullmatch(wanted, name)]):
        raise ModelError(
            f"method.target_modules {wanted!r} matches {head[0]}; the head gets no adapter, model.head says what of it "
            "is trained"
        )
    layers = None if isinstance(method, Ia3Method) else method.layers_to_transform
    if layers and max(layers) >= shape.n_layers:
        raise ModelError(
            f"method.layers_to_transform: found layer {max(layers)}; the base has {shape.n_layers} layers, 0 to "
            f"{shape.n_layers - 1}"
        )
    names = [name for name in linear_names(shape) if _is_target(name, method)]
    if not names:
        raise ModelError(
            f"method.target_modules {method.target_modules!r} matches no linear of the encoder; full names look like "
            f"{linear_names(shape)[0]}"
        )
    ranks, alphas = (
        _patterns(method, "rank_pattern", names),
        _patterns(method, "alpha_pattern", names),
    )
    found = {}
    for name in names:
        linear = name.rpartition(".")[2]
        found[name] = Target(
            *shape.linear(linear),
            rank=ranks.get(name, _rank(method)),
            alpha=alphas.get(
                name, 0 if isinstance(method, (Ia3Method, VeraMethod)) else method.lora_alpha
            ),
            feed_forward=linear in ("lin1", "lin2"),
        )
    return found


def linear_names(shape: Shape) -> list[str]:
    """Return the full names of all linears of an encoder's blocks."""
    return [
        f"distilbert.transformer.layer.{i}.{'ffn' if name in ('lin1', 'lin2') else 'attention'}.{name}"
        for i in range(shape.n_layers)
        for name in LINEARS
    ]


def target_names(method: PeftMethod) -> list[str] | str:
    """Return `target_modules` as PEFT takes it: a sorted list of names, or a regular expression."""
    if method.target_modules == "all-linear":
        # PEFT's own all-linear would take the head too.
        return sorted(LINEARS)
    return (
        method.target_modules
        if isinstance(method.target_modules, str)
        else sorted(method.target_modules)
    )


def _is_target(name: str, method: PeftMethod) -> bool:
    wanted = target_names(method)
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    layers = None if isinstance(method, Ia3Method) else method.layers_to_transform
    return name.rpartition(".")[2] in wanted and (
        layers is None or int(name.split(".")[3]) in layers
    )


def _rank(method: PeftMethod) -> int:
    match method:
        case AdaloraMethod():
            return method.init_r
        case Ia3Method():
            return 0
        case LoraMethod() | VeraMethod():
            return method.r


def _patterns(method: PeftMethod, field: str, names: list[str]) -> dict[str, int]:
    """Resolve rank_pattern or alpha_pattern: the first pattern that matches a name's end counts, as in PEFT."""
    patterns = getattr(method, field) if isinstance(method, LoraMethod) else {}
    found: dict[str, int] = {}
    for pattern, value in patterns.items():
        matching = [name for name in names if re.match(rf"(.*\.)?({pattern})$", name)]
        if not matching:
            raise ModelError(
                f"method.{field}: {pattern!r} matches none of the adapted linears, such as {names[0]}"
            )
        found = {**dict.fromkeys(matching, value), **found}
    return found
