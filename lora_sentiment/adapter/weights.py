"""The weights of an adapter folder: PEFT's two files, or `changed.safetensors`; written, read, checked."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from lora_sentiment.adapter.peft_file import PEFT_CONFIG, explain_peft, read_config
from lora_sentiment.adapter.safe_files import Header, read_header
from lora_sentiment.errors import AdapterError
from lora_sentiment.files import write_json
from lora_sentiment.models.families import HEAD
from lora_sentiment.models.load import Base
from lora_sentiment.models.wrap import as_plain_lora, kept_ranks, make_trainable, trainable_tensors
from lora_sentiment.recipe.method import LoraMethod, Method, PeftMethod
from lora_sentiment.recipe.model import ModelConfig

PEFT_WEIGHTS, CHANGED_WEIGHTS = "adapter_model.safetensors", "changed.safetensors"
_OWN_DTYPES, _STOCK_DTYPES = ("F32",), ("F32", "BF16", "F16")


def save_weights(folder: Path, model: nn.Module) -> None:
    """Write PEFT's own files, or `changed.safetensors` with what was trained and the dense head."""
    if isinstance(model, PeftModel):
        config = model.peft_config["default"]
        if isinstance(config, AdaLoraConfig):
            config.rank_pattern = kept_ranks(model.state_dict())
        tensors = tensors_to_save(model)
        _save_config(folder, config.to_dict())
        _save_tensors(folder / PEFT_WEIGHTS, tensors)
    else:
        _save_tensors(folder / CHANGED_WEIGHTS, tensors_to_save(model))


def tensors_to_save(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter file by name: PEFT's own choice, or what was trained and the whole head."""
    return _peft_tensors(model) if isinstance(model, PeftModel) else _own_tensors(model)


def save_as_plain_lora(
    folder: Path, model: nn.Module, base: Base, method: LoraMethod, config: ModelConfig
) -> None:
    """Write an adapter that took part of the base's weights as plain LoRA, so that it fits the base as it was."""
    start = make_trainable(base, method, config, dtype=torch.float32)
    assert isinstance(model, PeftModel)
    assert isinstance(start, PeftModel)
    changes, factors = as_plain_lora(model, start)
    short = {name.replace(".default.", "."): tensor for name, tensor in factors.items()}
    _save_config(folder, model.peft_config["default"].to_dict() | changes)
    _save_tensors(folder / PEFT_WEIGHTS, _peft_tensors(model) | short)


def _save_config(folder: Path, values: dict[str, Any]) -> None:
    # Sorted lists, because PEFT's sets come in any order and bytes must repeat.
    values = values | {"inference_mode": True}
    write_json(
        folder / PEFT_CONFIG,
        {k: sorted(v) if isinstance(v, (set, list)) else v for k, v in values.items()},
    )


def _save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    contiguous = {key: tensors[key].detach().to("cpu").contiguous() for key in sorted(tensors)}
    save_file(
        contiguous, path, metadata={"format": "pt"}
    )  # one key, because several come in any order
    # safetensors writes for the owner alone, where every other file here can be read by all.
    path.chmod(0o644)


def _peft_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        # A linear that AdaLoRA pruned away has rank 0, which PEFT takes for a shard of a larger tensor.
        warnings.filterwarnings("ignore", message=".*LoRA tensor.* have invalid shape")
        # "auto" would ask the Hub whether the vocabulary grew, and might save the base's embeddings.
        return dict(get_peft_model_state_dict(model, save_embedding_layers=False))


def _own_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what was trained, and the whole head: a new head's frozen layer stands in no checkpoint."""
    head = {
        f"{name}.{part}": p
        for name in HEAD
        for part, p in model.get_submodule(name).named_parameters()
    }
    return {**trainable_tensors(model), **head}


def rebuild(folder: Path, base: Base, method: Method, config: ModelConfig) -> nn.Module:
    """Return the model that a folder's weights make of a freshly loaded base, in fp32, in eval mode.

    Args:
        folder: An adapter folder.
        base: Its base; the model is built around it.
        method: What was trained.
        config: The `model` section that the base was loaded by.

    Raises:
        AdapterError: If a tensor is missing, extra, of the wrong shape or not finite, or the configuration is of
            another method.
    """
    if isinstance(method, PeftMethod):
        # From the folder's own configuration: the recipe's method may have been saved in another form.
        recorded = read_config(folder)
        kind: str = PeftType(recorded.peft_type).value
        if kind.lower() != method.kind:
            raise AdapterError(
                f"{folder / PEFT_CONFIG}: has peft_type {kind!r}, and card.json says {method.kind!r}"
            )
        model = _wrap(folder, base, recorded)
    else:
        dense = config.model_copy(update={"head": "full", "head_r": None})
        model = make_trainable(base, method, dense, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    _fill(model, folder)
    return model.eval()


def rebuild_stock(folder: Path, base: Base) -> nn.Module:
    """Return the model that a PEFT folder of unknown making makes of a base, in fp32, in eval mode.

    Raises:
        AdapterError: As `rebuild`, and if part of the head is neither in the folder nor in the base.
    """
    config = read_config(folder)
    model = _wrap(folder, base, config)
    lacking = sorted(set(HEAD) - set(getattr(config, "modules_to_save", None) or ()))
    if base.new_head and lacking:
        raise AdapterError(
            f"{folder}: {' and '.join(lacking)} is in neither the adapter nor the base: it was random at training and "
            f"never saved, so its answers are lost; train again with modules_to_save={list(HEAD)}"
        )
    _fill(model, folder, dtypes=_STOCK_DTYPES)
    return model.eval()


def _wrap(folder: Path, base: Base, config: PeftConfig) -> nn.Module:
    """Let PEFT wrap a base for a configuration of anyone's making, without room for tensors wherever it can."""
    # It may have moved since.
    config.base_model_name_or_path, config.inference_mode = str(base.model.name_or_path), True
    takes_base = isinstance(config, LoraConfig) and str(config.init_lora_weights).startswith(
        ("pissa", "olora")
    )
    if isinstance(config, LoraConfig) and not takes_base:
        config.init_lora_weights = True  # every value is replaced
    values_needed, room = True, torch.device("cpu")
    match config:
        case AdaLoraConfig():
            # No matrix has more singular values than it has sides, and these are made before they are cut.
            _check_rank(folder, "init_r", config.init_r, base.config.dim)
            _check_kept(folder, config)
        case LoraConfig() if takes_base:
            _check_rank(folder, "r", _largest_rank(config), base.config.dim)
        case LoraConfig() if config.use_dora and getattr(base.model, "is_quantized", False):
            # It takes the norms of quantised weights.
            _check_rank(folder, "r", _largest_rank(config), _saved_rank(folder))
        case VeraConfig():
            # Its projections are made whatever PEFT is told.
            _check_rank(folder, "r", config.r, _saved_rank(folder))
            values_needed = False
        case IA3Config():
            pass  # its vectors are as long as the base's sides, whatever the file says
        case _:
            # PEFT alone would make each tensor before it lets go of its values.
            values_needed, room = False, torch.device("meta")
    with warnings.catch_warnings(), explain_peft(folder), room:
        # PEFT takes AdaLoRA's record of kept values for LoRA's field of the same name.
        warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match")
        model: nn.Module = get_peft_model(base.model, config, low_cpu_mem_usage=not values_needed)
    return model


def _largest_rank(config: LoraConfig) -> int:
    return int(max(config.r, *(config.rank_pattern or {}).values(), 0))


def _saved_rank(folder: Path) -> int:
    """Return the largest rank that any tensor of a folder has."""
    header = read_header(folder / PEFT_WEIGHTS)
    ranked = re.compile(r"lora_A|vera_A|vera_lambda_d")
    return max(
        (shape[0] for name, (_, shape) in header.items() if shape and ranked.search(name)),
        default=0,
    )


def _check_rank(folder: Path, name: str, found: int, allowed: int) -> None:
    if found > allowed:
        raise AdapterError(
            f"{folder / PEFT_CONFIG}: {name} is {found}; the tensors leave room for at most {allowed}"
        )


def _check_kept(folder: Path, config: AdaLoraConfig) -> None:
    for name, kept in (config.rank_pattern or {}).items():
        if len(kept) != config.init_r:
            raise AdapterError(
                f"{folder / PEFT_CONFIG}: rank_pattern.{name[:100]} has {len(kept)} values; init_r is {config.init_r}"
            )


def _fill(model: nn.Module, folder: Path, dtypes: tuple[str, ...] = _OWN_DTYPES) -> None:
    """Give a model the saved tensors, after checking each name, shape, dtype and value."""
    with explain_peft(folder):
        path = folder / (PEFT_WEIGHTS if isinstance(model, PeftModel) else CHANGED_WEIGHTS)
        expected = tensors_to_save(model)
    _check_header(path, read_header(path), expected, dtypes)
    # Where the base's are: a quantised one may be on a GPU.
    device = next(parameter.device for parameter in model.parameters() if not parameter.is_meta)
    try:
        with safe_open(path, framework="pt") as file:
            # A copy, because what it gives is the file itself, mapped: it would change if that did.
            found = {
                name: file.get_tensor(name).to(device, t.dtype, copy=True)
                for name, t in expected.items()
            }
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path}: cannot be read: {error}") from error
    for name, tensor in found.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{path}: {name} holds a value that is not finite")
    if isinstance(model, PeftModel):
        with explain_peft(folder):
            set_peft_model_state_dict(model, found, low_cpu_mem_usage=True)
    else:
        with torch.no_grad():
            for name, tensor in expected.items():
                tensor.copy_(found[name])


def _check_header(
    path: Path, header: Header, expected: Mapping[str, torch.Tensor], dtypes: tuple[str, ...]
) -> None:
    for label, names in (
        ("is missing", expected.keys() - header.keys()),
        ("is unknown", header.keys() - expected.keys()),
    ):
        if names:
            raise AdapterError(f"{path}: tensor {min(names)[:200]} {label} ({len(names)} in all)")
    for name, (dtype, shape) in header.items():
        if shape != expected[name].shape:
            raise AdapterError(
                f"{path}: {name} has shape {shape}, expected {tuple(expected[name].shape)}"
            )
        if dtype not in dtypes:
            raise AdapterError(f"{path}: {name} has dtype {dtype}; allowed: {', '.join(dtypes)}")
