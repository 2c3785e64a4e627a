"""Files whose bytes repeat, and folders that appear whole: JSON with sorted keys, hashes, one synced rename."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, values: Any) -> None:
    """Write JSON with sorted keys, so that bytes repeat."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def hash_file(path: Path) -> str:
    """Return a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def take_place(aside: Path, place: Path) -> None:
    """Sync every file of a folder to disk, then rename it to its place."""
    for path in aside.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    aside.rename(place)
    if os.name == "posix":
        handle = os.open(place.parent, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
