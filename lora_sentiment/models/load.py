"""The base checkpoint: find it, check it, hash its values, load it in fp32, and quantise it."""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from httpx2 import HTTPError
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
)
from transformers.activations import ACT2FN
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file, extract_commit_hash

from lora_sentiment import bundled
from lora_sentiment.errors import ModelError
from lora_sentiment.files import LFS_FAULT, is_lfs_pointer
from lora_sentiment.hub import explain_refusal, is_hub_name
from lora_sentiment.models.dtype import resolve_dtype
from lora_sentiment.models.families import FAMILIES, Family, family_of, num_positions
from lora_sentiment.recipe.model import ModelConfig
from lora_sentiment.tasks import SINGLE_LABEL

QUANTISING_DEVICES = ("cpu", "cuda", "xpu")
"""Kinds of devices on which a base may be quantised. On Apple's, bitsandbytes may run code from the
Hub."""


@dataclass(frozen=True)
class Base:
    """A loaded base: a sequence classifier in fp32. Its head may be new.

    Attributes:
        model: transformers' sequence classifier of the family, every tensor in fp32 on the CPU.
            With `model.quantize`, the encoder's linears are quantised and on the device that was
            asked for.
        tokenizer: The checkpoint's fast tokenizer.
        name: Hub name, folder or `bundled`, as the recipe gave it. A folder is an absolute path.
        revision: Commit that the Hub resolved, or None for a folder.
        sha256: Hash of the unquantised encoder's tensors by name, shape and value.
        new_layers: The layers of the head that the checkpoint does not have.
        problem_type: That of the checkpoint, or None. The model has that of its head.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerFast
    name: str
    revision: str | None
    sha256: str
    new_layers: tuple[str, ...]
    problem_type: str | None = None

    @property
    def config(self) -> Any:
        """The base's config, as transformers reads it."""
        return self.model.config

    @property
    def family(self) -> Family:
        """The names of the base's family."""
        return family_of(self.config)

    @property
    def new_head(self) -> bool:
        """Whether the checkpoint has no whole head of its own."""
        return bool(self.new_layers)


def load_base(
    config: ModelConfig,
    *,
    labels: tuple[str, ...],
    problem_type: str | None = None,
    device: torch.device | None = None,
) -> Base:
    """Load the base of a recipe from the Hub, its cache or a folder.

    The initial values of a new head come from torch's global generator. Seed it first.

    Args:
        config: The recipe's `model` section.
        labels: Label names in order. Their number is the size of the head.
        problem_type: That of the head, as transformers names it. None stands for single labels.
        device: Device of the quantised linears; the CPU by default.

    Raises:
        ModelError: If nothing can be loaded, the checkpoint is of no family of this package, an
            encoder tensor is missing, its head has another number of labels, `max_length` is more
            than its positions, or the device cannot quantise.
    """
    device = device or torch.device("cpu")
    refuse_unquantisable(config, device)
    with quiet(), _ExplainFailure(config):
        hf_config, revision = _find_config(config)
        own_labels = [str(label) for _, label in sorted(hf_config.id2label.items())]
        own_problem_type = hf_config.problem_type
        # A checkpoint of single labels may say so or say nothing, and stays as it is.
        if problem_type is not None or own_problem_type != SINGLE_LABEL.problem_type:
            hf_config.problem_type = problem_type
        hf_config.num_labels = len(labels)
        hf_config.id2label = dict(enumerate(labels))
        hf_config.label2id = {label: index for index, label in enumerate(labels)}
        tokenizer = load_tokenizer(config, revision=revision)
        _check_weights(config, revision)
        source = {
            "pretrained_model_name_or_path": config.place,
            "revision": revision or config.revision,
            "config": hf_config,
            "dtype": torch.float32,
            "use_safetensors": True,  # never a pickle
            "trust_remote_code": False,
        }
        model, report = AutoModelForSequenceClassification.from_pretrained(
            **source, output_loading_info=True, ignore_mismatched_sizes=True
        )
    new_layers = _check_tensors(report, family_of(hf_config), config.name, len(labels))
    if not new_layers:
        _check_own_labels(own_labels, labels, config.name)
    if len(tokenizer) > hf_config.vocab_size:
        raise ModelError(
            f"{config.name!r} has a tokenizer with {len(tokenizer)} tokens and a model with "
            f"{hf_config.vocab_size}; name a checkpoint with its own tokenizer",
            key="model.name",
        )
    sha256 = hash_tensors(encoder_tensors(model))
    if config.quantize != "none":
        model = _quantise(model, config, source, device)
    name = config.name
    if name == bundled.NAME:
        # PEFT writes this path into its file. It would look `bundled` up on the Hub, where anyone
        # could own that name.
        model.name_or_path = bundled.PATH_IN_CLONE
    else:
        if Path(config.place).is_dir():
            # The adapter must find the folder from any working directory.
            name = str(Path(config.place).resolve())
        model.name_or_path = name
    return Base(
        model=model,
        tokenizer=tokenizer,
        name=name,
        revision=revision,
        sha256=sha256,
        new_layers=new_layers,
        problem_type=own_problem_type,
    )


def check_base(config: ModelConfig) -> Family:
    """Check a base as `load_base` does, without reading its weights, and return its family.

    Raises:
        ModelError: If there is no base, it is of no family of this package, or `revision` or
            `max_length` does not fit it.
    """
    with quiet(), _ExplainFailure(config):
        hf_config, _ = _find_config(config)
    return family_of(hf_config)


def _find_config(config: ModelConfig) -> tuple[Any, str | None]:
    """Find and check a checkpoint's configuration.

    Returns:
        The configuration with the recipe's dropout, and the commit that the Hub resolved.
    """
    is_folder = Path(config.place).is_dir()
    if config.place.startswith((".", "/", "~")) and not is_folder:
        raise ModelError(f"{config.name!r}: no such folder", key="model.name")
    if config.revision and is_folder:
        raise ModelError(
            f"{config.revision!r}: {config.name!r} is a folder, which has no revisions; remove it",
            key="model.revision",
        )
    # Resolve the revision once: a Hub name could move between one file and the next.
    path = cached_file(config.place, "config.json", revision=config.revision)
    _check_kind(path, config)
    revision = extract_commit_hash(path, None)
    hf_config = AutoConfig.from_pretrained(
        config.place, revision=revision or config.revision, trust_remote_code=False
    )
    _fit_config(hf_config, config)
    return hf_config, revision


def find_local_config(config: ModelConfig) -> Any | None:
    """Read and check a base's configuration in a folder or the Hub's cache; fetch nothing.

    Returns:
        The configuration with the recipe's dropout; None for a Hub name that is not cached.

    Raises:
        ModelError: If the name is malformed, the base is of no family of this package, or
            `max_length` is too long for it.
    """
    path: str | None
    if Path(config.place).is_dir():
        path = str(Path(config.place, "config.json"))
    else:
        try:
            cached = try_to_load_from_cache(config.name, "config.json", revision=config.revision)
        except ValueError as error:
            raise ModelError(
                f"{config.name!r}: no such folder, and no name of the Hub", key="model.name"
            ) from error
        if not isinstance(cached, str):
            return None
        path = cached
    with quiet(), _ExplainFailure(config):
        _check_kind(path if Path(path).is_file() else None, config)
        hf_config = AutoConfig.from_pretrained(Path(path).parent, trust_remote_code=False)
    _fit_config(hf_config, config)
    return hf_config


def _fit_config(hf_config: Any, config: ModelConfig) -> None:
    """Check the longest input, and set the recipe's dropout."""
    check_length(hf_config, config)
    set_dropouts(hf_config, config)


def set_dropouts(hf_config: Any, config: ModelConfig) -> None:
    """Set the dropout that a recipe names in the config of a base."""
    for key, own_keys in family_of(hf_config).dropouts.items():
        value = getattr(config, key)
        if value is not None:
            for own_key in own_keys:
                setattr(hf_config, own_key, value)


def load_tokenizer(config: ModelConfig, *, revision: str | None = None) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a recipe's base from the Hub, its cache or a folder.

    Args:
        config: The recipe's `model` section.
        revision: Commit of the base's other files; by default the section's own.

    Raises:
        ModelError: If there is no tokenizer, or it is not a fast one with the special tokens that
            frame and fill an input.
    """
    name = config.name
    revision = revision or config.revision
    with quiet(), _ExplainFailure(config):
        # Without these files transformers makes a tokenizer that knows no word.
        if not has_tokenizer(config.place, revision=revision):
            raise ModelError(
                f"{name!r} has no tokenizer; it needs a tokenizer.json or a vocab.txt",
                key="model.name",
            )
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(
                config.place, revision=revision, trust_remote_code=False
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{name!r}: its tokenizer.json is not valid: {error}; fetch it again",
                key="model.name",
            ) from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"{name!r} has no fast tokenizer; it needs a tokenizer.json", key="model.name"
        )
    for role in ("cls_token", "sep_token", "pad_token"):
        if getattr(tokenizer, role) is None:
            raise ModelError(
                f"{name!r}: its tokenizer has no {role}, which every input needs; name a "
                "checkpoint with its own tokenizer",
                key="model.name",
            )
    return cast(PreTrainedTokenizerFast, tokenizer)


def has_tokenizer(place: str, *, revision: str | None) -> bool:
    """Return whether a base has a tokenizer file, on the Hub, in its cache or in a folder.

    Raises:
        OSError: If the Hub is asked and there is no such base.
    """
    return _has_file(place, ("tokenizer.json", "vocab.txt", "vocab.json"), revision)


def _has_file(place: str, names: tuple[str, ...], revision: str | None) -> bool:
    """Return whether a base has one of these files."""
    for name in names:
        path = cached_file(
            place, name, revision=revision, _raise_exceptions_for_missing_entries=False
        )
        if path is not None and is_lfs_pointer(Path(path)):
            raise ModelError(f"{path}: {LFS_FAULT}")
        if path is not None:
            return True
    return False


def _check_weights(config: ModelConfig, revision: str | None) -> None:
    """Refuse a base without weights in safetensors' format."""
    names = ("model.safetensors", "model.safetensors.index.json")
    if not _has_file(config.place, names, revision or config.revision):
        raise ModelError(
            f"{config.name!r} has no model.safetensors, and pickled weights are never loaded; "
            "convert them, or name another checkpoint",
            key="model.name",
            advice=_advise_conversion(config),
        )


def _advise_conversion(config: ModelConfig) -> dict[str, str]:
    """Say where the Hub's own conversion to safetensors is found."""
    if not is_hub_name(config.place):
        return {}
    return {
        "model.revision": (
            f"; the Hub may have converted them: look at {constants.ENDPOINT}/{config.place}"
            "/discussions for the pull request of SFconvertbot, and set {}=refs/pr/N with its number"
        )
    }


def refuse_unquantisable(config: ModelConfig, device: torch.device) -> None:
    """Refuse a quantised base on a device that cannot hold one.

    Raises:
        ModelError: With the devices that can.
    """
    if config.quantize != "none" and device.type not in QUANTISING_DEVICES:
        raise ModelError(
            f"quantize={config.quantize}: the device is {device.type}, and a base is quantised on "
            f"{', '.join(QUANTISING_DEVICES)} only",
            advice={"model.quantize": "; set {}=none"},
        )


def bitsandbytes_config(
    config: ModelConfig, family: Family, *, dtype: torch.dtype
) -> BitsAndBytesConfig:
    """Return bitsandbytes' configuration of a quantised base.

    Args:
        config: The recipe's `model` section, whose `quantize` is not `none`.
        family: The base's family, whose head is not quantised.
        dtype: Compute dtype of 4-bit linears.
    """
    # At every layer and call, bitsandbytes warns that int8 products round their input to fp16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if config.quantize == "int8":
        bits: dict[str, Any] = {"load_in_8bit": True}
    else:
        bits = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": config.quantize,
            "bnb_4bit_use_double_quant": config.double_quant,
            "bnb_4bit_compute_dtype": dtype,
        }
    bits["llm_int8_skip_modules"] = list(family.head)
    return BitsAndBytesConfig(**bits)  # type: ignore[no-untyped-call]


def _quantise(
    plain: nn.Module, config: ModelConfig, source: dict[str, Any], device: torch.device
) -> nn.Module:
    """Load a checkpoint again with quantised linears in the encoder, and the head of `plain`.

    Args:
        plain: The model without quantisation.
        config: The recipe's `model` section.
        source: Arguments of `from_pretrained` that loaded `plain`.
        device: Device of the quantised linears.
    """
    family = family_of(cast(Any, plain).config)
    dtype = resolve_dtype(config.dtype, device)
    quantization_config = bitsandbytes_config(config, family, dtype=dtype)
    with quiet(), _ExplainFailure(config), torch.random.fork_rng(devices=[]):
        model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
            **source, quantization_config=quantization_config, device_map={"": str(device)}
        )
    for name in family.head:
        model.get_submodule(name).load_state_dict(plain.get_submodule(name).state_dict())
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # With this flag on a CPU with avx512_bf16, the first answer rounds the scales, packs
            # the weights in a layout that no backward pass reads, and fails for narrow linears.
            cast(Any, module).support_avx512bf16_for_cpu = False
    return model


def cast_frozen(model: nn.Module, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Freeze a model and move it to a compute dtype and a device, in place.

    Quantised tensors keep their dtype and device.
    """
    model.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if hasattr(module, "compute_dtype"):  # bitsandbytes' 4-bit linear
            cast(Any, module).compute_dtype = dtype
    # A quantised base was made on its device, and transformers refuses to move it.
    return model if getattr(model, "is_quantized", False) else model.to(device)


def encoder_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of the base encoder by the checkpoint's names, with or without PEFT.

    A pooler inside the encoder is a layer of the head.
    """
    family = family_of(model.config)
    prefix = f"{family.encoder}."
    head = tuple(f"{module}." for module in family.saved_modules)
    for name, tensor in model.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if not name.startswith(prefix) or name.startswith(head):
            continue
        if not re.search(r"\.((lora|ia3|vera)_|ranknum\.)", name):
            yield name.removeprefix(prefix), tensor


def hash_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return the SHA-256 over (name, shape, fp32 value) of tensors in name order.

    Values are widened to fp32, which is exact. The same weights hash alike in fp16, bf16 and fp32.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        values = tensor.detach().to("cpu", torch.float32).contiguous()
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def hash_tokenizer(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the SHA-256 of a fast tokenizer's serialised pipeline and vocabulary."""
    backend = tokenizer.backend_tokenizer
    # Truncation and padding are settings of the last call, not of the tokenizer.
    backend.no_truncation()
    backend.no_padding()
    return hashlib.sha256(backend.to_str().encode()).hexdigest()


def _check_kind(path: str | None, config: ModelConfig) -> None:
    """Refuse a checkpoint that is no plain encoder of a known family, before transformers reads it.

    Args:
        path: Its config.json, or None if it has none.
        config: The recipe's `model` section.
    """
    refuse = partial(ModelError, key="model.name")
    base = repr(config.name)
    known = ", ".join(FAMILIES)
    if path is None:
        if any(Path(config.place, file).is_file() for file in ("adapter_config.json", "card.json")):
            raise refuse(f"{base} is an adapter; name the base that it was trained on")
        raise refuse(f"{base} is no model: it has no config.json; name a checkpoint of {known}")
    try:
        facts = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise refuse(f"{base}: its config.json is no JSON ({error}); fetch it again") from error
    if not isinstance(facts, dict) or not isinstance(facts.get("model_type"), str):
        raise refuse(f"{base}: its config.json names no model_type; it must be one of {known}")
    if "auto_map" in facts:
        raise refuse(
            f"{base} asks to run its own code (auto_map in its config.json), which this package "
            "never does; name a plain checkpoint"
        )
    for key in ("attn_implementation", "_attn_implementation"):
        kernel = str(facts.get(key) or "")
        if "/" in kernel:
            raise refuse(
                f"{base} asks to fetch and run the kernel {kernel!r} ({key} in its config.json), "
                "which this package never does; name a plain checkpoint"
            )
    positions = facts.get("position_embedding_type") or "absolute"
    if positions != "absolute":
        raise refuse(
            f"{base} has the position_embedding_type {positions!r}, which transformers no longer "
            "computes; name a checkpoint with absolute positions"
        )
    for key in ("hidden_act", "activation", "hidden_activation", "classifier_activation"):
        if facts.get(key) is not None and str(facts[key]) not in ACT2FN:
            raise refuse(f"{base} has the {key} {facts[key]!r}, which transformers does not know")
    if "quantization_config" in facts:
        raise refuse(
            f"{base} is quantised already; name the checkpoint it was made from, and let this "
            "package quantise it"
        )
    kind = "model"
    if facts.get("is_encoder_decoder") is True:
        kind = "encoder-decoder"
    elif (
        facts.get("is_decoder") is True
        or facts.get("add_cross_attention") is True
        or _names_decoder(facts.get("architectures"))
    ):
        kind = "decoder"
    if kind != "model" or facts["model_type"] not in FAMILIES:
        raise refuse(
            f"{base} is a {facts['model_type']} {kind}; this package adapts encoders of {known}"
        )


def _names_decoder(architectures: Any) -> bool:
    """Return whether a config's `architectures` names a model that writes text."""
    names = architectures if isinstance(architectures, list) else []
    return any(re.search("ForCausalLM|LMHeadModel", str(name)) for name in names)


def check_length(shape: Any, config: ModelConfig) -> None:
    """Refuse a `max_length` of more tokens than a base has positions.

    Args:
        shape: The base's config or shape.
        config: The recipe's `model` section.

    Raises:
        ModelError: With the number of positions.
    """
    positions = num_positions(shape)
    if config.max_length > positions:
        raise ModelError(
            f"{config.max_length} is more than the {positions} positions of {config.name!r}; "
            f"allowed: {positions} or less",
            key="model.max_length",
        )


def _check_tensors(
    report: dict[str, Any], family: Family, name: str, num_labels: int
) -> tuple[str, ...]:
    """Refuse a checkpoint that does not fill the encoder.

    Args:
        report: What transformers loaded.
        family: The checkpoint's family.
        name: The checkpoint's name.
        num_labels: Labels of the data.

    Returns:
        The layers of the head that are new.
    """
    head = tuple(f"{layer}." for layer in family.head)
    missing = {key for key in report["missing_keys"] if not key.startswith(head)}
    wrong_shapes = {key: tuple(shape) for key, shape, _ in report["mismatched_keys"]}
    unfilled = sorted(missing | wrong_shapes.keys())
    head_sizes = [shape[0] for key, shape in wrong_shapes.items() if key.startswith(head[-1])]
    if head_sizes and all(key.startswith(head) for key in unfilled):
        raise ModelError(
            f"{name!r} has a head for {head_sizes[0]} labels and the data has {num_labels}; name a "
            "base without a head, or data with the same labels",
            key="model.name",
        )
    if unfilled:
        listed = ", ".join(unfilled[:4])
        if len(unfilled) > 4:
            listed += ", ..."
        raise ModelError(
            f"{name!r} leaves {len(unfilled)} tensors unfilled, which are missing or have another "
            f"shape: {listed}; name a whole checkpoint",
            key="model.name",
        )
    missing = {key.rpartition(".")[0] for key in report["missing_keys"]}
    return tuple(layer for layer in family.head if layer in missing)


def _check_own_labels(own: list[str], labels: tuple[str, ...], name: str) -> None:
    """Refuse a trained head with the same labels in another order: its answers would be swapped."""
    theirs = [label.lower() for label in own]
    ours = [label.lower() for label in labels]
    if ours != theirs and sorted(ours) == sorted(theirs):
        in_order = sorted(labels, key=lambda label: theirs.index(label.lower()))
        raise ModelError(
            f"{name!r} has a head for the labels {', '.join(own)}, in this order",
            key="model.name",
            advice={"data.labels": f"; set {{}}=[{', '.join(in_order)}]"},
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and load report. This module checks what was loaded."""
    verbosity = transformers_logging.get_verbosity()
    shows_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shows_bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


class _ExplainFailure:
    """Turn the libraries' errors for a base that cannot be loaded into a `ModelError`."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        expected = (OSError, ValueError, HTTPError, SafetensorError, StrictDataclassError)
        # The tokenizers package raises Exception itself. `except` would catch its subclasses too.
        if not isinstance(error, expected) and type(error) is not Exception:
            return
        name = self.config.name
        if is_hub_name(self.config.place):
            refusal = explain_refusal(
                key="model.name", name=name, kind="model", revision=self.config.revision
            )
            if refusal is not None:
                raise ModelError(refusal, key="model.name") from error
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"{name!r} could not be loaded: {reason}", key="model.name") from error
