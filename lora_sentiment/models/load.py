"""The base checkpoint: found, checked, hashed over its values, loaded in fp32."""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from httpx2 import HTTPError
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
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file, extract_commit_hash

from lora_sentiment import bundled
from lora_sentiment.errors import ModelError, did_you_mean
from lora_sentiment.hub import explain_refusal, is_hub_name
from lora_sentiment.models.families import HEAD, Shape
from lora_sentiment.recipe.model import ModelConfig

SHORT_DTYPE_DEVICES = ("cpu", "cuda")
"""Kinds of devices that may compute in bfloat16 or float16."""
QUANTISING_DEVICES = ("cpu", "cuda", "xpu")
"""Kinds of devices on which a base may be quantised; on Apple's, bitsandbytes may run code fetched from the Hub."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Base:
    """A loaded base: a DistilBERT sequence classifier in fp32 whose head may be new.

    Attributes:
        model: `DistilBertForSequenceClassification`, every tensor in fp32 on the CPU; with `model.quantize` the
            encoder's linears are quantised and on the device that was asked for.
        tokenizer: The checkpoint's fast tokenizer.
        name: Hub name, folder or `bundled`, as the recipe gave it.
        revision: Commit that the Hub resolved, or None for a folder.
        sha256: Hash of the unquantised encoder's tensors by name, shape and value.
        shape: The encoder's shape.
        new_head: True where the checkpoint brought no head of its own.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerFast
    name: str
    revision: str | None
    sha256: str
    shape: Shape
    new_head: bool


def load_base(
    config: ModelConfig, *, labels: tuple[str, ...], device: torch.device | None = None
) -> Base:
    """Load the base of a recipe from Hub, cache or folder.

    The head's initial values come from torch's global generator where the checkpoint has none, so seed it first.

    Args:
        config: The recipe's `model` section.
        labels: Label names in order; their number sizes the head.
        device: Where quantised linears are made and stay; the CPU by default.

    Raises:
        ModelError: If nothing can be loaded, the checkpoint is no DistilBERT, an encoder tensor is missing, its head
            has another number of labels, `max_length` is more than its positions, or the device quantises nothing.
    """
    device = device or torch.device("cpu")
    refuse_unquantisable(config, device)
    names = dict(enumerate(labels))
    place = config.place
    with quiet(), _Explain(config):
        found, revision = _load_config(config)
        where = {"revision": revision or config.revision, "trust_remote_code": False}
        own_names = [str(name) for _, name in sorted(found.id2label.items())]
        found.num_labels, found.id2label, found.label2id = (
            len(labels),
            names,
            {v: k for k, v in names.items()},
        )
        tokenizer = load_tokenizer(config, revision=revision)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            place,
            config=found,
            dtype=torch.float32,
            use_safetensors=True,  # never a pickle
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **where,
        )
    new_head = _check_tensors(report, config.name, len(labels))
    if not new_head:
        _check_own_labels(own_names, labels, config.name)
    if len(tokenizer) > found.vocab_size:
        raise ModelError(
            f"the tokenizer of model.name {config.name!r} has {len(tokenizer)} tokens and the model "
            f"{found.vocab_size}; name a checkpoint with its own tokenizer"
        )
    sha256 = hash_tensors(encoder_tensors(model))
    if config.quantize != "none":
        model = _quantise(model, config, found, where, device)
    # A folder is recorded whole: the adapter must find it from anywhere; the package finds its own.
    name = (
        str(Path(place).resolve())
        if config.name != bundled.NAME and Path(place).is_dir()
        else config.name
    )
    # What PEFT writes into its own file. It would look `bundled` up on the Hub, where anyone could own that name.
    model.name_or_path = bundled.PATH_IN_CLONE if name == bundled.NAME else name
    return Base(
        model=model,
        tokenizer=tokenizer,
        name=name,
        revision=revision,
        sha256=sha256,
        shape=Shape.from_config(found.to_dict()),
        new_head=new_head,
    )


def check_base(config: ModelConfig) -> None:
    """Refuse a base for whatever `load_base` refuses it for before weights are read.

    Raises:
        ModelError: If there is none, it is no DistilBERT, or `revision` or `max_length` does not fit it.
    """
    with quiet(), _Explain(config):
        _load_config(config)


def _load_config(config: ModelConfig) -> tuple[Any, str | None]:
    """Return the checkpoint's configuration, with the recipe's dropout, and the commit that the Hub resolved."""
    if config.place.startswith((".", "/", "~")) and not Path(config.place).is_dir():
        raise ModelError(f"model.name {config.name!r}: no such folder")
    if config.revision and Path(config.place).is_dir():
        raise ModelError(
            f"model.revision {config.revision!r}: {config.name!r} is a folder, which has no revisions"
        )
    # Resolved once: a Hub name could move between one file and the next.
    path = cached_file(config.place, "config.json", revision=config.revision)
    _check_kind(path, config)
    revision = extract_commit_hash(path, None)
    found = AutoConfig.from_pretrained(
        config.place, revision=revision or config.revision, trust_remote_code=False
    )
    check_length(found, config)
    for key in ("dropout", "attention_dropout", "seq_classif_dropout"):
        if getattr(config, key) is not None:
            setattr(found, key, getattr(config, key))
    return found, revision


def load_tokenizer(config: ModelConfig, *, revision: str | None = None) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a recipe's base, from Hub, cache or folder.

    Args:
        config: The recipe's `model` section.
        revision: Commit of the base's other files; by default what the section says.

    Raises:
        ModelError: If there is none, or it is no fast one with DistilBERT's special tokens.
    """
    name, wanted = config.name, revision or config.revision
    with quiet(), _Explain(config):
        # Without it transformers makes one that knows no word.
        if not has_tokenizer(config.place, revision=wanted):
            raise ModelError(
                f"model.name {name!r} has no tokenizer; it needs a tokenizer.json or a vocab.txt"
            )
        try:
            found: Any = AutoTokenizer.from_pretrained(
                config.place, revision=wanted, trust_remote_code=False
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"the tokenizer.json of model.name {name!r} is none: {error}; fetch it again"
            ) from error
    if not found.is_fast:
        raise ModelError(f"model.name {name!r} has no fast tokenizer; it needs a tokenizer.json")
    for role in ("cls_token", "sep_token", "pad_token"):
        if getattr(found, role) is None:
            raise ModelError(
                f"the tokenizer of model.name {name!r} has no {role}; DistilBERT's has one"
            )
    return cast(PreTrainedTokenizerFast, found)


def has_tokenizer(place: str, *, revision: str | None) -> bool:
    """Return whether a base has either of the files that a tokenizer is made of, on the Hub, in its cache or here.

    Raises:
        OSError: If the Hub is asked and there is no such base.
    """
    return any(
        cached_file(place, file, revision=revision, _raise_exceptions_for_missing_entries=False)
        for file in ("tokenizer.json", "vocab.txt")
    )


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the compute dtype for `model.dtype` on a device.

    `auto` takes bfloat16 only where that is faster. GTX 16xx cards report support but emulate it. An Intel CPU with
    avx512_bf16 and no AMX multiplies it more slowly than float32: on two cores 147 against 207 to 258 GFLOP/s, and
    the main recipe trained a base of 6 x 384 at 1,864 against 2,323 tokens/s. CPUs of other makes were not measured.
    Devices other than CPUs and CUDA's compute in float32 alone.

    Raises:
        ModelError: If there is no dtype of that name, or the device does not compute in it.
    """
    if name != "auto":
        if name not in DTYPES:
            raise ModelError(
                f"dtype: found {name!r}; allowed: auto, {', '.join(DTYPES)}{did_you_mean(name, list(DTYPES))}"
            )
        if device.type not in SHORT_DTYPE_DEVICES and name != "float32":
            raise ModelError(
                f"dtype: found {name!r}; on {device.type} only float32 was made to work; set auto"
            )
        return DTYPES[name]
    if device.type == "cuda":
        return (
            torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
        )
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return torch.bfloat16 if capabilities.get("amx_bf16") else torch.float32


def refuse_unquantisable(config: ModelConfig, device: torch.device) -> None:
    """Refuse a quantised base on a device that has none.

    Raises:
        ModelError: Naming the devices that have.
    """
    if config.quantize != "none" and device.type not in QUANTISING_DEVICES:
        raise ModelError(
            f"model.quantize={config.quantize}: the device is {device.type}, and a base is quantised on "
            f"{', '.join(QUANTISING_DEVICES)} only; set model.quantize=none"
        )


def _quantise(
    plain: nn.Module, config: ModelConfig, found: Any, where: dict[str, Any], device: torch.device
) -> nn.Module:
    """Load the checkpoint once more with its encoder's linears quantised, and give it the head of `plain`."""
    bits: dict[str, Any] = {"load_in_8bit": True}
    if config.quantize != "int8":
        bits = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": config.quantize,
            "bnb_4bit_use_double_quant": config.double_quant,
            "bnb_4bit_compute_dtype": resolve_dtype(config.dtype, device),
        }
    # It warns at every layer and call that int8 products round their input to fp16, which is what int8 means.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with quiet(), _Explain(config), torch.random.fork_rng(devices=[]):
        model = AutoModelForSequenceClassification.from_pretrained(
            config.place,
            config=found,
            dtype=torch.float32,
            use_safetensors=True,
            quantization_config=BitsAndBytesConfig(  # type: ignore[no-untyped-call]
                **bits, llm_int8_skip_modules=list(HEAD)
            ),
            device_map={"": str(device)},
            **where,
        )
    for name in HEAD:
        model.get_submodule(name).load_state_dict(plain.get_submodule(name).state_dict())
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # With it the first answer on a CPU that has avx512_bf16 rounds the scales for good, packs the weights as no
            # backward pass can read them (training ends in an error after an evaluation), and fails for narrow linears.
            cast(Any, module).support_avx512bf16_for_cpu = False
    return cast(nn.Module, model)


def cast_frozen(model: nn.Module, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Freeze a model and put it into a compute dtype on a device, in place; quantised tensors stay what they are."""
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
    """Yield the base encoder's (name, tensor) under the checkpoint's own names, whatever PEFT wrapped around them."""
    for name, tensor in model.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if name.startswith("distilbert.") and not re.search(r"\.(lora|ia3|vera)_", name):
            yield name.removeprefix("distilbert."), tensor


def hash_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return the SHA-256 over (name, shape, fp32 value) of tensors in name order.

    Values are widened to fp32, which is exact: the same weights stored as fp16, bf16 or fp32 hash alike.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def hash_tokenizer(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the SHA-256 of what decides a fast tokenizer's ids: its serialised pipeline and vocabulary."""
    return hashlib.sha256(_untruncated(tokenizer).encode()).hexdigest()


def _untruncated(tokenizer: PreTrainedTokenizerFast) -> str:
    # Truncation and padding are settings of the last call, not of the tokenizer.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return str(tokenizer.backend_tokenizer.to_str())


def _check_kind(path: str | None, config: ModelConfig) -> None:
    """Refuse what is no DistilBERT, from its config.json (None where it has none), before transformers guesses."""
    name = config.name
    if path is None:
        if any(Path(config.place, file).is_file() for file in ("adapter_config.json", "card.json")):
            raise ModelError(
                f"model.name {name!r} is an adapter; name the base that it was trained on"
            )
        raise ModelError(f"model.name {name!r} is no model: it has no config.json")
    try:
        facts = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(
            f"model.name {name!r}: its config.json is no JSON ({error}); fetch it again"
        ) from error
    if not isinstance(facts, dict) or not isinstance(facts.get("model_type"), str):
        raise ModelError(
            f"model.name {name!r}: its config.json names no model_type; it must be distilbert"
        )
    if "auto_map" in facts:
        raise ModelError(
            f"model.name {name!r} asks for code of its own to be run (auto_map in its config.json), which is never "
            "done; name a plain DistilBERT checkpoint"
        )
    kernel = next(
        (
            str(facts[key])
            for key in ("attn_implementation", "_attn_implementation")
            if facts.get(key)
        ),
        "",
    )
    if "/" in kernel:
        raise ModelError(
            f"model.name {name!r} asks for the kernel {kernel!r} to be fetched and run (config.json), never done here; "
            "name a plain DistilBERT checkpoint"
        )
    if "quantization_config" in facts:
        raise ModelError(
            f"model.name {name!r} is quantised already; name the checkpoint it was made from, and set model.quantize"
        )
    if facts["model_type"] != "distilbert":
        raise ModelError(
            f"model.name {name!r} is a {facts['model_type']} model; this package adapts distilbert checkpoints"
        )


def check_length(found: Any, config: ModelConfig) -> None:
    """Refuse more tokens a text than a base has positions.

    Args:
        found: The base's config or shape.
        config: What is asked of it.

    Raises:
        ModelError: Saying how many there are.
    """
    if config.max_length > found.max_position_embeddings:
        raise ModelError(
            f"model.max_length {config.max_length} is more than the {found.max_position_embeddings} positions of "
            f"{config.name!r}; set model.max_length={found.max_position_embeddings} or less"
        )


def _check_tensors(report: dict[str, Any], name: str, num_labels: int) -> bool:
    """Refuse a checkpoint that does not fill the encoder; return True where the head is new."""
    missing = {key for key in report["missing_keys"] if not key.startswith(HEAD)}
    mismatched = {key: tuple(found) for key, found, _ in report["mismatched_keys"]}
    sizes = [found[0] for key, found in mismatched.items() if key.startswith("classifier")]
    if sizes and not missing and all(key.startswith(HEAD) for key in mismatched):
        raise ModelError(
            f"model.name {name!r} has a head for {sizes[0]} labels and the data has {num_labels}; name a base "
            "without a head, or data with the same labels"
        )
    if unfilled := sorted(missing | mismatched.keys()):
        listed = ", ".join(unfilled[:4]) + (", ..." if len(unfilled) > 4 else "")
        raise ModelError(
            f"model.name {name!r} leaves {len(unfilled)} tensors unfilled, which it lacks or has in another shape: "
            f"{listed}; name a whole checkpoint"
        )
    return any(key.startswith(HEAD) for key in report["missing_keys"])


def _check_own_labels(own: list[str], labels: tuple[str, ...], name: str) -> None:
    """Refuse a trained head whose labels stand in another order: it would start with its answers swapped."""
    ours, theirs = [label.lower() for label in labels], [label.lower() for label in own]
    if ours != theirs and sorted(ours) == sorted(theirs):
        raise ModelError(
            f"model.name {name!r} has a head for the labels {', '.join(own)}, in this order; set "
            f"data.labels=[{', '.join(sorted(labels, key=lambda label: theirs.index(label.lower())))}]"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' bars and load report: that a head is new is no news, and all else is checked here."""
    verbosity, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


class _Explain:
    """Turn what the Hub client, transformers and tokenizers raise for a bad name or folder into one line."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        expected = (OSError, ValueError, HTTPError, SafetensorError, StrictDataclassError)
        # The tokenizers package raises plain Exceptions; only a context can tell one from its subclasses.
        if not isinstance(error, expected) and type(error) is not Exception:
            return
        name, refusal = self.config.name, None
        if is_hub_name(self.config.place):
            refusal = explain_refusal(
                key="model.name", name=name, kind="model", revision=self.config.revision
            )
        raise ModelError(
            refusal or f"base {name!r} could not be loaded: {_describe(error)}"
        ) from error


def _describe(error: BaseException) -> str:
    """Say what is wrong with a checkpoint that is there."""
    said = " ".join(str(error).split())
    if "safetensors" in said and (
        "does not appear to have a file" in said or "no file named" in said
    ):
        return "it has no model.safetensors, and pickled weights are never loaded; convert them, or name another"
    return said[:300] or type(error).__name__
