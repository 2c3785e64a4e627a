"""Clean texts: what training, `predict` and the server all do alike before they tokenise."""

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable

_CONTROL = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u200e\u200f\u2060\ufeff\ufffe\uffff\ud800-\udfff]"
)

_MARKS = 30
"""Most combining marks in a row: no script needs more (UAX #15, "Stream-Safe Text Format"), and the time to normalise a
run grows with the square of its length."""
_LONG_RUN = re.compile(rf"[^\w\s\x00-\x7f]{{{_MARKS + 1},}}")
"""What may hold such a run: marks are neither letters nor blanks."""


def _break_marks(run: re.Match[str]) -> str:
    """Leave out of a run of combining marks what comes after the first so many."""
    kept, marks = [], 0
    for character in run.group():
        # Three Tibetan vowel signs are made of marks without being one.
        marks = (
            marks + 1
            if unicodedata.combining(character) or character in "\u0f73\u0f75\u0f81"
            else 0
        )
        if marks <= _MARKS:
            kept.append(character)
    return "".join(kept)


_RULES: dict[str, Callable[[str], str]] = {
    "html line breaks": lambda text: re.sub(r"<br\s*/?>", " ", text, flags=re.IGNORECASE),
    # A number of so many digits is no character, and Python refuses to read one of more than 4,300.
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

    HTML line breaks become blanks, HTML entities their characters, control and zero-width characters go, the rest is
    normalised to NFC, and runs of blanks become one.
    """
    for name, rule in _RULES.items():
        before, text = text, rule(text)
        counts[name] += text != before
    return text
