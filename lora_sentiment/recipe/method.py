"""The recipe's `method` section: one class a method, field names and defaults PEFT's own."""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from lora_sentiment.errors import did_you_mean
from lora_sentiment.recipe.section import Names, Section

LINEARS = ("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2")
"""The linear layers of a DistilBERT block, in the order of its forward."""


def _check_targets(targets: tuple[str, ...] | str) -> tuple[str, ...] | str:
    if isinstance(targets, str):
        # Without one of these a pattern is a name, and a lone name is meant as a list of one.
        if targets != "all-linear" and not re.search(r"[.*+?\[\](){}|^$\\]", targets):
            hint = did_you_mean(targets, ["all-linear", *LINEARS])
            raise ValueError(
                f"found {targets!r}; allowed: a list of names, a regular expression, or all-linear{hint}"
            )
        try:
            re.compile(targets)
        except re.error as error:
            raise ValueError(f"{targets!r} is no regular expression: {error}") from None
        return targets
    for name in targets:
        if name not in LINEARS:
            allowed = ", ".join(LINEARS)
            hint = did_you_mean(name, list(LINEARS))
            raise ValueError(
                f"{name!r} is no linear layer of distilbert; choose from {allowed}, or all-linear{hint}"
            )
    if not targets or len(set(targets)) != len(targets):
        raise ValueError(
            f"found {list(targets)}; allowed: one or more of {', '.join(LINEARS)}, each once"
        )
    return targets


Targets = Annotated[Names | str, AfterValidator(_check_targets)]
Layers = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False, min_length=1)]


class _Adapters(Section):
    """What every method with adapters on chosen linears shares."""

    target_modules: Targets = ("q_lin", "v_lin")
    """Linears that get an adapter: names from q_lin, k_lin, v_lin, out_lin, lin1, lin2; a regular expression over full
    names such as distilbert.transformer.layer.0.attention.q_lin; or all-linear."""


class _LayeredAdapters(_Adapters):
    """Adapters that can be kept to some of the blocks."""

    layers_to_transform: Layers | None = None
    """Blocks that get adapters, counted from 0; by default all."""

    @model_validator(mode="after")
    def _layers_need_names(self) -> Self:
        if (
            self.layers_to_transform
            and isinstance(self.target_modules, str)
            and self.target_modules != "all-linear"
        ):
            raise ValueError(
                "layers_to_transform does nothing with a regular expression; put the blocks into it"
            )
        return self


class LoraMethod(_LayeredAdapters):
    """LoRA (Hu et al. 2021): low-rank updates of frozen linears."""

    kind: Literal["lora"] = "lora"
    """Low-rank adapters on frozen weights."""
    r: int = Field(8, ge=1)
    """Rank of each update."""
    lora_alpha: int = Field(8, ge=1)
    """The update is scaled by lora_alpha / r (lora_alpha / sqrt(r) with use_rslora)."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of the adapter's input while training."""
    use_rslora: bool = False
    """Rank-stabilised scaling (Kalajdzievski 2023)."""
    use_dora: bool = False
    """Train each weight row's magnitude apart from its direction (DoRA, Liu et al. 2024)."""
    init_lora_weights: bool | Literal["gaussian", "orthogonal", "pissa", "olora"] = True
    """How A and B start: true is PEFT's own (B zero); pissa (Meng et al. 2024) and olora (Buyukakyuz 2024) take part of
    the base's weights, and are saved as plain LoRA of twice the rank; false leaves B random."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Name or regular expression of a linear to its rank, where it differs from r."""
    alpha_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Name or regular expression of a linear to its lora_alpha, where it differs."""
    loraplus_lr_ratio: float | None = Field(None, gt=0)
    """Learning rate of every B over that of the rest (LoRA+, Hayou et al. 2024)."""

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns_compile(cls, patterns: dict[str, int]) -> dict[str, int]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return patterns

    @model_validator(mode="after")
    def _orthogonal_halves_the_rank(self) -> Self:
        odd = [rank for rank in (self.r, *self.rank_pattern.values()) if rank % 2]
        if self.init_lora_weights == "orthogonal" and odd:
            raise ValueError(f"init_lora_weights orthogonal needs even ranks; found {odd[0]}")
        return self

    @property
    def changes_base(self) -> bool:
        """Whether the start values are taken out of the base's weights."""
        return self.init_lora_weights in ("pissa", "olora")


class AdaloraMethod(_LayeredAdapters):
    """AdaLoRA (Zhang et al. 2023): ranks start at init_r and are pruned to target_r on average while training."""

    kind: Literal["adalora"]
    """LoRA as a singular value decomposition whose ranks are pruned by importance."""
    init_r: int = Field(12, ge=1)
    """Rank of each update at the start."""
    target_r: int = Field(8, ge=1)
    """Average rank at the end."""
    tinit: int = Field(0, ge=0)
    """Optimizer steps before pruning starts."""
    tfinal: int = Field(0, ge=0)
    """Optimizer steps at the end in which the ranks stay."""
    deltaT: int = Field(1, ge=1)  # noqa: N815 - PEFT's own name
    """Optimizer steps between prunings."""
    beta1: float = Field(0.85, gt=0, lt=1)
    """Decay of the smoothed sensitivity."""
    beta2: float = Field(0.85, gt=0, lt=1)
    """Decay of the smoothed uncertainty."""
    orth_reg_weight: float = Field(0.5, ge=0)
    """Weight of the penalty that keeps both factors orthogonal."""
    lora_alpha: int = Field(8, ge=1)
    """The update is scaled by lora_alpha / rank."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of the adapter's input while training."""

    @model_validator(mode="after")
    def _ranks_fall(self) -> Self:
        if self.target_r > self.init_r:
            raise ValueError(
                f"target_r {self.target_r} is more than init_r {self.init_r}; ranks are only pruned"
            )
        return self


class Ia3Method(_Adapters):
    """IA3 (Liu et al. 2022): a learned scale for every activation of the chosen linears."""

    kind: Literal["ia3"]
    """Learned scales of activations: the smallest adapter."""
    target_modules: Targets = ("k_lin", "v_lin", "lin2")
    """Linears whose activations are scaled: lin1 and lin2 at their input, the others at their output."""


class VeraMethod(_LayeredAdapters):
    """VeRA (Kopiczko et al. 2024): fixed random projections shared by all layers, trained scales between them."""

    kind: Literal["vera"]
    """Shared random projections with trained scales."""
    r: int = Field(256, ge=1)
    """Rank of the shared projections."""
    vera_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of the adapter's input while training."""
    d_initial: float = Field(0.1, gt=0)
    """Start value of the inner scales."""
    projection_prng_key: int = Field(0, ge=0)
    """Seed of the shared projections, which are saved too."""


class UnfreezeMethod(Section):
    """Plain fine-tuning of chosen tensors of the encoder, the rest frozen."""

    kind: Literal["unfreeze"]
    """Train chosen tensors of the encoder itself."""
    last_layers: int | None = Field(None, ge=1)
    """Train this many of the last blocks."""
    patterns: Names | None = None
    """Train the tensors that these shell patterns name, such as transformer.layer.5.* or *.bias."""

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if (self.last_layers is None) == (self.patterns is None) or self.patterns == ():
            raise ValueError(
                "name either last_layers (a number of blocks) or patterns (one or more)"
            )
        return self


class HeadMethod(Section):
    """A linear probe: the encoder is frozen, only the head is trained."""

    kind: Literal["head"]
    """Train the head alone."""


class FullMethod(Section):
    """Full fine-tuning: every parameter is trained."""

    kind: Literal["full"]
    """Train every parameter of encoder and head."""


PeftMethod = LoraMethod | AdaloraMethod | Ia3Method | VeraMethod
"""The methods that PEFT wraps."""
OwnMethod = UnfreezeMethod | HeadMethod | FullMethod
"""The methods that train the model's own tensors."""
Method = Annotated[PeftMethod | OwnMethod, Field(discriminator="kind")]
"""What is trained."""
METHODS: dict[str, type[Section]] = {
    "lora": LoraMethod,
    "adalora": AdaloraMethod,
    "ia3": Ia3Method,
    "vera": VeraMethod,
    "unfreeze": UnfreezeMethod,
    "head": HeadMethod,
    "full": FullMethod,
}
"""`kind` to class."""


def why_not_quantised(method: Method) -> str | None:
    """Return why a method cannot be trained on a quantised base, or None where it can."""
    match method:
        case FullMethod() | UnfreezeMethod():
            return f"method {method.kind} trains the base's own tensors, and quantised ones cannot be trained"
        case VeraMethod():
            return "PEFT has no VeRA for quantised linears"
        case LoraMethod() if method.changes_base:
            return f"init_lora_weights {method.init_lora_weights} changes the base's weights, and these are quantised"
        case LoraMethod() if method.init_lora_weights == "orthogonal":
            return "PEFT makes the orthogonal start in the dtype of the weights, and that is no float here"
        case _:
            return None
