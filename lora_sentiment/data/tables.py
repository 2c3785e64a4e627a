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

import codecs
import csv
import datetime
import gzip
import io
import json
import os
import re
import secrets
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import pyarrow as pa
import pyarrow.parquet as pq

from lora_sentiment.errors import DataError
from lora_sentiment.section import did_you_mean

Batch = dict[str, list[Any]]
MAX_CHARACTERS = 10_000_000  # of a line and of a csv field: else one unclosed quote swallows a file whole
_BUFFER_BYTES = 1 << 16
ENCODINGS = ("utf-8", "utf-16", "cp1252", "latin-1")  # the likeliest first; latin-1 decodes every file

_CSV_FAULTS = {
    "unexpected end of data": "a quote opened in this row is never closed; close it",
    "larger than": f"a field is longer than {MAX_CHARACTERS:,} characters; close its quote, or shorten it",
    "new-line character": "a carriage return stands alone outside quotes; end rows in LF or CRLF",
    "expected after": "text follows a closing quote; write a quote inside a quoted field as two quotes",
}
# Arrow's own, and those of turning its values into Python's and back: a date after 9999, bytes that are no UTF-8.
_ARROW_FAULTS = (pa.ArrowException, ValueError, TypeError, OverflowError)


def _check_columns(columns: Sequence[str], path: Path) -> None:
    """Refuses names that a caller could not tell apart, or that a file would not give back."""
    if not columns:
        raise DataError(f"{path}: the table has no columns; it needs at least one, such as 'text'")
    for number, name in enumerate(columns, 1):
        if not name:
            fault = "has no name; name it or remove it (pandas writes an index so, unless to_csv(index=False))"
        elif name.startswith("\ufeff"):
            fault = "begins with a stray byte order mark; remove it, or set data.encoding=utf-16 if the file is that"
        elif (first := columns.index(name) + 1) != number:
            fault = f"has the name of column {first}, {name!r}; rename or remove one of them"
        else:
            continue
        raise DataError(f"{path}: column {number} of {len(columns)} {fault}")


class _Lines:
    """The lines of an open file, each with its line end; `number` is that of the last one, from 1."""

    def __init__(self, file: io.TextIOWrapper, path: Path) -> None:
        self.file, self.path, self.number = file, path, 0

    def __iter__(self) -> Iterator[str]:
        while line := self.file.readline(MAX_CHARACTERS + 1):
            self.number += 1
            if len(line) > MAX_CHARACTERS:
                raise DataError(f"{self.path}: line {self.number} is longer than {MAX_CHARACTERS:,} characters; cut it")
            if "\0" in line:
                fault = "holds a NUL character; remove it, or set data.encoding=utf-16-le or utf-16-be if it is that"
                raise DataError(f"{self.path}: line {self.number} {fault}")
            yield line

    def fault(self, row: int, text: str, *, line: int | None = None) -> DataError:
        """Returns the error of a row, 0 being the header, that begins at `line`, by default the last one read."""
        return DataError(f"{self.path}: {f'row {row}' if row else 'the header'} (line {line or self.number}): {text}")


def _delimited_rows(lines: _Lines, records: Iterator[list[str]], advice: str) -> Iterator[list[Any]]:
    columns: list[str] = []
    row = -1  # so that the header is row 0
    while True:
        line = lines.number + 1
        try:
            fields = next(records, None)
        except csv.Error as error:
            fault = next((text for key, text in _CSV_FAULTS.items() if key in str(error)), str(error))
            raise lines.fault(row + 1, fault, line=line) from error
        if fields is None:
            return
        if not fields and len(columns) > 1:
            continue
        fields = fields or [""]
        row += 1
        if not row:
            columns = fields
            _check_columns(columns, lines.path)
        if len(fields) != len(columns):
            fault = f"found {len(fields)} field(s), expected {len(columns)}, as in the header: {columns}; {advice}"
            raise lines.fault(row, fault, line=line)
        yield fields


def _csv_rows(lines: _Lines) -> Iterator[list[Any]]:
    csv.field_size_limit(MAX_CHARACTERS)  # the csv module has one limit for the whole process
    return _delimited_rows(lines, csv.reader(lines, strict=True), "quote a field that holds a comma or a newline")


def _tsv_rows(lines: _Lines) -> Iterator[list[Any]]:
    texts = (line.removesuffix("\n").removesuffix("\r") for line in lines)
    records = (text.split("\t") if text else [] for text in texts)
    return _delimited_rows(lines, records, "a tab always ends a field, quoted or not: make one inside a text a space")


def _make_record(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError(f"a key stands twice among {[name for name, _ in pairs]}")
    return record


def _jsonl_rows(lines: _Lines) -> Iterator[list[Any]]:
    columns: list[str] = []
    row = 0
    for line in lines:
        if not line.strip(" \t\r\n"):
            continue
        row += 1
        try:
            record = json.loads(line.rstrip("\r\n"), object_pairs_hook=_make_record)
            if not isinstance(record, dict):
                raise ValueError(f"found a {type(record).__name__}")
            if "\\u" in line:  # an escape can name half of a surrogate pair, which no tokenizer and no file takes
                json.dumps(record, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            fault = f"no JSON object: {error}".replace(": line 1 column", " at column")
            raise lines.fault(row, fault + '; each line must hold one, as {"text": "fine", "label": 1}') from error
        if not columns:
            columns = list(record)
            _check_columns(columns, lines.path)
            yield columns
        if unknown := [name for name in record if name not in columns]:
            raise lines.fault(row, f"found the key {unknown[0]!r}, but the first line names {columns}; add it there")
        yield [record.get(name) for name in columns]


def _as_text(value: object, forbidden: str = "") -> str:
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if not isinstance(value, str | int | float | Decimal | None):
        raise TypeError(f"a {type(value).__name__}")
    text = "" if value is None else str(value)
    if found := [character for character in forbidden if character in text]:
        raise ValueError(repr(found[0]))
    return text


def _fields(values: Sequence[Any], columns: Sequence[str], make_field: Callable[[Any], str]) -> list[str]:
    fields = []
    for name, value in zip(columns, values, strict=True):
        try:
            fields.append(make_field(value))
        except (TypeError, ValueError) as error:
            raise ValueError(f"column {name!r} holds {error}, which this format cannot") from error
    return fields


def _csv_line(values: Sequence[Any], columns: Sequence[str]) -> str:
    fields = _fields(values, columns, partial(_as_text, forbidden="\0"))
    quoted = ['"' + text.replace('"', '""') + '"' if re.search('[,"\r\n]', text) else text for text in fields]
    return (",".join(quoted) or '""') + "\n"  # other readers skip a blank line


def _tsv_line(values: Sequence[Any], columns: Sequence[str]) -> str:
    return "\t".join(_fields(values, columns, partial(_as_text, forbidden="\0\t\n\r"))) + "\n"


def _jsonl_line(values: Sequence[Any], columns: Sequence[str]) -> str:
    encode = partial(json.dumps, ensure_ascii=False, default=_as_text)
    fields = zip(map(encode, columns), _fields(values, columns, encode), strict=True)
    return "{" + ", ".join(f"{name}: {value}" for name, value in fields) + "}\n"


@contextmanager
def _file_faults(path: Path, verb: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        fault = f"is no gzip file, or a damaged one ({error}); make or copy it again, or drop .gz from its name"
        raise DataError(f"{path}: {fault}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be {verb}: {error.strerror or error}; check its folder and disk") from error


def _open(path: Path, *, gzipped: bool) -> io.BufferedReader | gzip.GzipFile:
    return gzip.GzipFile(path) if gzipped else path.open("rb")


def _decode(file: io.BufferedReader | gzip.GzipFile, *, path: Path, encoding: str) -> io.TextIOWrapper:
    if file.peek(2)[:2] == b"\x1f\x8b":
        raise DataError(f"{path}: is gzip, which its name must tell; end it in .gz")
    try:
        codec = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
        # Only "\n" ends a line here: Python's other line ends, such as U+0085, are characters of real texts.
        return io.TextIOWrapper(file, encoding=codec, newline="\n")
    except (LookupError, ValueError) as error:
        fault = f"{encoding!r} is no text encoding of Python's; set data.encoding to one such as {', '.join(ENCODINGS)}"
        raise DataError(f"{path}: {fault}") from error


def _bad_byte(path: Path, *, encoding: str, gzipped: bool) -> str:
    """Describes the first byte that does not decode; empty if the whole file does."""
    decoder = codecs.getincrementaldecoder(encoding)()
    end, line, chunk = 0, 1, b"-"
    with _open(path, gzipped=gzipped) as file:
        # Without its mark, nearly every file of even length decodes as UTF-16, into nonsense.
        if encoding == "utf-16" and file.peek(2)[:2] not in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return "it has no byte order mark"
        while chunk:
            chunk = file.read(1 << 20)
            end += len(chunk)
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                start = end - len(error.object) + error.start  # the object may begin with bytes of the chunk before
                line += error.object[: error.start].count(b"\n")
                return f"byte 0x{error.object[error.start]:02x} at offset {start} (line {line})"
            except UnicodeError as error:
                return str(error)
            line += chunk.count(b"\n")
    return ""


class _Text(NamedTuple):
    """A format of lines: `parse` yields the columns and then each row, `make_line` writes a row."""

    parse: Callable[[_Lines], Iterator[list[Any]]]
    make_line: Callable[[Sequence[Any], Sequence[str]], str]
    has_header: bool
    gzipped: bool = False

    def read(self, path: Path, encoding: str, rows_per_batch: int) -> Iterator[Batch]:
        try:
            with _open(path, gzipped=self.gzipped) as file, _decode(file, path=path, encoding=encoding) as text:
                rows = self.parse(_Lines(text, path))
                columns = next(rows, None)
                if columns is None:
                    raise DataError(f"{path}: is empty; a table needs a header (csv, tsv) or a row (jsonl)")
                chunks = iter(lambda: list(islice(rows, rows_per_batch)), [])
                for chunk in chain([next(chunks, [])], chunks):
                    yield {name: [row[place] for row in chunk] for place, name in enumerate(columns)}
        except UnicodeError as error:
            bad = _bad_byte(path, encoding=encoding, gzipped=self.gzipped)
            fits = [name for name in ENCODINGS if not _bad_byte(path, encoding=name, gzipped=self.gzipped)]
            fault = f"is not {encoding}: {bad}; all of it decodes as {', '.join(fits)}: set data.encoding={fits[0]}"
            raise DataError(f"{path}: {fault}") from error


def _read_parquet(path: Path, rows_per_batch: int) -> Iterator[Batch]:
    try:
        # Read as it is needed: by default a whole row group is held, which for most writers is the file.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file:
            columns = file.schema_arrow.names
            _check_columns(columns, path)
            if not file.metadata.num_rows:
                yield {name: [] for name in columns}
            for batch in file.iter_batches(rows_per_batch):
                yield batch.to_pydict()
    except (*_ARROW_FAULTS, OSError) as error:
        fault = f"cannot be read as parquet ({' '.join(str(error).split())}); if it is parquet, make or copy it again"
        raise DataError(f"{path}: {fault}") from error


_TEXTS = {
    ".csv": _Text(_csv_rows, _csv_line, has_header=True),
    ".tsv": _Text(_tsv_rows, _tsv_line, has_header=True),
    ".jsonl": _Text(_jsonl_rows, _jsonl_line, has_header=False),
    ".json": _Text(_jsonl_rows, _jsonl_line, has_header=False),
}
_ZIPPED = {f"{suffix}.gz": form._replace(gzipped=True) for suffix, form in _TEXTS.items()}
FORMATS: dict[str, _Text | Literal["parquet"]] = {**_TEXTS, **_ZIPPED, ".parquet": "parquet"}
"""Suffix in lower case -> format: the one place that names what is supported."""


def _find_format(path: Path) -> _Text | Literal["parquet"]:
    for suffix, form in FORMATS.items():
        if path.name.lower().endswith(suffix):
            return form
    raise DataError(f"{path}: its name tells no known format; it must end in one of {', '.join(FORMATS)}")


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name a file in it, or a pattern such as {path / '*.csv'}")
    if not path.is_file():
        hint = did_you_mean(path.name, sorted(other.name for other in path.parent.iterdir()))
        raise DataError(f"{path}: no such file{hint or '; check the path'}")


def read_table(path: Path, *, encoding: str = "utf-8", rows_per_batch: int = 10_000) -> Iterator[Batch]:
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
            _read_parquet(path, rows_per_batch) if form == "parquet" else form.read(path, encoding, rows_per_batch)
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
                raise DataError(f"{path}: {fault}, or give all its rows one type of value") from error
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
        self, path: Path, *, columns: Sequence[str], types: Mapping[str, pa.DataType] | None = None, dry: bool = False
    ) -> None:
        _check_columns(columns, path)
        self._path, self._columns, self._form, self._types = path, list(columns), _find_format(path), types or {}
        self._aside = path.with_name(f".{secrets.token_hex(8)}.tmp")
        self._row, self._dry = 0, dry  # row 0 is the header
        self._parquet: Any = None

    def __enter__(self) -> Self:
        with _file_faults(self._path, "written"):
            self._file: Any = pa.MockOutputStream() if self._dry else self._aside.open("xb")
        # Neither a name nor a time goes into the gzip header, so that equal rows are equal bytes.
        zipped = self._form != "parquet" and self._form.gzipped and not self._dry
        self._zip = gzip.GzipFile("", "wb", compresslevel=6, fileobj=self._file, mtime=0) if zipped else None
        return self

    def write(self, batch: Batch) -> None:
        """Appends rows; every column must be there, all of one length."""
        if batch.keys() != set(self._columns) or len(set(map(len, batch.values()))) > 1:
            found = {name: len(values) for name, values in batch.items()}
            raise DataError(f"{self._path}: a batch has {found} rows; all of {self._columns} must have as many")
        with _file_faults(self._path, "written"):
            if self._form == "parquet":
                self._write_row_group(batch)
            else:
                self._write_lines(batch, self._form)

    def _write_lines(self, batch: Batch, form: _Text) -> None:
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
                known = self._parquet.schema.field(name).type if self._parquet else self._types.get(name)
                inferred = pa.string() if pa.infer_type(batch[name]) == pa.null() else pa.infer_type(batch[name])
                arrays[name] = pa.array(batch[name], inferred if known is None else known)
            table = pa.table(arrays)
            self._parquet = self._parquet or pq.ParquetWriter(self._file, table.schema)
            self._parquet.write_table(table)
        except _ARROW_FAULTS as error:
            place = next((f"column {name!r}" for name in self._columns if name not in arrays), "a column")
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
                    self._file.flush()
                    os.fsync(self._file.fileno())
                if kind is None:
                    self._aside.replace(self._path)
            finally:
                self._aside.unlink(missing_ok=True)
