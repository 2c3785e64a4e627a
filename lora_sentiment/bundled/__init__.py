"""What ships with the package: a small base, and short reviews written for it, under CC0."""

import json
from pathlib import Path

NAME = "bundled"
"""What `model.name` and `data.source` call the parts that ship."""
BASE = Path(__file__).parent / "base"
PATH_IN_CLONE = "lora_sentiment/bundled/base"
"""Where a clone of the repository has it."""
REVIEWS = Path(__file__).parent / "reviews"


def probe_texts(num_texts: int = 32) -> list[str]:
    """Return texts of our own whose logits every adapter records in its card."""
    with (REVIEWS / "validation.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line, _ in zip(file, range(num_texts), strict=False)]
