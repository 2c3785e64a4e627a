"""The recipe's `data` section."""

import codecs
import re
from collections.abc import Iterable
from difflib import get_close_matches
from itertools import combinations
from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from lora_sentiment.errors import show
from lora_sentiment.recipe.section import Names, Section

SPLITS = ("train", "validation", "test")
"""Usual names of splits and roles."""
FROM_PYTHON = "rows from Python"
"""`data.source` of a run whose rows a Python program gave. Its blanks make it no name of the Hub."""
REPORT_BLOCKS = (
    "schema",
    "parameters",
    "train",
    "data",
    "quantisation",
    "seen_rows",
    "tokens",
    "offline",
    "parent",
)
"""Keys of report.json that are no role, and those that its `data` block had in older versions. No
role may have such a name, because each evaluated role is a key of report.json too."""


class DataConfig(Section):
    """Which texts and labels, how they are cleaned, and how they are split."""

    source: str | dict[str, str]
    """Hub data set, file, glob, files by role ({train: .., validation: .., test: ..}; see splits),
    `bundled`: the reviews that ship with the package, or `bundled-emotions`: its texts with
    emotions."""
    splits: dict[str, str] | None = None
    """Role to name of a split of the Hub data set: train, validation (otherwise carved out of
    train). Every other role is evaluated at the end."""
    config: str | None = None
    """Configuration of the Hub data set."""
    revision: str | None = None
    """Revision of the Hub data set."""
    task: Literal["single_label", "multi_label", "regression"] = "single_label"
    """What a label is: one of several names, any number of them, or a number."""
    text_column: str = "text"
    """Column that holds the text."""
    text_pair_column: str | None = None
    """Column that holds the second text of a pair, such as an answer to a question. The tokenizer
    joins the two, and the longer one is cut first."""
    label_column: str = "label"
    """Column that holds the label, as text or as an integer."""
    label_columns: Names | None = None
    """For multi_label: columns of 0 and 1, one for each label, whose names are the labels."""
    label_separator: str = ","
    """For multi_label: separates the labels in a cell of label_column. A cell that is a list of
    labels needs none."""
    labels: Names | None = None
    """Label names in order; by default those of the data set, otherwise sorted (integers
    numerically). Integers of a file stand for names only where the recipe or the data set orders
    them: 0 is the first."""
    clean: bool = True
    """Turn HTML line breaks and entities into text, remove control characters, collapse blanks.
    Each change is counted."""
    encoding: str = "utf-8"
    """Encoding of text files; a byte-order mark is accepted."""
    on_bad_row: Literal["error", "drop"] = "error"
    """What to do with an empty text or an unknown label. `drop` counts and reports such rows."""
    validation_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of train carved out for validation, stratified, if there is no validation split."""
    test_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of train carved out for test if there is no split to evaluate; 0 means no test."""
    calibration_fraction: float = Field(0.0, ge=0, lt=1)
    """For single_label: share of train carved out, after test and validation, to calibrate the label
    sets of `predict --coverage`; 0 means no label sets. These rows choose and train nothing."""
    split_seed: int = Field(0, ge=0)
    """Seed of the carved splits and of row samples. train.seed does not change which rows are
    used."""
    max_train_rows: int | None = Field(None, ge=2)
    """Use a stratified sample of this many rows of the train split, including rows carved out for
    validation."""
    max_test_rows: int | None = Field(None, ge=1)
    """Use a stratified sample of this many rows of each evaluated split."""

    @field_validator("source", mode="before")
    @classmethod
    def _source_is_no_list(cls, source: Any) -> Any:
        if isinstance(source, list):
            raise ValueError(
                f"found {show(source)}; name several files by a glob, such as 'data/*.csv', or by "
                "role: {train: .., test: ..}"
            )
        return source

    @field_validator("source")
    @classmethod
    def _splits_are_known(cls, source: str | dict[str, str]) -> str | dict[str, str]:
        if not source:
            raise ValueError(
                "is empty; name a Hub data set, a file, a glob, or {train: .., test: ..}"
            )
        if isinstance(source, dict):
            check_roles(source)
        return source

    @field_validator("splits")
    @classmethod
    def _roles_are_known(
        cls, splits: dict[str, str] | None, info: ValidationInfo
    ) -> dict[str, str] | None:
        if splits is None:
            return None
        if isinstance(info.data.get("source"), dict):
            raise ValueError(
                "names splits of a Hub data set, but data.source names files by role already; set "
                "data.splits=null"
            )
        check_roles(splits)
        names = list(splits.values())
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"found split {name!r} under two roles; allowed: each split once")
        return splits

    @field_validator("encoding")
    @classmethod
    def _encoding_exists(cls, encoding: str) -> str:
        try:
            codecs.lookup(encoding)
        except LookupError:
            raise ValueError(
                f"found {encoding!r}; allowed: a text encoding, such as utf-8, cp1252, latin-1"
            ) from None
        return encoding

    @field_validator("labels")
    @classmethod
    def _labels_differ(cls, labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if labels is not None and (len(labels) < 2 or len(set(labels)) != len(labels)):
            raise ValueError(f"found {list(labels)}; allowed: two or more names, each once")
        return labels

    @model_validator(mode="after")
    def _labels_fit_the_task(self) -> Self:
        if self.task != "multi_label" and self.label_columns is not None:
            raise ValueError("label_columns are columns of 0 and 1; set task=multi_label")
        if self.task != "multi_label" and self.label_separator != ",":
            raise ValueError(
                "label_separator is for several labels in a cell; set task=multi_label"
            )
        if self.task != "single_label" and self.calibration_fraction:
            raise ValueError(
                f"calibration_fraction is for label sets, which task {self.task} does not have; "
                "leave it out"
            )
        if self.task == "regression" and self.labels is not None:
            raise ValueError("task regression has numbers and no label names; leave out labels")
        if self.label_columns is None:
            return self
        if self.labels is not None:
            raise ValueError("label_columns name the labels; leave out labels")
        if len(set(self.label_columns)) != len(self.label_columns):
            raise ValueError(f"label_columns: found {list(self.label_columns)}; name each once")
        for column in self.text_cells:
            if column in self.label_columns:
                raise ValueError(f"the text's column {column!r} is among label_columns")
        return self

    @property
    def label_cells(self) -> tuple[str, ...]:
        """The columns that hold the labels."""
        return self.label_columns or (self.label_column,)

    @property
    def reads_pairs(self) -> bool:
        """Whether each row has a pair of texts."""
        return self.text_pair_column is not None

    @property
    def text_cells(self) -> tuple[str, ...]:
        """The columns that hold the text, or the two texts of a pair."""
        if self.text_pair_column is None:
            return (self.text_column,)
        return (self.text_column, self.text_pair_column)

    @model_validator(mode="after")
    def _columns_differ(self) -> Self:
        columns = {"text_column": self.text_column, "label_column": self.label_column}
        if self.text_pair_column is not None:
            columns["text_pair_column"] = self.text_pair_column
        for (key, column), (other_key, other) in combinations(columns.items(), 2):
            if column == other:
                raise ValueError(
                    f"{key} and {other_key} are both {column!r}; name the column of each"
                )
        return self


def check_roles(roles: Iterable[str]) -> None:
    """Refuse names that are no roles.

    Every name that is not in SPLITS is evaluated, so a misspelt name would go unnoticed.

    Raises:
        ValueError: A name is no role, or none is train.
    """
    for role in roles:
        if role in SPLITS:
            continue
        near = get_close_matches(role, SPLITS, n=1, cutoff=0.75)
        if role.startswith("val") and not near:
            near = ["validation"]
        if near and role.isalpha():
            raise ValueError(
                f"found split {role!r}; did you mean {near[0]!r}? If not, choose a name less like "
                "it"
            )
        if role in REPORT_BLOCKS or not re.fullmatch(r"[a-z][a-z0-9_]*", role):
            taken = ", ".join(name for name in REPORT_BLOCKS if name not in SPLITS)
            raise ValueError(
                f"found split {role!r}; allowed: {', '.join(SPLITS)}, or a name of your own for "
                f"rows to evaluate: small letters, digits and _, none of {taken}"
            )
    if "train" not in roles:
        raise ValueError("has no 'train'; splits by role name at least train")
