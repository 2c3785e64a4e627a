"""Two forms of one model on the same rows: how far their answers are apart."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_sentiment.adapter.folder import Card
from lora_sentiment.bundled import probe_texts
from lora_sentiment.data.batches import Encoded, TextEncoder
from lora_sentiment.data.rows import Rows, load_data, sample
from lora_sentiment.data.sources import is_on_hub
from lora_sentiment.errors import DataError
from lora_sentiment.hub import prepare_hub
from lora_sentiment.models.engine import Engine, compute_logits

log = logging.getLogger("lora_sentiment")

MAX_DIFFERENCE = 1e-4
"""Largest difference of a logit between forms that should be equal, in units of max(1, their standard deviation)."""


@dataclass(frozen=True)
class Reference:
    """What one form of a model answers.

    Attributes:
        name: What it is called in figures: `adapter` or `merged`.
        rows: `probe`, and `validation` where its rows could be had.
        logits: The answers to each, (num_rows, num_labels).
        missing: Why there are no validation rows, or None.
        progress: Show bars.
    """

    name: str
    rows: dict[str, Encoded]
    logits: dict[str, NDArray[np.float32]]
    missing: str | None
    progress: bool

    def compare(self, engine: Engine, name: str, *, exact: bool) -> dict[str, Any]:
        """Return how far another form's answers are from these.

        Args:
            engine: The other form.
            name: What it is called in figures.
            exact: Whether its logits should be equal but for rounding.

        Returns:
            `probe` and `validation`, each with its `rows`, the `max_difference` of a logit (null where one is not
            finite), the largest one `allowed` (null unless exact), the `flips` of the likeliest label, and on
            validation the accuracy of both; or the `reason` why validation rows could not be had.
        """
        found: dict[str, Any] = {}
        for part, encoded in self.rows.items():
            ours, theirs = (
                self.logits[part],
                compute_logits(engine, encoded, progress=part if self.progress else None),
            )
            difference = float(np.abs(theirs - ours).max())
            found[part] = {
                "rows": len(encoded),
                "max_difference": difference if np.isfinite(difference) else None,
                "allowed": MAX_DIFFERENCE * max(1.0, float(ours.std())) if exact else None,
                "flips": int((theirs.argmax(axis=1) != ours.argmax(axis=1)).sum()),
            }
            if part == "validation":
                for form, logits in ((self.name, ours), (name, theirs)):
                    found[part][f"accuracy_{form}"] = float(
                        (logits.argmax(axis=1) == encoded.labels).mean()
                    )
        if self.missing is not None:
            found["validation"] = {"reason": self.missing}
        return found


def ask(
    engine: Engine,
    name: str,
    *,
    card: Card | None,
    encoder: TextEncoder,
    max_rows: int,
    progress: bool,
) -> Reference:
    """Let a form of a model answer the probe, and validation rows where they can be had.

    Args:
        engine: The form.
        name: What it is called in figures.
        card: The adapter's, which holds the probe and names the rows; without it the bundled texts are the probe.
        encoder: From texts to inputs, as in training.
        max_rows: Most validation rows.
        progress: Show bars.
    """
    if card:
        inputs = [np.array(ids, dtype=np.int32) for ids in card.probe.input_ids]
    else:
        inputs = [encoder.frame(encoder.truncate(ids)) for ids in encoder.tokenise(probe_texts())]
    rows, missing = {"probe": encoder.pack(inputs)}, None
    try:
        rows["validation"] = encoder.encode(_validation_rows(card, max_rows), progress=progress)
    except DataError as error:
        missing = str(error)
        log.info("compared on the probe alone, without validation rows: %s", missing)
    logits = {
        part: compute_logits(engine, encoded, progress=part if progress else None)
        for part, encoded in rows.items()
    }
    return Reference(name, rows, logits, missing, progress)


def find_fault(found: dict[str, Any]) -> str | None:
    """Return what is wrong with logits that should be finite, and equal where a difference is allowed; else None."""
    for part, figures in found.items():
        if "rows" not in figures:
            continue
        difference, allowed = figures["max_difference"], figures["allowed"]
        if difference is None:
            return f"its logits are not finite on the {part} rows"
        if allowed is not None and not difference <= allowed:
            return (
                f"its logits differ by {difference:.2g} on the {part} rows, allowed {allowed:.2g}"
            )
    return None


def without_reasons(compared: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return figures as a stamp may hold them: a reason may quote a path or a cell of someone's file."""
    unread = {"reason": "its rows could not be had where this was made"}
    return {
        form: {
            part: unread if isinstance(value, dict) and "reason" in value else value
            for part, value in found.items()
        }
        for form, found in compared.items()
    }


def _validation_rows(card: Card | None, max_rows: int) -> Rows:
    if card is None:
        raise DataError(
            "a merged folder does not say on which rows it was trained; export the adapter itself"
        )
    config = card.data.config
    if is_on_hub(config.source):
        prepare_hub()
    rows = load_data(config).validation
    if rows.fingerprint != card.data.validation_sha256:
        raise DataError(
            f"{config.source}: changed since training, so its validation rows are other ones"
        )
    return sample(rows, num_rows=max_rows, seed=config.split_seed)
