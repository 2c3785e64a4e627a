"""What every section of a recipe shares: frozen, strict about types, no unknown keys, one line of doc per field."""

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
