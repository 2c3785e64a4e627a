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
