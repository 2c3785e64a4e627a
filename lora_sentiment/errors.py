"""Everything this package raises on purpose.

    LoraSentimentError
    ├── RecipeError       a recipe file, an override or a launch setting
    ├── DataError         a file, a Hub data set, a row, a label
    ├── ModelError        a base checkpoint, a method or a speed path that does not fit it
    ├── TrainingError     a run that cannot go on
    │   ├── DivergedError  a loss, a gradient or a logit is not finite
    │   └── StoppedError   a signal stopped the run after it saved a checkpoint
    └── AdapterError      a saved folder that is incomplete, altered or made for another base

A message says what was found, where, what is allowed and what to do. The command line shows it
without a traceback.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from reprlib import Repr


class LoraSentimentError(Exception):
    """Base class of every error that this package raises on purpose.

    A recipe key has its name in a recipe, and another one, or none, as an option of a command. So
    the message names no key that some command cannot set. It is complete with `tell`, or as `str`
    with the names of a recipe.

    Attributes:
        message: What was found, where, what is allowed and what to do.
        key: The recipe key of the value that the message begins with, or None.
        advice: Recipe key to what follows the message where that key can be set. `{}` stands for
            its name, as in `, or set {}=drop`.
    """

    def __init__(
        self,
        message: str = "",
        *,
        key: str | None = None,
        advice: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.key = key
        self.advice = dict(advice or {})

    def __str__(self) -> str:
        return self.tell({key: key for key in (self.key, *self.advice) if key})

    def tell(self, names: Mapping[str, str]) -> str:
        """Return the message with the names of the keys that a command can set.

        Args:
            names: Recipe key to its name in the command.
        """
        text = self.message
        if self.key is not None and self.key in names:
            text = f"{names[self.key]} {text}"
        for key, phrase in self.advice.items():
            if key in names:
                text += phrase.replace("{}", names[key])
        return text


class RecipeError(LoraSentimentError):
    """A recipe file, an override or a launch setting is wrong.

    Attributes:
        faults: The mistakes, one line each. The message is all of them.
    """

    def __init__(self, *faults: str) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


class DataError(LoraSentimentError):
    """A file, a Hub data set, a row or a label is wrong.

    Attributes:
        rows: The first row of each kind of fault; empty where no row is wrong.
    """

    def __init__(
        self,
        message: str,
        *,
        rows: Iterable[int] = (),
        key: str | None = None,
        advice: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, key=key, advice=advice)
        self.rows = list(rows)


class ModelError(LoraSentimentError):
    """A base checkpoint cannot be used, or a method or speed path does not fit it."""


class TrainingError(LoraSentimentError):
    """A training run cannot go on."""


class DivergedError(TrainingError):
    """A loss, a gradient or a logit is not finite."""


class StoppedError(TrainingError):
    """A signal stopped a training run after it saved a checkpoint."""


class AdapterError(LoraSentimentError):
    """A saved adapter folder is incomplete, altered or made for another base."""


DRAWING_FAULTS = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What matplotlib raises: for values, sizes, texts, fonts, LaTeX, files and memory, and for an
installation or a setting that it cannot be imported or drawn with."""
_STEERING = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters of ASCII and Latin-1, and marks of the writing direction."""
_REPR = Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80
_REPR.maxlevel = 3


def show(value: object) -> str:
    """Return the repr of a value. A long one is cut in the middle, and never made in full."""
    return _REPR.repr(value)


def one_line(text: str, *, limit: int | None = None) -> str:
    """Return a text as it may stand in a line: a label may hold anything.

    Blanks of any kind become one. A character that steers a terminal, or turns the direction of the
    line, becomes U+FFFD.

    Args:
        text: The text.
        limit: Most characters. A longer text is cut.
    """
    line = _STEERING.sub("\N{REPLACEMENT CHARACTER}", " ".join(text.split()))
    if limit is None or len(line) <= limit:
        return line
    return f"{line[: limit - 3]}..."


def show_names(names: Sequence[str], *, most: int = 20) -> str:
    """Return the first of many names in a line, and the number of the others."""
    shown = [one_line(name, limit=40) for name in names[:most]]
    if len(names) > most:
        shown.append(f"and {len(names) - most:,} more")
    return ", ".join(shown)


def did_you_mean(name: str, allowed: list[str]) -> str:
    """Return `"; did you mean 'x'?"` for the closest allowed name, or an empty string."""
    close = get_close_matches(name, allowed, n=1)
    if not close:
        return ""
    return f"; did you mean {close[0]!r}?"
