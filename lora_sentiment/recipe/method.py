"""The recipe's `method` section: one class for each method. Names and defaults are PEFT's own."""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from lora_sentiment.errors import did_you_mean
from lora_sentiment.recipe.section import Names, Section


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None


def _check_targets(targets: tuple[str, ...] | str) -> tuple[str, ...] | str:
    if isinstance(targets, str):
        # A string without one of these characters is a name, probably meant as a list of one name.
        is_pattern = re.search(r"[.*+?\[\](){}|^$\\]", targets)
        if targets != "all-linear" and not is_pattern:
            hint = did_you_mean(targets, ["all-linear"])
            raise ValueError(
                f"found {targets!r}; allowed: a list of names, a regular expression, or "
                f"all-linear{hint}"
            )
        _check_pattern(targets)
        return targets
    if not targets or len(set(targets)) != len(targets):
        raise ValueError(f"found {list(targets)}; allowed: one or more names, each once")
    return targets


Targets = Annotated[Names | str, AfterValidator(_check_targets)]
Layers = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False, min_length=1)]


class _Adapters(Section):
    """Base class of the methods that put adapters on chosen linear layers."""

    target_modules: Targets | None = None
    """Linear layers that get an adapter: names of the base's own, such as q_lin (DistilBERT), query
    (BERT) or Wqkv (ModernBERT); a regular expression for full names such as
    distilbert.transformer.layer.0.attention.q_lin; or all-linear. By default query and value."""


class _LayeredAdapters(_Adapters):
    """Base class of the methods that can restrict adapters to some blocks."""

    layers_to_transform: Layers | None = None
    """Blocks that get adapters, counted from 0; by default all."""

    @model_validator(mode="after")
    def _layers_need_names(self) -> Self:
        is_pattern = isinstance(self.target_modules, str) and self.target_modules != "all-linear"
        if self.layers_to_transform and is_pattern:
            raise ValueError(
                "layers_to_transform does nothing with a regular expression; name the blocks in "
                "the expression"
            )
        return self


class LoraMethod(_LayeredAdapters):
    """LoRA (Hu et al. 2021): low-rank updates of frozen linear layers."""

    kind: Literal["lora"] = "lora"
    """Low-rank adapters on frozen weights."""
    r: int = Field(8, ge=1)
    """Rank of each update."""
    lora_alpha: int = Field(8, ge=1)
    """The update is scaled by lora_alpha / r (lora_alpha / sqrt(r) with use_rslora)."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of the adapter's input during training."""
    use_rslora: bool = False
    """Rank-stabilised scaling (Kalajdzievski 2023)."""
    use_dora: bool = False
    """Train the magnitude of each weight row separately from its direction (DoRA, Liu et al.
    2024)."""
    init_lora_weights: bool | Literal["gaussian", "orthogonal", "pissa", "olora"] = True
    """Initial values of A and B: true is PEFT's default (B is zero); pissa (Meng et al. 2024) and
    olora (Buyukakyuz 2024) take part of the base's weights and are saved as plain LoRA of twice the
    rank; false leaves B random."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Name or regular expression of a linear layer to its rank, if not r."""
    alpha_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Name or regular expression of a linear layer to its alpha, if not lora_alpha."""
    loraplus_lr_ratio: float | None = Field(None, gt=0)
    """Learning rate of every B divided by that of the other tensors (LoRA+, Hayou et al. 2024)."""

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns_compile(cls, patterns: dict[str, int]) -> dict[str, int]:
        for pattern in patterns:
            _check_pattern(pattern)
        return patterns

    @model_validator(mode="after")
    def _orthogonal_needs_even_ranks(self) -> Self:
        if self.init_lora_weights == "orthogonal":
            for rank in (self.r, *self.rank_pattern.values()):
                if rank % 2:
                    raise ValueError(f"init_lora_weights orthogonal needs even ranks; found {rank}")
        return self

    @property
    def changes_base(self) -> bool:
        """Whether the initial values are subtracted from the weights of the base."""
        return self.init_lora_weights in ("pissa", "olora")


class AdaloraMethod(_LayeredAdapters):
    """AdaLoRA (Zhang et al. 2023): training prunes the ranks from init_r to target_r on average."""

    kind: Literal["adalora"]
    """LoRA as a singular value decomposition whose ranks are pruned by importance."""
    init_r: int = Field(12, ge=1)
    """Rank of each update at the start."""
    target_r: int = Field(8, ge=1)
    """Average rank at the end."""
    tinit: int = Field(0, ge=0)
    """Optimizer steps before pruning starts."""
    tfinal: int = Field(0, ge=0)
    """Optimizer steps at the end during which the ranks do not change."""
    deltaT: int = Field(1, ge=1)  # noqa: N815 - PEFT's own name
    """Optimizer steps between prunings."""
    beta1: float = Field(0.85, gt=0, lt=1)
    """Decay of the sensitivity average."""
    beta2: float = Field(0.85, gt=0, lt=1)
    """Decay of the uncertainty average."""
    orth_reg_weight: float = Field(0.5, ge=0)
    """Weight of the penalty that keeps both factors orthogonal."""
    lora_alpha: int = Field(8, ge=1)
    """The update is scaled by lora_alpha / rank."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of the adapter's input during training."""

    @model_validator(mode="after")
    def _ranks_fall(self) -> Self:
        if self.target_r > self.init_r:
            raise ValueError(
                f"target_r {self.target_r} is more than init_r {self.init_r}; AdaLoRA only lowers "
                "ranks"
            )
        return self


class Ia3Method(_Adapters):
    """IA3 (Liu et al. 2022): a learned scale for each activation of the chosen linear layers."""

    kind: Literal["ia3"]
    """Learned scales of activations; the smallest adapter."""
    target_modules: Targets | None = None
    """Linear layers whose activations are scaled: those of the feed-forward network at their input,
    the others at their output. By default key, value and the second of the feed-forward
    network."""


class VeraMethod(_LayeredAdapters):
    """VeRA (Kopiczko et al. 2024): shared fixed random projections with trained scales."""

    kind: Literal["vera"]
    """Shared random projections with trained scales."""
    r: int = Field(256, ge=1)
    """Rank of the shared projections."""
    vera_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of the adapter's input during training."""
    d_initial: float = Field(0.1, gt=0)
    """Initial value of the inner scales."""
    projection_prng_key: int = Field(0, ge=0)
    """Seed of the shared projections. The projections are saved with the adapter."""


class UnfreezeMethod(Section):
    """Fine-tuning of chosen tensors of the encoder; the others are frozen."""

    kind: Literal["unfreeze"]
    """Train chosen tensors of the encoder itself."""
    last_layers: int | None = Field(None, ge=1)
    """Train this many of the last blocks."""
    patterns: Names | None = None
    """Train the tensors whose names match these shell patterns, such as transformer.layer.5.* or
    *.bias."""

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if (self.last_layers is None) == (self.patterns is None) or self.patterns == ():
            raise ValueError(
                "name either last_layers (a number of blocks) or patterns (one or more)"
            )
        return self


class HeadMethod(Section):
    """Linear probe: the encoder is frozen and only the head is trained."""

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
"""Classes of the methods by `kind`."""


def why_not_quantised(method: Method) -> str | None:
    """Return why a method cannot be trained on a quantised base, or None if it can."""
    match method:
        case FullMethod() | UnfreezeMethod():
            return f"method {method.kind} trains the base's own tensors; quantised ones cannot be"
        case VeraMethod():
            return "PEFT has no VeRA for quantised linears"
        case LoraMethod() if method.changes_base:
            start = method.init_lora_weights
            return f"init_lora_weights {start} changes the base's weights, which are quantised"
        case LoraMethod() if method.init_lora_weights == "orthogonal":
            return "orthogonal initial values have the dtype of the weights, here an integer type"
        case _:
            return None
