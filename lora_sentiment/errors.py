"""Everything this package raises on purpose.

    LoraSentimentError
    ├── RecipeError      a recipe file, an override or a launch setting
    ├── DataError        a file, a Hub data set, a row, a label
    ├── ModelError       a base checkpoint, a method that does not fit it, a speed path that cannot run
    ├── TrainingError    a run that cannot go on, such as a loss that is not finite
    │   └── StoppedError a run that was told to stop, and saved first
    └── AdapterError     a saved folder that is incomplete, altered or made for another base

A message says what was found, where, what is allowed and what to do. The command line shows it without a traceback.
"""

from difflib import get_close_matches
from reprlib import Repr


class LoraSentimentError(Exception):
    """The root of every error that this package raises on purpose."""


class RecipeError(LoraSentimentError):
    """A recipe file, an override or a launch setting is wrong."""


class DataError(LoraSentimentError):
    """A file, a Hub data set, a row or a label is wrong."""


class ModelError(LoraSentimentError):
    """A base checkpoint cannot be used, or a method or speed path does not fit it."""


class TrainingError(LoraSentimentError):
    """A training run cannot go on."""


class StoppedError(TrainingError):
    """A training run was told to stop by a signal; it is saved and goes on when it is started again."""


class AdapterError(LoraSentimentError):
    """A saved adapter folder is incomplete, altered or made for another base."""


_REPR = Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80
_REPR.maxlevel = 3


def show(found: object) -> str:
    """Return the repr of what was found, cut in the middle where it is long, without making all of it first."""
    return _REPR.repr(found)


def did_you_mean(found: str, allowed: list[str]) -> str:
    """Return `"; did you mean 'x'?"` for the closest allowed name, or an empty string."""
    close = get_close_matches(found, allowed, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
