"""The recipe's `data` section."""

import codecs
from typing import Literal

from pydantic import Field, field_validator

from lora_sentiment.section import Names, Section, did_you_mean

SPLITS = ("train", "validation", "test")


class DataConfig(Section):
    """Which texts and labels, how they are cleaned, and how they are split."""

    source: str | dict[str, str]
    """Hub data set, file, glob, or {train: .., validation: .., test: ..} of files."""
    config: str | None = None
    """Configuration of the Hub data set."""
    revision: str | None = None
    """Revision of the Hub data set."""
    text_column: str = "text"
    """Column that holds the text."""
    label_column: str = "label"
    """Column that holds the label, as text or as an integer."""
    labels: Names | None = None
    """Label names in order; by default the data set's own, else sorted (integers numerically)."""
    clean: bool = True
    """Turn HTML line breaks and entities into text, drop control characters, collapse blanks; all of it counted."""
    encoding: str = "utf-8"
    """Encoding of text files; a byte-order mark is accepted."""
    on_bad_row: Literal["error", "drop"] = "error"
    """What to do with an empty text or an unknown label; `drop` counts and shows them."""
    validation_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of train carved out for validation when there is no validation split; stratified."""
    test_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of train carved out for test when there is no test split; 0 means no test."""
    split_seed: int = Field(0, ge=0)
    """Seed of the carve and of the row samples, apart from train.seed: another seed trains on the same rows."""
    max_train_rows: int | None = Field(None, ge=2)
    """Use a stratified sample of this many rows of the train split (the validation carve included)."""
    max_test_rows: int | None = Field(None, ge=1)
    """Use a stratified sample of this many rows of the test split."""

    @field_validator("source")
    @classmethod
    def _splits_are_known(cls, source: str | dict[str, str]) -> str | dict[str, str]:
        if not source:
            raise ValueError("is empty; name a Hub data set, a file, a glob, or {train: .., test: ..}")
        if isinstance(source, dict):
            for split in source:
                if split not in SPLITS:
                    hint = did_you_mean(split, list(SPLITS))
                    raise ValueError(f"found split {split!r}; allowed: {', '.join(SPLITS)}{hint}")
            if "train" not in source:
                raise ValueError("has no 'train'; a source by splits names at least train")
        return source

    @field_validator("encoding")
    @classmethod
    def _encoding_exists(cls, encoding: str) -> str:
        try:
            codecs.lookup(encoding)
        except LookupError:
            raise ValueError(f"found {encoding!r}; allowed: a text encoding, such as utf-8, cp1252, latin-1") from None
        return encoding

    @field_validator("labels")
    @classmethod
    def _labels_differ(cls, labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if labels is not None and (len(labels) < 2 or len(set(labels)) != len(labels)):
            raise ValueError(f"found {list(labels)}; allowed: two or more names, each once")
        return labels
