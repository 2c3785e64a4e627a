"""Where the rows are: files or a Hub data set, their splits, and their two columns."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from lora_sentiment.data.config import SPLITS, DataConfig
from lora_sentiment.data.tables import FORMATS, read_table, table_columns
from lora_sentiment.errors import DataError
from lora_sentiment.section import did_you_mean


@dataclass(frozen=True)
class Source:
    """Where each split's columns come from.

    Attributes:
        splits: Split to its files; no files where the Hub has them.
        hub: Name of the Hub data set, or None.
    """

    splits: dict[str, list[Path]]
    hub: str | None = None

    def where(self, split: str) -> str:
        """Return what messages call a split: the data set and split, or the files."""
        return f"{self.hub} [{split}]" if self.hub else ", ".join(map(str, self.splits[split]))


def find_source(config: DataConfig) -> Source:
    """Resolve `data.source` to splits without reading a row.

    Raises:
        DataError: If there is no such file or data set, or files are given a Hub data set's options.
    """
    if isinstance(config.source, str) and not looks_like_files(config.source):
        return Source({split: [] for split in _hub_splits(config)}, hub=config.source)
    for key in ("config", "revision"):
        if getattr(config, key) is not None:
            raise DataError(f"data.{key}: found {getattr(config, key)!r}, but {config.source!r} are files")
    if isinstance(config.source, dict):
        return Source({split: _files(config.source[split]) for split in SPLITS if split in config.source})
    return Source({"train": _files(config.source)})


def looks_like_files(source: str) -> bool:
    """Return whether a source names files here rather than a Hub data set."""
    hub_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) and not source.endswith(tuple(FORMATS))
    return not hub_name or Path(source).exists()


def _files(pattern: str) -> list[Path]:
    # Not Path.glob, which refuses absolute patterns.
    paths = [Path(p) for p in sorted(glob(pattern, recursive=True))]  # noqa: PTH207
    if not paths and not has_magic(pattern):
        paths = [Path(pattern)]
    if not paths:
        raise DataError(f"data.source {pattern!r} matches no file")
    return paths


def check_files(config: DataConfig, source: Source) -> None:
    """Look at the header of every file, test included: a missing column must not show after an hour of training."""
    for path in [path for paths in source.splits.values() for path in paths]:
        _check_columns(config, table_columns(path, encoding=config.encoding), str(path))


def _hub_splits(config: DataConfig) -> list[str]:
    from datasets import get_dataset_split_names

    with _ExplainHub(config):
        found = get_dataset_split_names(config.source, config.config, revision=config.revision)
    if "train" not in found:
        raise DataError(
            f"data.source {config.source!r} has the splits {', '.join(map(str, found))}; training needs 'train'"
        )
    return [split for split in SPLITS if split in found]


class _ExplainHub:
    """Turn what the Hub client and `datasets` raise for a data set into one line."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        from datasets.exceptions import DatasetsError
        from huggingface_hub.errors import HfHubHTTPError

        if isinstance(error, (OSError, ValueError, HfHubHTTPError, DatasetsError, RuntimeError)) and not isinstance(
            error, DataError
        ):
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise DataError(
                f"data.source {self.config.source!r} is no file here and could not be had from the Hub: {reason}; "
                "check name and connection, or name files"
            ) from error


def read_columns(config: DataConfig, source: Source, split: str) -> tuple[list[Any], list[Any], tuple[str, ...] | None]:
    """Return the text and label columns of a split, and the label names that the source itself states."""
    texts: list[Any] = []
    values: list[Any] = []
    if source.hub:
        return _read_hub(config, split)
    for path in source.splits[split]:
        for batch in read_table(path, encoding=config.encoding):
            texts += batch[config.text_column]
            values += batch[config.label_column]
    if not texts:
        raise DataError(f"{source.where(split)}: has no rows")
    return texts, values, None


def _read_hub(config: DataConfig, split: str) -> tuple[list[Any], list[Any], tuple[str, ...] | None]:
    from datasets import ClassLabel, load_dataset

    with _ExplainHub(config):
        table = load_dataset(config.source, config.config, split=split, revision=config.revision)
    _check_columns(config, table.column_names, f"{config.source} [{split}]")
    feature = table.features[config.label_column]
    names = tuple(feature.names) if isinstance(feature, ClassLabel) else None
    columns = table.select_columns([config.text_column, config.label_column]).with_format("arrow")[:]
    return columns[config.text_column].to_pylist(), columns[config.label_column].to_pylist(), names


def _check_columns(config: DataConfig, columns: Sequence[str], where: str) -> None:
    for key in ("text_column", "label_column"):
        wanted = getattr(config, key)
        if wanted not in columns:
            hint = did_you_mean(wanted, list(columns))
            raise DataError(
                f"{where}: no column {wanted!r}; the columns are {', '.join(columns)}{hint}; set data.{key}"
            )
