"""Name the encodings that the bytes of a file may be in, by evidence."""

import codecs
import re
from collections.abc import Callable
from typing import Any

from charset_normalizer import from_bytes

from lora_sentiment.errors import show

LIKELY = (
    "cp1252", "cp1251", "gb18030", "cp932", "cp949", "big5", "cp1250", "cp1254", "cp1256", "cp1255",
    "cp1253", "cp1257", "cp1258", "cp874", "euc_jp", "koi8_r", "koi8_u", "mac_roman", "mac_cyrillic",
    "cp850", "cp866", "cp852", "cp437", "iso8859_2", "iso8859_5", "iso8859_6", "iso8859_7",
    "iso8859_15", "latin_1",
)  # fmt: skip
"""Encodings that files really have. Of two that read a file alike, the first is named."""
MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Byte order marks. That of UTF-32 begins as that of UTF-16, and comes first."""
ISO_2022 = b"\x1b$"
"""Begins a character in the encodings of mail, whose bytes are all ASCII."""
_SAMPLE_BYTES = 1 << 16
_NUM_SHOWN = 4
_ASCII = bytes(range(128)).decode()

Open = Callable[[], Any]
"""Opens the file again, at its first byte."""


def find_bad_byte(open_file: Open, encoding: str) -> str:
    """Describe the first byte that does not decode; return an empty text if there is none."""
    decoder = codecs.getincrementaldecoder(encoding)()
    end, line, chunk = 0, 1, b"-"
    with open_file() as file:
        # Without the mark, nearly every file of even length decodes as UTF-16 into nonsense.
        has_mark = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        if codecs.lookup(encoding).name == "utf-16" and not has_mark:
            return "it has no byte order mark"
        file.seek(0)
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


def describe_likely_encodings(open_file: Open) -> tuple[str, dict[str, str]]:
    """Say which encodings the file may be in, and what a line reads in each.

    Returns:
        (finding, advice), as of a `DataError`.
    """
    lines = _take_lines(open_file)
    sample = b"".join(lines.values())
    text = sample.decode("utf-8", "replace")
    num_bad = text.count("\ufffd")
    if sum(not character.isascii() for character in text) > 5 * num_bad:
        return "nearly all of it is utf-8; correct the other characters", {}
    names: dict[str, str] = {}
    # Much ASCII around few other characters misleads the search, so a word and its neighbours are
    # taken.
    words = b" ".join(re.findall(rb"(?:\S+\s)?\S*[\x80-\xff]\S*(?:\s\S+)?", sample))
    for match in from_bytes(words, cp_isolation=list(LIKELY), threshold=0.4):
        name = min((match.encoding, *match.could_be_from_charset), key=_rank)
        text = sample.decode(name, "replace")
        if text not in names and len(names) < _NUM_SHOWN and not find_bad_byte(open_file, name):
            names[text] = name
    if not names:
        return "no common encoding fits all of it: it is damaged, or no text", {}

    def read(line: bytes) -> list[str]:
        return [show(_cut(line.decode(name, "replace"))) for name in names.values()]

    # A line that tells the encodings apart, and of these the shortest, which shows its label.
    number = min(lines, key=lambda number: (-len(set(read(lines[number]))), len(lines[number])))
    pairs = zip(read(lines[number]), names.values(), strict=True)
    readings = [f"{reading} as {name}" for reading, name in pairs]
    return (
        f"line {number} reads {', '.join(readings)}; save it as UTF-8",
        {"data.encoding": ", or set {} to the encoding that reads right"},
    )


def _cut(line: str) -> str:
    """Return the part of a line before and after its last character that is not ASCII."""
    end = len(line.rstrip(_ASCII))
    return line[max(0, end - 40) : end + 30].strip()


def _rank(name: str) -> int:
    return LIKELY.index(name) if name in LIKELY else len(LIKELY)


def find_certain_encoding(open_file: Open) -> str | None:
    """Return an encoding that bytes of another one would hardly fit."""
    with open_file() as file:
        head = file.read(_SAMPLE_BYTES)
    names = [name for mark, name in MARKS.items() if head.startswith(mark)][:1]
    if ISO_2022 in head:
        names += ["iso2022_jp", "iso2022_jp_3", "iso2022_kr"]
    for name, place in (("utf-16-le", 1), ("utf-16-be", 0)):
        # The high bytes of ASCII are zero in UTF-16, and no other byte is.
        has_zeros = 0 in head[place::2] and 0 not in head[1 - place :: 2]
        if has_zeros and head.count("\n".encode(name)) > head.count(b"\n") / 2:
            names.append(name)
    for name in (*names, "utf-8"):
        if not find_bad_byte(open_file, name):
            return name
    return None


def _take_lines(open_file: Open) -> dict[int, bytes]:
    """Return the first lines that are not ASCII, by their numbers."""
    lines: dict[int, bytes] = {}
    size, number = 0, 1
    with open_file() as file:
        while size < _SAMPLE_BYTES:
            line = file.readline(_SAMPLE_BYTES)
            if not line:
                break
            if not line.isascii():
                lines[number] = line
                size += len(line)
            number += line.endswith(b"\n")
    return lines
