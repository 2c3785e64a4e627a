"""Files whose bytes repeat, folders that appear whole, and locks."""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError

from lora_sentiment.errors import AdapterError


def write_json(path: Path, values: Any) -> None:
    """Write JSON with sorted keys, so that bytes repeat."""
    path.write_text(
        json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def hash_file(path: Path) -> str:
    """Return a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def take_place(aside: Path, place: Path, *, replaced: Path | None = None) -> None:
    """Sync a folder and all that it holds to disk, then rename it to its place.

    Args:
        aside: The folder.
        place: Its place.
        replaced: What stands in the place is renamed to this in the moment before; without it nothing may stand there.
    """
    for path in aside.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(aside)
    if replaced and place.exists():
        place.rename(replaced)
    aside.rename(place)
    sync_folder(place.parent)


@contextmanager
def write_aside(out: Path) -> Iterator[Path]:
    """Yield a new empty folder beside `out`. At the end of the block, rename it to `out`.

    If the block raises, nothing is left behind.

    Raises:
        AdapterError: If `out` exists, or cannot be written.
    """
    if out.exists() or out.is_symlink():
        raise AdapterError(f"{out}: exists; name another folder, or remove it first")
    created = [parent for parent in out.absolute().parents if not parent.exists()]
    aside = out.with_name(f"{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        aside.mkdir(parents=True)
        yield aside
        if out.exists():
            raise AdapterError(
                f"{out}: was written by another process meanwhile; name another folder"
            )
        take_place(aside, out)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{out}: cannot be written: {error}") from error
    finally:
        if aside.exists():
            shutil.rmtree(aside)
        for parent in created:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


def publish(aside: Path, folder: Path, *, overwrite: bool) -> None:
    """Rename a finished folder to its final place, after syncing every file.

    Args:
        aside: The finished folder, inside the folder of the run.
        folder: The final place. A folder that exists there is moved beside `aside`, and deleted last.
        overwrite: Whether an existing folder may be replaced.

    Raises:
        AdapterError: If the folder exists and must not be replaced.
    """
    if folder.exists() and not overwrite:
        raise AdapterError(f"{folder}: exists; the finished adapter stays in {aside}; move it")
    replaced = aside.with_name("replaced")
    take_place(aside, folder, replaced=replaced)
    if replaced.exists():
        shutil.rmtree(replaced)


def sync_folder(folder: Path) -> None:
    """Sync a folder's own list of names to disk, where a folder can be opened."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Hold a file lock. The file is made for the lock and removed at the end.

    Raises:
        Timeout: If another process holds the lock; this function does not wait.
        OSError: If the file cannot be made.
    """
    with FileLock(path, blocking=False):
        try:
            yield
        finally:
            if os.name == "posix":
                # filelock leaves the file there, and detects that another process has removed it.
                path.unlink(missing_ok=True)
