"""Tables as streams: csv, tsv, jsonl and parquet, in and out.

A table is read and written in batches of whole columns, `{"text": [...], "label": [...]}`, so one
batch bounds the memory. Rows are counted from 1, without the header. Every fault of a file is a
`DataError`.

- csv follows RFC 4180: a quoted field may hold commas, newlines and doubled quotes. Rows end in LF
  or CRLF.
- tsv has no quoting, because GLUE's files hold unbalanced quotes. No field can hold a tab, newline
  or carriage return.
- A csv or tsv file is read with semicolons, bars, commas, quoted tabs or another character only if
  its first line is Excel's `sep=;`, or if its header gives the needed columns no other way.
- Fields of csv and tsv are strings: "NA", "007", "1.0" and "" are not converted. None is written
  as "".
- A blank line of csv or tsv is one empty field: a row of a table with one column, and nothing in a
  wider table.
- jsonl holds one object per line; .json is read the same way. Values keep their JSON types, NaN
  included. The columns are the keys of all lines. A key that a line lacks is None there.
- parquet keeps its own types. Dates, times and decimals are written to the other formats as text.
"""

import gzip
import secrets
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Self

import pyarrow as pa
import pyarrow.parquet as pq

from lora_sentiment.data.lines import (
    MAX_CHARACTERS,
    PLAIN_TABS,
    ColumnBatch,
    TextFormat,
    check_columns,
    csv_line,
    jsonl_line,
    tsv_line,
)
from lora_sentiment.errors import DataError, did_you_mean
from lora_sentiment.files import LFS_FAULT, is_lfs_pointer, replace_atomically

_BUFFER_BYTES = 1 << 16
# The last three come from converting values, such as a date after 9999 or bytes that are no UTF-8.
_ARROW_FAULTS = (pa.ArrowException, ValueError, TypeError, OverflowError)


@contextmanager
def _file_faults(path: Path, verb: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: is no gzip file, or a damaged one ({error}); make or copy it again, or "
            "remove .gz from its name"
        ) from error
    except OSError as error:
        raise DataError(
            f"{path}: cannot be {verb}: {error.strerror or error}; check its folder and disk"
        ) from error


def _read_parquet(path: Path, rows_per_batch: int) -> Iterator[ColumnBatch]:
    try:
        # Read in small pieces. By default a whole row group is in memory, often the whole file.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file:
            columns = file.schema_arrow.names
            check_columns(columns, path)
            if not file.metadata.num_rows:
                yield {name: [] for name in columns}
            for batch in file.iter_batches(rows_per_batch):
                yield batch.to_pydict()
    except (*_ARROW_FAULTS, OSError) as error:
        message = " ".join(str(error).split())
        raise DataError(
            f"{path}: cannot be read as parquet ({message}); if it is parquet, make or copy it "
            "again"
        ) from error


_TEXTS = {
    ".csv": TextFormat(csv_line, ","),
    ".tsv": TextFormat(tsv_line, PLAIN_TABS),
    ".jsonl": TextFormat(jsonl_line),
    ".json": TextFormat(jsonl_line),
}
_ZIPPED = {f"{suffix}.gz": form._replace(gzipped=True) for suffix, form in _TEXTS.items()}
FORMATS: dict[str, TextFormat | Literal["parquet"]] = {**_TEXTS, **_ZIPPED, ".parquet": "parquet"}
"""Suffix in lower case to format: every supported format."""


SPREADSHEETS = (".xlsx", ".xlsm", ".xlsb", ".xls", ".ods", ".numbers")


def _find_format(path: Path) -> TextFormat | Literal["parquet"]:
    for suffix, form in FORMATS.items():
        if path.name.lower().endswith(suffix):
            return form
    raise DataError(
        f"{path}: its name tells no known format; it must end in one of "
        f"{', '.join(FORMATS)}{_spreadsheet_hint(path)}"
    )


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name a file in it")
    if not path.is_file():
        hint = ""
        if path.parent.is_dir():
            hint = did_you_mean(path.name, sorted(other.name for other in path.parent.iterdir()))
        if not hint and not path.is_absolute():
            hint = f" in {Path.cwd()}, the current folder"
        raise DataError(
            f"{path}: no such file{hint or '; check the path'}{_spreadsheet_hint(path)}"
        )
    if is_lfs_pointer(path):
        raise DataError(f"{path}: {LFS_FAULT}")


def _spreadsheet_hint(path: Path) -> str:
    if not path.name.lower().endswith(SPREADSHEETS):
        return ""
    return "; spreadsheets are not read: save the sheet as CSV UTF-8, and name that file"


def read_table(
    path: Path,
    *,
    encoding: str = "utf-8",
    rows_per_batch: int = 10_000,
    needed: Sequence[str] = (),
    others: bool = True,
) -> Iterator[ColumnBatch]:
    """Yield a table in batches of whole columns, `{name: values}` in the order of the file.

    A table without rows gives one batch of empty columns, so the first batch always names the
    columns.

    Args:
        path: A file whose name ends in one of `FORMATS`.
        encoding: Python's name of a text format's encoding. A UTF-8 byte order mark is removed.
            Parquet has its own encoding.
        rows_per_batch: Most rows of a batch.
        needed: Columns by which the delimiter of csv or tsv is found. The caller refuses a table
            without them.
        others: Whether every other column is needed too. If not, a jsonl file is read once, and
            keys that only its later rows have may be left out.

    Raises:
        DataError: The file is missing, damaged or in another format or encoding, or a row does not
            fit the columns.
    """
    with _file_faults(path, "read"):
        _check_file(path)
        form = _find_format(path)
        if form == "parquet":
            yield from _read_parquet(path, rows_per_batch)
        else:
            yield from form.read(path, encoding, rows_per_batch, needed, others=others)


def table_columns(
    path: Path, *, encoding: str = "utf-8", needed: Sequence[str] = (), others: bool = True
) -> list[str]:
    """Return the column names after reading at most one row of csv; raise as `read_table` does."""
    batches = read_table(path, encoding=encoding, rows_per_batch=1, needed=needed, others=others)
    return list(next(batches))


def describe_delimiter(path: Path, *, encoding: str, needed: Sequence[str]) -> str | None:
    """Say how the fields of csv or tsv are separated, if it is not as the file's name says.

    Raises:
        DataError: As `read_table`.
    """
    with _file_faults(path, "read"):
        form = _find_format(path)
        return None if form == "parquet" else form.describe(path, encoding, needed)


def table_types(
    path: Path, *, encoding: str = "utf-8", needed: Sequence[str] = ()
) -> dict[str, pa.DataType]:
    """Return the Arrow type of each column: that of parquet, or one that fits all values.

    A text format is read to its end for this. A column of None has the type string.

    Raises:
        DataError: As `read_table`, or the values of a column do not fit one type.
    """
    columns = table_columns(path, encoding=encoding, needed=needed)
    if _find_format(path) == "parquet":
        return {field.name: field.type for field in pq.read_schema(path)}
    types = dict.fromkeys(columns, pa.null())
    for batch in read_table(path, encoding=encoding, needed=needed):
        for name, values in batch.items():
            try:
                known = pa.schema([(name, types[name])])
                added = pa.schema([(name, pa.array(values).type)])
                unified = pa.unify_schemas([known, added], promote_options="permissive")
                types[name] = unified.field(name).type
            except _ARROW_FAULTS as error:
                message = " ".join(str(error).split())
                raise DataError(
                    f"{path}: column {name!r} fits no type of parquet ({message}); write .jsonl, "
                    "or give all its rows one type of value"
                ) from error
    return {name: pa.string() if kind == pa.null() else kind for name, kind in types.items()}


class TableWriter:
    """Writes a table batch by batch in UTF-8. The file appears at the end of the `with` block.

    If the block raises, no file appears. An existing file is replaced. In parquet each batch
    becomes a row group, and the first one decides the types that `types` does not name; a column of
    None has the type string. A .jsonl without rows is an empty file without columns, which
    `read_table` refuses.

    Args:
        path: A file whose name ends in one of `FORMATS`.
        columns: Names in the order of the file.
        types: Arrow types of parquet's columns, by name. Other formats have none.
        dry: Check names and values as if they were written, and write nothing.

    Raises:
        DataError: The format does not allow a name or a value, a batch has other columns, or the
            file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        *,
        columns: Sequence[str],
        types: Mapping[str, pa.DataType] | None = None,
        dry: bool = False,
    ) -> None:
        check_columns(columns, path)
        self._path = path
        self._columns = list(columns)
        self._form = _find_format(path)
        self._types = types or {}
        self._dry = dry
        self._unfinished = path.with_name(f".{secrets.token_hex(8)}.tmp")
        self._row = 0  # the header
        self._parquet: Any = None

    def __enter__(self) -> Self:
        with _file_faults(self._path, "written"):
            self._file: Any = pa.MockOutputStream() if self._dry else self._unfinished.open("xb")
        # The gzip header gets no name and no time, so equal rows give equal bytes.
        self._zip: gzip.GzipFile | None = None
        if self._form != "parquet" and self._form.gzipped and not self._dry:
            self._zip = gzip.GzipFile("", "wb", compresslevel=6, fileobj=self._file, mtime=0)
        return self

    def write(self, batch: ColumnBatch) -> None:
        """Append rows. The batch must hold every column, all of one length."""
        if batch.keys() != set(self._columns) or len(set(map(len, batch.values()))) > 1:
            lengths = {name: len(values) for name, values in batch.items()}
            raise DataError(
                f"{self._path}: a batch has {lengths} rows; all of {self._columns} must have as "
                "many"
            )
        with _file_faults(self._path, "written"):
            if self._form == "parquet":
                self._write_row_group(batch)
            else:
                self._write_lines(batch, self._form)

    def _write_lines(self, batch: ColumnBatch, form: TextFormat) -> None:
        rows = zip(*(batch[name] for name in self._columns), strict=True)
        for values in rows if self._row else chain([self._columns], rows):
            try:
                line = (
                    form.make_line(values, self._columns)
                    if self._row or form.delimiter is not None
                    else ""
                )
                if len(line) > MAX_CHARACTERS:
                    raise ValueError(f"it is longer than {MAX_CHARACTERS:,} characters")
                (self._zip or self._file).write(line.encode())
            except (ValueError, TypeError, RecursionError) as error:
                place = f"row {self._row}" if self._row else "the header"
                formats = ".jsonl or .parquet" if form.delimiter is not None else ".parquet"
                raise DataError(
                    f"{self._path}: {place} cannot be written: {error}; change it, or write "
                    f"{formats}"
                ) from error
            self._row += 1

    def _write_row_group(self, batch: ColumnBatch) -> None:
        arrays: dict[str, pa.Array] = {}
        try:
            for name in self._columns:
                if self._parquet:
                    kind = self._parquet.schema.field(name).type
                elif name in self._types:
                    kind = self._types[name]
                else:
                    kind = pa.infer_type(batch[name])
                    if kind == pa.null():
                        kind = pa.string()
                arrays[name] = pa.array(batch[name], kind)
            table = pa.table(arrays)
            self._parquet = self._parquet or pq.ParquetWriter(self._file, table.schema)
            self._parquet.write_table(table)
        except _ARROW_FAULTS as error:
            missing = [name for name in self._columns if name not in arrays]
            place = f"column {missing[0]!r}" if missing else "a column"
            message = " ".join(str(error).split())
            raise DataError(
                f"{self._path}: {place} cannot be written: {message}; give all its rows one type "
                "of value"
            ) from error

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._dry:
            return
        with _file_faults(self._path, "written"):
            try:
                with self._file:
                    if kind is None and not self._row and not self._parquet:
                        self.write({name: [] for name in self._columns})  # a table without rows
                    for layer in filter(None, (self._parquet, self._zip)):
                        layer.close()
                if kind is None:
                    replace_atomically(self._unfinished, self._path)
            finally:
                self._unfinished.unlink(missing_ok=True)
