"""The adapter folder: the only code that knows its files. It saves, loads and verifies them."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError
from torch import nn
from transformers import PreTrainedTokenizerFast

from lora_sentiment.adapter.merge_record import check_files
from lora_sentiment.adapter.peft_file import PEFT_CONFIG
from lora_sentiment.adapter.safe_files import first_fault, read_json, read_section
from lora_sentiment.adapter.weights import (
    CHANGED_WEIGHTS,
    PEFT_WEIGHTS,
    rebuild,
    save_as_plain_lora,
    save_weights,
)
from lora_sentiment.errors import AdapterError, ModelError
from lora_sentiment.fast import attention_backends
from lora_sentiment.files import hash_file, take_place, write_json
from lora_sentiment.hub import is_hub_name, prepare_hub
from lora_sentiment.models.load import Base, check_length, hash_tokenizer, load_base
from lora_sentiment.recipe.data import DataConfig
from lora_sentiment.recipe.method import LoraMethod, Method, PeftMethod
from lora_sentiment.recipe.model import ModelConfig
from lora_sentiment.recipe.section import Section

SCHEMA = 1
PROBE_TOLERANCE = 1e-4
"""Largest difference in fp32 between a stored probe logit and today's: another CPU adds up in another order."""
PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors")


class BaseRecord(Section):
    """Which base an adapter belongs to."""

    name: str
    """Hub name or folder, as the recipe gave it."""
    revision: str | None
    """Commit that the Hub resolved, or null for a folder."""
    base_sha256: str
    """Hash of the unquantised encoder's tensors by name, shape and value."""
    quantize: Literal["none", "int8", "nf4", "fp4"] = "none"
    """Precision of the frozen linears that it was trained on."""
    double_quant: bool = False
    """Whether the 4-bit scales were quantised too."""


class DataRecord(Section):
    """Which rows it was trained on: names and fingerprints, no text."""

    config: DataConfig
    """The recipe's resolved `data` section."""
    train_sha256: str
    """Fingerprint of the training rows."""
    validation_sha256: str
    """Fingerprint of the validation rows."""
    carved_test_sha256: str | None = None
    """Fingerprint of the test rows where they were carved out of train, or null."""


class Probe(Section):
    """Token ids of texts of our own and the logits that this adapter gave for them in fp32."""

    input_ids: list[Annotated[list[int], Field(min_length=1)]] = Field(min_length=1)
    """One list of ids a text, special tokens included."""
    logits: list[list[float]]
    """One list of num_labels values a text."""


class Card(Section):
    """`card.json`: what the weights alone do not say."""

    schema_: int = Field(alias="schema", ge=1)
    """Version of this file's layout."""
    labels: list[str] = Field(min_length=2)
    """Label names; the index of a name is its label."""
    max_length: int = Field(ge=8)
    """Longest input in tokens."""
    truncation: Literal["head", "head_tail"]
    """Which tokens of a longer text stay."""
    method: Method
    """What was trained."""
    base: BaseRecord
    """On which base."""
    tokenizer_sha256: str
    """Hash of the tokenizer's pipeline and vocabulary."""
    files: dict[str, str]
    """File name to SHA-256, of every file that decides an answer."""
    data: DataRecord
    """On which rows."""
    offline: str | dict[str, str] | None = None
    """What replaced the recipe's data and base where no Hub answered. Older versions wrote a
    mapping."""
    calibration: dict[str, float] | None
    """Temperature fitted on validation, or null."""
    versions: dict[str, str]
    """Package to version, of those that fix the bytes."""
    machine: dict[str, Any]
    """Facts of the machine and run that fix the bytes: threads, processes, dtype, micro-batch cut."""
    probe: Probe
    """How this adapter answers texts of our own."""

    @property
    def sha256(self) -> str:
        """Hash of what decides an answer: the base, the files, and how texts are cut."""
        decisive = [
            self.base.base_sha256,
            self.base.quantize,
            self.max_length,
            self.truncation,
            self.files,
        ]
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Loaded:
    """An adapter on its base, ready to answer.

    Attributes:
        model: In fp32 on the CPU, in eval mode; a quantised base's linears stay quantised.
        tokenizer: The base's tokenizer.
        card: What was recorded at training.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerFast
    card: Card


def save(
    folder: Path,
    model: nn.Module,
    *,
    base: Base,
    labels: tuple[str, ...],
    model_config: ModelConfig,
    method: Method,
    data: DataRecord,
    machine: dict[str, Any],
    trained: Probe,
    tolerance: float,
    calibration: dict[str, float] | None = None,
    offline: str | None = None,
) -> Card:
    """Write weights, tokenizer and card, then rebuild the model from them and hold it against the trained one.

    The base's weights are never written.

    Args:
        folder: Existing empty folder.
        model: The trained model.
        base: What it was made from.
        labels: Label names in order.
        model_config: The recipe's `model` section.
        method: The recipe's `method` section.
        data: Which rows it was trained on.
        machine: Facts that fix the bytes.
        trained: What the trained model answers texts of our own, in its compute dtype.
        tolerance: Largest difference allowed between a logit of the trained model and of the rebuilt one, in units of
            max(1, largest logit): rounding of the compute dtype.
        calibration: Temperature fitted on validation, or None.
        offline: The sentence of `resolve_offline`, or None.

    Raises:
        AdapterError: If the rebuilt model answers otherwise than the trained one.
    """
    again = _save_files(folder, model, base, labels=labels, config=model_config, method=method)
    probe = compute_probe(rebuild(folder, again, method, model_config), trained.input_ids)
    stored = np.array(probe.logits)
    difference = float(np.abs(stored - np.array(trained.logits)).max()) / max(
        1.0, float(np.abs(stored).max())
    )
    if not difference <= tolerance:
        raise AdapterError(
            f"{folder}: the saved adapter answers otherwise than the trained model (by {difference:.2g})"
        )
    decisive = [
        p
        for p in folder.iterdir()
        if p.suffix == ".safetensors" or p.name in (PEFT_CONFIG, "tokenizer.json")
    ]
    card = Card(
        schema=SCHEMA,
        labels=list(labels),
        max_length=model_config.max_length,
        truncation=model_config.truncation,
        method=method,
        base=BaseRecord(
            name=base.name,
            revision=base.revision,
            base_sha256=base.sha256,
            quantize=model_config.quantize,
            double_quant=model_config.double_quant,
        ),
        tokenizer_sha256=hash_tokenizer(base.tokenizer),
        files={path.name: hash_file(path) for path in sorted(decisive)},
        data=data,
        offline=offline,
        calibration=calibration,
        versions={name: version(name) for name in PACKAGES},
        machine=machine,
        probe=probe,
    )
    write_json(folder / "card.json", card.model_dump(mode="json", by_alias=True))
    return card


def load(
    folder: Path,
    *,
    base: str | None = None,
    device: torch.device | None = None,
    fresh: Base | None = None,
) -> Loaded:
    """Rebuild a trained model from its folder alone, and check that it is the one that was saved.

    Args:
        folder: An adapter folder.
        base: Where to find the base, if not where the card says; it must hash to the same value.
        device: Where a quantised base is made and stays; the CPU by default.
        fresh: The base where it was loaded already, with a head for the adapter's labels; the model is built around it.

    Raises:
        AdapterError: If a file is missing or altered, the base or tokenizer is another one, a tensor is missing, extra,
            of the wrong shape or not finite, or the probe's answers differ.
        ModelError: If the base cannot be loaded, or has fewer positions than the card says.
    """
    card = load_card(folder)
    weights = (
        (PEFT_WEIGHTS, PEFT_CONFIG) if isinstance(card.method, PeftMethod) else (CHANGED_WEIGHTS,)
    )
    check_files(folder, card.files, needed=(*weights, "tokenizer.json"))
    config = _base_config(folder, card, base)
    if not fresh and is_hub_name(config.place):
        prepare_hub()
    try:
        loaded = fresh or load_base(config, labels=tuple(card.labels), device=device)
    except ModelError as error:
        raise ModelError(f"{error}; if the base is elsewhere now, name it with --base") from error
    if loaded.sha256 != card.base.base_sha256:
        raise AdapterError(
            f"{folder}: was trained on the base {card.base.name!r} with hash {card.base.base_sha256[:12]}; "
            f"{loaded.name!r} has {loaded.sha256[:12]}; name the right one with --base"
        )
    if hash_tokenizer(loaded.tokenizer) != card.tokenizer_sha256:
        raise AdapterError(
            f"{folder}: was trained with another tokenizer than the one of {loaded.name!r}; name the base that it was "
            "trained on with --base"
        )
    check_length(loaded.shape, config)
    _check_probe(folder, card, loaded)
    model = rebuild(folder, loaded, card.method, config)
    _verify_probe(model, card, folder)
    return Loaded(model=model, tokenizer=loaded.tokenizer, card=card)


def load_card(folder: Path) -> Card:
    """Read `card.json`.

    Raises:
        AdapterError: If the folder or file is missing, malformed, or of a newer layout.
    """
    path = folder / "card.json"
    if not path.is_file():
        raise AdapterError(f"{folder}: is no adapter folder of this package (no card.json)")
    values = read_json(path)
    found = values.get("schema") if isinstance(values, dict) else None
    if isinstance(found, int) and found > SCHEMA:
        raise AdapterError(
            f"{path}: has schema {found}; this version reads up to {SCHEMA}; upgrade lora_sentiment"
        )
    return read_section(values, Card, path)


def compute_probe(model: nn.Module, input_ids: list[list[int]]) -> Probe:
    """Return a model's logits of token id lists, one text at a time and so without padding."""
    return Probe(input_ids=input_ids, logits=_answer(model, input_ids))


def _answer(model: nn.Module, input_ids: list[list[int]]) -> list[list[float]]:
    device = next(model.parameters()).device
    with torch.inference_mode(), attention_backends(device):
        return [
            model(input_ids=torch.tensor([ids], device=device)).logits[0].tolist()
            for ids in input_ids
        ]


def publish(aside: Path, folder: Path, *, overwrite: bool) -> None:
    """Move a finished folder to its place: every file synced, then one rename.

    Args:
        aside: The finished folder, inside the run's own.
        folder: Its place; what stands there is moved beside `aside` first and deleted last.
        overwrite: Whether the place may be taken.

    Raises:
        AdapterError: If the place is taken and must not be overwritten.
    """
    replaced = aside.with_name("replaced")
    if folder.exists() and not overwrite:
        raise AdapterError(f"{folder}: exists; the finished adapter stays in {aside}; move it")
    take_place(aside, folder, replaced=replaced)
    if replaced.exists():
        shutil.rmtree(replaced)


def _save_files(
    folder: Path,
    model: nn.Module,
    base: Base,
    *,
    labels: tuple[str, ...],
    config: ModelConfig,
    method: Method,
) -> Base:
    """Write weights and tokenizer; return the base freshly loaded, which must be the one that was trained on."""
    device = next(model.parameters()).device
    # Rebuilt in fp32 whatever it was trained in, as `load` will: the stored probe must not hang on a machine's dtype.
    config = config.model_copy(update={"dtype": "float32"})
    again = load_base(config, labels=labels, device=device)
    if again.sha256 != base.sha256:
        raise AdapterError(
            f"the base {base.name!r} changed on disk during training; its hash was {base.sha256[:12]}"
        )
    if isinstance(method, LoraMethod) and method.changes_base:
        # This takes the start values out of the fresh base, and so uses it up.
        save_as_plain_lora(folder, model, again, method, config)
        again = load_base(config, labels=labels, device=device)
    else:
        save_weights(folder, model)
    _save_tokenizer(folder, base)
    return again


def _save_tokenizer(folder: Path, base: Base) -> None:
    # What the last call set must not travel: other runtimes would cut every text at it.
    base.tokenizer.backend_tokenizer.no_truncation()
    base.tokenizer.backend_tokenizer.no_padding()
    base.tokenizer.save_pretrained(folder)


def _base_config(folder: Path, card: Card, base: str | None) -> ModelConfig:
    """Return the `model` section that loads an adapter's base."""
    try:
        return ModelConfig(
            name=base or card.base.name,
            revision=None if base else card.base.revision,
            max_length=card.max_length,
            dtype="float32",
            quantize=card.base.quantize,
            double_quant=card.base.double_quant,
        )
    except ValidationError as error:
        raise AdapterError(f"{folder / 'card.json'}: base: {first_fault(error)}") from error


def _check_probe(folder: Path, card: Card, base: Base) -> None:
    """Refuse a probe that the model could not be asked, or that no answer of it could equal."""
    ids, logits, shape = card.probe.input_ids, card.probe.logits, base.shape
    fault = None
    if not all(0 <= token < shape.vocab_size for row in ids for token in row):
        fault = f"holds a token that the base does not have; allowed: 0 to {shape.vocab_size - 1}"
    elif max(map(len, ids)) > shape.max_position_embeddings:
        fault = (
            f"holds a text longer than the {shape.max_position_embeddings} positions of the base"
        )
    elif len(ids) != len(logits) or any(len(row) != len(card.labels) for row in logits):
        fault = (
            f"needs {len(card.labels)} logits for each of its {len(ids)} texts, one for each label"
        )
    if fault:
        raise AdapterError(f"{folder / 'card.json'}: probe: {fault}")


def _verify_probe(model: nn.Module, card: Card, folder: Path) -> None:
    """Compare today's answers with the stored ones."""
    now = np.array(_answer(model, card.probe.input_ids))
    difference = float(np.abs(now - np.array(card.probe.logits)).max())
    if not difference <= PROBE_TOLERANCE:
        raise AdapterError(
            f"{folder}: answers its probe otherwise than when it was saved (logits differ by {difference:.2g}, allowed "
            f"{PROBE_TOLERANCE:g}); versions then: {card.versions}"
        )
