"""Token ids on disk, memory-mapped. A damaged or unfinished folder is made again.

Token ids stand for the texts, so only their owner may read them.
"""

import json
import logging
import mmap
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lora_sentiment.files import hash_file, lock_file, replace_atomically, write_json

log = logging.getLogger("lora_sentiment")

KEPT_DAYS = 30
"""Ids that no run has used for this many days are removed when others are written."""
IDS = "input_ids.i4"
LENGTHS = "whole_lengths.i8"
CARD = "card.json"
"""SHA-256 of the two other files."""

Part = tuple[NDArray[np.int32], NDArray[np.int64]]
"""The ids of rows, one row after another, and the number of tokens of each whole text."""


def cache_folder() -> Path:
    """Return the folder of all token ids. It lies beside the Hub's files, so HF_HOME moves both."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "lora_sentiment" / "token_ids"


def keep_ids(key: str, make: Callable[[], Iterator[Part]]) -> Part | None:
    """Return the ids kept under a key, mapped. Make and keep them if there are none.

    A process that needs ids which another process is making waits for them.

    Args:
        key: A hash of everything that decides the ids.
        make: Makes them, some rows at a time.

    Returns:
        None if they cannot be kept, which is logged.
    """
    folder = cache_folder()
    place = folder / key
    try:
        ids = _open(place)
        if ids is not None:
            return ids
        is_damaged = place.exists()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with lock_file(folder / f".{key}.lock", wait=True):
            if not is_damaged:
                ids = _open(place)  # another process may have made them
            if ids is None:
                _remove_old(folder)
                _write(place, make)
                ids = _open(place)
        return ids
    except OSError as error:
        log.warning(
            "token ids cannot be kept in %s (%s): they stay in memory", folder, error.strerror
        )
        return None


def _write(place: Path, make: Callable[[], Iterator[Part]]) -> None:
    unfinished = place.with_name(f".{place.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(mode=0o700)
    try:
        for name in (IDS, LENGTHS, CARD):
            (unfinished / name).touch(mode=0o600)
        with (
            (unfinished / IDS).open("wb") as ids_file,
            (unfinished / LENGTHS).open("wb") as lengths_file,
        ):
            for ids, lengths in make():
                ids_file.write(ids.astype("<i4").tobytes())
                lengths_file.write(lengths.astype("<i8").tobytes())
        write_json(unfinished / CARD, _hash_files(unfinished))
        shutil.rmtree(place, ignore_errors=True)
        replace_atomically(unfinished, place)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _open(place: Path) -> Part | None:
    """Map kept ids. None means that there are none, or that they are damaged, which is logged."""
    if not place.exists():
        return None
    try:
        card = json.loads((place / CARD).read_text(encoding="utf-8"))
        if card != _hash_files(place):
            raise ValueError("a file differs from what was written")
        with (place / IDS).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        lengths = np.fromfile(place / LENGTHS, dtype="<i8")
    except (OSError, ValueError) as error:
        log.warning("token ids in %s cannot be used (%s): made again", place, error)
        return None
    with suppress(OSError):  # a folder that cannot be written to is not removed either
        place.touch()
    log.info("token ids of %s rows are in %s", f"{len(lengths):,}", place)
    return np.frombuffer(mapped, dtype="<i4"), lengths


def _hash_files(folder: Path) -> dict[str, str]:
    return {name: hash_file(folder / name) for name in (IDS, LENGTHS)}


def _remove_old(folder: Path) -> None:
    oldest = time.time() - KEPT_DAYS * 24 * 3600
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another process has removed it
            if path.lstat().st_mtime < oldest:
                shutil.rmtree(path, ignore_errors=True)
