"""Save, check and load the weights of an adapter folder."""

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
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from lora_sentiment.adapter.peft_file import PEFT_CONFIG, get_defaults, read_config
from lora_sentiment.adapter.safe_files import (
    MAX_TOKENIZER_BYTES,
    ExplainLibraryError,
    Header,
    read_bytes,
    read_header,
    read_object,
)
from lora_sentiment.errors import AdapterError
from lora_sentiment.files import write_json
from lora_sentiment.models.families import FAMILIES, family_of
from lora_sentiment.models.load import Base
from lora_sentiment.models.wrap import as_plain_lora, kept_ranks, make_trainable, trainable_tensors
from lora_sentiment.recipe.method import LoraMethod, Method, PeftMethod
from lora_sentiment.recipe.model import ModelConfig

PEFT_WEIGHTS, CHANGED_WEIGHTS = "adapter_model.safetensors", "changed.safetensors"
OWN_DTYPES, STOCK_DTYPES = ("F32",), ("F32", "BF16", "F16")
# Keys that make transformers run other code, download, or read files other than the folder's own.
_REDIRECTS = {
    "config.json": (
        "auto_map",
        "quantization_config",
        "attn_implementation",
        "_attn_implementation",
        "experts_implementation",
        "transformers_weights",
        "per_layer_config",
    ),
    "tokenizer_config.json": ("auto_map", "tokenizer_file", "vocab_file", "merges_file"),
}


def save_weights(folder: Path, model: nn.Module) -> None:
    """Write PEFT's two files, or `changed.safetensors`."""
    if not isinstance(model, PeftModel):
        _save_tensors(folder / CHANGED_WEIGHTS, get_saved_tensors(model))
        return
    config = model.peft_config["default"]
    if isinstance(config, AdaLoraConfig):
        # PEFT cuts the tensors by this record, and renames its keys. Its own record is of the last
        # step, and the best tensors may be those of an earlier step.
        config.rank_pattern = kept_ranks(model.state_dict())
    tensors = _get_peft_tensors(model)
    _save_config(folder, model, {})
    _save_tensors(folder / PEFT_WEIGHTS, tensors)


def save_as_plain_lora(
    folder: Path, model: nn.Module, base: Base, method: LoraMethod, config: ModelConfig
) -> None:
    """Write an adapter whose start values came from the base as LoRA on the unchanged base."""
    start = make_trainable(base, method, config, dtype=torch.float32)
    assert isinstance(model, PeftModel)
    assert isinstance(start, PeftModel)
    changes, factors = as_plain_lora(model, start)
    tensors = _get_peft_tensors(model)
    for name, factor in factors.items():
        tensors[name.replace(".default.", ".")] = factor
    _save_config(folder, model, changes)
    _save_tensors(folder / PEFT_WEIGHTS, tensors)


def _save_config(folder: Path, model: PeftModel, changes: dict[str, Any]) -> None:
    """Write `adapter_config.json`, with the full names of the adapted modules.

    It holds what differs from PEFT's defaults: an older PEFT refuses an option that it does not
    know, whatever its value. Other programs ask for `r` and `lora_alpha`.
    """
    tuner: Any = model.base_model
    targets = sorted(tuner.targeted_module_names)
    config = model.peft_config["default"]
    values = config.to_dict() | changes
    values |= {"inference_mode": True, "target_modules": targets}
    if values.get("layers_to_transform"):
        values["layers_to_transform"] = None  # the names hold the layers already
    if isinstance(config, IA3Config):
        values["feedforward_modules"] = [
            name for name in targets if tuner.model.get_submodule(name).is_feedforward
        ]
    defaults = get_defaults(type(config))
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if name in ("r", "lora_alpha") or value != defaults[name]:
            # PEFT's sets have no order, and the bytes must repeat.
            kept[name] = sorted(set(value)) if isinstance(value, set | list) else value
    # PEFT 0.18 added this option. `card.json` has the version.
    kept.pop("peft_version", None)
    write_json(folder / PEFT_CONFIG, kept)


def _save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    contiguous = {name: tensors[name].detach().to("cpu").contiguous() for name in sorted(tensors)}
    # One metadata key only: safetensors writes several in any order.
    save_file(contiguous, path, metadata={"format": "pt"})
    # safetensors makes the file readable for its owner alone. All other files here are readable for
    # everyone.
    path.chmod(0o644)


def get_saved_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter file by name.

    PEFT chooses those of its methods. Other methods save the trained tensors and the whole head.
    """
    return _get_peft_tensors(model) if isinstance(model, PeftModel) else _get_own_tensors(model)


def _get_peft_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        # AdaLoRA leaves rank 0 where it pruned everything. PEFT takes such a tensor for a part of a
        # larger one.
        warnings.filterwarnings("ignore", message=".*LoRA tensor.* have invalid shape")
        # "auto" would ask the Hub whether the vocabulary grew, and might save the embeddings of the
        # base.
        return dict(get_peft_model_state_dict(model, save_embedding_layers=False))


def _get_own_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the trained tensors and the whole head, because no checkpoint holds a new head."""
    tensors: dict[str, torch.Tensor] = dict(trainable_tensors(model))
    for name in family_of(model.config).head:
        for part, parameter in model.get_submodule(name).named_parameters():
            tensors[f"{name}.{part}"] = parameter
    return tensors


def rebuild(folder: Path, base: Base, method: Method, config: ModelConfig) -> nn.Module:
    """Load the weights of an adapter of this package into a fresh base.

    Args:
        folder: An adapter folder.
        base: Its base. The returned model uses the base's own modules.
        method: The training method.
        config: The `model` section that the base was loaded with.

    Returns:
        The model in fp32 and eval mode.

    Raises:
        AdapterError: If a tensor is missing, extra, of the wrong shape or not finite, or
            `adapter_config.json` is for another method.
    """
    if isinstance(method, PeftMethod):
        # The method of the recipe is not enough: PiSSA and OLoRA are saved as plain LoRA.
        saved = read_header(folder / PEFT_WEIGHTS)
        recorded = read_config(folder, saved=saved)
        kind: str = PeftType(recorded.peft_type).value
        if kind.lower() != method.kind:
            raise AdapterError(
                f"{folder / PEFT_CONFIG}: has peft_type {kind!r}, and card.json says "
                f"{method.kind!r}"
            )
        model = _wrap(folder, base, recorded, saved)
    else:
        dense = config.model_copy(update={"head": "full", "head_r": None})
        model = make_trainable(base, method, dense, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    _load_tensors(model, folder, OWN_DTYPES)
    return model.eval()


def rebuild_stock(folder: Path, base: Base, config: PeftConfig) -> nn.Module:
    """Load the weights of a stock PEFT folder into a fresh base.

    Args:
        folder: A folder of PEFT's files.
        base: Its base. The returned model uses the base's own modules.
        config: Its configuration, as `read_config` returned it.

    Raises:
        AdapterError: As `rebuild`, and if a layer of the head is neither in the folder nor in the
            base.
    """
    model = _wrap(folder, base, config, read_header(folder / PEFT_WEIGHTS))
    saved = tuple(getattr(config, "modules_to_save", None) or ())
    lacking = [layer for layer in base.new_layers if not _is_saved(layer, saved)]
    if lacking:
        raise AdapterError(
            f"{folder}: {' and '.join(lacking)} is in neither the adapter nor the base. Training "
            "began with a random head and did not save it, so its answers are lost. Train again "
            f"with modules_to_save={list(base.family.saved_modules)}"
        )
    _load_tensors(model, folder, STOCK_DTYPES)
    return model.eval()


def _is_saved(layer: str, saved: tuple[str, ...]) -> bool:
    """Return whether PEFT's `modules_to_save` holds a layer, itself or in a module around it."""
    parts = layer.split(".")
    modules = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(f".{module}".endswith(f".{name}") for module in modules for name in saved)


def _wrap(folder: Path, base: Base, config: PeftConfig, saved: Header) -> nn.Module:
    """Let PEFT wrap a base as a foreign configuration says."""
    # The base may have moved.
    config.base_model_name_or_path, config.inference_mode = str(base.model.name_or_path), True
    needs_values = True
    if type(config) is LoraConfig:
        takes_base = str(config.init_lora_weights).startswith(("pissa", "olora"))
        takes_norms = config.use_dora and getattr(base.model, "is_quantized", False)
        if not takes_base:
            config.init_lora_weights = True  # every value is replaced
        needs_values = takes_base or takes_norms
    if needs_values:
        _check_rank(folder, base, config, saved)
    device = torch.device("cpu" if needs_values else "meta")
    with ExplainLibraryError(folder / PEFT_CONFIG), warnings.catch_warnings(), device:
        # PEFT takes AdaLoRA's record of kept values for LoRA's field of the same name.
        warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match")
        # PEFT asks the model by an old name.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        model: nn.Module = get_peft_model(base.model, config, low_cpu_mem_usage=not needs_values)
    return model


def _check_rank(folder: Path, base: Base, config: PeftConfig, saved: Header) -> None:
    """Refuse a rank that is larger than every saved rank and the base's hidden size."""
    largest = base.config.hidden_size
    for name, (_, shape) in saved.items():
        if shape and ("lora_A" in name or "vera_lambda_d" in name):
            largest = max(largest, shape[0])
    ranks: dict[str, Any] = {"r": getattr(config, "r", 0), "init_r": getattr(config, "init_r", 0)}
    ranks |= getattr(config, "rank_pattern", None) or {}
    for name, rank in ranks.items():
        if isinstance(rank, int) and rank > largest:
            raise AdapterError(
                f"{folder / PEFT_CONFIG}: rank {name} is {rank}; the tensors leave room for at "
                f"most {largest}"
            )


def _load_tensors(model: nn.Module, folder: Path, dtypes: tuple[str, ...]) -> None:
    """Load the saved tensors into a model, after checking each name, shape, dtype and value."""
    if isinstance(model, PeftModel):
        path = folder / PEFT_WEIGHTS
        with ExplainLibraryError(folder / PEFT_CONFIG):
            expected = _get_peft_tensors(model)
    else:
        path = folder / CHANGED_WEIGHTS
        expected = _get_own_tensors(model)
    header = read_header(path)
    check_header(path, header, expected, dtypes)
    if unknown := header.keys() - expected.keys():
        raise AdapterError(
            f"{path}: tensor {min(unknown)[:200]} is unknown ({len(unknown)} in all)"
        )
    # The device of the base: a quantised base may be on a GPU.
    device = next(parameter.device for parameter in model.parameters() if not parameter.is_meta)
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name, tensor in expected.items():
                # A copy: safetensors maps the file into memory, so the tensor would change with the
                # file.
                tensors[name] = file.get_tensor(name).to(device, tensor.dtype, copy=True)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path}: cannot be read: {error}") from error
    check_finite(path, tensors)
    if isinstance(model, PeftModel):
        with ExplainLibraryError(folder / PEFT_CONFIG):
            set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=True)
    else:
        with torch.no_grad():
            for name, tensor in expected.items():
                tensor.copy_(tensors[name])


def check_whole_model(folder: Path) -> None:
    """Check a whole model's folder, before transformers makes any of its tensors.

    Raises:
        AdapterError: If a file is missing, a link out of the folder or malformed, a configuration
            names other code or files, or the saved tensors are not those that `config.json` needs.
    """
    for name, keys in _REDIRECTS.items():
        if name != "config.json" and not (folder / name).is_file():
            continue
        values = read_object(folder / name)
        for key in keys:
            if values.get(key) is not None:
                raise AdapterError(
                    f"{folder / name}: {key} is {str(values[key])[:100]!r}; this package loads no "
                    "other code, kernels or files than those of a plain model; remove it"
                )
    if (folder / "tokenizer.json").is_file():
        read_bytes(folder / "tokenizer.json", limit=MAX_TOKENIZER_BYTES)
    path = folder / "model.safetensors"
    header = read_header(path)
    with ExplainLibraryError(folder / "config.json"):
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        family = FAMILIES.get(config.model_type)
        if family is None:
            raise AdapterError(
                f"{folder / 'config.json'}: model_type is {config.model_type}; this package reads "
                f"{', '.join(FAMILIES)}"
            )
        if config.num_hidden_layers > len(header):
            key = family.aliases.get("num_hidden_layers", "num_hidden_layers")
            raise AdapterError(
                f"{folder / 'config.json'}: {key} is {config.num_hidden_layers}; {path} has "
                f"{len(header)} tensors"
            )
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(  # type: ignore[no-untyped-call]
                config, trust_remote_code=False
            )
    if not any(name.startswith(family.head) for name in header):
        raise AdapterError(
            f"{folder}: is an encoder without a classification head; train one on it first"
        )
    check_header(path, header, model.state_dict(), STOCK_DTYPES)


def check_header(
    path: Path, header: Header, expected: Mapping[str, torch.Tensor], dtypes: tuple[str, ...]
) -> None:
    """Compare the header of a safetensors file with the tensors that a model needs.

    Args:
        path: The file.
        header: Its header.
        expected: Name to a tensor of the same shape, which may be on the meta device.
        dtypes: Allowed dtypes, as safetensors writes them.

    Raises:
        AdapterError: If a tensor is missing, or has another shape or dtype.
    """
    if missing := expected.keys() - header.keys():
        raise AdapterError(
            f"{path}: tensor {min(missing)[:200]} is missing ({len(missing)} in all)"
        )
    for name, tensor in expected.items():
        dtype, shape = header[name]
        if shape != tensor.shape:
            raise AdapterError(f"{path}: {name} has shape {shape}, expected {tuple(tensor.shape)}")
        if dtype not in dtypes:
            raise AdapterError(f"{path}: {name} has dtype {dtype}; allowed: {', '.join(dtypes)}")


def check_finite(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors with a value that is not finite.

    Raises:
        AdapterError: If there is one, with the name of its tensor.
    """
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise AdapterError(f"{path}: {name} holds a value that is not finite")
