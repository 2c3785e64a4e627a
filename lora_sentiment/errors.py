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

from collections.abc import Iterable
from difflib import get_close_matches
from reprlib import Repr


class LoraSentimentError(Exception):
    """Base class of every error that this package raises on purpose."""


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

    def __init__(self, message: str, *, rows: Iterable[int] = ()) -> None:
        super().__init__(message)
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


_REPR = Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80
_REPR.maxlevel = 3


def show(value: object) -> str:
    """Return the repr of a value. A long one is cut in the middle, and never made in full."""
    return _REPR.repr(value)


def did_you_mean(name: str, allowed: list[str]) -> str:
    """Return `"; did you mean 'x'?"` for the closest allowed name, or an empty string."""
    close = get_close_matches(name, allowed, n=1, cutoff=0.5)
    if not close:
        return ""
    return f"; did you mean {close[0]!r}?"
