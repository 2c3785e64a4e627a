"""Read and write csv, tsv and jsonl row by row. `tables.py` describes each format."""

import codecs
import csv
import datetime
import gzip
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from decimal import Decimal
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from lora_sentiment.cleaning import strip_blanks
from lora_sentiment.data.encoding import (
    ISO_2022,
    describe_likely_encodings,
    find_bad_byte,
    find_certain_encoding,
)
from lora_sentiment.errors import DataError, show

ColumnBatch = dict[str, list[Any]]
"""Rows as whole columns: name to values."""
MAX_CHARACTERS = 10_000_000
"""Most characters of a line and of a csv field. Without it an unclosed quote reads a whole file."""

_CSV_FAULTS = {
    "unexpected end of data": "a quote opened in this row is never closed; close it",
    "larger than": (
        f"a field is longer than {MAX_CHARACTERS:,} characters; close its quote, or shorten it"
    ),
    "new-line character": "a carriage return stands alone outside quotes; end rows in LF or CRLF",
    "expected after": (
        "text follows a closing quote; write a quote inside a quoted field as two quotes (in R: "
        'qmethod="double")'
    ),
}
DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
"""Characters that separate the fields of a table, and their names."""
_OTHER_DELIMITER = re.compile(r"[^\w\s\"]")
PLAIN_TABS = ""
"""In the place of a delimiter: a tab always ends a field, and a quote is a character."""
_SEP_LINE = re.compile(r'"?sep=(\\t|[^"\r\n])[ ,;]*"?\r?\n', re.IGNORECASE)
"""Excel's first line, which names the delimiter. A program that saved it again may add to it."""

_JSON_LINES = (
    'each line must hold one object, as {"text": "fine", "label": 1}; in Python, load the objects '
    "as a list `rows`, then `for row in rows: print(json.dumps(row))` writes such lines"
)

_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair. Some encodings of Python, such as raw_unicode_escape, decode to it."""


def check_columns(columns: Sequence[str], path: Path | str) -> None:
    """Refuse column names that are missing, equal, or not readable again."""
    if not columns:
        raise DataError(f"{path}: the table has no columns; it needs at least one, such as 'text'")
    for number, name in enumerate(columns, 1):
        first = columns.index(name) + 1
        if not name:
            fault = (
                "has no name; name it or remove it (pandas writes an index so, unless "
                "to_csv(index=False), and R row names, unless row.names=FALSE)"
            )
        elif first != number:
            fault = f"has the name of column {first}, {show(name)}; rename or remove one of them"
        else:
            continue
        raise DataError(f"{path}: column {number} of {len(columns)} {fault}")


def find_column(columns: Sequence[str], name: str) -> str | None:
    """Return the column of a name. Blanks around a name count only where both spellings occur."""
    if name in columns:
        return name
    found = [column for column in columns if strip_blanks(column) == strip_blanks(name)]
    return found[0] if len(found) == 1 else None


def has_columns(columns: Sequence[str], names: Sequence[str]) -> bool:
    """Return whether every name has a column."""
    return all(find_column(columns, name) is not None for name in names)


class _Lines:
    """The lines of an open file, with their line ends. `number` is that of the last one read."""

    def __init__(self, file: io.TextIOWrapper, path: Path) -> None:
        self.file = file
        self.path = path
        self.number = 0

    def rewind(self) -> None:
        self.file.seek(0)
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        while line := self.file.readline(MAX_CHARACTERS + 1):
            self.number += 1
            fault = None
            if len(line) > MAX_CHARACTERS:
                fault = f"is longer than {MAX_CHARACTERS:,} characters; cut it"
            elif "\0" in line:
                # Mostly it is text in UTF-16: `TextFormat` explains it.
                raise UnicodeError(f"line {self.number} holds a NUL character")
            elif ISO_2022.decode() in line:
                raise UnicodeError(f"line {self.number} holds an escape sequence of ISO-2022")
            elif not line.isascii() and _SURROGATE.search(line):
                fault = (
                    "holds half of a surrogate pair, which no tokenizer takes; save the file as "
                    "UTF-8"
                )
            if fault:
                raise DataError(f"{self.path}: line {self.number} {fault}")
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


class Dialect(NamedTuple):
    """How the fields of a csv or tsv file are separated.

    Attributes:
        delimiter: The character between two fields, or `PLAIN_TABS`.
        is_declared: Whether a first line `sep=;` names it. That line is no row.
        has_row_names: Whether each row begins with a name that the header leaves out, as R writes
            it.
        skips_blanks: Whether blanks stand between a delimiter and the quote that follows it.
    """

    delimiter: str
    is_declared: bool = False
    has_row_names: bool = False
    skips_blanks: bool = False

    def read(self, lines: Iterable[str]) -> Iterator[list[str]]:
        """Yield the fields of each row of lines. Raise csv.Error for a row that is none."""
        if self.delimiter == PLAIN_TABS:
            texts = (line.removesuffix("\n").removesuffix("\r") for line in lines)
            return (text.split("\t") if text else [] for text in texts)
        return csv.reader(
            lines, delimiter=self.delimiter, strict=True, skipinitialspace=self.skips_blanks
        )


def _read_row(lines: Iterable[str], dialect: Dialect) -> list[str]:
    """Return the fields of the first row, or none if it has a fault."""
    try:
        return next(dialect.read(lines), [])
    except csv.Error:
        return []  # `delimited_rows` reads the row again and explains its fault


def _find_delimiter(header: str, own: str, needed: Sequence[str]) -> str:
    """Return the first delimiter, the format's own before others, that gives the needed columns."""
    columns = {}
    others: list[str] = _OTHER_DELIMITER.findall(header)
    for delimiter in (own, *DELIMITERS, *others):
        names = _read_row([header], Dialect(delimiter, skips_blanks=True))
        # Between the two characters of `||`, a name is empty.
        columns[delimiter] = names if delimiter == own or all(names) else []
        if has_columns(columns[delimiter], needed):
            return delimiter
    # The needed columns are missing, so the file will be refused. The message shows the columns.
    is_whole = header.count('"') % 2 == 0
    if is_whole and len(columns[own]) < 2:
        return max((own, *DELIMITERS), key=lambda delimiter: len(columns[delimiter]))
    return own


def find_dialect(lines: _Lines, own: str, needed: Sequence[str]) -> Dialect:
    """Find out from the first rows how fields are separated.

    Args:
        lines: The file at its beginning, and again afterwards.
        own: The delimiter of the format.
        needed: Columns that the header has. If no delimiter gives them, the format's own is taken.
    """
    remaining = iter(lines)
    header = next(remaining, "")
    declared = _SEP_LINE.fullmatch(header)
    if declared:
        header = next(remaining, "")
        own = declared[1].replace("\\t", "\t")
    dialect = Dialect(_find_delimiter(header, own, needed), declared is not None)
    if dialect.delimiter != PLAIN_TABS:
        dialect = _find_habits(dialect, header, remaining)
    lines.rewind()
    return dialect


def _find_habits(dialect: Dialect, header: str, remaining: Iterator[str]) -> Dialect:
    """Find out from the header and the first row what a program writes beside the fields."""
    names = _read_row([header], dialect)
    first = next(remaining, "")
    row = _read_row(chain([first], remaining), dialect)
    fields = [*names, *row]
    is_opened = any(re.match(' +"', field) for field in fields)
    if is_opened and any(field.endswith('"') for field in fields):
        return dialect._replace(skips_blanks=True)
    # R quotes every name of a column and of a row.
    is_quoted = header.count('"') == 2 * len(names) and first.startswith('"')
    return dialect._replace(has_row_names=is_quoted and len(row) == len(names) + 1)


def delimited_rows(lines: _Lines, own: str, needed: Sequence[str]) -> Iterator[list[Any]]:
    """Yield the columns and then each row of csv, by RFC 4180, or tsv.

    Args:
        lines: The file.
        own: The delimiter of the format.
        needed: As for `find_dialect`.
    """
    csv.field_size_limit(MAX_CHARACTERS)  # the csv module has one limit for the whole process
    dialect = find_dialect(lines, own, needed)
    remaining = iter(lines)
    if dialect.is_declared:
        next(remaining)
    records = dialect.read(remaining)
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
                names = ", ".join(f"{name}s" for name in DELIMITERS.values())
                fault += f"; fields may be separated by {names}"
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
        elif dialect.has_row_names:
            fields = fields[1:]
        if len(fields) != len(columns):
            fault = (
                f"found {len(fields)} field(s), expected {len(columns)}, as in the header: "
                f"{show(columns)}; {_advise(dialect, fields)}"
            )
            if row == 1 and len(fields) == len(columns) + 1 and " " not in fields[0]:
                fault += "; if the first field is a row name of R, write with row.names=FALSE"
            raise lines.fault(row, fault, line=line)
        yield fields


def _advise(dialect: Dialect, fields: list[str]) -> str:
    """Say how to mend a row with too many or too few fields."""
    if dialect.delimiter != PLAIN_TABS:
        name = DELIMITERS.get(dialect.delimiter, repr(dialect.delimiter))
        return f"quote a field that holds a {name} or a newline"
    advice = "a tab always ends a field, quoted or not: replace tabs in texts by spaces"
    if any('"' in field for field in fields):
        advice += "; if quotes enclose fields here, end the file's name in .csv"
    return advice


def _make_record(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError(f"a key stands twice among {show([name for name, _ in pairs])}")
    return record


def jsonl_rows(lines: _Lines, needed: Sequence[str], *, others: bool) -> Iterator[list[Any]]:
    """Yield the keys of the objects and then the values of each object.

    Args:
        lines: The file.
        needed: Keys that some object must have.
        others: Whether every key of the file is wanted. If not, the keys are those up to the object
            in which all needed ones have been seen.
    """
    keys: dict[str, None] = {}
    row = 0
    for row, record in _records(lines):
        if row == 1 and needed and all(isinstance(record.get(n), dict | list) for n in needed):
            raise lines.fault(
                row,
                "its keys hold whole columns; each line must hold one row, as pandas writes by "
                "to_json(orient='records', lines=True)",
            )
        keys.update(dict.fromkeys(record))
        if not others and has_columns(list(keys), needed):
            break
    if not row:
        return
    columns = list(keys)
    check_columns(columns, lines.path)
    yield columns
    lines.rewind()
    for _, record in _records(lines):
        yield [record.get(name) for name in columns]


def _records(lines: _Lines) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the object of each row."""
    row = 0
    for line in lines:
        text = line.rstrip(" \t\r\n")
        if not text:
            continue
        row += 1
        try:
            record = json.loads(text, object_pairs_hook=_make_record)
            if not isinstance(record, dict):
                raise ValueError(f"found a {type(record).__name__}")
            if "\\u" in line:
                # An escape can name half of a surrogate pair, which no tokenizer and no file takes.
                json.dumps(record, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            fault = f"no JSON object: {error}".replace(": line 1 column", " at column")
            if not isinstance(error, RecursionError):
                fault = _explain_json(text, row) or fault
            raise lines.fault(row, f"{fault}; {_JSON_LINES}") from error
        yield row, record


def _explain_json(text: str, row: int) -> str | None:
    """Return the fault of a line of JSON that has not one object a line."""
    if row == 1 and re.match(r"\s*\[\s*(\{|$)", text):
        return "is a JSON array"
    text = text.lstrip()
    if not text.startswith("{"):
        return None
    with suppress(ValueError):
        _, end = json.JSONDecoder().raw_decode(text)
        rest = text[end:].strip()
        return f"{show(rest)} follows the object" if rest else None
    if row == 1 and text.endswith(("{", "[", ",", ":")):
        return "begins an object that goes on in the next line"
    return None


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
            "UTF-8"
        )
    try:
        codec = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
        # Only "\n" ends a line here: Python's other line ends, such as U+0085, are characters of
        # real texts.
        return io.TextIOWrapper(file, encoding=codec, newline="\n")
    except (LookupError, ValueError) as error:
        raise DataError(
            f"{path}: {encoding!r} is no text encoding of Python's; set one such as utf-8, utf-16, "
            "cp1252"
        ) from error


def _make_batch(columns: list[str], rows: list[list[Any]]) -> ColumnBatch:
    return {name: [row[place] for row in rows] for place, name in enumerate(columns)}


class TextFormat(NamedTuple):
    """A text format.

    Attributes:
        make_line: Writes a row.
        delimiter: The delimiter of csv or tsv, which have a header. None for jsonl.
        gzipped: Whether the file is compressed.
    """

    make_line: Callable[[Sequence[Any], Sequence[str]], str]
    delimiter: str | None = None
    gzipped: bool = False

    @contextmanager
    def _open(self, path: Path, encoding: str) -> Iterator[_Lines]:
        """Open a file. Bytes that do not decode are explained."""
        try:
            with (
                _open(path, gzipped=self.gzipped) as file,
                _decode(file, path=path, encoding=encoding) as text,
            ):
                yield _Lines(text, path)
        except UnicodeError as error:
            reopen = partial(_open, path, gzipped=self.gzipped)
            bad = find_bad_byte(reopen, encoding)
            certain = find_certain_encoding(reopen)
            if not bad and certain == "utf-8":
                raise DataError(f"{path}: {error}; remove it") from error
            fault = f"is not {encoding}: {bad}" if bad else str(error)
            if certain:
                finding = f"all of it is {certain}; save it as UTF-8"
                advice = {"data.encoding": f", or set {{}}={certain}"}
            else:
                finding, advice = describe_likely_encodings(reopen)
            raise DataError(f"{path}: {fault}; {finding}", advice=advice) from error

    def describe(self, path: Path, encoding: str, needed: Sequence[str]) -> str | None:
        """Say how the fields of a file are separated, if it is not as its name says."""
        if self.delimiter is None:
            return None
        with self._open(path, encoding) as lines:
            dialect = find_dialect(lines, self.delimiter, needed)
        if dialect == Dialect(self.delimiter):
            return None
        name = DELIMITERS.get(dialect.delimiter, f"{dialect.delimiter!r} character")
        text = f"its fields are separated by {name}s and may be quoted"
        if dialect.skips_blanks:
            text += " after a blank"
        if dialect.has_row_names:
            text += "; the row name before each row, as R writes it, is left out"
        return text

    def read(
        self,
        path: Path,
        encoding: str,
        rows_per_batch: int,
        needed: Sequence[str],
        *,
        others: bool,
    ) -> Iterator[ColumnBatch]:
        """Yield the batches of a file. Raise DataError if the format does not allow its content."""
        with self._open(path, encoding) as lines:
            if self.delimiter is None:
                rows = jsonl_rows(lines, needed, others=others)
            else:
                rows = delimited_rows(lines, self.delimiter, needed)
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
