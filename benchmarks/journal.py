"""The finished measurements of a script: a JSON-lines file that a killed script goes on from."""

import json
import os
from collections.abc import Callable, Hashable
from operator import itemgetter
from pathlib import Path
from typing import Any

Line = dict[str, Any]
"""One finished measurement."""


class Journal:
    """The finished lines of a file, by key.

    Attributes:
        lines: Key to line, in the order in which they were finished.
    """

    def __init__(self, path: Path, *, key: Callable[[Line], Hashable] = itemgetter("key")) -> None:
        self._path, self._key = path, key
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        whole, _, torn = text.rpartition("\n")
        if torn:
            # Killed in the middle of a line: that one is measured again.
            path.write_text(f"{whole}\n" if whole else "", encoding="utf-8")
        lines = map(json.loads, filter(None, whole.split("\n")))
        self.lines: dict[Hashable, Line] = {key(line): line for line in lines}

    def append(self, line: Line) -> None:
        """Write a finished line before anything else is begun."""
        self.lines[self._key(line)] = line
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
