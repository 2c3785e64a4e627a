"""What ships with the package: a small base, and short reviews written for it, under CC0."""

import json
from pathlib import Path

NAME = "bundled"
"""What `model.name` and `data.source` call the parts that ship."""
BASE = Path(__file__).parent / "base"
LICENSE = "apache-2.0"
"""The licence of the base, as the Hub writes it: see PROVENANCE.md."""
PATH_IN_CLONE = "lora_sentiment/bundled/base"
"""Where a clone of the repository has it."""
REVIEWS = Path(__file__).parent / "reviews"
SOURCES = {NAME: REVIEWS, "bundled-emotions": Path(__file__).parent / "emotions"}
"""What `data.source` calls the texts that ship, and the folder of each."""
STAND_INS = {
    "single_label": {"source": NAME},
    "multi_label": {"source": "bundled-emotions", "label_column": "emotions"},
    "regression": {"source": NAME, "label_column": "stars"},
}
"""The `data` section that stands in for rows of each task where no Hub answers."""


def probe_texts(num_texts: int = 32) -> list[str]:
    """Return texts of our own whose logits every adapter records in its card."""
    return _read_texts("validation")[:num_texts]


def review_texts() -> list[str]:
    """Return the texts of all 600 reviews."""
    return [text for role in ("train", "validation", "test") for text in _read_texts(role)]


def _read_texts(role: str) -> list[str]:
    lines = (REVIEWS / f"{role}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]
