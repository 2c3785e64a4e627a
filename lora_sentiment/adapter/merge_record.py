"""The record in a merged or exported model of its adapter, its base and its comparison.

The record stands in the model's `config.json` under the key `lora_sentiment`. Stock transformers
keeps it there when it loads and saves the model. This module imports no torch.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from lora_sentiment.adapter.safe_files import check_files, read_object, read_section
from lora_sentiment.errors import AdapterError
from lora_sentiment.files import write_json
from lora_sentiment.recipe.section import Section

KEY = "lora_sentiment"
SCHEMA = 1
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
    clean: bool
    """Whether texts are cleaned before they are tokenised, as in training."""
    cleaning_steps: int = Field(0, ge=0)
    """Number of steps of the normalizer in `tokenizer.json` that clean texts, for other programs.
    This package removes them and cleans by itself, which leaves nothing out."""
    calibration: dict[str, float] | None
    """Temperature fitted on validation, or null."""
    compared: dict[str, dict[str, Any]]
    """Differences from the adapter, by the form and the rows that were compared."""
    readings: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """What other ways of reading the validation rows cost, as `compare_readings` returns it, or
    the `reason` why it is not known. `stock` is a stock pipeline on raw texts. `head` is head
    truncation, if training had another."""
    files: dict[str, str]
    """File name to SHA-256, of every other file that decides an answer."""
    config_sha256: str = ""
    """Hash of `config.json` without this record. Labels and shape stand there."""


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
    values |= {"hidden_size": values["dim"], "num_hidden_layers": values["n_layers"]}
    record = record.model_copy(update={"config_sha256": _hash_config(values)})
    values[KEY] = record.model_dump(mode="json", by_alias=True)
    write_json(path, values)


def check_merge_record(folder: Path, record: MergeRecord, *, needed: Sequence[str]) -> None:
    """Compare a model folder with its record.

    Args:
        folder: The folder.
        record: Its record.
        needed: Files that will be used. Each must have a recorded hash.

    Raises:
        AdapterError: If a needed file has no recorded hash, or a recorded file is missing or
            altered.
    """
    check_files(folder, record.files, needed=needed)
    path = folder / "config.json"
    if _hash_config(read_object(path)) != record.config_sha256:
        raise AdapterError(
            f"{path}: was altered after it was saved (labels or shape are not the recorded ones)"
        )


def _hash_config(config: dict[str, Any]) -> str:
    without_record = {key: value for key, value in config.items() if key != KEY}
    return hashlib.sha256(json.dumps(without_record, sort_keys=True).encode()).hexdigest()
