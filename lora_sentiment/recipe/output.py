"""The recipe's `output` section."""

from pathlib import Path

from pydantic import field_validator

from lora_sentiment.errors import show
from lora_sentiment.recipe.section import Section


class OutputConfig(Section):
    """The output folder of a run."""

    dir: str | None = None
    """Adapter folder to write. Default: adapters/<name>."""

    @field_validator("dir")
    @classmethod
    def _dir_has_a_name(cls, folder: str | None) -> str | None:
        if folder is not None and Path(folder).name in ("", ".."):
            raise ValueError(
                f"found {show(folder)}; allowed: a folder with a name, such as adapters/mine"
            )
        # A run appends to the last name, and most file systems allow 255 bytes.
        if folder is not None and ("\0" in folder or len(Path(folder).name.encode()) > 200):
            raise ValueError(
                f"found {show(folder)}; allowed: a name without NUL, of at most 200 bytes"
            )
        return folder

    overwrite: bool = False
    """Replace an existing adapter folder. If false, it is refused before anything is loaded."""
