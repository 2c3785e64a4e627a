"""Save and load an adapter folder, and verify that it is the one that was saved."""

import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, ValidationError, model_validator
from torch import nn
from transformers import PreTrainedTokenizerFast

from lora_sentiment.adapter.peft_file import PEFT_CONFIG
from lora_sentiment.adapter.safe_files import check_files, first_fault, read_object, read_section
from lora_sentiment.adapter.weights import (
    CHANGED_WEIGHTS,
    PEFT_WEIGHTS,
    rebuild,
    save_as_plain_lora,
    save_weights,
)
from lora_sentiment.data.batches import TextEncoder
from lora_sentiment.errors import AdapterError, ModelError
from lora_sentiment.fast import attention_backends
from lora_sentiment.files import hash_file, write_json
from lora_sentiment.hub import is_hub_name, prepare_hub
from lora_sentiment.models.families import FAMILIES, num_positions
from lora_sentiment.models.load import Base, check_length, hash_tokenizer, load_base
from lora_sentiment.recipe.data import DataConfig
from lora_sentiment.recipe.method import LoraMethod, Method, PeftMethod
from lora_sentiment.recipe.model import ModelConfig
from lora_sentiment.recipe.section import Section
from lora_sentiment.tasks import Task, find_task
from lora_sentiment.tasks.task import Calibration

SCHEMA = 1
PROBE_TOLERANCE = 1e-4
"""Largest difference in fp32 between a stored and a computed probe logit. Other CPUs add in another
order."""
PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors")


class BaseRecord(Section):
    """The base that an adapter belongs to."""

    name: str
    """Hub name or folder, as in the recipe."""
    revision: str | None
    """Commit on the Hub, or null for a folder."""
    base_sha256: str
    """Hash of the unquantised encoder's tensors by name, shape and value."""
    quantize: Literal["none", "int8", "nf4", "fp4"] = "none"
    """Precision of the frozen linears in training."""
    double_quant: bool = False
    """Whether the 4-bit scales were quantised too."""
    model_type: str = "distilbert"
    """Family of the base, as `model_type` in its `config.json`. Older versions knew one family."""


class DataRecord(Section):
    """The rows that an adapter was trained on: names and fingerprints, no text."""

    config: DataConfig
    """The recipe's resolved `data` section."""
    train_sha256: str
    """Fingerprint of the training rows."""
    validation_sha256: str
    """Fingerprint of the validation rows."""
    carved_test_sha256: str | None = None
    """Fingerprint of the test rows if they were carved out of train, or null."""

    @property
    def task(self) -> Task:
        """What the labels are. Records of older versions have single labels."""
        return find_task(self.config.task)


class Probe(Section):
    """Token ids of texts of our own, and the fp32 logits that the adapter gave for them."""

    input_ids: list[Annotated[list[int], Field(min_length=1)]] = Field(min_length=1)
    """One list of ids for each text, special tokens included."""
    logits: list[list[float]]
    """One list of num_labels values for each text."""


class Card(Section):
    """`card.json`: the facts that the weights alone do not hold."""

    schema_: int = Field(alias="schema", ge=1)
    """Version of this file's layout."""
    labels: list[str] = Field(min_length=1)
    """Label names. The index of a name is its label. A regression has one: its column."""
    max_length: int = Field(ge=8)
    """Longest input in tokens."""
    truncation: Literal["head", "head_tail"]
    """Which tokens of a longer text stay."""
    method: Method
    """The training method."""
    base: BaseRecord
    """The base."""
    tokenizer_sha256: str
    """Hash of the tokenizer's pipeline and vocabulary."""
    files: dict[str, str]
    """File name to SHA-256, of every file that decides an answer."""
    data: DataRecord
    """The rows of training."""
    parent_sha256: str | None = None
    """Hash of the adapter that the training went on from, as its `Card.sha256`, or null."""
    offline: str | dict[str, str] | None = None
    """Bundled parts that were used because no Hub answered. Older versions wrote a mapping."""
    calibration: Calibration | None
    """What was fitted on validation: `temperature`, `thresholds`, or null."""
    versions: dict[str, str]
    """Package to version, of the packages that fix the bytes."""
    machine: dict[str, Any]
    """Facts of the machine and run that fix the bytes: threads, processes, dtype, size of
    micro-batches."""
    probe: Probe
    """Answers of this adapter to texts of our own."""

    @property
    def task(self) -> Task:
        """What its labels are. Cards of older versions have single labels."""
        return self.data.task

    @property
    def reads_pairs(self) -> bool:
        """Whether an input is a pair of texts."""
        return self.data.config.reads_pairs

    @model_validator(mode="after")
    def _labels_fit_the_task(self) -> Self:
        fault = self.task.check_answers(self.labels, self.calibration)
        if fault:
            raise ValueError(fault)
        return self

    @property
    def sha256(self) -> str:
        """Hash of the facts that decide an answer: the base, the files, and how texts are cut."""
        decisive = [
            self.base.base_sha256,
            self.base.quantize,
            self.max_length,
            self.truncation,
            self.files,
            *self.task.get_decisive(self.calibration),
            *(["pairs"] if self.reads_pairs else []),
        ]
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Loaded:
    """An adapter on its base, ready to answer.

    Attributes:
        model: In fp32 on the CPU, in eval mode. The linears of a quantised base stay quantised, on
            their device.
        tokenizer: The base's tokenizer.
        card: The adapter's card.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerFast
    card: Card

    def make_encoder(self) -> TextEncoder:
        """Return its way from texts to inputs, as in training."""
        card = self.card
        return TextEncoder.of(
            self.tokenizer,
            max_length=card.max_length,
            truncation=card.truncation,
            reads_pairs=card.reads_pairs,
            has_types=FAMILIES[card.base.model_type].token_types,
        )


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
    calibration: Calibration | None = None,
    offline: str | None = None,
    parent_sha256: str | None = None,
) -> Card:
    """Write weights, tokenizer and card, and verify them.

    The model is rebuilt from the files and compared with the trained one. The base's weights are
    not written.

    Args:
        folder: Existing empty folder.
        model: The trained model.
        base: The base of the model.
        labels: Label names in order.
        model_config: The recipe's `model` section.
        method: The recipe's `method` section.
        data: The rows of training.
        machine: Facts that fix the bytes.
        trained: Answers of the trained model to texts of our own, in its compute dtype.
        tolerance: Largest difference between a logit of the trained and of the rebuilt model, in
            units of max(1, largest logit). It allows for rounding of the compute dtype.
        calibration: What was fitted on validation, or None.
        offline: The sentence of `resolve_offline`, or None.
        parent_sha256: Hash of the adapter that the training went on from, or None.

    Returns:
        The card that was written.

    Raises:
        AdapterError: If the rebuilt model answers differently from the trained one.
    """
    # In fp32, as `load` will compute: the stored probe must not depend on the dtype of this
    # machine.
    config = model_config.model_copy(update={"dtype": "float32"})
    device = next(model.parameters()).device
    fresh = load_base(config, labels=labels, problem_type=data.task.head_type, device=device)
    if fresh.sha256 != base.sha256:
        raise AdapterError(
            f"the base {base.name!r} changed on disk during training; its hash was "
            f"{base.sha256[:12]}"
        )
    if isinstance(method, LoraMethod) and method.changes_base:
        save_as_plain_lora(folder, model, fresh, method, config)
        # PEFT took the start values out of the fresh base.
        fresh = load_base(config, labels=labels, problem_type=data.task.head_type, device=device)
    else:
        save_weights(folder, model)
    # The settings of the tokenizer's last call must not be saved: other runtimes would cut every
    # text there.
    base.tokenizer.backend_tokenizer.no_truncation()
    base.tokenizer.backend_tokenizer.no_padding()
    base.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    write_tokenizer_config(
        folder,
        base.tokenizer,
        max_length=model_config.max_length,
        has_types=data.config.reads_pairs and base.family.token_types,
    )
    probe = compute_probe(rebuild(folder, fresh, method, config), trained.input_ids)
    largest = max(1.0, float(np.abs(np.array(probe.logits)).max()))
    difference = _largest_difference(probe.logits, trained.logits) / largest
    if not difference <= tolerance:
        raise AdapterError(
            f"{folder}: the saved adapter answers differently from the trained model (by "
            f"{difference:.2g})"
        )
    decisive = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix == ".safetensors" or path.name in (PEFT_CONFIG, "tokenizer.json")
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
            model_type=base.family.model_type,
        ),
        tokenizer_sha256=hash_tokenizer(base.tokenizer),
        files={path.name: hash_file(path) for path in decisive},
        data=data,
        parent_sha256=parent_sha256,
        offline=offline,
        calibration=calibration,
        versions={name: version(name) for name in PACKAGES},
        machine=machine,
        probe=probe,
    )
    write_json(folder / "card.json", card.model_dump(mode="json", by_alias=True))
    return card


def write_tokenizer_config(
    folder: Path, tokenizer: PreTrainedTokenizerFast, *, max_length: int, has_types: bool
) -> None:
    """Write the `tokenizer_config.json` with which stock transformers reads `tokenizer.json`.

    With BertTokenizer or DistilBertTokenizer in it, transformers 5 makes a normalizer of its own,
    and transformers 4 makes token types, which DistilBERT does not take. The other families take a
    text without types as the first of a pair.

    Args:
        folder: Where to write it.
        tokenizer: The tokenizer.
        max_length: Most tokens of an input.
        has_types: Whether inputs are pairs, and the model knows types of tokens.
    """
    names = ["input_ids", "attention_mask"]
    if has_types:
        names.insert(1, "token_type_ids")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": names,
            "model_max_length": max_length,
            **tokenizer.special_tokens_map,
        },
    )


def load(
    folder: Path,
    *,
    base: str | None = None,
    device: torch.device | None = None,
    fresh: Base | None = None,
) -> Loaded:
    """Rebuild a trained model from its folder, and verify that it is the one that was saved.

    Args:
        folder: An adapter folder.
        base: Place of the base, if it is not where the card says. It must have the same hash.
        device: Device of a quantised base. The CPU by default.
        fresh: The base, if it is loaded already, with a head for the adapter's labels. The returned
            model uses its modules.

    Raises:
        AdapterError: If a file is missing or altered, the base or tokenizer is another one, a
            tensor is missing, extra, of the wrong shape or not finite, or the model answers its
            probe differently.
        ModelError: If the base cannot be loaded, or has fewer positions than the card says.
    """
    card = load_card(folder)
    is_peft = isinstance(card.method, PeftMethod)
    weights = (PEFT_WEIGHTS, PEFT_CONFIG) if is_peft else (CHANGED_WEIGHTS,)
    check_files(folder, card.files, needed=(*weights, "tokenizer.json"))
    try:
        config = ModelConfig(
            name=base or card.base.name,
            revision=None if base else card.base.revision,
            max_length=card.max_length,
            dtype="float32",
            quantize=card.base.quantize,
            double_quant=card.base.double_quant,
        )
    except ValidationError as error:
        raise AdapterError(f"{folder / 'card.json'}: base: {first_fault(error)}") from error
    if fresh is None:
        fresh = _load_recorded_base(config, card, device)
    if fresh.sha256 != card.base.base_sha256:
        raise AdapterError(
            f"{folder}: was trained on the base {card.base.name!r} with hash "
            f"{card.base.base_sha256[:12]}; {fresh.name!r} has {fresh.sha256[:12]}; name the right "
            "base with --base"
        )
    if hash_tokenizer(fresh.tokenizer) != card.tokenizer_sha256:
        raise AdapterError(
            f"{folder}: was trained with another tokenizer than that of {fresh.name!r}; name the "
            "base of training with --base"
        )
    check_length(fresh.config, config)
    _check_probe(folder, card, fresh)
    model = rebuild(folder, fresh, card.method, config)
    # Not as a Probe, which refuses logits that are not finite.
    answers = _answer(model, card.probe.input_ids)
    difference = _largest_difference(answers, card.probe.logits)
    allowed = card.task.find_allowed_difference(np.array(card.probe.logits), PROBE_TOLERANCE)
    if not difference <= allowed:
        raise AdapterError(
            f"{folder}: answers its probe differently than when it was saved (logits differ by "
            f"{difference:.2g}, allowed {allowed:g}); versions then: {card.versions}"
        )
    return Loaded(model=model, tokenizer=fresh.tokenizer, card=card)


def _load_recorded_base(config: ModelConfig, card: Card, device: torch.device | None) -> Base:
    if is_hub_name(config.place):
        prepare_hub()
    try:
        return load_base(
            config, labels=tuple(card.labels), problem_type=card.task.head_type, device=device
        )
    except ModelError as error:
        raise ModelError(
            f"{error.message}; if the base is elsewhere now, name it with --base", key=error.key
        ) from error


def load_card(folder: Path) -> Card:
    """Read `card.json`.

    Raises:
        AdapterError: If the folder or file is missing, malformed, or has a newer layout.
    """
    path = folder / "card.json"
    if not path.is_file():
        fault = f"{folder}: is not an adapter folder of this package (no card.json)"
        if (folder / "config.json").is_file():
            fault += "; it is a whole model: name the adapter that it was made from"
        raise AdapterError(fault)
    return read_section(read_object(path), Card, path, newest=SCHEMA)


def compute_probe(model: nn.Module, input_ids: list[list[int]]) -> Probe:
    """Compute a model's logits for lists of token ids, one at a time and so without padding."""
    return Probe(input_ids=input_ids, logits=_answer(model, input_ids))


def _answer(model: nn.Module, input_ids: list[list[int]]) -> list[list[float]]:
    device = next(model.parameters()).device
    logits = []
    with torch.inference_mode(), attention_backends(device):
        for ids in input_ids:
            answer = model(input_ids=torch.tensor([ids], device=device))
            logits.append(answer.logits[0].tolist())
    return logits


def _largest_difference(one: list[list[float]], other: list[list[float]]) -> float:
    return float(np.abs(np.array(one) - np.array(other)).max())


def _check_probe(folder: Path, card: Card, base: Base) -> None:
    """Refuse a probe that the model cannot compute, or that has another shape than its answers."""
    ids, logits, limits = card.probe.input_ids, card.probe.logits, base.config
    fault = None
    if min(map(min, ids)) < 0 or max(map(max, ids)) >= limits.vocab_size:
        fault = f"holds a token that the base does not have; allowed: 0 to {limits.vocab_size - 1}"
    elif max(map(len, ids)) > num_positions(limits):
        fault = f"holds a text longer than the {num_positions(limits)} positions of the base"
    elif [len(row) for row in logits] != [len(card.labels)] * len(ids):
        fault = (
            f"needs {len(card.labels)} logits for each of its {len(ids)} texts, one for each label"
        )
    if fault:
        raise AdapterError(f"{folder / 'card.json'}: probe: {fault}")
