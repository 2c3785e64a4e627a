"""What every section of a recipe shares: frozen, strict about types, no unknown keys, one line of doc per field."""

from difflib import get_close_matches
from reprlib import Repr
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Names = Annotated[tuple[str, ...], Field(strict=False)]
"""A YAML list of strings, kept as a tuple so that a frozen section holds nothing that can change."""


class Section(BaseModel):
    """One section of a recipe.

    Strict: `"8"` is no integer and `true` is no number, because a recipe that says something else than it means
    costs hours. The docstring under each field becomes its description in the JSON schema.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


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
