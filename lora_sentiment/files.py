"""Write repeatable JSON, hash files, replace files and folders atomically, lock files."""

import errno
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

from lora_sentiment.errors import AdapterError, DataError

LFS_FAULT = "is a Git LFS pointer, not the file itself; fetch the file, as by git lfs pull"
"""The fault of a file for which `is_lfs_pointer` is true."""


def write_json(path: Path, values: Any) -> None:
    """Write JSON with sorted keys, so that equal values give equal bytes."""
    path.write_text(
        json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def hash_file(path: Path) -> str:
    """Return a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_lfs_pointer(path: Path) -> bool:
    """Return whether a file is the pointer that git leaves where Git LFS is not installed."""
    with path.open("rb") as file:
        return file.read(40).startswith(b"version https://git-lfs.github.com/spec/")


def check_new_file(path: Path) -> None:
    """Refuse the place of a new file, before there is work to lose.

    Raises:
        DataError: The file exists, or its folder does not.
    """
    if path.exists():
        raise DataError(f"{path}: exists already; give another name")
    if not path.parent.is_dir():
        raise DataError(f"{path}: there is no folder {path.parent}; make it first")


def replace_atomically(unfinished: Path, place: Path, *, replaced: Path | None = None) -> None:
    """Sync a finished file or folder to disk, then rename it to its place.

    Args:
        unfinished: The file or folder.
        place: Its place. A file there is replaced.
        replaced: A folder at the place is first renamed to this. If None, no folder may be there.
    """
    for path in unfinished.rglob("*"):
        sync(path)
    sync(unfinished)
    if replaced and place.exists():
        place.rename(replaced)
    unfinished.replace(place)
    sync(place.parent)


def sync(path: Path) -> None:
    """Sync a file, or the list of names of a folder, to disk. Only POSIX can sync a folder."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def write_aside(out: Path) -> Iterator[Path]:
    """Yield a new empty folder beside `out`. At the end of the block, rename it to `out`.

    If the block raises, nothing is left behind.

    Raises:
        AdapterError: `out` exists or cannot be written.
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
        replace_atomically(aside, out)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{out}: cannot be written: {error}") from error
    finally:
        if aside.exists():
            shutil.rmtree(aside)
        for parent in created:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


@contextmanager
def write_file_aside(path: Path, *, folder: Path | None = None) -> Iterator[Path]:
    """Yield the path of a new file. At the end of the block, rename it to `path`.

    If the block raises, `path` is as it was.

    Args:
        path: The file. The target of a link is replaced, not the link.
        folder: Where the new file is written; by default beside `path`.

    Raises:
        FileExistsError: `path` is there and is no regular file, such as a device.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "exists and is no regular file", str(path))
    aside = (folder or path.parent) / f".{secrets.token_hex(8)}{path.suffix}"
    try:
        yield aside
        replace_atomically(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def publish(aside: Path, folder: Path, *, overwrite: bool) -> None:
    """Rename a finished folder to its final place, after syncing every file.

    Args:
        aside: The finished folder, inside the folder of the run.
        folder: The final place. A folder that exists there is moved beside `aside`, and deleted
            last.
        overwrite: Whether an existing folder may be replaced.

    Raises:
        AdapterError: The folder exists and must not be replaced.
    """
    if folder.exists() and not overwrite:
        raise AdapterError(f"{folder}: exists; the finished adapter stays in {aside}; move it")
    replaced = aside.with_name("replaced")
    replace_atomically(aside, folder, replaced=replaced)
    if replaced.exists():
        shutil.rmtree(replaced)


@contextmanager
def lock_file(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a file lock. The file is made for the lock and removed at the end.

    Args:
        path: The file.
        wait: Whether to wait until no other process holds the lock.

    Raises:
        Timeout: Another process holds the lock, and `wait` is False.
        OSError: The file cannot be made.
    """
    with FileLock(path, blocking=wait):
        try:
            yield
        finally:
            if os.name == "posix":
                # filelock leaves the file there, and detects that another process has removed it.
                path.unlink(missing_ok=True)
