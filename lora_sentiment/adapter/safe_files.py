"""Read the files of a foreign folder. Every file is checked and bounded before anything uses it.

This module imports no torch: an ONNX file is loaded without it.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub.errors import StrictDataclassError
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open

from lora_sentiment.errors import AdapterError, show
from lora_sentiment.files import LFS_FAULT, hash_file, is_lfs_pointer
from lora_sentiment.tasks import TASKS, Task, find_task_of

MAX_JSON_BYTES = 4 << 20
"""Largest JSON file. A card takes about 100 kB. Parsed JSON takes up to 20 times its bytes."""
MAX_TOKENIZER_BYTES = 32 << 20
"""Largest `tokenizer.json`. The multilingual one takes 3 MB."""
MAX_HEADER_BYTES = 1 << 20
"""Largest header of a safetensors file. The header of a whole DistilBERT takes 12 kB."""
MAX_DEPTH = 32
"""Most levels of nested JSON objects and lists."""
_FILE_NAME = re.compile(r"[\w-][\w.-]{0,99}(/[\w-][\w.-]{0,99})?", re.ASCII)
_Kind = TypeVar("_Kind", bound=BaseModel)
Header = dict[str, tuple[str, tuple[int, ...]]]
"""Tensor name to dtype (as safetensors writes it) and shape."""


def find_file(folder: Path, name: str) -> Path:
    """Return the path of a file in a folder or one level below.

    Raises:
        AdapterError: If the name or a link leads out of the folder, or there is no such file.
    """
    if not _FILE_NAME.fullmatch(name):
        raise AdapterError(f"{folder}: records the file {name!r}, which is not in it")
    path = folder / name
    allowed = [folder]
    for place in (folder, folder.parent):
        # In the Hub's cache, each file is a link to a blob of the same repository.
        if place.parent.name == "snapshots":
            allowed.append(place.parents[1] / "blobs")
    # Path.resolve raises a RuntimeError for a circle of links; realpath does not.
    target = Path(os.path.realpath(path))
    if not any(target.is_relative_to(os.path.realpath(root)) for root in allowed):
        raise AdapterError(
            f"{path}: is a link out of its folder; put the file itself there (cp -L copies a "
            "link's target)"
        )
    if not path.is_file():
        raise AdapterError(f"{path}: is missing; copy the whole folder")
    if is_lfs_pointer(path):
        raise AdapterError(f"{path}: {LFS_FAULT}")
    return path


def check_files(folder: Path, files: dict[str, str], *, needed: Sequence[str] = ()) -> None:
    """Compare the files of a folder with their recorded hashes.

    Args:
        folder: The folder.
        files: File name to SHA-256.
        needed: Files that will be used. Each must have a recorded hash.

    Raises:
        AdapterError: If a needed file has no recorded hash, or a recorded file is missing, altered,
            or a link out of the folder.
    """
    for name in needed:
        if name not in files:
            raise AdapterError(f"{folder / name}: no hash of this file is recorded")
    for name, expected in files.items():
        path = find_file(folder, name)
        if hash_file(path) != expected:
            raise AdapterError(
                f"{path}: was altered after it was saved (its SHA-256 is not the recorded one)"
            )


def read_bytes(path: Path, *, limit: int = MAX_JSON_BYTES) -> bytes:
    """Read a small file whole.

    Raises:
        AdapterError: If the file is missing, a link out of its folder, larger than `limit` bytes,
            or unreadable.
    """
    try:
        with find_file(path.parent, path.name).open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read: {error}") from error
    if len(content) > limit:
        raise AdapterError(
            f"{path}: is larger than {limit:,} bytes, more than any such file of this package"
        )
    return content


def read_json(path: Path, *, limit: int = MAX_JSON_BYTES) -> Any:
    """Read a JSON file of at most `limit` bytes. It may hold any kind of value.

    Raises:
        AdapterError: As `read_bytes`, and if the file is not JSON or is nested too deeply.
    """
    content = read_bytes(path, limit=limit)
    too_deep = f"{path}: nests lists or objects deeper than {MAX_DEPTH} levels"
    try:
        values = json.loads(content.decode())
    except RecursionError as error:
        raise AdapterError(too_deep) from error
    except ValueError as error:
        raise AdapterError(f"{path}: is not JSON: {error}") from error
    if _is_deeper(values, MAX_DEPTH):
        raise AdapterError(too_deep)
    return values


def _is_deeper(value: Any, levels: int) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return False
    return levels == 0 or any(_is_deeper(inner, levels - 1) for inner in value)


def read_object(path: Path, *, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON file of at most `limit` bytes that holds an object.

    Raises:
        AdapterError: As `read_json`, and if the file holds another kind of value.
    """
    values = read_json(path, limit=limit)
    if not isinstance(values, dict):
        raise AdapterError(f"{path}: is not a JSON object")
    return values


def read_section(
    values: dict[str, Any], kind: type[_Kind], path: Path, *, newest: int, inside: str = ""
) -> _Kind:
    """Return a JSON object as a section.

    Args:
        values: The object, as `read_object` returned it.
        kind: The class of the section.
        path: The file, for the message.
        newest: Highest `schema` that this version reads.
        inside: The key of the object in the file and a dot, for the message.

    Raises:
        AdapterError: If the schema is newer, or a field is missing, unknown or wrong.
    """
    schema = values.get("schema")
    if isinstance(schema, int) and schema > newest:
        raise AdapterError(
            f"{path}: {inside}schema is {schema}; this version reads up to {newest}; upgrade "
            "lora_sentiment"
        )
    try:
        return kind.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise AdapterError(f"{path}: {inside}{first_fault(error)}") from error
    except (RecursionError, OverflowError) as error:
        # A card's method may hold regular expressions. They are compiled, but never run.
        raise AdapterError(
            f"{path}: {inside} holds a pattern that cannot be compiled: {error}"
        ) from error


def first_fault(error: ValidationError) -> str:
    """Return the place of the first validation error and its message."""
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}"


def read_header(path: Path) -> Header:
    """Return the names, dtypes and shapes of a safetensors file without reading a tensor.

    safetensors itself checks that the tensors fill the file exactly.

    Raises:
        AdapterError: If the file is missing, a link out of its folder, or its header is too long or
            malformed.
    """
    header = {}
    try:
        with find_file(path.parent, path.name).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise AdapterError(
                f"{path}: cannot be read: its header takes {length:,} bytes; allowed: "
                f"{MAX_HEADER_BYTES:,}"
            )
        with safe_open(path, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - the file is not a mapping
                tensor = tensors.get_slice(name)
                header[name] = (str(tensor.get_dtype()), tuple(tensor.get_shape()))
    except (OSError, SafetensorError, ValueError) as error:
        raise AdapterError(f"{path}: cannot be read: {error}") from error
    return header


def read_task(folder: Path) -> Task:
    """Return the task of a whole model, as the `problem_type` in its `config.json` names it.

    Raises:
        AdapterError: As `read_object`, and if this package does not know the type, or the model has
            one label and no type: transformers trains it as a regression and answers a sigmoid.
    """
    path = folder / "config.json"
    config = read_object(path)
    problem_type = config.get("problem_type")
    task = find_task_of(problem_type)
    if task is None:
        known = ", ".join(str(known.problem_type) for known in TASKS)
        raise AdapterError(
            f"{path}: problem_type is {show(problem_type)}; this package answers for {known}; run "
            "this one with its own library"
        )
    labels = config.get("id2label", {})
    has_one = config.get("num_labels") == 1 or (isinstance(labels, dict) and len(labels) == 1)
    if has_one and problem_type is None:
        raise AdapterError(
            f"{path}: has one label and no problem_type, so whether its answer is a number or a "
            'probability is not known; write "problem_type": "regression" there if it is a number, '
            "or run it with its own library"
        )
    return task


def read_labels(folder: Path) -> tuple[str, ...]:
    """Return the label names in the `config.json` of a whole model, in order.

    Raises:
        AdapterError: As `read_object`, and if the labels are not numbered from 0.
    """
    path = folder / "config.json"
    # transformers leaves its own two names out.
    names = read_object(path).get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})
    numbers = [str(number) for number in range(len(names))] if isinstance(names, dict) else None
    if not isinstance(names, dict) or sorted(names) != sorted(numbers or ()):
        raise AdapterError(
            f"{path}: id2label is {str(names)[:100]}; allowed: an object with the keys 0, 1 and so "
            "on"
        )
    return tuple(str(names[number]) for number in numbers or ())


class ExplainLibraryError:
    """Context manager that turns the errors of other libraries for a file into AdapterError."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        expected = (
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RuntimeError,
            ImportError,
            StrictDataclassError,
        )
        # The tokenizers library raises Exception itself. Only a context manager can tell it from
        # its subclasses.
        if isinstance(error, expected) or type(error) is Exception:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise AdapterError(f"{self.path}: cannot be used: {reason}") from error
