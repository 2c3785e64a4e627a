"""Read `adapter_config.json`, check it, and return PEFT's own configuration object.

PEFT's options can import modules, read files of any path, run regular expressions and change what
is computed. Only the options in `_Options` may differ from PEFT's defaults.
"""

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftConfig, VeraConfig
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from lora_sentiment.adapter.safe_files import (
    ExplainLibraryError,
    Header,
    first_fault,
    read_object,
)
from lora_sentiment.errors import AdapterError
from lora_sentiment.models.families import FAMILIES

PEFT_CONFIG = "adapter_config.json"
KINDS: dict[str, type[Any]] = {
    "LORA": LoraConfig,
    "ADALORA": AdaLoraConfig,
    "IA3": IA3Config,
    "VERA": VeraConfig,
}
_NAME = re.compile(r"[A-Za-z0-9_.]{1,200}")
_ADAPTED = re.compile(r"base_model\.model\.(.+)\.(?:lora_A|lora_A\.weight|ia3_l|vera_lambda_d)")


def _is_name(name: object) -> bool:
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def _check_names(names: Any) -> Any:
    """Refuse a regular expression: PEFT would run it, and some expressions take years."""
    for name in [names] if isinstance(names, str) else names or ():
        if not _is_name(name):
            raise ValueError(
                f"{name[:60]!r} is not a module name (letters, digits, _ and .); regular "
                "expressions in a folder are never run; list the names of the modules"
            )
    return names


def _check_saved(names: list[str] | None) -> list[str] | None:
    allowed = {"score", "pooler", "bert.pooler"}
    for family in FAMILIES.values():
        allowed |= set(family.saved_modules)
    for name in names or ():
        if name not in allowed:
            raise ValueError(f"{name[:60]!r} is no head; allowed: {', '.join(sorted(allowed))}")
    return names


Names = Annotated[list[str] | str | None, AfterValidator(_check_names)]
Rank = Annotated[int, Field(ge=1, le=1 << 16)]
Count = Annotated[int, Field(ge=0, le=1 << 32)]
Share = Annotated[float, Field(ge=0, lt=1)]
Scale = Annotated[float, Field(ge=0, le=1e6)]


class _Options(BaseModel):
    """The options that may differ from PEFT's defaults. Each method has some of them."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")

    peft_type: str
    task_type: Literal["SEQ_CLS"] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    # PEFT copies other modules whole out of the base.
    modules_to_save: Annotated[list[str] | None, AfterValidator(_check_saved)] = None
    target_modules: Names = None
    exclude_modules: Names = None
    feedforward_modules: Names = None
    layers_pattern: Names = None
    layers_to_transform: list[Count] | Count | None = None
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only", "vera_only"] = "none"
    r: Count = 0
    init_r: Rank = 1
    target_r: Count = 0
    tinit: Count = 0
    tfinal: Count = 0
    deltaT: Count = 1  # noqa: N815 - PEFT's own name
    beta1: Share = 0.0
    beta2: Share = 0.0
    orth_reg_weight: Scale = 0.0
    total_step: Count | None = None
    lora_alpha: Scale = 0.0
    lora_dropout: Share = 0.0
    vera_dropout: Share = 0.0
    lora_bias: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    # Other values read files or download data.
    init_lora_weights: (
        bool
        | Literal["gaussian", "orthogonal", "pissa", "olora"]
        | Annotated[str, Field(pattern=r"^pissa_niter_\d{1,2}$")]
    ) = True
    init_ia3_weights: bool = True
    init_weights: bool = True
    # AdaLoRA keeps a list of the remaining singular values for each module.
    rank_pattern: Annotated[dict[str, Rank | list[bool]] | None, AfterValidator(_check_names)] = (
        None
    )
    alpha_pattern: Annotated[dict[str, Scale], AfterValidator(_check_names)] = {}
    projection_prng_key: Count = 0
    save_projection: bool = True
    d_initial: Scale = 0.0


def read_config(folder: Path, *, saved: Header | None = None) -> PeftConfig:
    """Read the `adapter_config.json` of a folder. Nothing is imported or downloaded for it.

    Args:
        folder: The folder.
        saved: Header of the adapter's tensors, only for an adapter of this package. Its early
            versions saved regular expressions, which are then replaced by names.

    Raises:
        AdapterError: If the file is missing or malformed, or has a kind or an option that this
            package does not compute.
    """
    path = folder / PEFT_CONFIG
    values = read_object(path)
    kind = values.get("peft_type")
    if not isinstance(kind, str):
        raise AdapterError(f"{path}: is not a PEFT configuration: it has no peft_type")
    if kind not in KINDS:
        raise AdapterError(f"{path}: has peft_type {kind!r}; this package reads {', '.join(KINDS)}")
    if saved is not None:
        values = _replace_expressions(values, saved)
    try:
        _Options.model_validate(values)
    except ValidationError as error:
        raise AdapterError(f"{path}: {first_fault(error)}") from error
    defaults = get_defaults(KINDS[kind])
    for name, value in values.items():
        if name not in defaults:
            # An option of another PEFT version. It is left out, so it must be empty.
            allowed = value in (None, False, [], {})
        else:
            allowed = name in _Options.model_fields or value == defaults[name]
        if not allowed:
            raise AdapterError(
                f"{path}: {name} is {str(value)[:100]!r}; this package leaves it at PEFT's "
                "default: other values could import code, read other files, or change the answers"
            )
    with ExplainLibraryError(path):
        config: PeftConfig = KINDS[kind](**{k: v for k, v in values.items() if k in defaults})
    return config


def get_defaults(kind: type[Any]) -> dict[str, Any]:
    """Return the default of each option of a PEFT configuration."""
    defaults = {}
    for field in dataclasses.fields(kind):
        if field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = field.default_factory()
        else:
            defaults[field.name] = field.default
    return defaults


def _replace_expressions(values: dict[str, Any], saved: Header) -> dict[str, Any]:
    """Replace the regular expressions of an early version by the names that the saved tensors have.

    No expression is run. The tensors say which linears have an adapter, and of which rank. They do
    not hold `lora_alpha`, so an expression in `alpha_pattern` stays, and is refused.
    """
    sizes = {}
    for name, (_, shape) in saved.items():
        match = _ADAPTED.fullmatch(name)
        if match and shape:
            sizes[match[1]] = shape[0]
    replaced: dict[str, Any] = {}
    targets = values.get("target_modules")
    if isinstance(targets, str) and not _is_name(targets):
        replaced["target_modules"] = sorted(sizes)
        if values["peft_type"] == "IA3":
            # The scale of an input has shape (1, in_features), the scale of an output
            # (out_features, 1).
            inputs = sorted(name for name, size in sizes.items() if size == 1)
            replaced["feedforward_modules"] = inputs
    ranks = values.get("rank_pattern")
    if isinstance(ranks, dict) and not all(map(_is_name, ranks)):
        replaced["rank_pattern"] = sizes
    return values | replaced
