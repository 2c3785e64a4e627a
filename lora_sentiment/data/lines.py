"""Read and write csv, tsv and jsonl row by row. `tables.py` describes each format."""

import codecs
import csv
import datetime
import gzip
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from lora_sentiment.errors import DataError, show

ColumnBatch = dict[str, list[Any]]
"""Rows as whole columns: name to values."""
MAX_CHARACTERS = 10_000_000
"""Most characters of a line and of a csv field. Without it an unclosed quote reads a whole file."""
ENCODINGS = ("utf-8", "utf-16", "cp1252", "latin-1")
"""Encodings that a message may suggest, the most likely first. latin-1 decodes every file."""

_CSV_FAULTS = {
    "unexpected end of data": "a quote opened in this row is never closed; close it",
    "larger than": (
        f"a field is longer than {MAX_CHARACTERS:,} characters; close its quote, or shorten it"
    ),
    "new-line character": "a carriage return stands alone outside quotes; end rows in LF or CRLF",
    "expected after": (
        "text follows a closing quote; write a quote inside a quoted field as two quotes"
    ),
}


_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair. Some encodings of Python, such as raw_unicode_escape, decode to it."""


def check_columns(columns: Sequence[str], path: Path) -> None:
    """Refuse column names that are missing, equal, or not readable again."""
    if not columns:
        raise DataError(f"{path}: the table has no columns; it needs at least one, such as 'text'")
    for number, name in enumerate(columns, 1):
        first = columns.index(name) + 1
        advice: dict[str, str] = {}
        if not name:
            fault = (
                "has no name; name it or remove it (pandas writes an index so, unless "
                "to_csv(index=False))"
            )
        elif first != number:
            fault = f"has the name of column {first}, {show(name)}; rename or remove one of them"
        else:
            continue
        raise DataError(f"{path}: column {number} of {len(columns)} {fault}", advice=advice)


class _Lines:
    """The lines of an open file, with their line ends. `number` is that of the last one read."""

    def __init__(self, file: io.TextIOWrapper, path: Path) -> None:
        self.file = file
        self.path = path
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        while line := self.file.readline(MAX_CHARACTERS + 1):
            self.number += 1
            fault = None
            advice: dict[str, str] = {}
            if len(line) > MAX_CHARACTERS:
                fault = f"is longer than {MAX_CHARACTERS:,} characters; cut it"
            elif "\0" in line:
                fault = "holds a NUL character; remove it"
                advice = {"data.encoding": ", or set {}=utf-16-le"}
            elif not line.isascii() and _SURROGATE.search(line):
                fault = (
                    "holds half of a surrogate pair, which no tokenizer takes; save the file as "
                    "UTF-8"
                )
            if fault:
                raise DataError(f"{self.path}: line {self.number} {fault}", advice=advice)
            yield line

    def fault(self, row: int, text: str, *, line: int | None = None) -> DataError:
        """Return the error of a row.

        Args:
            row: Number of the row; 0 is the header.
            text: The fault.
            line: First line of the row, by default the last line read.
        """
        place = f"row {row}" if row else "the header"
        return DataError(f"{self.path}: {place} (line {line or self.number}): {text}")


def _delimited_rows(
    lines: _Lines, records: Iterator[list[str]], advice: str
) -> Iterator[list[Any]]:
    columns: list[str] = []
    row = -1  # the header becomes row 0
    while True:
        line = lines.number + 1
        try:
            fields = next(records, None)
        except csv.Error as error:
            fault = str(error)
            for part, text in _CSV_FAULTS.items():
                if part in fault:
                    fault = text
                    break
            if not columns:
                fault += "; or separate fields by commas, if semicolons or tabs do it here"
            raise lines.fault(row + 1, fault, line=line) from error
        if fields is None:
            return
        if not fields and len(columns) > 1:
            continue
        fields = fields or [""]
        row += 1
        if not row:
            columns = fields
            check_columns(columns, lines.path)
        if len(fields) != len(columns):
            fault = (
                f"found {len(fields)} field(s), expected {len(columns)}, as in the header: "
                f"{show(columns)}; {advice}"
            )
            raise lines.fault(row, fault, line=line)
        yield fields


def csv_rows(lines: _Lines) -> Iterator[list[Any]]:
    """Yield the columns and then each row, by RFC 4180."""
    csv.field_size_limit(MAX_CHARACTERS)  # the csv module has one limit for the whole process
    return _delimited_rows(
        lines, csv.reader(lines, strict=True), "quote a field that holds a comma or a newline"
    )


def tsv_rows(lines: _Lines) -> Iterator[list[Any]]:
    """Yield the columns and then each row. A quote is an ordinary character."""
    texts = (line.removesuffix("\n").removesuffix("\r") for line in lines)
    records = (text.split("\t") if text else [] for text in texts)
    return _delimited_rows(
        lines, records, "a tab always ends a field, quoted or not: replace tabs in texts by spaces"
    )


def _make_record(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError(f"a key stands twice among {show([name for name, _ in pairs])}")
    return record


def jsonl_rows(lines: _Lines) -> Iterator[list[Any]]:
    """Yield the keys of the first object and then the values of each object."""
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
            if "\\u" in line:
                # An escape can name half of a surrogate pair, which no tokenizer and no file takes.
                json.dumps(record, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            fault = f"no JSON object: {error}".replace(": line 1 column", " at column")
            raise lines.fault(
                row, fault + '; each line must hold one, as {"text": "fine", "label": 1}'
            ) from error
        if not columns:
            columns = list(record)
            check_columns(columns, lines.path)
            yield columns
        for name in record:
            if name not in columns:
                raise lines.fault(
                    row,
                    f"found the key {show(name)}, but the first line names {show(columns)}; add "
                    "the key there",
                )
        yield [record.get(name) for name in columns]


def _as_text(value: object, forbidden: str = "") -> str:
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if not isinstance(value, str | int | float | Decimal | None):
        raise TypeError(f"a {type(value).__name__}")
    text = "" if value is None else str(value)
    for character in forbidden:
        if character in text:
            raise ValueError(repr(character))
    return text


def _fields(
    values: Sequence[Any], columns: Sequence[str], make_field: Callable[[Any], str]
) -> list[str]:
    fields = []
    for name, value in zip(columns, values, strict=True):
        try:
            fields.append(make_field(value))
        except (TypeError, ValueError) as error:
            raise ValueError(f"column {name!r} holds {error}, which this format cannot") from error
    return fields


def csv_line(values: Sequence[Any], columns: Sequence[str]) -> str:
    """Return a row as csv; raise ValueError if a value cannot be written."""
    fields = _fields(values, columns, partial(_as_text, forbidden="\0"))
    quoted = []
    for text in fields:
        if re.search('[,"\r\n]', text):
            text = '"' + text.replace('"', '""') + '"'
        quoted.append(text)
    # Other readers skip a blank line.
    return (",".join(quoted) or '""') + "\n"


def tsv_line(values: Sequence[Any], columns: Sequence[str]) -> str:
    """Return a row as tsv; raise ValueError if a value cannot be written."""
    return "\t".join(_fields(values, columns, partial(_as_text, forbidden="\0\t\n\r"))) + "\n"


def jsonl_line(values: Sequence[Any], columns: Sequence[str]) -> str:
    """Return a row as one JSON object; raise ValueError if a value cannot be written."""
    encode = partial(json.dumps, ensure_ascii=False, default=_as_text)
    fields = zip(map(encode, columns), _fields(values, columns, encode), strict=True)
    return "{" + ", ".join(f"{name}: {value}" for name, value in fields) + "}\n"


def _open(path: Path, *, gzipped: bool) -> io.BufferedReader | gzip.GzipFile:
    return gzip.GzipFile(path) if gzipped else path.open("rb")


def _decode(
    file: io.BufferedReader | gzip.GzipFile, *, path: Path, encoding: str
) -> io.TextIOWrapper:
    if file.peek(2)[:2] == b"\x1f\x8b":
        raise DataError(f"{path}: is gzip, which its name must tell; end it in .gz")
    if file.peek(4)[:4] in (b"PK\x03\x04", b"\xd0\xcf\x11\xe0"):
        raise DataError(
            f"{path}: is a zip archive or an Excel workbook; unpack it, or save the sheet as CSV "
            f"UTF-8"
        )
    try:
        codec = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
        # Only "\n" ends a line here: Python's other line ends, such as U+0085, are characters of
        # real texts.
        return io.TextIOWrapper(file, encoding=codec, newline="\n")
    except (LookupError, ValueError) as error:
        raise DataError(
            f"{path}: {encoding!r} is no text encoding of Python's; set one such as "
            f"{', '.join(ENCODINGS)}"
        ) from error


def _bad_byte(path: Path, *, encoding: str, gzipped: bool) -> str:
    """Describe the first byte that does not decode; return an empty text if there is none."""
    decoder = codecs.getincrementaldecoder(encoding)()
    end, line, chunk = 0, 1, b"-"
    with _open(path, gzipped=gzipped) as file:
        # Without the mark, nearly every file of even length decodes as UTF-16 into nonsense.
        if encoding == "utf-16" and file.peek(2)[:2] not in (
            codecs.BOM_UTF16_LE,
            codecs.BOM_UTF16_BE,
        ):
            return "it has no byte order mark"
        while chunk:
            chunk = file.read(1 << 20)
            end += len(chunk)
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                # The object may begin with bytes of the previous chunk.
                start = end - len(error.object) + error.start
                line += error.object[: error.start].count(b"\n")
                return f"byte 0x{error.object[error.start]:02x} at offset {start} (line {line})"
            except UnicodeError as error:
                return str(error)
            line += chunk.count(b"\n")
    return ""


def _make_batch(columns: list[str], rows: list[list[Any]]) -> ColumnBatch:
    return {name: [row[place] for row in rows] for place, name in enumerate(columns)}


class TextFormat(NamedTuple):
    """A text format. `parse` yields the columns and then each row; `make_line` writes a row."""

    parse: Callable[[_Lines], Iterator[list[Any]]]
    make_line: Callable[[Sequence[Any], Sequence[str]], str]
    has_header: bool
    gzipped: bool = False

    def read(self, path: Path, encoding: str, rows_per_batch: int) -> Iterator[ColumnBatch]:
        """Yield the batches of a file. Raise DataError if the format does not allow its content."""
        try:
            with (
                _open(path, gzipped=self.gzipped) as file,
                _decode(file, path=path, encoding=encoding) as text,
            ):
                rows = self.parse(_Lines(text, path))
                columns = next(rows, None)
                if columns is None:
                    raise DataError(
                        f"{path}: is empty; a table needs a header (csv, tsv) or a row (jsonl)"
                    )
                chunk = list(islice(rows, rows_per_batch))
                yield _make_batch(columns, chunk)
                while len(chunk) == rows_per_batch:
                    chunk = list(islice(rows, rows_per_batch))
                    if chunk:
                        yield _make_batch(columns, chunk)
        except UnicodeError as error:
            bad = _bad_byte(path, encoding=encoding, gzipped=self.gzipped)
            fits = []
            for name in ENCODINGS:
                if not _bad_byte(path, encoding=name, gzipped=self.gzipped):
                    fits.append(name)
            raise DataError(
                f"{path}: is not {encoding}: {bad}; all of it decodes as {', '.join(fits)}; save "
                "it as UTF-8",
                advice={"data.encoding": f", or set {{}}={fits[0]}"},
            ) from error
