"""Texts on disk: one unnamed, memory-mapped file, and where each text lies in it.

A text is a string. With `data.text_pair_column` it is a pair of strings.
"""

import mmap
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from lora_sentiment.errors import DataError

Text = str | tuple[str, str]
"""A text, or a pair of texts."""
_CHUNK = 1000
"""Texts that an iteration holds in memory at a time."""


def encode_text(text: str) -> bytes:
    """Return a text in UTF-8. Lone surrogates are kept."""
    return text.encode("utf-8", "surrogatepass")


def split_text(text: Text) -> tuple[str, ...]:
    """Return the parts of a text: itself, or the two of a pair."""
    return (text,) if isinstance(text, str) else text


def hash_texts(digest: Any, texts: Iterable[Text]) -> str:
    """Add texts to a hash and return its hexadecimal digest."""
    for text in texts:
        for part in split_text(text):
            digest.update(encode_text(f"{len(part)}:{part}"))
    return str(digest.hexdigest())


def release_pages(mapped: object) -> None:
    """Give the pages of a memory-mapped file back to the system. Other objects are ignored.

    Pages that were read count as memory of this process until another process needs the room, so a
    pass over a whole file would show as a peak.
    """
    owner = mapped.obj if isinstance(mapped, memoryview) else mapped
    if isinstance(owner, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        owner.madvise(mmap.MADV_DONTNEED)


class Texts(Sequence[Text]):
    """A sequence of texts in a memory-mapped file. Subsets share the file.

    Args:
        mapped: The bytes of the file, texts in UTF-8.
        starts: Where each text begins, shape (num_texts,), or (num_texts, 2) of pairs.
        ends: Where each text ends, same shape.
    """

    def __init__(
        self, mapped: mmap.mmap, starts: NDArray[np.int64], ends: NDArray[np.int64]
    ) -> None:
        self._mapped = mapped
        self._starts = starts
        self._ends = ends

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> Text: ...
    @overload
    def __getitem__(self, index: slice) -> list[Text]: ...
    def __getitem__(self, index: int | slice) -> Text | list[Text]:
        if isinstance(index, slice):
            texts = [self[i] for i in range(*index.indices(len(self)))]
            release_pages(self._mapped)
            return texts
        if self._starts.ndim == 1:
            return self._read(self._starts[index], self._ends[index])
        (start, pair_start), (end, pair_end) = self._starts[index], self._ends[index]
        return self._read(start, end), self._read(pair_start, pair_end)

    def _read(self, start: int, end: int) -> str:
        return self._mapped[start:end].decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[Text]:
        for start in range(0, len(self), _CHUNK):
            yield from self[start : start + _CHUNK]

    def take(self, index: NDArray[np.int64]) -> "Texts":
        """Return the texts at these positions, in this order."""
        return Texts(self._mapped, self._starts[index], self._ends[index])


def store_texts(texts: Iterable[str], *, are_pairs: bool = False) -> Texts:
    """Write texts to a file without a name. The system deletes it with the last of its `Texts`.

    Args:
        texts: The texts, or of each pair its first and then its second text.
        are_pairs: Whether two texts are a pair.

    Raises:
        DataError: The file cannot be written.
    """
    # One byte, because an empty file cannot be mapped.
    boundaries = array("q", [1])
    try:
        with tempfile.TemporaryFile() as file:
            file.write(b"\n")
            for text in texts:
                length = file.write(encode_text(text))
                boundaries.append(boundaries[-1] + length)
            file.flush()
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        # tempfile.gettempdir() raises if there is no temporary folder, which may be the fault.
        where = f"{tempfile.tempdir}: " if tempfile.tempdir else ""
        raise DataError(
            f"{where}the texts cannot be written to a temporary file: {error.strerror or error}; "
            "free some room, or set TMPDIR to another folder"
        ) from error
    ends = np.array(boundaries, dtype=np.int64)
    starts, ends = ends[:-1], ends[1:]
    if are_pairs:
        starts, ends = starts.reshape(-1, 2), ends.reshape(-1, 2)
    return Texts(mapped, starts, ends)
