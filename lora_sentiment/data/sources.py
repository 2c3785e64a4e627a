"""Where the rows are: files or a Hub data set, their splits, and their two columns."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from lora_sentiment import bundled
from lora_sentiment.data.tables import FORMATS, read_table, table_columns
from lora_sentiment.errors import DataError, did_you_mean, show
from lora_sentiment.hub import explain_refusal, innermost
from lora_sentiment.recipe.data import SPLITS, DataConfig


@dataclass(frozen=True)
class Source:
    """Where the columns of each role come from.

    Attributes:
        files: Role to its files; empty where the Hub has them.
        hub_splits: Role to the name of its split on the Hub; empty where there are files.
        hub: Name of the Hub data set, or None.
    """

    files: dict[str, list[Path]]
    hub_splits: dict[str, str]
    hub: str | None = None

    @property
    def roles(self) -> tuple[str, ...]:
        """All roles, in the order that the recipe gives them."""
        return tuple(self.files or self.hub_splits)

    @property
    def judged(self) -> tuple[str, ...]:
        """The roles that are judged once, at the end: all but train and validation."""
        return tuple(role for role in self.roles if role not in ("train", "validation"))

    def where(self, role: str) -> str:
        """Return what messages call the rows of a role: the data set and split, or the files."""
        return (
            f"{self.hub} [{self.hub_splits[role]}]"
            if self.hub
            else ", ".join(map(str, self.files[role]))
        )


def find_source(config: DataConfig) -> Source:
    """Resolve `data.source` to roles without reading a row.

    Raises:
        DataError: If there is no such file, data set or split, or files are given a Hub data set's options.
    """
    if is_on_hub(config.source):
        return Source({}, _hub_splits(config), hub=str(config.source))
    for key in ("splits", "config", "revision"):
        if getattr(config, key) is not None:
            instead = (
                "; files by role are data.source={train: .., test: ..}" if key == "splits" else ""
            )
            raise DataError(
                f"data.{key}: found {getattr(config, key)!r}, but {config.source!r} are files{instead}"
            )
    if isinstance(config.source, dict):
        return Source({role: _files(pattern) for role, pattern in config.source.items()}, {})
    if config.source == bundled.NAME:
        return Source({role: [bundled.REVIEWS / f"{role}.jsonl"] for role in SPLITS}, {})
    return Source({"train": _files(config.source)}, {})


def is_on_hub(source: str | dict[str, str]) -> bool:
    """Return whether `data.source` names a Hub data set rather than files here."""
    return isinstance(source, str) and not looks_like_files(source)


def looks_like_files(source: str) -> bool:
    """Return whether a source that is no dict names files here rather than a Hub data set."""
    hub_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) and not source.endswith(tuple(FORMATS))
    return not hub_name or source.startswith(".") or source == bundled.NAME or Path(source).exists()


_HUB_PAGE = re.compile(
    r"(?:hf://|(?:https?://)?huggingface\.co/)datasets/([\w.-]+(?:/(?!(?:tree|blob|resolve|viewer)\b)[\w.-]+)?)"
)
"""What begins with the address of a data set, whose name ends before a revision (@) or the pages of its files."""


def _files(pattern: str) -> list[Path]:
    if re.match(r"[A-Za-z][\w+.-]*://|huggingface\.co/", pattern):
        page = _HUB_PAGE.match(pattern)
        instead = (
            f"name the data set: data.source={page[1]}"
            if page
            else "download the file and name it here"
        )
        raise DataError(f"data.source {show(pattern)}: addresses are not read; {instead}")
    pattern = os.path.expanduser(pattern)  # noqa: PTH111 - Path's raises where there is no such user
    # Not Path.glob, which refuses absolute patterns.
    paths = [Path(p) for p in sorted(glob(pattern, recursive=True))]  # noqa: PTH207
    if not paths and not has_magic(pattern):
        paths = [Path(pattern)]
    if not paths:
        raise DataError(f"data.source {pattern!r} matches no file")
    return paths


def check_files(config: DataConfig, source: Source) -> None:
    """Look at the header of every file, test included: a missing column must not show after an hour of training."""
    for path in [path for paths in source.files.values() for path in paths]:
        _check_columns(config, table_columns(path, encoding=config.encoding), str(path))


def _hub_splits(config: DataConfig) -> dict[str, str]:
    """Return role to name of a split of the Hub data set, in the order of `data.splits`."""
    from datasets import get_dataset_split_names

    with _ExplainHub(config):
        found = [
            str(name)
            for name in get_dataset_split_names(
                config.source, config.config, revision=config.revision
            )
        ]
    if config.splits is None and "train" not in found:
        raise DataError(
            f"data.source {config.source!r} has the splits {', '.join(found)}; training needs 'train', or name it: "
            "data.splits={train: ..}"
        )
    splits = config.splits or {split: split for split in SPLITS if split in found}
    for role, name in splits.items():
        if name not in found:
            key = "data.source" if role == name else f"data.splits.{role}"
            raise DataError(
                f"{key}: {config.source!r} has no split {name!r}; it has {', '.join(found)}{did_you_mean(name, found)}"
            )
    return splits


class _ExplainHub:
    """Turn what the Hub client and `datasets` raise for a data set into one line."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        from datasets.exceptions import DatasetsError
        from httpx2 import HTTPError
        from yaml import YAMLError

        if isinstance(
            error, (OSError, ValueError, HTTPError, DatasetsError, RuntimeError, YAMLError)
        ):
            name = str(self.config.source)
            refusal = explain_refusal(
                key="data.source", name=name, kind="dataset", revision=self.config.revision
            )
            raise DataError(refusal or f"data.source {name!r}: {_describe(error)}") from error


def _describe(error: BaseException) -> str:
    """Say what is wrong with a data set that the Hub does give."""
    said = " ".join(str(error).split())
    if "scripts are no longer supported" in said:
        return (
            f"is made by a script ({said.rpartition(' ')[2]}), and code from the Hub is never run; name a data set of "
            "parquet, csv or json files, or convert it to such files yourself"
        )
    if "Config name is missing" in said or "BuilderConfig" in said:
        return f"{said}; set data.config"
    if "doesn't contain any data files" in said:
        return "holds no data files; name one that does, or name files"
    return f"the Hub has it, but it cannot be read ({innermost(error)}); name another, a data.revision, or files"


_HUB_ROWS = 10_000
"""Rows that are taken at a time from the memory-mapped file where `datasets` keeps a split."""
Columns = Iterator[tuple[list[Any], list[Any]]]
"""Texts and label values, some rows at a time."""


def read_columns(
    config: DataConfig, source: Source, role: str
) -> tuple[Columns, tuple[str, ...] | None]:
    """Return the text and label columns of a role's rows, and the label names that the source itself states."""
    if source.hub:
        return _read_hub(config, source.hub_splits[role])
    batches = (
        batch for path in source.files[role] for batch in read_table(path, encoding=config.encoding)
    )
    return ((batch[config.text_column], batch[config.label_column]) for batch in batches), None


def _read_hub(config: DataConfig, split: str) -> tuple[Columns, tuple[str, ...] | None]:
    from datasets import ClassLabel, load_dataset

    with _ExplainHub(config):
        table = load_dataset(config.source, config.config, split=split, revision=config.revision)
    _check_columns(config, table.column_names, f"{config.source} [{split}]")
    feature = table.features[config.label_column]
    names = tuple(feature.names) if isinstance(feature, ClassLabel) else None
    columns = [config.text_column, config.label_column]
    batches = table.select_columns(columns).with_format("arrow").iter(_HUB_ROWS)
    return (
        (batch[columns[0]].to_pylist(), batch[columns[1]].to_pylist()) for batch in batches
    ), names


_MARKS = {";": "semicolons", "\t": "tabs", "|": "bars"}
"""What else may separate fields, where a whole header is one column."""


def _check_columns(config: DataConfig, columns: Sequence[str], where: str) -> None:
    for key in ("text_column", "label_column"):
        wanted = getattr(config, key)
        if wanted not in columns:
            hint = did_you_mean(wanted, list(columns))
            # Without a header, the first row of texts stands where the names should.
            shown = ", ".join(
                name if len(name) <= 40 else f"{name[:37]}..." for name in columns[:20]
            )
            headed = "" if hint else ", or give the file a first row of names if it has none"
            if len(columns) == 1 and (
                mark := next((mark for mark in _MARKS if mark in columns[0]), None)
            ):
                raise DataError(
                    f"{where}: no column {wanted!r}; its one column is {shown}; if {_MARKS[mark]} separate its fields, "
                    f"save it again: a .csv has commas, a .tsv tabs; else set data.{key}"
                )
            raise DataError(
                f"{where}: no column {wanted!r}; the columns are {shown}{hint}; set data.{key}{headed}"
            )
