"""Find the rows of a recipe: files or a Hub data set, their splits, and their columns."""

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from glob import glob, has_magic
from pathlib import Path
from typing import Any, NamedTuple

from lora_sentiment import bundled
from lora_sentiment.cleaning import strip_blanks
from lora_sentiment.data.lines import ColumnBatch, find_column
from lora_sentiment.data.tables import (
    FORMATS,
    SPREADSHEETS,
    describe_delimiter,
    read_table,
    table_columns,
)
from lora_sentiment.errors import DataError, did_you_mean, show, show_names
from lora_sentiment.hub import explain_refusal, innermost
from lora_sentiment.recipe.data import FROM_PYTHON, SPLITS, DataConfig, check_roles

log = logging.getLogger("lora_sentiment")

Columns = Iterator[tuple[list[Any], list[Any]]]
"""Texts and label values, some rows at a time. A pair of texts is a tuple of two cells."""
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
        files: Role to its files; empty for others.
        hub_splits: Role to the name of its split on the Hub; empty for others.
        hub: Name of the Hub data set, or None.
        tables: Role to its table in memory; empty for others.
    """

    files: dict[str, list[Path]]
    hub_splits: dict[str, str]
    hub: str | None = None
    tables: dict[str, Any] = field(default_factory=dict)

    @property
    def roles(self) -> tuple[str, ...]:
        """All roles, in the order of the recipe."""
        return tuple(self.files or self.hub_splits or self.tables)

    @property
    def judged(self) -> tuple[str, ...]:
        """The roles that are evaluated at the end: all but train and validation."""
        return tuple(role for role in self.roles if role not in ("train", "validation"))

    def where(self, role: str) -> str:
        """Return the files of a role, its data set and split, or its table, for messages."""
        if self.tables:
            return f"data[{role!r}]"
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
    if source == FROM_PYTHON:
        raise DataError(
            f"{FROM_PYTHON!r}: these rows are not stored; give them again in Python as "
            "data={role: table}",
            key="data.source",
            advice={"data.source": ", or name files by {}"},
        )
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


def make_source(data: Mapping[str, Any], *, for_training: bool) -> Source:
    """Return a source of tables in memory.

    Args:
        data: Role to its table: a pandas DataFrame, a `datasets.Dataset` or a list of dicts.
        for_training: Whether train must be among the roles, and misspelt roles are refused.

    Raises:
        DataError: A role cannot be used. Tables are checked by `check_files`.
    """
    if not isinstance(data, Mapping):
        raise DataError(
            f"data: found {type(data).__name__}; allowed: a dict from role to table, such as "
            '{"train": table, "test": table}'
        )
    if for_training:
        try:
            check_roles(list(map(str, data)))
        except ValueError as error:
            raise DataError(f"data: {error}") from error
    if not data:
        raise DataError('data: is empty; name a table for a role, such as {"test": table}')
    return Source({}, {}, tables=dict(data))


def mark_as_given(config: DataConfig) -> DataConfig:
    """Return a `data` section that says that its rows came from Python."""
    update = {"source": FROM_PYTHON, "splits": None, "config": None, "revision": None}
    return config.model_copy(update=update)


def is_on_hub(source: str | dict[str, str]) -> bool:
    """Return whether `data.source` names a Hub data set, not files."""
    if not isinstance(source, str) or source in bundled.SOURCES:
        return False
    # A name without an owner, such as `imdb`, has no dot.
    is_hub_name = re.fullmatch(r"[\w-]+|[\w-][\w.-]*/[\w.-]+", source)
    is_file_name = source.lower().endswith((*FORMATS, *OTHER_FILES))
    return bool(is_hub_name) and not is_file_name and not _exists(Path(source))


def check_files(config: DataConfig, source: Source) -> None:
    """Refuse files and tables without the recipe's columns before training starts."""
    for role in source.tables:
        _find_in_table(config, source, role)
    for paths in source.files.values():
        for path in paths:
            _find_columns(config, table_columns(path, **_reading(config)), str(path))


def read_columns(
    config: DataConfig, source: Source, role: str
) -> tuple[Columns, tuple[str, ...] | None]:
    """Return the text and label columns of a role, and the label names of the source or None."""
    if source.tables:
        table = source.tables[role]
        columns = _find_in_table(config, source, role)
        return _read_table(config, table, columns), _declared_names(table, columns.labels[0])
    if source.hub is None:
        paths = source.files[role]
        pattern = config.source if isinstance(config.source, str) else config.source[role]
        if has_magic(pattern) and paths != [Path(pattern)]:
            shown = show_names([str(path) for path in paths], most=SHOWN_FILES)
            log.info("%s: %r matches %d file(s): %s", role, pattern, len(paths), shown)
        return _read_files(config, paths), None
    from datasets import load_dataset

    split = source.hub_splits[role]
    with _explain_hub(config):
        table = load_dataset(source.hub, config.config, split=split, revision=config.revision)
    columns = _find_columns(config, table.column_names, source.where(role))
    return _read_hub(config, table, columns), _declared_names(table, columns.labels[0])


def _find_in_table(config: DataConfig, source: Source, role: str) -> "_Found":
    """Return the names of the text and the label columns as a table in memory spells them."""
    # Late, because `datasets` and pandas take a second, and rows of files need neither.
    from lora_sentiment.data.python_tables import find_table_columns

    where = source.where(role)
    return _find_columns(config, find_table_columns(source.tables[role], where), where)


def _declared_names(table: Any, label_column: str) -> tuple[str, ...] | None:
    """Return the label names that a `datasets.Dataset` declares, or None."""
    from datasets import ClassLabel, Dataset

    if not isinstance(table, Dataset):
        return None
    feature = table.features[label_column]
    # A list of labels declares those of its members.
    feature = getattr(feature, "feature", feature)
    if not isinstance(feature, ClassLabel):
        return None
    return tuple(strip_blanks(name) for name in feature.names)


def _reading(config: DataConfig) -> dict[str, Any]:
    """Return how the tables of a recipe are read."""
    needed = [*config.text_cells, *config.label_cells]
    return {"encoding": config.encoding, "needed": needed, "others": False}


def _read_files(config: DataConfig, paths: list[Path]) -> Columns:
    needed = [*config.text_cells, *config.label_cells]
    for path in paths:
        note = describe_delimiter(path, encoding=config.encoding, needed=needed)
        if note:
            log.info("%s: %s", path, note)
        num_rows = num_quoted = num_doubled = 0
        for batch in read_table(path, **_reading(config)):
            columns = _find_columns(config, list(batch), str(path))
            yield _join_columns(config, columns, batch)
            if note or not path.name.lower().endswith((".tsv", ".tsv.gz")):
                continue
            fields = []
            for column in (*columns.texts, *columns.labels):
                fields += batch[column]
            num_rows += len(batch[column])
            inner = [field[1:-1] for field in fields if _stands_in_quotes(field)]
            num_quoted += len(inner)
            num_doubled += sum('""' in field for field in inner)
        if num_doubled or num_quoted > num_rows / 2:
            log.warning(
                "%s: %s texts and labels of %s rows stand in quotes, which are characters in a "
                ".tsv without a quoted header; if they enclose fields, end the file's name in .csv",
                path, f"{num_quoted:,}", f"{num_rows:,}",
            )  # fmt: skip


def _join_columns(
    config: DataConfig, columns: "_Found", batch: ColumnBatch
) -> tuple[list[Any], list[Any]]:
    """Return the text of each row, or its pair, and its label: the list of its `label_columns`."""
    texts = batch[columns.texts[0]]
    if config.reads_pairs:
        texts = list(zip(texts, batch[columns.texts[1]], strict=True))
    written = []
    for column in columns.labels:
        written.append([_as_csv_writes(value) for value in batch[column]])
    if config.label_columns is None:
        return texts, written[0]
    return texts, [list(cells) for cells in zip(*written, strict=True)]


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


def _read_hub(config: DataConfig, table: Any, columns: "_Found") -> Columns:
    with _explain_hub(config):
        yield from _read_table(config, table, columns)


def _read_table(config: DataConfig, table: Any, columns: "_Found") -> Columns:
    from lora_sentiment.data.python_tables import read_table_columns  # late, as above

    for batch in read_table_columns(table, [*columns.texts, *columns.labels]):
        yield _join_columns(config, columns, batch)


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


class _Found(NamedTuple):
    """The names of columns as a source spells them.

    Attributes:
        texts: The column of the text, or the two of a pair.
        labels: The columns of the labels.
    """

    texts: list[str]
    labels: list[str]


def _find_columns(config: DataConfig, columns: Sequence[str], where: str) -> _Found:
    """Return the names of the text and the label columns as the source spells them."""
    found = []
    wanted = list(zip(("text_column", "text_pair_column"), config.text_cells, strict=False))
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
    num_texts = len(config.text_cells)
    return _Found(found[:num_texts], found[num_texts:])
