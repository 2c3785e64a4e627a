"""Clean texts before they are tokenised, in training, `predict` and the server alike.

`add_cleaning` puts the same steps into a tokenizer, for programs that read raw texts. Both use the
same patterns, which mean the same in Python, in tokenizers (Oniguruma) and in JavaScript. Classes
of characters and flags do not: they differ among the three.
"""

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from html.entities import html5

from tokenizers import Regex, Tokenizer, normalizers

_BLANK = (
    r"[\u0009-\u000d\u001c-\u0020\u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
)
"""A blank, as `str.isspace` has it."""
_CHANGED_BLANKS = rf"{_BLANK}{{2,}}|(?! ){_BLANK}"
"""Blanks that are not one plain space. Replacing each single space too takes ten times as long."""
_LINE_BREAK = rf"<[bB][rR]{_BLANK}*/?>"
_CONTROL = r"[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u200b\u200e\u200f\u2060\ufeff\ufffe\uffff]"
_SURROGATE = "[\ud800-\udfff]"
"""Half of a pair. No tokenizer takes one."""
_ENTITIES = [
    *"!\"$%'()*+,-./:<=>?@[\\]^_`{|}~–—‘’‚“”„•…€™",
    *map(chr, range(0xA0, 0x100)),
    # Last, because the text of `&amp;lt;` is `&lt;`. For the same reason # and ; are left out.
    "&",
]
"""Characters whose entities a tokenizer with `add_cleaning` decodes."""

_AROUND = re.sub(f"(?!{_BLANK}|{_CONTROL}).", "", "".join(map(chr, range(0x3001)))) + "\ufeff"
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
    "html line breaks": lambda text: re.sub(_LINE_BREAK, " ", text),
    # A number with 1,000 digits is no character, and Python refuses to read more than 4,300 digits.
    "html entities": lambda text: html.unescape(
        re.sub(r"&#[0-9]{1000,};?", "\N{REPLACEMENT CHARACTER}", text)
    ),
    "control characters": lambda text: re.sub(f"{_CONTROL}|{_SURROGATE}", "", text),
    "decomposed characters": lambda text: (
        text if text.isascii() else unicodedata.normalize("NFC", _LONG_RUN.sub(_break_marks, text))
    ),
    "repeated blanks": lambda text: re.sub(_CHANGED_BLANKS, " ", text).strip(),
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
    return name.strip(_AROUND)


def fold_name(name: str) -> str:
    """Return what is left of a label without case, blanks and Unicode's forms of a character."""
    folded = unicodedata.normalize("NFKC", clean_text(name, Counter())).casefold()
    return "".join(c for c in folded if not (c.isspace() or _is_invisible(c)))


def find_similar(names: Sequence[str]) -> list[list[str]]:
    """Return the groups of names that `fold_name` makes equal."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(fold_name(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _is_invisible(character: str) -> bool:
    """Return whether a character only changes how its neighbours look, as a variation selector."""
    return unicodedata.category(character) == "Cf" or "\ufe00" <= character <= "\ufe0f"


def add_cleaning(tokenizer: Tokenizer) -> int:
    """Let a tokenizer clean texts as `clean_text` does, before its own normalizer.

    A normalizer can only replace a pattern by a fixed text. So two things stay as they are:
    entities of characters that are not in _ENTITIES, and long runs of combining marks. Special
    tokens, such as [SEP], are found before cleaning instead of after it.

    Returns:
        The number of steps that were put in front of the tokenizer's own normalizer.
    """
    steps: list[normalizers.Normalizer] = [normalizers.Replace(Regex(_LINE_BREAK), " ")]
    for character in _ENTITIES:
        steps.append(normalizers.Replace(Regex(_make_entity_pattern(character)), character))
    steps += [
        normalizers.Replace(Regex(_CONTROL), ""),
        normalizers.NFC(),
        normalizers.Replace(Regex(f"{_BLANK}+"), " "),
        normalizers.Strip(),
    ]
    own = [tokenizer.normalizer] if tokenizer.normalizer else []
    tokenizer.normalizer = normalizers.Sequence([*steps, *own])
    return len(steps)


def remove_cleaning(tokenizer: Tokenizer, num_steps: int) -> None:
    """Remove the steps of `add_cleaning` again, for texts that `clean_text` cleans."""
    steps = tokenizer.normalizer
    own = [steps[place] for place in range(num_steps, len(steps))]
    tokenizer.normalizer = normalizers.Sequence(own)


def _make_entity_pattern(character: str) -> str:
    """Return a regular expression for all entities that `html.unescape` turns into a character."""
    found = []
    for name, value in html5.items():
        if value != character:
            continue
        # A name without a semicolon counts unless it begins a longer name.
        rests = [other.removeprefix(name) for other in html5 if other.startswith(name)]
        rests.remove("")
        found.append(f"{name}(?!{'|'.join(rests)})" if rests else name)
    for number in [ord(character), *range(128, 160)]:
        # The numbers from 128 to 159 are those of Windows-1252.
        if html.unescape(f"&#{number};") == character:
            found.append(f"#0*{number}(?:;|(?![0-9]))")
            digits = re.sub("[a-f]", lambda digit: f"[{digit[0]}{digit[0].upper()}]", f"{number:x}")
            found.append(f"#[xX]0*{digits}(?:;|(?![0-9a-fA-F]))")
    return f"&(?:{'|'.join(found)})"
