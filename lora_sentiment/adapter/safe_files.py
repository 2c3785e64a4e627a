"""Files of anyone's making: read only where they lie in their folder, are of a sane size and are what they say.

Nothing here imports torch.
"""

import json
import os
import re
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open

from lora_sentiment.errors import AdapterError

MAX_JSON_BYTES = 4 << 20
"""Of a JSON file: a card takes some 100 kB. Parsed, the densest JSON takes 20 times its bytes."""
MAX_TOKENIZER_BYTES = 32 << 20
"""Of `tokenizer.json`: the multilingual one takes 3 MB."""
MAX_HEADER_BYTES = 1 << 20
"""Of the names and shapes in a safetensors file: a whole DistilBERT's take 12 kB."""
MAX_DEPTH = 32
"""Of objects and lists within one another."""
_NAME = re.compile(r"[\w-][\w.-]{0,99}(/[\w-][\w.-]{0,99})?", re.ASCII)
# What makes transformers run other code, fetch from elsewhere or read another file than the folder's own.
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
_Kind = TypeVar("_Kind", bound=BaseModel)
Header = dict[str, tuple[str, tuple[int, ...]]]
"""Tensor name to dtype, as safetensors writes it, and shape."""


def find_file(folder: Path, name: str) -> Path:
    """Return the path of a file of a folder, itself or one folder below.

    Raises:
        AdapterError: If the name or a link leads out of the folder, or there is no such file.
    """
    if not _NAME.fullmatch(name):
        raise AdapterError(f"{folder}: records the file {name!r}, which is not in it")
    path = folder / name
    # Not Path.resolve, which raises a RuntimeError where links go round in a circle.
    if not any(
        Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))
        for root in _roots(folder)
    ):
        raise AdapterError(
            f"{path}: is a link out of its folder; put the file itself there (cp -L copies what is linked)"
        )
    if not path.is_file():
        raise AdapterError(f"{path}: is missing; copy the whole folder")
    return path


def _roots(folder: Path) -> list[Path]:
    """Return where a link in a folder may lead: into it, and in the Hub's cache to the blobs of its repository."""
    snapshots = [place for place in (folder, folder.parent) if place.parent.name == "snapshots"]
    return [folder, *(place.parents[1] / "blobs" for place in snapshots)]


def read_bytes(path: Path, *, limit: int = MAX_JSON_BYTES) -> bytes:
    """Read a small file whole.

    Raises:
        AdapterError: If it is missing, linked from elsewhere, larger than `limit` bytes, or cannot be read.
    """
    try:
        with find_file(path.parent, path.name).open("rb") as file:
            found = file.read(limit + 1)
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read: {error}") from error
    if len(found) > limit:
        raise AdapterError(
            f"{path}: is larger than {limit:,} bytes, more than any such file that this package writes"
        )
    return found


def read_json(path: Path) -> Any:
    """Read a JSON file; what it holds may be anything.

    Raises:
        AdapterError: As `read_bytes`, and if it is no JSON, nested too deep, or an object has a key twice.
    """
    found = read_bytes(path)
    try:
        values = json.loads(found.decode(), object_pairs_hook=_make_object)
    except RecursionError as error:
        raise AdapterError(f"{path}: nests lists or objects deeper than {MAX_DEPTH}") from error
    except ValueError as error:
        raise AdapterError(f"{path}: is no JSON: {error}") from error
    level = [values]
    for _ in range(MAX_DEPTH):
        level = [
            inner for value in level if isinstance(value, dict | list) for inner in _children(value)
        ]
    if level:
        raise AdapterError(f"{path}: nests lists or objects deeper than {MAX_DEPTH}")
    return values


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _children(value: dict[str, Any] | list[Any]) -> Any:
    return value.values() if isinstance(value, dict) else value


def read_section(values: Any, kind: type[_Kind], path: Path, *, inside: str = "") -> _Kind:
    """Return what a JSON file holds as a section.

    Args:
        values: As `read_json` gave them.
        kind: The section's class.
        path: The file, for the message.
        inside: The key under which the values stood, and a dot.

    Raises:
        AdapterError: If a field is missing, unknown or wrong.
    """
    try:
        return kind.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise AdapterError(f"{path}: {inside}{first_fault(error)}") from error
    except (RecursionError, OverflowError) as error:  # from the regular expressions in it
        raise AdapterError(
            f"{path}: {inside} holds a pattern that cannot be compiled: {error}"
        ) from error


def first_fault(error: ValidationError) -> str:
    """Return where the first fault stands and what it is."""
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def read_header(path: Path) -> Header:
    """Return the names, dtypes and shapes of a safetensors file; no tensor is read.

    That they fill the file exactly is checked by safetensors itself.

    Raises:
        AdapterError: If the file is missing, linked from elsewhere, or its header is too long or malformed.
    """
    try:
        with find_file(path.parent, path.name).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise AdapterError(
                f"{path}: cannot be read: its header is said to take {length:,} bytes, allowed {MAX_HEADER_BYTES:,}"
            )
        with safe_open(path, framework="numpy") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - no mapping
            return {
                name: (str(found.get_dtype()), tuple(found.get_shape()))
                for name, found in slices.items()
            }
    except (OSError, SafetensorError, ValueError) as error:
        raise AdapterError(f"{path}: cannot be read: {error}") from error


def check_model(folder: Path) -> None:
    """Hold a whole model's folder against its own `config.json`, before any code of transformers sees it.

    Raises:
        AdapterError: If a file is missing, linked from elsewhere or malformed, a configuration redirects to other
            code or files, or the encoder's tensors are not those that the configuration names.
    """
    for name, keys in _REDIRECTS.items():
        if name != "config.json" and not (folder / name).is_file():
            continue
        values = read_object(folder / name)
        if found := [key for key in keys if values.get(key) is not None]:
            raise AdapterError(
                f"{folder / name}: {found[0]} is {str(values[found[0]])[:100]!r}; this package loads no other code, "
                "kernels or files than a plain DistilBERT's; remove it"
            )
    if (folder / "tokenizer.json").is_file():
        read_bytes(folder / "tokenizer.json", limit=MAX_TOKENIZER_BYTES)
    path = folder / "model.safetensors"
    header = read_header(path)
    for name, size in _encoder_sizes(folder, at_most=len(header)).items():
        found_shape = next(
            (header[key][1] for key in (f"distilbert.{name}", name) if key in header), None
        )
        if found_shape is None:
            raise AdapterError(f"{path}: tensor {name} is missing, which its config.json asks for")
        count = 1
        for side in found_shape:
            count *= side
        if count != size:
            raise AdapterError(
                f"{path}: {name} has shape {found_shape}, and its config.json asks for {size} values"
            )


def _encoder_sizes(folder: Path, *, at_most: int) -> dict[str, int]:
    """Return the number of values of each tensor that a folder's `config.json` asks for."""
    # No torch at the top: an ONNX file is loaded without it.
    import torch
    from transformers import DistilBertConfig, DistilBertModel

    values = read_object(folder / "config.json")
    names = (
        *("vocab_size", "max_position_embeddings", "n_layers", "n_heads", "dim", "hidden_dim"),
    )
    named = {name: values[name] for name in names if name in values}
    if wrong := [name for name, value in named.items() if type(value) is not int or value < 1]:
        raise AdapterError(
            f"{folder / 'config.json'}: {wrong[0]} is {str(named[wrong[0]])[:50]}; allowed: 1 or more"
        )
    config = DistilBertConfig(**named)
    if config.n_layers > at_most:
        raise AdapterError(
            f"{folder / 'config.json'}: n_layers is {config.n_layers}; there are {at_most} tensors"
        )
    config.n_heads = 1  # the number of heads changes no size
    with torch.device("meta"):
        encoder = DistilBertModel(config)
    return {name: tensor.numel() for name, tensor in encoder.named_parameters()}


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        AdapterError: As `read_json`, and if it holds anything else.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise AdapterError(f"{path}: is no JSON object")
    return values


def read_labels(folder: Path) -> tuple[str, ...]:
    """Return the label names of a whole model's `config.json`, in order.

    Raises:
        AdapterError: As `read_object`, and if it names no labels from 0 on.
    """
    path = folder / "config.json"
    # transformers writes no names where they are its own two.
    names = read_object(path).get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})
    if not isinstance(names, dict) or sorted(names) != sorted(map(str, range(len(names)))):
        raise AdapterError(f"{path}: id2label names no labels from 0 on: found {str(names)[:100]}")
    return tuple(str(names[str(i)]) for i in range(len(names)))
