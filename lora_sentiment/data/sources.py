"""Find the rows of a recipe: files or a Hub data set, their splits, and their two columns."""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from lora_sentiment import bundled
from lora_sentiment.cleaning import strip_blanks
from lora_sentiment.data.lines import find_column
from lora_sentiment.data.tables import (
    FORMATS,
    SPREADSHEETS,
    describe_delimiter,
    read_table,
    table_columns,
)
from lora_sentiment.errors import DataError, did_you_mean, show, show_names
from lora_sentiment.hub import explain_refusal, innermost
from lora_sentiment.recipe.data import SPLITS, DataConfig

log = logging.getLogger("lora_sentiment")

Columns = Iterator[tuple[list[Any], list[Any]]]
"""Texts and label values, some rows at a time."""
HUB_CHUNK = 10_000
"""Rows of a Hub data set that are in memory at a time."""
SHOWN_FILES = 5
"""Files of a pattern that the log names."""
HUB_PAGE = re.compile(
    r"(?:hf://|(?:https?://)?huggingface\.co/)datasets/"
    r"([\w.-]+(?:/(?!(?:tree|blob|resolve|viewer)\b)[\w.-]+)?)"
)
"""Beginning of the address of a Hub data set. The group is its name."""
OTHER_FILES = (*SPREADSHEETS, ".txt", ".zip", ".gz", ".tab", ".xml", ".arrow")
"""Ends of names that are files and no data sets of the Hub, beside those that are read."""


@dataclass(frozen=True)
class Source:
    """Where the rows of each role are.

    Attributes:
        files: Role to its files; empty for a Hub data set.
        hub_splits: Role to the name of its split on the Hub; empty for files.
        hub: Name of the Hub data set, or None.
    """

    files: dict[str, list[Path]]
    hub_splits: dict[str, str]
    hub: str | None = None

    @property
    def roles(self) -> tuple[str, ...]:
        """All roles, in the order of the recipe."""
        return tuple(self.files or self.hub_splits)

    @property
    def judged(self) -> tuple[str, ...]:
        """The roles that are evaluated at the end: all but train and validation."""
        return tuple(role for role in self.roles if role not in ("train", "validation"))

    def where(self, role: str) -> str:
        """Return the files of a role, or its data set and split, for messages."""
        if self.hub:
            return f"{self.hub} [{self.hub_splits[role]}]"
        return ", ".join(str(path) for path in self.files[role])


def find_source(config: DataConfig) -> Source:
    """Resolve `data.source` to roles without reading a row.

    Raises:
        DataError: There is no such file, data set or split, or an option of Hub data sets is set
            for files.
    """
    source = config.source
    if is_on_hub(source):
        return Source({}, _hub_splits(config), hub=str(source))
    for key in ("splits", "config", "revision"):
        value = getattr(config, key)
        if value is not None:
            hint = ""
            if key == "splits":
                hint = "; name files by role: data.source={train: .., test: ..}"
            raise DataError(f"data.{key}: found {value!r}, but {source!r} are files{hint}")
    if isinstance(source, dict):
        return Source({role: _find_files(pattern) for role, pattern in source.items()}, {})
    if source in bundled.SOURCES:
        folder = bundled.SOURCES[source]
        return Source({role: [folder / f"{role}.jsonl"] for role in SPLITS}, {})
    return Source({"train": _find_files(source)}, {})


def is_on_hub(source: str | dict[str, str]) -> bool:
    """Return whether `data.source` names a Hub data set, not files."""
    if not isinstance(source, str) or source in bundled.SOURCES:
        return False
    # A name without an owner, such as `imdb`, has no dot.
    is_hub_name = re.fullmatch(r"[\w-]+|[\w-][\w.-]*/[\w.-]+", source)
    is_file_name = source.lower().endswith((*FORMATS, *OTHER_FILES))
    return bool(is_hub_name) and not is_file_name and not _exists(Path(source))


def check_files(config: DataConfig, source: Source) -> None:
    """Refuse files without the recipe's columns before training starts."""
    for paths in source.files.values():
        for path in paths:
            _find_columns(config, table_columns(path, **_reading(config)), str(path))


def read_columns(
    config: DataConfig, source: Source, role: str
) -> tuple[Columns, tuple[str, ...] | None]:
    """Return the text and label columns of a role, and the label names of the source or None."""
    if source.hub is None:
        paths = source.files[role]
        pattern = config.source if isinstance(config.source, str) else config.source[role]
        if has_magic(pattern) and paths != [Path(pattern)]:
            shown = show_names([str(path) for path in paths], most=SHOWN_FILES)
            log.info("%s: %r matches %d file(s): %s", role, pattern, len(paths), shown)
        return _read_files(config, paths), None
    from datasets import ClassLabel, load_dataset

    split = source.hub_splits[role]
    with _explain_hub(config):
        table = load_dataset(source.hub, config.config, split=split, revision=config.revision)
    columns = _find_columns(config, table.column_names, source.where(role))
    feature = table.features[columns[1]]
    # A list of labels declares those of its members.
    feature = getattr(feature, "feature", feature)
    names = None
    if isinstance(feature, ClassLabel):
        names = tuple(strip_blanks(name) for name in feature.names)
    return _read_hub(config, table, columns), names


def _reading(config: DataConfig) -> dict[str, Any]:
    """Return how the tables of a recipe are read."""
    needed = [config.text_column, *config.label_cells]
    return {"encoding": config.encoding, "needed": needed, "others": False}


def _read_files(config: DataConfig, paths: list[Path]) -> Columns:
    needed = [config.text_column, *config.label_cells]
    for path in paths:
        note = describe_delimiter(path, encoding=config.encoding, needed=needed)
        if note:
            log.info("%s: %s", path, note)
        num_rows = num_quoted = num_doubled = 0
        for batch in read_table(path, **_reading(config)):
            text_column, *label_columns = _find_columns(config, list(batch), str(path))
            texts = batch[text_column]
            yield texts, _join_columns(config, [batch[column] for column in label_columns])
            if note or not path.name.lower().endswith((".tsv", ".tsv.gz")):
                continue
            num_rows += len(texts)
            fields = list(texts)
            for column in label_columns:
                fields += batch[column]
            inner = [field[1:-1] for field in fields if _stands_in_quotes(field)]
            num_quoted += len(inner)
            num_doubled += sum('""' in field for field in inner)
        if num_doubled or num_quoted > num_rows / 2:
            log.warning(
                "%s: %s texts and labels of %s rows stand in quotes, which are characters in a "
                ".tsv without a quoted header; if they enclose fields, end the file's name in .csv",
                path, f"{num_quoted:,}", f"{num_rows:,}",
            )  # fmt: skip


def _join_columns(config: DataConfig, columns: list[list[Any]]) -> list[Any]:
    """Return the label value of each row: with `label_columns`, the list of its cells."""
    written = [[_as_csv_writes(value) for value in column] for column in columns]
    if config.label_columns is None:
        return written[0]
    return [list(cells) for cells in zip(*written, strict=True)]


def _stands_in_quotes(text: str) -> bool:
    """Return whether a text begins and ends with a quote, with every quote inside doubled."""
    if len(text) < 2 or not (text.startswith('"') and text.endswith('"')):
        return False
    return '"' not in text[1:-1].replace('""', "")


def _as_csv_writes(value: Any) -> Any:
    """Return a truth value or a decimal number as the word of a csv file, so that both count alike.

    A missing number, which is NaN, stays what it is.
    """
    is_word = isinstance(value, bool) or (isinstance(value, float) and value == value)
    return str(value) if is_word else value


def _read_hub(config: DataConfig, table: Any, columns: list[str]) -> Columns:
    with _explain_hub(config):
        for batch in table.select_columns(columns).with_format("arrow").iter(HUB_CHUNK):
            labels = [batch[column].to_pylist() for column in columns[1:]]
            yield batch[columns[0]].to_pylist(), _join_columns(config, labels)


def _find_files(pattern: str) -> list[Path]:
    if re.match(r"[A-Za-z][\w+.-]*://|huggingface\.co/", pattern):
        page = HUB_PAGE.match(pattern)
        advice = {"data.source": f"; name the data set: {{}}={page[1]}"} if page else {}
        hint = "" if page else "; download the file and name it here"
        raise DataError(
            f"{show(pattern)}: addresses are not read{hint}", key="data.source", advice=advice
        )
    path = Path(os.path.expanduser(pattern))  # noqa: PTH111 - Path's raises for an unknown user
    # A path that exists is no pattern, and neither are the folders of a pattern that exist.
    folder = path
    while not _exists(folder):
        folder = folder.parent
    if folder == path and path.is_dir():
        raise DataError(
            f"{path}: is a folder; name a file in it, or a pattern such as {path / '*.csv'}"
        )
    rest = str(path.relative_to(folder))
    if folder == path or not has_magic(rest):
        return [path]
    # Path.glob does not follow links.
    paths = [folder / name for name in sorted(glob(rest, root_dir=folder, recursive=True))]  # noqa: PTH207
    if not paths:
        raise DataError(f"{pattern!r} matches no file in {folder.absolute()}", key="data.source")
    return paths


def _exists(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110 - Path's raises for a name that is too long


def _hub_splits(config: DataConfig) -> dict[str, str]:
    """Return role to name of a split of the Hub data set, in the order of `data.splits`."""
    from datasets import get_dataset_split_names

    source = config.source
    with _explain_hub(config):
        splits = get_dataset_split_names(source, config.config, revision=config.revision)
    existing = [str(split) for split in splits]
    shown = ", ".join(existing)
    if config.splits is None:
        if "train" not in existing:
            raise DataError(
                f"{source!r} has the splits {shown}; training needs 'train'",
                key="data.source",
                advice={"data.splits": ", or name another split: {}={train: ..}"},
            )
        return {split: split for split in SPLITS if split in existing}
    for role, split in config.splits.items():
        if split not in existing:
            key = "data.source" if role == split else f"data.splits.{role}"
            hint = did_you_mean(split, existing)
            raise DataError(f"{source!r} has no split {split!r}; it has {shown}{hint}", key=key)
    return config.splits


@contextmanager
def _explain_hub(config: DataConfig) -> Iterator[None]:
    """Turn the errors of the Hub client and of `datasets` into one `DataError`."""
    from datasets.exceptions import DatasetsError
    from httpx2 import HTTPError
    from yaml import YAMLError

    try:
        yield
    except (OSError, ValueError, HTTPError, DatasetsError, RuntimeError, YAMLError) as error:
        name = str(config.source)
        refusal = explain_refusal(
            key="data.source", name=name, kind="dataset", revision=config.revision
        )
        advice = {}
        if refusal is None and _lacks_config(error):
            advice["data.config"] = "; set {}"
        raise DataError(
            refusal or f"{name!r}: {_describe(error)}", key="data.source", advice=advice
        ) from error


def _lacks_config(error: BaseException) -> bool:
    """Return whether a data set has several configurations, and not the one that was asked for."""
    return "Config name is missing" in str(error) or "BuilderConfig" in str(error)


def _describe(error: BaseException) -> str:
    """Return what is wrong with a data set that the Hub has."""
    message = " ".join(str(error).split())
    if "scripts are no longer supported" in message:
        script = message.rpartition(" ")[2]
        return (
            f"is made by a script ({script}), and code from the Hub is never run; name a data set "
            "of parquet, csv or json files, or convert it to such files yourself"
        )
    if _lacks_config(error):
        return message
    if "doesn't contain any data files" in message:
        return "holds no data files; name another data set, or files"
    return (
        f"the Hub has it, but it cannot be read ({innermost(error)}); name another data set, or "
        "files"
    )


def _find_columns(config: DataConfig, columns: Sequence[str], where: str) -> list[str]:
    """Return the names of the text and the label columns as the source spells them."""
    found = []
    wanted = [("text_column", config.text_column)]
    label_key = "label_columns" if config.label_columns else "label_column"
    wanted += [(label_key, column) for column in config.label_cells]
    for key, column in wanted:
        spelling = find_column(columns, column)
        if spelling is not None:
            found.append(spelling)
            continue
        header = columns[0]
        if len(columns) == 1 and config.text_column in header and config.label_column in header:
            raise DataError(
                f"{where}: its header {show(header)} is one field; separate the fields by one "
                "character, such as a comma"
            )
        # In a file without a header, a row of texts stands where the names should be.
        shown = show_names(columns)
        hint = did_you_mean(column, list(columns))
        advice = "give it this name" if hint else "give one of them this name"
        if not hint and any(name.count(" ") > 3 for name in columns):
            advice = "give the file a first row of names if it has none"
        raise DataError(
            f"{where}: no column {column!r}; the columns are {shown}{hint}; {advice}",
            advice={f"data.{key}": ", or set {}"},
        )
    return found
