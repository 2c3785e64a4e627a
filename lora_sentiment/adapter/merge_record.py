"""The record in a merged or exported model of its adapter, its base and its comparison.

The record stands in the model's `config.json` under the key `lora_sentiment`. Stock transformers
keeps it there when it loads and saves the model, and the record still holds: it has hashes of what
decides an answer alone. This module imports no torch.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from lora_sentiment.adapter.safe_files import (
    MAX_TOKENIZER_BYTES,
    check_files,
    read_object,
    read_section,
)
from lora_sentiment.errors import AdapterError
from lora_sentiment.files import write_json
from lora_sentiment.models.families import FAMILIES
from lora_sentiment.recipe.section import Section
from lora_sentiment.tasks.task import Calibration

KEY = "lora_sentiment"
SCHEMA = 2
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_SPECIAL_TOKENS = ("unk_token", "cls_token", "sep_token", "pad_token")
LENGTH_CONFIG = "sentence_bert_config.json"
"""Where text-embeddings-inference looks for the longest input. Without it, the number of positions
counts."""


class MergeRecord(Section):
    """The facts that a merged or exported model keeps about itself."""

    schema_: int = Field(alias="schema")
    """Version of the record's layout."""
    adapter_sha256: str
    """Hash of the adapter that was merged: `Card.sha256`."""
    base_sha256: str
    """Hash of the unquantised base's encoder."""
    base: str
    """Name of the base, as in the adapter's card."""
    model_type: str = "distilbert"
    """Family of the base, as `model_type` in `config.json`."""
    method: str
    """Training method: `lora`, `full`, ..."""
    into: Literal["base", "dequantised"]
    """Weights that the adapter was merged into: the published base, or the base after
    quantising."""
    dtype: str
    """Dtype of the weights."""
    max_length: int = Field(ge=8)
    """Longest input in tokens."""
    truncation: Literal["head", "head_tail"]
    """Which tokens of a longer text stay."""
    reads_pairs: bool = False
    """Whether an input is a pair of texts."""
    clean: bool
    """Whether texts are cleaned before they are tokenised, as in training."""
    cleaning_steps: int = Field(0, ge=0)
    """Number of steps of the normalizer in `tokenizer.json` that clean texts, for other programs.
    This package removes them and cleans by itself, which leaves nothing out."""
    calibration: Calibration | None
    """What was fitted on validation, or null."""
    compared: dict[str, dict[str, Any]]
    """Differences from the adapter, by the form and the rows that were compared."""
    readings: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """What other ways of reading the validation rows cost, as `compare_readings` returns it, or
    the `reason` why it is not known. `stock` is a stock pipeline on raw texts. `head` is head
    truncation, if training had another."""
    files: dict[str, str]
    """File name to SHA-256, of the weights. In schema 1, of the tokenizer's files too."""
    config_sha256: str = ""
    """Hash of the values in `config.json` that decide an answer. In schema 1, of the whole file
    without this record."""
    tokenizer_sha256: str = ""
    """Hash of the tokenizer and its special tokens, which is not in schema 1."""


def read_merge_record(folder: Path) -> MergeRecord | None:
    """Read the record of a model folder, or return None if its `config.json` has none.

    Raises:
        AdapterError: If there is no `config.json`, or the file or the record is malformed or has a
            newer layout.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise AdapterError(f"{folder}: is not a model folder (no config.json)")
    record = read_object(path).get(KEY)
    if record is None:
        return None
    if not isinstance(record, dict):
        raise AdapterError(f"{path}: {KEY} is not an object")
    return read_section(record, MergeRecord, path, newest=SCHEMA, inside=f"{KEY}.")


def write_merge_record(folder: Path, record: MergeRecord) -> None:
    """Put a record into the `config.json` of a model folder. All other files must be final.

    text-embeddings-inference gets what it asks for: `hidden_size` and `num_hidden_layers`, which
    DistilBERT calls `dim` and `n_layers`, and the longest input in `sentence_bert_config.json`.
    """
    write_json(folder / LENGTH_CONFIG, {"max_seq_length": record.max_length})
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    aliases = FAMILIES[values["model_type"]].aliases
    for key in ("hidden_size", "num_hidden_layers"):
        if key in aliases:
            values[key] = values[aliases[key]]
    write_json(path, values)
    hashes = {"config_sha256": _hash_config(folder), "tokenizer_sha256": _hash_tokenizer(folder)}
    record = record.model_copy(update={"schema_": SCHEMA, **hashes})
    values[KEY] = record.model_dump(mode="json", by_alias=True)
    write_json(path, values)


def check_merge_record(folder: Path, record: MergeRecord, *, weights: str | None = None) -> None:
    """Compare a model folder with its record.

    Args:
        folder: The folder.
        record: Its record.
        weights: The file of weights that will be used, which must have a recorded hash, or None.

    Raises:
        AdapterError: If `weights` has no recorded hash, or a recorded file is missing or altered.
    """
    needed = [weights] if weights else []
    path = folder / "config.json"
    if record.schema_ == 1:
        check_files(folder, record.files, needed=[*needed, *TOKENIZER])
        config = read_object(path)
        config.pop(KEY)
        if _hash(config) != record.config_sha256:
            raise AdapterError(
                f"{path}: was altered after it was saved. Its hash is not the recorded one, which "
                "an older version made of the whole file, so a program that saved the model again "
                "alters it too; take the file as it was, or merge the adapter again"
            )
        return
    check_files(folder, record.files, needed=needed)
    if _hash_config(folder) != record.config_sha256:
        raise AdapterError(
            f"{path}: was altered after it was saved (its labels, shape or task are not the "
            "recorded ones)"
        )
    if _hash_tokenizer(folder) != record.tokenizer_sha256:
        raise AdapterError(
            f"{folder}: {' or '.join(TOKENIZER)} was altered after it was saved (the tokenizer or "
            "its special tokens are not the recorded ones)"
        )


def _hash_config(folder: Path) -> str:
    """Return the hash of the values in `config.json` that decide an answer.

    Stock transformers keeps them, and rewrites others.
    """
    path = folder / "config.json"
    config = read_object(path)
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise AdapterError(
            f"{path}: was altered after it was saved (model_type is {config.get('model_type')!r})"
        )
    keys = ("model_type", "problem_type", "id2label", *family.functions, *family.shape)
    decisive = {key: config.get(key) for key in keys}
    for alias, key in family.aliases.items():
        decisive[alias] = config.get(alias, decisive[key])
    return _hash(decisive)


def _hash_tokenizer(folder: Path) -> str:
    """Return the hash of the tokenizer and of its special tokens."""
    tokenizer = read_object(folder / "tokenizer.json", limit=MAX_TOKENIZER_BYTES)
    # These are settings of the last call.
    tokenizer |= {"truncation": None, "padding": None}
    settings = read_object(folder / "tokenizer_config.json")
    special = []
    for role in _SPECIAL_TOKENS:
        token = settings.get(role)
        special.append(token.get("content") if isinstance(token, dict) else token)
    return _hash([tokenizer, special])


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
