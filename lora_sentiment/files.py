"""Files whose bytes repeat: JSON with sorted keys, and hashes."""

import hashlib
import json
from pathlib import Path
from typing import Any


def write_json(path: Path, values: Any) -> None:
    """Write JSON with sorted keys, so that bytes repeat."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def hash_file(path: Path) -> str:
    """Return a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
