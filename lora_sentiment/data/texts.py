"""Texts outside memory: one unnamed file, mapped, and where each text lies in it."""

import mmap
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from lora_sentiment.errors import DataError

_AT_ONCE = 1000
"""Texts that a pass over all of them holds at a time."""


def let_go(mapped: object) -> None:
    """Give the pages of a mapped file that were read back to the system; what is no mapping is left alone.

    They count as this process's memory until another needs the room, so a pass over a whole file would show as a peak.
    """
    owner = mapped.obj if isinstance(mapped, memoryview) else mapped
    if isinstance(owner, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        owner.madvise(mmap.MADV_DONTNEED)


class Texts(Sequence[str]):
    """A sequence of texts that lie in a mapped file; what is taken from it shares that file.

    Args:
        mapped: The file's bytes, texts in UTF-8.
        starts: Where each text begins in it, shape (num_texts,).
        ends: Where each text ends, same shape.
    """

    def __init__(
        self, mapped: mmap.mmap, starts: NDArray[np.int64], ends: NDArray[np.int64]
    ) -> None:
        self._mapped, self._starts, self._ends = mapped, starts, ends

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        if isinstance(at, slice):
            found = [self[i] for i in range(*at.indices(len(self)))]
            let_go(self._mapped)
            return found
        return self._mapped[self._starts[at] : self._ends[at]].decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _AT_ONCE):
            yield from self[start : start + _AT_ONCE]

    def take(self, index: NDArray[np.int64]) -> "Texts":
        """Return the texts at these positions, in this order."""
        return Texts(self._mapped, self._starts[index], self._ends[index])


class TextsWriter:
    """Writes texts to a file without a name, which is gone with the last of its `Texts`, however the process ends."""

    def __init__(self) -> None:
        self._ends = array("q", [1])
        try:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the texts do
            self._file.write(b"\n")  # an empty file cannot be mapped
        except OSError as error:
            raise self._fault(error) from error

    def write(self, text: str) -> None:
        """Add a text.

        Raises:
            DataError: If there is no room.
        """
        content = text.encode("utf-8", "surrogatepass")
        try:
            self._file.write(content)
        except OSError as error:
            raise self._fault(error) from error
        self._ends.append(self._ends[-1] + len(content))

    def finish(self) -> Texts:
        """Return all that was written; nothing can be added then.

        Raises:
            DataError: If there is no room.
        """
        try:
            with self._file:  # closing writes too, and fails where writing did
                self._file.flush()
                mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise self._fault(error) from error
        ends = np.array(self._ends, dtype=np.int64)
        return Texts(mapped, ends[:-1], ends[1:])

    @staticmethod
    def _fault(error: OSError) -> DataError:
        # gettempdir raises where there is no such folder, which is what may have to be said here.
        where = f"{tempfile.tempdir}: " if tempfile.tempdir else ""
        return DataError(
            f"{where}the texts that were read cannot be put into a temporary file: {error.strerror or error}; free "
            "some room, or set TMPDIR to another folder"
        )
