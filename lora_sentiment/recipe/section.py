"""Base class of a recipe's sections."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Names = Annotated[tuple[str, ...], Field(strict=False)]
"""A YAML list of strings, kept as a tuple because a frozen section holds nothing that can
change."""


class Section(BaseModel):
    """One section of a recipe: frozen, without unknown keys, strict about types.

    Strict: `"8"` is no integer and `true` is no number. The docstring under each field becomes its
    description in the JSON schema.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
