"""Tables as streams: csv, tsv, jsonl and parquet, in and out.

A table is read and written in batches of whole columns, `{"text": [...], "label": [...]}`, so memory is bounded by one
batch. Rows are counted from 1 for the first data row. Every fault of a file is a `DataError`.

- csv follows RFC 4180: a quoted field may hold commas, newlines and doubled quotes. Rows end in LF or CRLF.
- tsv has no quoting, for GLUE's files hold unbalanced quotes: no field can hold a tab, newline or carriage return.
- Fields of csv and tsv are always strings: "NA", "007", "1.0" and "" stay what they are. None is written as "".
- A blank line of csv or tsv is one empty field: a row of a table with one column, and nothing in a wider table.
- jsonl (and .json, read the same way) holds one object per line; values keep their JSON types, NaN included. The first
  line names the columns: a key that a later line lacks is None there, and a key that only a later line has is refused.
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
    Batch,
    TextFormat,
    check_columns,
    csv_line,
    csv_rows,
    jsonl_line,
    jsonl_rows,
    tsv_line,
    tsv_rows,
)
from lora_sentiment.errors import DataError, did_you_mean
from lora_sentiment.files import replace_atomically

_BUFFER_BYTES = 1 << 16
# Arrow's own, and those of turning its values into Python's and back: a date after 9999, bytes that are no UTF-8.
_ARROW_FAULTS = (pa.ArrowException, ValueError, TypeError, OverflowError)


@contextmanager
def _file_faults(path: Path, verb: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        fault = f"is no gzip file, or a damaged one ({error}); make or copy it again, or drop .gz from its name"
        raise DataError(f"{path}: {fault}") from error
    except OSError as error:
        raise DataError(
            f"{path}: cannot be {verb}: {error.strerror or error}; check its folder and disk"
        ) from error


def _read_parquet(path: Path, rows_per_batch: int) -> Iterator[Batch]:
    try:
        # Read as it is needed: by default a whole row group is held, which for most writers is the file.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file:
            columns = file.schema_arrow.names
            check_columns(columns, path)
            if not file.metadata.num_rows:
                yield {name: [] for name in columns}
            for batch in file.iter_batches(rows_per_batch):
                yield batch.to_pydict()
    except (*_ARROW_FAULTS, OSError) as error:
        fault = f"cannot be read as parquet ({' '.join(str(error).split())}); if it is parquet, make or copy it again"
        raise DataError(f"{path}: {fault}") from error


_TEXTS = {
    ".csv": TextFormat(csv_rows, csv_line, has_header=True),
    ".tsv": TextFormat(tsv_rows, tsv_line, has_header=True),
    ".jsonl": TextFormat(jsonl_rows, jsonl_line, has_header=False),
    ".json": TextFormat(jsonl_rows, jsonl_line, has_header=False),
}
_ZIPPED = {f"{suffix}.gz": form._replace(gzipped=True) for suffix, form in _TEXTS.items()}
FORMATS: dict[str, TextFormat | Literal["parquet"]] = {**_TEXTS, **_ZIPPED, ".parquet": "parquet"}
"""Suffix in lower case -> format: the one place that names what is supported."""


def _find_format(path: Path) -> TextFormat | Literal["parquet"]:
    for suffix, form in FORMATS.items():
        if path.name.lower().endswith(suffix):
            return form
    raise DataError(
        f"{path}: its name tells no known format; it must end in one of {', '.join(FORMATS)}"
    )


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise DataError(
            f"{path}: is a folder; name a file in it, or a pattern such as {path / '*.csv'}"
        )
    if not path.is_file():
        hint = did_you_mean(path.name, sorted(other.name for other in path.parent.iterdir()))
        raise DataError(f"{path}: no such file{hint or '; check the path'}")


def read_table(
    path: Path, *, encoding: str = "utf-8", rows_per_batch: int = 10_000
) -> Iterator[Batch]:
    """Yields a table in batches of whole columns, `{name: values}` in the file's order.

    A table without rows gives one batch of empty columns, so the first batch always tells the columns.

    Args:
        path: A file whose name ends in one of `FORMATS`.
        encoding: Of a text format, by Python's name; a UTF-8 byte order mark is dropped. Parquet states its own.
        rows_per_batch: The most rows of a batch.

    Raises:
        DataError: The file is missing, damaged, in another format or encoding, or a row does not fit the columns.
    """
    with _file_faults(path, "read"):
        _check_file(path)
        form = _find_format(path)
        yield from (
            _read_parquet(path, rows_per_batch)
            if form == "parquet"
            else form.read(path, encoding, rows_per_batch)
        )


def table_columns(path: Path, *, encoding: str = "utf-8") -> list[str]:
    """Returns the column names, having read no more than the first row; raises as `read_table` does."""
    return list(next(read_table(path, encoding=encoding, rows_per_batch=1)))


def table_types(path: Path, *, encoding: str = "utf-8") -> dict[str, pa.DataType]:
    """Returns the Arrow type of each column: parquet's own, else one that fits all its values.

    A text format is read whole for that; a column of None is a string's.

    Raises:
        DataError: As `read_table` does, or the values of a column fit no one type.
    """
    columns = table_columns(path, encoding=encoding)
    if _find_format(path) == "parquet":
        return {field.name: field.type for field in pq.read_schema(path)}
    types = dict.fromkeys(columns, pa.null())
    for batch in read_table(path, encoding=encoding):
        for name, values in batch.items():
            try:
                found = [pa.schema([(name, kind)]) for kind in (types[name], pa.array(values).type)]
                types[name] = pa.unify_schemas(found, promote_options="permissive").field(name).type
            except _ARROW_FAULTS as error:
                fault = f"column {name!r} fits no type of parquet ({' '.join(str(error).split())}); write .jsonl"
                raise DataError(
                    f"{path}: {fault}, or give all its rows one type of value"
                ) from error
    return {name: pa.string() if kind == pa.null() else kind for name, kind in types.items()}


class TableWriter:
    """Writes a table batch by batch, in UTF-8; the file appears whole when the `with` block ends, or not at all.

    An existing file is replaced. In parquet each batch becomes a row group, and the first one fixes the types that
    `types` leaves open; a column of None is a string's. A .jsonl without rows is an empty file, which states no
    columns: `read_table` refuses it.

    Args:
        path: A file whose name ends in one of `FORMATS`.
        columns: Names in the file's order.
        types: Arrow types of parquet's columns, by name; other formats have none.
        dry: Refuse what would be refused, and write nothing.

    Raises:
        DataError: The format cannot hold a name or a value, a batch has other columns, or the disk refuses.
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
        self._path, self._columns, self._form, self._types = (
            path,
            list(columns),
            _find_format(path),
            types or {},
        )
        self._aside = path.with_name(f".{secrets.token_hex(8)}.tmp")
        self._row, self._dry = 0, dry  # row 0 is the header
        self._parquet: Any = None

    def __enter__(self) -> Self:
        with _file_faults(self._path, "written"):
            self._file: Any = pa.MockOutputStream() if self._dry else self._aside.open("xb")
        # Neither a name nor a time goes into the gzip header, so that equal rows are equal bytes.
        zipped = self._form != "parquet" and self._form.gzipped and not self._dry
        self._zip = (
            gzip.GzipFile("", "wb", compresslevel=6, fileobj=self._file, mtime=0)
            if zipped
            else None
        )
        return self

    def write(self, batch: Batch) -> None:
        """Appends rows; every column must be there, all of one length."""
        if batch.keys() != set(self._columns) or len(set(map(len, batch.values()))) > 1:
            found = {name: len(values) for name, values in batch.items()}
            raise DataError(
                f"{self._path}: a batch has {found} rows; all of {self._columns} must have as many"
            )
        with _file_faults(self._path, "written"):
            if self._form == "parquet":
                self._write_row_group(batch)
            else:
                self._write_lines(batch, self._form)

    def _write_lines(self, batch: Batch, form: TextFormat) -> None:
        rows = zip(*(batch[name] for name in self._columns), strict=True)
        for values in rows if self._row else chain([self._columns], rows):
            try:
                line = form.make_line(values, self._columns) if self._row or form.has_header else ""
                if len(line) > MAX_CHARACTERS:
                    raise ValueError(f"it is longer than {MAX_CHARACTERS:,} characters")
                (self._zip or self._file).write(line.encode())
            except (ValueError, TypeError, RecursionError) as error:
                place = f"row {self._row}" if self._row else "the header"
                fault = f"cannot be written: {error}; change it, or write {'.jsonl or ' * form.has_header}.parquet"
                raise DataError(f"{self._path}: {place} {fault}") from error
            self._row += 1

    def _write_row_group(self, batch: Batch) -> None:
        arrays: dict[str, pa.Array] = {}
        try:
            for name in self._columns:
                known = (
                    self._parquet.schema.field(name).type
                    if self._parquet
                    else self._types.get(name)
                )
                inferred = (
                    pa.string()
                    if pa.infer_type(batch[name]) == pa.null()
                    else pa.infer_type(batch[name])
                )
                arrays[name] = pa.array(batch[name], inferred if known is None else known)
            table = pa.table(arrays)
            self._parquet = self._parquet or pq.ParquetWriter(self._file, table.schema)
            self._parquet.write_table(table)
        except _ARROW_FAULTS as error:
            place = next(
                (f"column {name!r}" for name in self._columns if name not in arrays), "a column"
            )
            fault = f"{place} cannot be written: {' '.join(str(error).split())}; give all its rows one type of value"
            raise DataError(f"{self._path}: {fault}") from error

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
                    replace_atomically(self._aside, self._path)
            finally:
                self._aside.unlink(missing_ok=True)
