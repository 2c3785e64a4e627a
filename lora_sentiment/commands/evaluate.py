"""Score a saved adapter, rebuilt from its folder alone."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_sentiment.adapter.folder import Card, load
from lora_sentiment.data.batches import TextEncoder
from lora_sentiment.data.rows import Rows, load_data, load_judged, load_rows
from lora_sentiment.data.sources import find_source, is_on_hub
from lora_sentiment.errors import AdapterError, DataError
from lora_sentiment.evaluation.statistics import Interval
from lora_sentiment.hub import prepare_hub
from lora_sentiment.models.dtype import resolve_dtype
from lora_sentiment.models.inference import make_fast, predict_logits
from lora_sentiment.tasks.metrics import score_calibrated
from lora_sentiment.training.processes import explain_lost_process, join_launch, make_accelerator

log = logging.getLogger("lora_sentiment")


@dataclass(frozen=True)
class Evaluation:
    """Scores of an adapter on one split, with 95 % intervals."""

    split: str
    num_rows: int
    scores: dict[str, Interval]

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        scores = {name: interval.as_dict() for name, interval in self.scores.items()}
        return {"split": self.split, "num_rows": self.num_rows, **scores}


def evaluate(
    folder: Path,
    *,
    source: str | None = None,
    split: str = "test",
    base: str | None = None,
    dtype: str = "auto",
) -> Evaluation:
    """Score an adapter folder.

    Args:
        folder: An adapter folder. Its base is found where the card says, and checked by its hash.
        source: Rows to score on instead of the recorded source: a file or a Hub data set with the
            recorded columns.
        split: A judged role, such as `test`, or `validation` as training had it. Of `source`, the
            name of its split.
        base: Where to find the base, if not where the card says.
        dtype: Compute dtype, as `model.dtype` of a recipe.

    Raises:
        AdapterError: If the folder, base or tokenizer is not the one that was saved.
        DataError: If the rows cannot be read, or there is no such split.
    """
    state = join_launch()
    accelerator = make_accelerator(state, dtype)
    loaded = load(folder, base=base, device=accelerator.device)
    card = loaded.card
    compute_dtype = resolve_dtype(dtype, accelerator.device)
    model = make_fast(loaded.model, dtype=compute_dtype, device=accelerator.device)
    rows = _read(card, source, split)
    is_main = accelerator.is_main_process
    encoder = TextEncoder.of(
        loaded.tokenizer, max_length=card.max_length, truncation=card.truncation
    )
    encoded = encoder.encode(rows, progress=is_main)
    with explain_lost_process(state):
        logits = predict_logits(
            model, encoded, accelerator=accelerator, progress=split if is_main else None
        )
    scores = score_calibrated(logits, encoded.labels, calibration=card.calibration)
    return Evaluation(split=split, num_rows=len(rows), scores=scores)


def _read(card: Card, source: str | None, split: str) -> Rows:
    """Return the rows of a split of `source`, or of the recorded source."""
    config = card.data.config
    if is_on_hub(source or config.source):
        prepare_hub()
    if source is not None:
        given = config.model_copy(update={"source": source, "config": None, "revision": None})
        return load_rows(given, split=split, labels=tuple(card.labels))[0]
    try:
        return _read_recorded(card, split)
    except DataError as error:
        raise DataError(f"{error}; other rows can be named with --source") from error


def _read_recorded(card: Card, role: str) -> Rows:
    """Return the rows of a role that training judged, or of validation."""
    config = card.data.config
    judged = find_source(config).judged
    if role in judged:
        rows, counts = load_judged(config, role=role, labels=tuple(card.labels))
        if rows is None:
            raise DataError(
                f"{config.source}: the {counts.read:,} rows of {role} have no labels (all are -1)"
            )
        return rows
    allowed = [*(judged or ["test"]), "validation"]
    if role not in allowed:
        raise DataError(f"split: found {role!r}; allowed: {', '.join(allowed)}")
    data = load_data(config, labels=tuple(card.labels))
    carved, recorded = data.validation, card.data.validation_sha256
    if role != "validation":
        if data.carved_test is None or card.data.carved_test_sha256 is None:
            raise DataError(f"{config.source}: has no test split; use --split validation")
        carved, recorded = data.carved_test, card.data.carved_test_sha256
    if carved.fingerprint != recorded:
        raise AdapterError(
            f"{config.source}: changed since training, so its {role} rows are other ones and may "
            "have been trained on; name rows with --source"
        )
    return carved
