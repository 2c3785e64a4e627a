"""Token ids on disk, mapped into memory: whole or not there, and made again where they are damaged.

They stand for the texts, so nobody but their owner may read them.
"""

import json
import logging
import mmap
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lora_sentiment.files import hash_file, take_place, write_json

log = logging.getLogger("lora_sentiment")

KEPT_DAYS = 30
"""Ids that no run has used for so long are removed when others are written."""
_IDS, _LENGTHS, _CARD = "input_ids.i4", "whole_lengths.i8", "card.json"

Part = tuple[NDArray[np.int32], NDArray[np.int64]]
"""The ids of rows, one row after another, and the tokens of each whole text."""


def cache_folder() -> Path:
    """Return where token ids are kept: beside the Hub's files, so that HF_HOME moves both."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "lora_sentiment" / "token_ids"


def keep_ids(key: str, make: Callable[[], Iterator[Part]]) -> Part | None:
    """Return the ids kept under a key, mapped; make and keep them where there are none.

    Two processes that make the same at once do not disturb each other: each writes aside, and the first to finish
    gives the folder its name.

    Args:
        key: Stands for all that decides the ids.
        make: Makes them, a part at a time.

    Returns:
        None where they cannot be kept, which is logged.
    """
    place = cache_folder() / key
    before = _identity(place)
    if found := _open(place):
        log.info("token ids of %s rows taken from %s", f"{len(found[1]):,}", place)
        return found
    aside = place.with_name(f".{secrets.token_hex(8)}")
    damaged = aside.with_suffix(".damaged")
    try:
        aside.mkdir(parents=True, mode=0o700)
        _remove_old(place.parent)
        _write(aside, make())
        if (
            before is not None and _identity(place) == before
        ):  # else another process made it again meanwhile
            place.rename(damaged)
        take_place(aside, place)
    except OSError as error:
        if _identity(place) in (None, before):  # else another process was quicker
            log.warning(
                "token ids cannot be kept in %s (%s): they stay in memory",
                place.parent,
                error.strerror,
            )
            return None
    finally:
        for left in (aside, damaged):
            shutil.rmtree(left, ignore_errors=True)
    return _open(place)


def _identity(place: Path) -> int | None:
    """Return the number that tells a folder from another one of its name; None where none can be seen."""
    try:
        return place.stat().st_ino
    except OSError:
        return None


def _write(folder: Path, parts: Iterator[Part]) -> None:
    for name in (_IDS, _LENGTHS, _CARD):
        (folder / name).touch(mode=0o600)
    with (folder / _IDS).open("wb") as ids_file, (folder / _LENGTHS).open("wb") as lengths_file:
        for ids, lengths in parts:
            ids_file.write(ids.astype("<i4").tobytes())
            lengths_file.write(lengths.astype("<i8").tobytes())
    write_json(folder / _CARD, {name: hash_file(folder / name) for name in (_IDS, _LENGTHS)})


def _open(place: Path) -> Part | None:
    """Map what is kept; None where nothing is, or where it is not what was written, which is logged."""
    if _identity(place) is None:
        return None
    try:
        written = json.loads((place / _CARD).read_text(encoding="utf-8"))
        if written != {name: hash_file(place / name) for name in (_IDS, _LENGTHS)}:
            raise ValueError("it is not what was written")
        with (place / _IDS).open("rb") as file:
            ids = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype="<i4")
        lengths = np.fromfile(place / _LENGTHS, dtype="<i8")
    except (OSError, ValueError) as error:
        log.warning("token ids in %s cannot be used (%s): made again", place, error)
        return None
    with suppress(OSError):  # what may not be written to here does not grow old either
        place.touch()
    return ids, lengths


def _remove_old(folder: Path) -> None:
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another run has renamed or removed it since
            if path.lstat().st_mtime < time.time() - KEPT_DAYS * 24 * 3600:
                shutil.rmtree(path, ignore_errors=True)
