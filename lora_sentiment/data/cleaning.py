"""Clean texts before they are tokenised, in training, `predict` and the server alike."""

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable

_CONTROL = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u200e\u200f\u2060\ufeff\ufffe\uffff\ud800-\udfff]"
)

_BLANKS = "".join(c for c in map(chr, range(0x3001)) if c.isspace() or _CONTROL.match(c)) + "\ufeff"
"""Characters that leave no mark at the ends of a label or of a column name."""

_MAX_COMBINING = 30
"""Most combining marks in a row.

No script needs more (UAX #15, "Stream-Safe Text Format"), and the time to normalise a run grows
with the square of its length.
"""
_LONG_RUN = re.compile(rf"[^\w\s\x00-\x7f]{{{_MAX_COMBINING + 1},}}")
"""A run that may have more marks. Marks are neither letters nor blanks."""


def _break_marks(run: re.Match[str]) -> str:
    """Remove the combining marks after the first _MAX_COMBINING in a row."""
    kept = []
    num_marks = 0
    for character in run.group():
        # Three Tibetan vowel signs decompose into marks without being marks.
        if unicodedata.combining(character) or character in "\u0f73\u0f75\u0f81":
            num_marks += 1
        else:
            num_marks = 0
        if num_marks <= _MAX_COMBINING:
            kept.append(character)
    return "".join(kept)


_RULES: dict[str, Callable[[str], str]] = {
    "html line breaks": lambda text: re.sub(r"<br\s*/?>", " ", text, flags=re.IGNORECASE),
    # A number with 1,000 digits is no character, and Python refuses to read more than 4,300 digits.
    "html entities": lambda text: html.unescape(
        re.sub(r"&#[0-9]{1000,};?", "\N{REPLACEMENT CHARACTER}", text)
    ),
    "control characters": lambda text: _CONTROL.sub("", text),
    "decomposed characters": lambda text: unicodedata.normalize(
        "NFC", _LONG_RUN.sub(_break_marks, text)
    ),
    "repeated blanks": lambda text: re.sub(r"\s+", " ", text).strip(),
}


def clean_text(text: str, counts: Counter[str]) -> str:
    """Clean one text and count the rules that changed it.

    HTML line breaks become blanks and HTML entities their characters. Control and zero-width
    characters are removed. The text is normalised to NFC. Repeated blanks become one.
    """
    for name, rule in _RULES.items():
        cleaned = rule(text)
        counts[name] += cleaned != text
        text = cleaned
    return text


def strip_blanks(name: str) -> str:
    """Remove blanks, control and zero-width characters around a label or a column name."""
    return name.strip(_BLANKS)


def fold_name(name: str) -> str:
    """Return what is left of a label without case, blanks and Unicode's forms of a character."""
    cleaned = clean_text(name, Counter())
    return "".join(unicodedata.normalize("NFKC", cleaned).casefold().split())
