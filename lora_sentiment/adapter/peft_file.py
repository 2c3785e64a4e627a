"""`adapter_config.json`: read once, held against what this package computes, and made PEFT's own object.

PEFT's options can import modules, read files of any path and change what is computed. What is named here may vary;
every other option must stand at PEFT's default.
"""

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftConfig, VeraConfig
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from lora_sentiment.adapter.safe_files import first_fault, read_json
from lora_sentiment.errors import AdapterError

PEFT_CONFIG = "adapter_config.json"
_MAX_STEPS = 1e6
"""Of a regular expression on one module's name. `re` has no timeout, and some patterns take years."""


def _check_pattern(pattern: str) -> str:
    """Refuse a pattern that might take long on a name of 50 characters: each repeat could end at any of them."""
    repeats = len(re.findall(r"[*+{]|(?<![(*+}?])\?", pattern))
    groups, choices = max(1, pattern.count("(")), pattern.count("|")
    if len(pattern) > 300 or re.search(r"\)[*+{]", pattern) or repeats > 9 or groups > 9:
        raise ValueError(
            f"the pattern {pattern[:60]!r} may take too long; name the modules in a list"
        )
    if 50**repeats * (1 + choices / groups) ** groups > _MAX_STEPS:
        raise ValueError(
            f"the pattern {pattern[:60]!r} may take too long; name the modules in a list"
        )
    try:
        re.compile(pattern)
    except (re.error, OverflowError) as error:
        raise ValueError(f"{pattern[:60]!r} is no regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_check_pattern)]
Modules = list[str] | Pattern | None
Rank = Annotated[int, Field(ge=1, le=1 << 16)]
Count = Annotated[int, Field(ge=0, le=1 << 32)]
Share = Annotated[float, Field(ge=0, lt=1)]
Scale = Annotated[float, Field(ge=0, le=1e6)]


class _Options(BaseModel):
    """What may vary in every kind of file; the keys beside these are in `model_extra`."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")

    peft_type: str
    task_type: Literal["SEQ_CLS"] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    target_modules: Modules = None
    exclude_modules: Modules = None
    fan_in_fan_out: bool = False
    # Others would be copied whole out of the base.
    modules_to_save: list[Literal["pre_classifier", "classifier", "score"]] | None = None


class _Layered(_Options):
    bias: Literal["none", "all", "lora_only", "vera_only"] = "none"
    layers_to_transform: list[Count] | Count | None = None
    layers_pattern: list[Pattern] | Pattern | None = None


class _Lora(_Layered):
    r: Rank = 8
    lora_alpha: Scale = 8
    lora_dropout: Share = 0.0
    lora_bias: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: (
        bool
        | Literal["gaussian", "orthogonal", "pissa", "olora"]
        | Annotated[str, Field(pattern=r"^pissa_niter_\d{1,2}$")]
    ) = True
    rank_pattern: dict[Pattern, Rank] = Field(default_factory=dict)
    alpha_pattern: dict[Pattern, Scale] = Field(default_factory=dict)


class _Adalora(_Layered):
    r: Count = 8
    init_r: Rank = 12
    target_r: Count = 8
    tinit: Count = 0
    tfinal: Count = 0
    deltaT: Count = 1  # noqa: N815 - PEFT's own name
    beta1: Share = 0.85
    beta2: Share = 0.85
    orth_reg_weight: Scale = 0.5
    total_step: Count | None = None
    lora_alpha: Scale = 8
    lora_dropout: Share = 0.0
    init_lora_weights: bool = True
    rank_pattern: dict[str, list[bool]] | None = None


class _Ia3(_Options):
    feedforward_modules: Modules = None
    init_ia3_weights: bool = True


class _Vera(_Layered):
    r: Rank = 256
    projection_prng_key: Count = 0
    save_projection: bool = True
    vera_dropout: Share = 0.0
    d_initial: Scale = 0.1
    init_weights: bool = True


_KINDS: dict[str, tuple[type[_Options], type[Any]]] = {
    "LORA": (_Lora, LoraConfig),
    "ADALORA": (_Adalora, AdaLoraConfig),
    "IA3": (_Ia3, IA3Config),
    "VERA": (_Vera, VeraConfig),
}


def read_config(folder: Path) -> PeftConfig:
    """Read a folder's `adapter_config.json`; nothing is imported or fetched for it.

    Raises:
        AdapterError: If it is missing, malformed, of a kind that this package does not know, or has an option that
            this package does not compute.
    """
    path = folder / PEFT_CONFIG
    values = read_json(path)
    if not isinstance(values, dict) or not isinstance(values.get("peft_type"), str):
        raise AdapterError(f"{path}: is no PEFT configuration: it names no peft_type")
    if values["peft_type"] not in _KINDS:
        raise AdapterError(
            f"{path}: has peft_type {values['peft_type']!r}; this package reads {', '.join(_KINDS)}"
        )
    options, kind = _KINDS[values["peft_type"]]
    try:
        others = options.model_validate(values).model_extra or {}
    except ValidationError as error:
        raise AdapterError(f"{path}: PEFT cannot use it: {first_fault(error)}") from error
    defaults = dict(_defaults(kind))
    for name, value in others.items():
        # A newer PEFT's option is left out here, and so must say nothing.
        if value != defaults[name] if name in defaults else value not in (None, False, [], {}):
            raise AdapterError(
                f"{path}: {name} is {str(value)[:100]!r}; this package leaves it at PEFT's default: other values could "
                "import code, read other files, or answer otherwise than this package computes"
            )
    with explain_peft(folder):
        config: PeftConfig = kind(**{name: values[name] for name in defaults if name in values})
    return config


def _defaults(kind: type[Any]) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(kind):
        made = (
            field.default_factory()
            if field.default_factory is not dataclasses.MISSING
            else field.default
        )
        yield field.name, made


@contextmanager
def explain_peft(folder: Path) -> Iterator[None]:
    """Turn what PEFT and torch raise for a configuration of anyone's making into one line."""
    try:
        yield
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
        ImportError,
    ) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise AdapterError(f"{folder / PEFT_CONFIG}: PEFT cannot use it: {reason}") from error
