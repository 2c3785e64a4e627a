"""The recipe's `output` section."""

from pathlib import Path

from pydantic import field_validator

from lora_sentiment.errors import show
from lora_sentiment.recipe.section import Section


class OutputConfig(Section):
    """The folder that a run writes."""

    dir: str | None = None
    """Adapter folder to write; by default adapters/<name>."""

    @field_validator("dir")
    @classmethod
    def _dir_has_a_name(cls, folder: str | None) -> str | None:
        if folder is not None and Path(folder).name in ("", ".."):
            raise ValueError(
                f"found {show(folder)}; allowed: a folder with a name of its own, such as "
                f"adapters/mine"
            )
        # A run appends to the last name, and most file systems end at 255 bytes.
        if folder is not None and ("\0" in folder or len(Path(folder).name.encode()) > 200):
            raise ValueError(
                f"found {show(folder)}; allowed: a name without NUL, of at most 200 bytes"
            )
        return folder

    overwrite: bool = False
    """Replace an existing adapter folder; otherwise it is refused before anything is loaded."""
