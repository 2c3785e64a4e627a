"""What ships with the package: short reviews written for it, under CC0."""

import json
from pathlib import Path

REVIEWS = Path(__file__).parent / "reviews"


def probe_texts(num_texts: int = 32) -> list[str]:
    """Return texts of our own whose logits every adapter records in its card."""
    with (REVIEWS / "validation.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line, _ in zip(file, range(num_texts), strict=False)]
