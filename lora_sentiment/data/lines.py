"""Formats of lines: csv, tsv and jsonl, decoded, parsed and written row by row; `tables.py` says what each promises."""

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
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from lora_sentiment.errors import DataError, show

Batch = dict[str, list[Any]]
"""Rows as whole columns: name to values."""
MAX_CHARACTERS = (
    10_000_000  # of a line and of a csv field: else one unclosed quote swallows a file whole
)
ENCODINGS = (
    "utf-8",
    "utf-16",
    "cp1252",
    "latin-1",
)  # the likeliest first; latin-1 decodes every file
_ENCODING_KEYS = "(data.encoding, or --encoding of predict)"

_CSV_FAULTS = {
    "unexpected end of data": "a quote opened in this row is never closed; close it",
    "larger than": f"a field is longer than {MAX_CHARACTERS:,} characters; close its quote, or shorten it",
    "new-line character": "a carriage return stands alone outside quotes; end rows in LF or CRLF",
    "expected after": "text follows a closing quote; write a quote inside a quoted field as two quotes",
}


_HALF = re.compile("[\ud800-\udfff]")
"""What some of Python's encodings decode to, raw_unicode_escape for one."""


def check_columns(columns: Sequence[str], path: Path) -> None:
    """Refuses names that a caller could not tell apart, or that a file would not give back."""
    if not columns:
        raise DataError(f"{path}: the table has no columns; it needs at least one, such as 'text'")
    for number, name in enumerate(columns, 1):
        if not name:
            fault = "has no name; name it or remove it (pandas writes an index so, unless to_csv(index=False))"
        elif name.startswith("\ufeff"):
            fault = (
                "begins with a stray byte order mark; remove it, or set the encoding "
                f"{_ENCODING_KEYS} to utf-16 if the file is that"
            )
        elif (first := columns.index(name) + 1) != number:
            fault = f"has the name of column {first}, {show(name)}; rename or remove one of them"
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
                raise DataError(
                    f"{self.path}: line {self.number} is longer than {MAX_CHARACTERS:,} characters; cut it"
                )
            if "\0" in line:
                fault = (
                    f"holds a NUL character; remove it, or set the encoding {_ENCODING_KEYS} to "
                    "utf-16-le or utf-16-be if it is that"
                )
                raise DataError(f"{self.path}: line {self.number} {fault}")
            if not line.isascii() and _HALF.search(line):
                fault = "holds half of a surrogate pair, which no tokenizer takes; save the file as UTF-8"
                raise DataError(f"{self.path}: line {self.number} {fault}")
            yield line

    def fault(self, row: int, text: str, *, line: int | None = None) -> DataError:
        """Returns the error of a row, 0 being the header, that begins at `line`, by default the last one read."""
        return DataError(
            f"{self.path}: {f'row {row}' if row else 'the header'} (line {line or self.number}): {text}"
        )


def _delimited_rows(
    lines: _Lines, records: Iterator[list[str]], advice: str
) -> Iterator[list[Any]]:
    columns: list[str] = []
    row = -1  # so that the header is row 0
    while True:
        line = lines.number + 1
        try:
            fields = next(records, None)
        except csv.Error as error:
            fault = next(
                (text for key, text in _CSV_FAULTS.items() if key in str(error)), str(error)
            )
            fault += (
                ""
                if columns
                else "; or separate fields by commas, if semicolons or tabs do it here"
            )
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
            fault = f"found {len(fields)} field(s), expected {len(columns)}, as in the header: {show(columns)}"
            raise lines.fault(row, f"{fault}; {advice}", line=line)
        yield fields


def csv_rows(lines: _Lines) -> Iterator[list[Any]]:
    """Yields the columns and then each row, by RFC 4180."""
    csv.field_size_limit(MAX_CHARACTERS)  # the csv module has one limit for the whole process
    return _delimited_rows(
        lines, csv.reader(lines, strict=True), "quote a field that holds a comma or a newline"
    )


def tsv_rows(lines: _Lines) -> Iterator[list[Any]]:
    """Yields the columns and then each row; a quote is a character like any other."""
    texts = (line.removesuffix("\n").removesuffix("\r") for line in lines)
    records = (text.split("\t") if text else [] for text in texts)
    return _delimited_rows(
        lines, records, "a tab always ends a field, quoted or not: make one inside a text a space"
    )


def _make_record(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError(f"a key stands twice among {show([name for name, _ in pairs])}")
    return record


def jsonl_rows(lines: _Lines) -> Iterator[list[Any]]:
    """Yields the keys of the first object and then each object's values."""
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
            if (
                "\\u" in line
            ):  # an escape can name half of a surrogate pair, which no tokenizer and no file takes
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
        if unknown := [name for name in record if name not in columns]:
            fault = f"found the key {show(unknown[0])}, but the first line names {show(columns)}; add it there"
            raise lines.fault(row, fault)
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
    """Returns a row as csv; raises ValueError where a value cannot be written."""
    fields = _fields(values, columns, partial(_as_text, forbidden="\0"))
    quoted = [
        '"' + text.replace('"', '""') + '"' if re.search('[,"\r\n]', text) else text
        for text in fields
    ]
    return (",".join(quoted) or '""') + "\n"  # other readers skip a blank line


def tsv_line(values: Sequence[Any], columns: Sequence[str]) -> str:
    """Returns a row as tsv; raises ValueError where a value cannot be written."""
    return "\t".join(_fields(values, columns, partial(_as_text, forbidden="\0\t\n\r"))) + "\n"


def jsonl_line(values: Sequence[Any], columns: Sequence[str]) -> str:
    """Returns a row as one JSON object; raises ValueError where a value cannot be written."""
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
    if file.peek(4)[:4] == b"PK\x03\x04":
        raise DataError(
            f"{path}: is a zip archive or an Excel workbook; unpack it, or save the sheet as CSV UTF-8"
        )
    try:
        codec = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
        # Only "\n" ends a line here: Python's other line ends, such as U+0085, are characters of real texts.
        return io.TextIOWrapper(file, encoding=codec, newline="\n")
    except (LookupError, ValueError) as error:
        fault = (
            f"{encoding!r} is no text encoding of Python's; set one such as "
            f"{', '.join(ENCODINGS)} {_ENCODING_KEYS}"
        )
        raise DataError(f"{path}: {fault}") from error


def _bad_byte(path: Path, *, encoding: str, gzipped: bool) -> str:
    """Describes the first byte that does not decode; empty if the whole file does."""
    decoder = codecs.getincrementaldecoder(encoding)()
    end, line, chunk = 0, 1, b"-"
    with _open(path, gzipped=gzipped) as file:
        # Without its mark, nearly every file of even length decodes as UTF-16, into nonsense.
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
                start = (
                    end - len(error.object) + error.start
                )  # the object may begin with bytes of the chunk before
                line += error.object[: error.start].count(b"\n")
                return f"byte 0x{error.object[error.start]:02x} at offset {start} (line {line})"
            except UnicodeError as error:
                return str(error)
            line += chunk.count(b"\n")
    return ""


class TextFormat(NamedTuple):
    """A format of lines: `parse` yields the columns and then each row, `make_line` writes a row."""

    parse: Callable[[_Lines], Iterator[list[Any]]]
    make_line: Callable[[Sequence[Any], Sequence[str]], str]
    has_header: bool
    gzipped: bool = False

    def read(self, path: Path, encoding: str, rows_per_batch: int) -> Iterator[Batch]:
        """Yields the batches of a file; raises DataError for what it cannot hold."""
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
                chunks = iter(lambda: list(islice(rows, rows_per_batch)), [])
                for chunk in chain([next(chunks, [])], chunks):
                    yield {
                        name: [row[place] for row in chunk] for place, name in enumerate(columns)
                    }
        except UnicodeError as error:
            bad = _bad_byte(path, encoding=encoding, gzipped=self.gzipped)
            fits = [
                name
                for name in ENCODINGS
                if not _bad_byte(path, encoding=name, gzipped=self.gzipped)
            ]
            raise DataError(
                f"{path}: is not {encoding}: {bad}; all of it decodes as {', '.join(fits)}: set "
                f"the encoding to {fits[0]} {_ENCODING_KEYS}"
            ) from error
