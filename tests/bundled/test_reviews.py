"""What the bundled reviews promise: counts, balance, variety, no leakage between the splits, and clean files."""

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

import lora_sentiment

FOLDER = Path(lora_sentiment.__file__).parent / "bundled" / "reviews"
NUM_ROWS = {"train": 400, "validation": 100, "test": 100}


def raw(split: str) -> str:
    """Return the file of one split; a byte that is not UTF-8 raises."""
    return (FOLDER / f"{split}.jsonl").read_bytes().decode("utf-8")


def rows(split: str) -> list[dict[str, str | int]]:
    """Return the reviews of one split in file order."""
    return [json.loads(line) for line in raw(split).splitlines()]


def texts() -> list[str]:
    """Return all the reviews of all the splits."""
    return [str(row["text"]) for split in NUM_ROWS for row in rows(split)]


def words(text: str) -> list[str]:
    """Return the lower-cased words of a review, apostrophes kept, punctuation dropped."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower())


def trigrams(text: str) -> set[tuple[str, ...]]:
    """Return the word trigrams of a review."""
    found = words(text)
    return set(zip(found, found[1:], found[2:], strict=False))


@pytest.mark.parametrize("split", NUM_ROWS)
def test_every_line_is_a_json_object_with_exactly_the_three_keys(split: str) -> None:
    for row in rows(split):
        assert list(row) == ["text", "stars", "label"]
        assert isinstance(row["text"], str)
        assert type(row["stars"]) is int


@pytest.mark.parametrize(("split", "expected"), NUM_ROWS.items())
def test_each_split_has_its_count_and_is_half_positive(split: str, expected: int) -> None:
    labels = Counter(row["label"] for row in rows(split))
    assert labels == {"negative": expected // 2, "positive": expected // 2}


def test_reviews_have_twelve_to_eighty_words() -> None:
    assert [text for text in texts() if not 12 <= len(text.split()) <= 80] == []


def test_texts_are_unique_whatever_their_case_and_punctuation() -> None:
    assert len({" ".join(words(text)) for text in texts()}) == sum(NUM_ROWS.values())


def test_no_two_reviews_share_more_than_thirty_percent_of_their_trigrams() -> None:
    sets = [(text, trigrams(text)) for text in texts()]
    for (text, left), (other, right) in combinations(sets, 2):
        assert len(left & right) <= 0.3 * min(len(left), len(right)), (text, other)


def test_the_licence_dedicates_the_reviews_to_the_public_domain() -> None:
    licence = " ".join((FOLDER / "LICENSE").read_text(encoding="utf-8").split())
    assert "CC0-1.0" in licence
    assert "CC0 1.0 Universal" in licence
    assert "written for this project" in licence


def test_the_bag_of_words_baseline_is_the_one_that_is_stated() -> None:
    labels = {split: [str(row["label"]) for row in rows(split)] for split in NUM_ROWS}
    found = {split: [str(row["text"]) for row in rows(split)] for split in NUM_ROWS}
    scores = []
    for strength in (0.3, 1, 3, 10, 30):
        words_alone = TfidfVectorizer(sublinear_tf=True)
        model = make_pipeline(words_alone, LogisticRegression(C=strength, max_iter=2000))
        model.fit(found["train"], labels["train"])
        scores.append(
            [model.score(found[split], labels[split]) for split in ("validation", "test")]
        )
    assert max(scores, key=lambda pair: pair[0])[1] == pytest.approx(0.62)
    assert "gives **0.62** on the 100" in (FOLDER / "README.md").read_text(encoding="utf-8")
