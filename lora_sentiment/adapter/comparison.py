"""Compare two forms of one model on the same rows."""

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
"""Largest difference of a logit between equal forms, in units of max(1, standard deviation of the
logits)."""


@dataclass(frozen=True)
class Reference:
    """The answers of one form of a model.

    Attributes:
        name: Its name in figures: `adapter` or `merged`.
        rows: The rows of `probe`, and of `validation` if they could be read.
        logits: The answers to each part, shape (num_rows, num_labels).
        missing: Why there are no validation rows, or None.
        progress: Whether to show bars.
    """

    name: str
    rows: dict[str, Encoded]
    logits: dict[str, NDArray[np.float32]]
    missing: str | None
    progress: bool

    def compare(self, engine: Engine, name: str, *, exact: bool) -> dict[str, Any]:
        """Compute the difference between another form's answers and these.

        Args:
            engine: The other form.
            name: Its name in figures.
            exact: Whether the logits must be equal but for rounding.

        Returns:
            `probe` and `validation`, each with `rows`, `max_difference` of a logit (null if one is
            not finite), the largest one `allowed` (null unless exact), and `flips` (rows whose
            likeliest label differs). `validation` also has the accuracy of both, or instead the
            `reason` why its rows could not be read.
        """
        compared: dict[str, Any] = {}
        for part, encoded in self.rows.items():
            expected = self.logits[part]
            bar = part if self.progress else None
            answers = compute_logits(engine, encoded, progress=bar)
            difference = float(np.abs(answers - expected).max())
            allowed = MAX_DIFFERENCE * max(1.0, float(expected.std()))
            figures = {
                "rows": len(encoded),
                "max_difference": difference if np.isfinite(difference) else None,
                "allowed": allowed if exact else None,
                "flips": int((answers.argmax(axis=1) != expected.argmax(axis=1)).sum()),
            }
            if part == "validation":
                figures[f"accuracy_{self.name}"] = _compute_accuracy(expected, encoded)
                figures[f"accuracy_{name}"] = _compute_accuracy(answers, encoded)
            compared[part] = figures
        if self.missing is not None:
            compared["validation"] = {"reason": self.missing}
        return compared


def _compute_accuracy(logits: NDArray[np.float32], encoded: Encoded) -> float:
    return float((logits.argmax(axis=1) == encoded.labels).mean())


def make_reference(
    engine: Engine,
    name: str,
    *,
    card: Card | None,
    encoder: TextEncoder,
    max_rows: int,
    progress: bool,
) -> Reference:
    """Compute the answers of one form of a model to the probe and to readable validation rows.

    Args:
        engine: The form.
        name: Its name in figures.
        card: The adapter's card, which holds the probe and names the rows. Without it, the bundled
            texts are the probe.
        encoder: From texts to inputs, as in training.
        max_rows: Most validation rows.
        progress: Whether to show bars.
    """
    if card:
        inputs = [np.array(ids, dtype=np.int32) for ids in card.probe.input_ids]
    else:
        inputs = [encoder.frame(encoder.truncate(ids)) for ids in encoder.tokenise(probe_texts())]
    rows = {"probe": encoder.pack(inputs)}
    missing = None
    try:
        rows["validation"] = encoder.encode(_load_validation(card, max_rows), progress=progress)
    except DataError as error:
        missing = error.message
        log.info("compared on the probe alone, without validation rows: %s", missing)
    logits = {}
    for part, encoded in rows.items():
        logits[part] = compute_logits(engine, encoded, progress=part if progress else None)
    return Reference(name, rows, logits, missing, progress)


def find_fault(compared: dict[str, Any]) -> str | None:
    """Return a message if logits are not finite or differ by more than allowed, or None."""
    for part, figures in compared.items():
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


def get_decisive(compared: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return `validation` if its rows could be read, else `probe`, with its figures."""
    part = "validation" if "rows" in compared["validation"] else "probe"
    return part, compared[part]


def without_reasons(compared: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return figures without the reasons, which may quote a path or a cell of somebody's file."""
    kept: dict[str, dict[str, Any]] = {}
    for form, parts in compared.items():
        kept[form] = dict(parts)
        if "reason" in kept[form]["validation"]:
            kept[form]["validation"] = {"reason": "its rows could not be had where this was made"}
    return kept


def _load_validation(card: Card | None, max_rows: int) -> Rows:
    if card is None:
        raise DataError(
            "a merged folder does not say on which rows it was trained; export the adapter itself"
        )
    config = card.data.config
    if is_on_hub(config.source):
        prepare_hub()
    rows = load_data(config, labels=tuple(card.labels)).validation
    if rows.fingerprint != card.data.validation_sha256:
        raise DataError(
            f"{config.source}: changed since training, so its validation rows are other ones"
        )
    return sample(rows, num_rows=max_rows, seed=config.split_seed)
