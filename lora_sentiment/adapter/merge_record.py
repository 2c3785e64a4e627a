"""The stamp of a merged or exported model: which adapter it holds, on which base, and how it was checked.

It stands in the model's `config.json` under `lora_sentiment`, where stock transformers keeps it whenever it loads and
saves.
Nothing here imports torch.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from lora_sentiment.adapter.safe_files import find_file, read_json, read_object, read_section
from lora_sentiment.errors import AdapterError
from lora_sentiment.files import hash_file, write_json
from lora_sentiment.recipe.section import Section

KEY = "lora_sentiment"
SCHEMA = 1


class Stamp(Section):
    """What a merged or exported model says about itself."""

    schema_: int = Field(alias="schema")
    """Version of the stamp's layout."""
    adapter_sha256: str
    """Hash of the adapter that was merged: `Card.sha256`."""
    base_sha256: str
    """Hash of the unquantised base's encoder."""
    base: str
    """The base's name, as the adapter's card gave it."""
    method: str
    """What had been trained: `lora`, `full`, ..."""
    into: Literal["base", "dequantised"]
    """Whether the adapter was merged into the base as it was published, or as quantising had left it."""
    dtype: str
    """Dtype of the weights."""
    max_length: int = Field(ge=8)
    """Longest input in tokens."""
    truncation: Literal["head", "head_tail"]
    """Which tokens of a longer text stay."""
    clean: bool
    """Whether texts are cleaned before they are tokenised, as they were for training."""
    calibration: dict[str, float] | None
    """Temperature fitted on validation, or null."""
    compared: dict[str, dict[str, Any]]
    """What the model was compared on with the adapter, and how far they were apart."""
    files: dict[str, str]
    """File name to SHA-256, of every other file that decides an answer."""
    config_sha256: str = ""
    """Hash of `config.json` without this stamp: labels and shape stand there."""


def read_stamp(folder: Path) -> Stamp | None:
    """Read the stamp of a model folder; None where its `config.json` has none.

    Raises:
        AdapterError: If there is no such file, or it or the stamp is malformed or of a newer layout.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise AdapterError(f"{folder}: is no model folder (no config.json)")
    values = read_json(path)
    found = values.get(KEY) if isinstance(values, dict) else None
    if found is None:
        return None
    newest = found.get("schema") if isinstance(found, dict) else None
    if isinstance(newest, int) and newest > SCHEMA:
        raise AdapterError(
            f"{path}: {KEY} has schema {newest}; this version reads up to {SCHEMA}; upgrade {KEY}"
        )
    return read_section(found, Stamp, path, inside=f"{KEY}.")


def write_stamp(folder: Path, stamp: Stamp) -> None:
    """Put a stamp into a model folder's `config.json`, last of all its files."""
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    whole = stamp.model_copy(update={"config_sha256": _hash_values(values)})
    values[KEY] = whole.model_dump(mode="json", by_alias=True)
    write_json(path, values)


def check_stamp(folder: Path, stamp: Stamp, *, needed: Sequence[str]) -> None:
    """Hold a model folder against its stamp.

    Args:
        folder: The folder.
        stamp: What `read_stamp` found in it.
        needed: Files that are about to be used, which the stamp must vouch for.

    Raises:
        AdapterError: If one of them is not recorded, or anything recorded is missing or was altered.
    """
    check_files(folder, stamp.files, needed=needed)
    path = folder / "config.json"
    values = read_object(path)
    if _hash_values(values) != stamp.config_sha256:
        raise AdapterError(
            f"{path}: was altered after it was saved (its labels or shape are not the recorded ones)"
        )


def _hash_values(config: dict[str, Any]) -> str:
    own = {key: value for key, value in config.items() if key != KEY}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def check_files(folder: Path, files: dict[str, str], *, needed: Sequence[str] = ()) -> None:
    """Hold a folder's files against their recorded hashes.

    Args:
        folder: The folder.
        files: File name to SHA-256.
        needed: Files that are about to be used, which must be among them.

    Raises:
        AdapterError: If one is missing, was altered or leads out of the folder, or one that is needed is not recorded.
    """
    if unknown := [name for name in needed if name not in files]:
        raise AdapterError(
            f"{folder / unknown[0]}: nothing vouches for it: no hash of it is recorded"
        )
    for name, expected in files.items():
        path = find_file(folder, name)
        if hash_file(path) != expected:
            raise AdapterError(
                f"{path}: was altered after it was saved (its SHA-256 is not the recorded one)"
            )
