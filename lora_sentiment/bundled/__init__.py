"""What ships with the package: a small base, and short reviews written for it, under CC0."""

import json
from pathlib import Path

NAME = "bundled"
"""What `model.name` and `data.source` call the parts that ship."""
BASE = Path(__file__).parent / "base"
PATH_IN_CLONE = "lora_sentiment/bundled/base"
"""Where a clone of the repository has it."""
REVIEWS = Path(__file__).parent / "reviews"

StandIn = dict[str, str]
"""Key of a recipe to what it asked for, where the bundled part stood in for it; and why, under
`reason`."""


def probe_texts(num_texts: int = 32) -> list[str]:
    """Return texts of our own whose logits every adapter records in its card."""
    with (REVIEWS / "validation.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line, _ in zip(file, range(num_texts), strict=False)]


def describe(stand_in: StandIn) -> str:
    """Return the sentence that says what was replaced, and why."""
    asked = ", ".join(f"{key} {value}" for key, value in stand_in.items() if key != "reason")
    return (
        f"NOT what the recipe asks for ({asked}): no Hub answered ({stand_in['reason']}), so the "
        f"small base and the "
        "short reviews that ship with the package stood in; no figure here is one of the data that "
        "it names, and a "
        "few hundred reviews teach little: adapters/imdb_small is an adapter that works"
    )
