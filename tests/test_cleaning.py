import html
import json
import re
import unicodedata
from collections import Counter
from html.entities import html5

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers

from lora_sentiment import cleaning
from lora_sentiment.cleaning import add_cleaning, clean_text, remove_cleaning


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


def make_tokenizer(normalizer):
    """Return a tokenizer with a normalizer and without a vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    return tokenizer


NORMALIZERS = {
    "none": None,
    "bert": normalizers.BertNormalizer(),
    "cased": normalizers.BertNormalizer(lowercase=False),
    "several": normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
}
DECODED = [name for name, value in html5.items() if value in cleaning._ENTITIES]
NUMBERS = [ord(character) for character in cleaning._ENTITIES]
PIECES = st.one_of(
    st.sampled_from(
        ["<br />", "<BR>", "<bR\u00a0\x1c/>", "<br/ >", "&", "#", ";", "3", "x", "lt", "|"]
    ),
    st.sampled_from(
        ["&amp;", "&amp;lt;", "&lt;br&gt;", "&notit;", "&notin", "&ltimes", "&#38;#39;"]
    ),
    st.sampled_from(
        ["e\u0301", "\u212b", "\u1112\u1161", "\r\n", "\x00", "\x85", "\u200b", "\ufeff"]
    ),
    st.sampled_from(DECODED).map("&{}".format),
    st.sampled_from(NUMBERS).map("&#{}".format),
    st.sampled_from(NUMBERS).map("&#0{};".format),
    st.sampled_from(NUMBERS).map("&#x{:x};".format),
    st.sampled_from(NUMBERS).map("&#X0{:X}".format),
    st.characters(exclude_categories=["Cs"]),
    st.text(st.characters(codec="ascii"), max_size=5),
)


def decodes_another(text):
    """Whether a text has an entity of a character that a normalizer does not decode."""
    for found in re.findall(r"&#?[0-9A-Za-z]+;?", text):
        named = html5.get(found.removeprefix("&"))
        changed = html.unescape(found)
        if changed != found and (named or changed[:1]) not in cleaning._ENTITIES:
            return True
    return False


@pytest.mark.parametrize("name", NORMALIZERS)
@given(st.lists(PIECES, max_size=6).map("".join))
def test_a_tokenizer_with_cleaning_reads_raw_texts_as_the_cleaner_does(name, text):
    plain, cleans = PLAIN[name], CLEANING[name]
    if decodes_another(text):
        return
    cleaned = clean_text(text, Counter())
    expected = plain.normalizer.normalize_str(cleaned) if plain.normalizer else cleaned
    assert cleans.normalizer.normalize_str(text) == expected


def with_cleaning(normalizer):
    tokenizer = make_tokenizer(normalizer)
    add_cleaning(tokenizer)
    return tokenizer


PLAIN = {name: make_tokenizer(normalizer) for name, normalizer in NORMALIZERS.items()}
CLEANING = {name: with_cleaning(normalizer) for name, normalizer in NORMALIZERS.items()}


@pytest.mark.parametrize(
    "text",
    [
        "&alpha;",
        "&#945;",
        "&num;",
        "&#59;",
        "&nvgt;",
        "&ltimes;",
        "&#0;",
        "&#xD800;",
        "a" + "\u0301" * 40,
    ],
)
def test_what_a_normalizer_cannot_express_stays(text):
    cleaned = CLEANING["none"].normalizer.normalize_str(text)
    assert cleaned == unicodedata.normalize("NFC", text) != clean_text(text, Counter())


@pytest.mark.parametrize("name", NORMALIZERS)
def test_cleaning_is_removed_from_a_tokenizer_again(name):
    tokenizer = make_tokenizer(NORMALIZERS[name])
    num_steps = add_cleaning(tokenizer)
    again = Tokenizer.from_str(tokenizer.to_str())
    remove_cleaning(again, num_steps)
    text = "<br />Caf&eacute; \u212b"
    plain = PLAIN[name].normalizer
    assert again.normalizer.normalize_str(text) == (plain.normalize_str(text) if plain else text)


def test_patterns_mean_the_same_in_javascript():
    steps = json.loads(CLEANING["none"].to_str())["normalizer"]["normalizers"]
    patterns = [step["pattern"]["Regex"] for step in steps if step["type"] == "Replace"]
    assert len(patterns) == len(cleaning._ENTITIES) + 3
    for pattern in patterns:
        # No flag, no class of characters, no escape but \uXXXX, and those of punctuation in numbers.
        assert "(?i" not in pattern
        assert not re.search(r"\\(?!u[0-9a-f]{4})", pattern)


def test_a_blank_is_what_python_calls_one():
    characters = [chr(code) for code in range(0x110000)]
    blanks = [character for character in characters if character.isspace()]
    assert re.findall(cleaning._BLANK, "".join(characters)) == blanks
