import unicodedata
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_sentiment.data.cleaning import clean_text


@pytest.mark.parametrize(
    ("raw", "clean", "rule"),
    [
        ("a<br />b<BR>c", "a b c", "html line breaks"),
        ("fish &amp; chips", "fish & chips", "html entities"),
        ("a\x00b\x81c", "abc", "control characters"),
        ("zero\u200bwidth", "zerowidth", "control characters"),
        ("cafe\u0301", "café", "decomposed characters"),
        ("  a \n\t b\u00a0c ", "a b c", "repeated blanks"),
    ],
)
def test_each_rule_cleans_and_is_counted(raw, clean, rule):
    counts = Counter()
    assert clean_text(raw, counts) == clean
    assert counts[rule] == 1


def test_a_clean_text_stays_as_it_is_and_counts_nothing():
    counts = Counter()
    assert clean_text("Nothing to do here.", counts) == "Nothing to do here."
    assert sum(counts.values()) == 0


@given(st.text())
def test_a_cleaned_text_has_no_edges_and_no_control_characters(text):
    cleaned = clean_text(text, Counter())
    assert cleaned == cleaned.strip()
    assert "\x00" not in cleaned
    assert "  " not in cleaned


def test_what_would_take_the_cleaner_hours_or_down_is_cut_short():
    marks = "\u0316\u0301"
    long = clean_text("a" + marks * 50_000 + " b", Counter())
    assert len(long) < 40
    assert long.endswith(" b")
    assert clean_text("a" + marks * 10, Counter()) == unicodedata.normalize("NFC", "a" + marks * 10)
    assert (
        clean_text("—" * 100 + "é" * 100 + "😀" * 100, Counter())
        == "—" * 100 + "é" * 100 + "😀" * 100
    )
    assert clean_text(f"x &#{'9' * 5000}; y", Counter()) == "x \N{REPLACEMENT CHARACTER} y"
