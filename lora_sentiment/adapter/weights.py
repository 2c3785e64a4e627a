"""The weights of an adapter folder: PEFT's two files, or `changed.safetensors`; written, read, checked."""

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from lora_sentiment.errors import AdapterError
from lora_sentiment.files import write_json
from lora_sentiment.model.architecture import HEAD
from lora_sentiment.model.base import Base
from lora_sentiment.model.config import ModelConfig
from lora_sentiment.model.method_config import LoraMethod, Method, PeftMethod
from lora_sentiment.model.methods import as_plain_lora, kept_ranks, make_trainable, trainable_tensors

_STOCK = ("LORA", "ADALORA", "IA3", "VERA")
PEFT_WEIGHTS, PEFT_CONFIG, CHANGED_WEIGHTS = "adapter_model.safetensors", "adapter_config.json", "changed.safetensors"


def save_weights(folder: Path, model: nn.Module) -> None:
    """Write PEFT's own files, or `changed.safetensors` with what was trained and the dense head."""
    if isinstance(model, PeftModel):
        config = model.peft_config["default"]
        if isinstance(config, AdaLoraConfig):
            config.rank_pattern = kept_ranks(model.state_dict())
        tensors = _peft_tensors(model)
        _save_config(folder, config.to_dict())
        _save_tensors(folder / PEFT_WEIGHTS, tensors)
    else:
        _save_tensors(folder / CHANGED_WEIGHTS, _own_tensors(model))


def save_as_plain_lora(folder: Path, model: nn.Module, base: Base, method: LoraMethod, config: ModelConfig) -> None:
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
    write_json(folder / PEFT_CONFIG, {k: sorted(v) if isinstance(v, (set, list)) else v for k, v in values.items()})


def _save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    contiguous = {key: tensors[key].detach().to("cpu").contiguous() for key in sorted(tensors)}
    save_file(contiguous, path, metadata={"format": "pt"})  # one key, because several come in any order
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
    head = {f"{name}.{part}": p for name in HEAD for part, p in model.get_submodule(name).named_parameters()}
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
        with warnings.catch_warnings():
            # PEFT takes AdaLoRA's record of kept values for LoRA's field of the same name.
            warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match")
            model: nn.Module = get_peft_model(base.model, _read_config(folder, base, method))
    else:
        dense = config.model_copy(update={"head": "full", "head_r": None})
        model = make_trainable(base, method, dense, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    _fill(model, folder)
    return model.eval()


def read_stock_config(folder: Path) -> PeftConfig:
    """Read the configuration of a PEFT folder that this package did not write.

    Raises:
        AdapterError: If it is malformed, or of a kind that this package does not know.
    """
    kind = _peft_type(folder)
    if kind not in _STOCK:
        raise AdapterError(f"{folder / PEFT_CONFIG}: has peft_type {kind!r}; this package reads {', '.join(_STOCK)}")
    with _explain_stock(folder):
        config: PeftConfig = PeftConfig.from_pretrained(str(folder))
    return config


def rebuild_stock(folder: Path, base: Base) -> nn.Module:
    """Return the model that a PEFT folder of unknown making makes of a base, in fp32, in eval mode.

    Raises:
        AdapterError: As `rebuild`, and if part of the head is neither in the folder nor in the base.
    """
    config = read_stock_config(folder)
    config.base_model_name_or_path, config.inference_mode = base.name, True
    with _explain_stock(folder):
        model = get_peft_model(base.model, config)
    lacking = sorted(set(HEAD) - set(getattr(config, "modules_to_save", None) or ()))
    if base.new_head and lacking:
        raise AdapterError(
            f"{folder}: {' and '.join(lacking)} is in neither the adapter nor the base: it was random at training and "
            f"never saved, so its answers are lost; train again with modules_to_save={list(HEAD)}"
        )
    _fill(model, folder)
    return model.eval()


@contextmanager
def _explain_stock(folder: Path) -> Iterator[None]:
    """Turn what PEFT raises for a configuration of anyone's making into one line."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, ImportError, re.error) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise AdapterError(f"{folder / PEFT_CONFIG}: PEFT cannot use it: {reason}") from error


def _peft_type(folder: Path) -> str:
    path = folder / PEFT_CONFIG
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["peft_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{path}: is no PEFT configuration: {error}") from error


def _read_config(folder: Path, base: Base, method: PeftMethod) -> PeftConfig:
    """Read PEFT's own configuration, which must be of the card's method."""
    kind = _peft_type(folder)
    if kind.lower() != method.kind:
        raise AdapterError(f"{folder / PEFT_CONFIG}: has peft_type {kind!r}, and card.json says {method.kind!r}")
    config: PeftConfig = PeftConfig.from_pretrained(str(folder))
    config.base_model_name_or_path = base.name  # it may have moved since
    return config


def _fill(model: nn.Module, folder: Path) -> None:
    """Copy the saved tensors into a model, after checking each name, shape and value."""
    if isinstance(model, PeftModel):
        path, expected = folder / PEFT_WEIGHTS, _peft_tensors(model)
    else:
        path, expected = folder / CHANGED_WEIGHTS, _own_tensors(model)
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path}: cannot be read: {error}") from error
    for label, names in (
        ("is missing", expected.keys() - found.keys()),
        ("is unknown", found.keys() - expected.keys()),
    ):
        if names:
            raise AdapterError(f"{path}: tensor {min(names)} {label} ({len(names)} in all)")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise AdapterError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{path}: {name} holds a value that is not finite")
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, found)
    else:
        with torch.no_grad():
            for name, tensor in expected.items():
                tensor.copy_(found[name])
