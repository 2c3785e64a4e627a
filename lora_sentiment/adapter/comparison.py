"""Compare two forms of one model on the same rows."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_sentiment.adapter.folder import Card
from lora_sentiment.bundled import probe_texts, review_texts
from lora_sentiment.data.batches import Encoded, TextEncoder
from lora_sentiment.data.rows import Rows, load_data, load_raw_texts, sample
from lora_sentiment.data.sources import is_on_hub
from lora_sentiment.data.texts import Text
from lora_sentiment.errors import DataError
from lora_sentiment.hub import prepare_hub
from lora_sentiment.models.engine import Engine, compute_logits
from lora_sentiment.tasks import Task, find_task
from lora_sentiment.tasks.task import Calibration

log = logging.getLogger("lora_sentiment")

JUDGED_ROWS = 500
"""Fewest rows to judge changed labels and lost accuracy on, if there are as many."""
MAX_DIFFERENCE = 1e-4
"""Largest difference of a logit between equal forms, in units of max(1, standard deviation of the
logits)."""


LABELLED = ("validation", "train")
"""The parts that have labels."""


@dataclass(frozen=True)
class Reference:
    """The answers of one form of a model.

    Attributes:
        name: Its name in figures: `adapter` or `merged`.
        rows: The rows of `probe`, of `validation` if they could be read, and of `train` where
            validation has too few. Without `validation`, the bundled `reviews`, if labels may
            change.
        logits: The answers to each part, shape (num_rows, num_labels).
        task: What the labels are.
        calibration: What was fitted on validation in training, or None.
        validation: The validation rows as texts, or None.
        raw_texts: The same texts, or pairs of texts, as they stand in their source, before cleaning.
        missing: Why there are no validation rows, or None.
        progress: Whether to show bars.
    """

    name: str
    rows: dict[str, Encoded]
    logits: dict[str, NDArray[np.float32]]
    task: Task
    calibration: Calibration | None
    validation: Rows | None
    raw_texts: list[Text]
    missing: str | None
    progress: bool

    def compare(self, engine: Engine, name: str, *, exact: bool) -> dict[str, Any]:
        """Compute the difference between another form's answers and these.

        Args:
            engine: The other form.
            name: Its name in figures.
            exact: Whether the logits must be equal but for rounding.

        Returns:
            The parts of `rows`, each with `rows`, `max_difference` of a logit (null if one is
            not finite), the largest one `allowed` (null unless exact), and `flips` (rows whose
            likeliest label differs). Parts with labels also have the accuracy of both. If no
            validation rows could be read, `validation` has the `reason` instead.
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
                "flips": int(self.task.find_flips(expected, answers, self.calibration).sum()),
            }
            if part in LABELLED:
                for form, logits in ((self.name, expected), (name, answers)):
                    is_right = self.task.find_right(logits, encoded.labels, self.calibration)
                    if is_right is not None:
                        figures[f"accuracy_{form}"] = float(is_right.mean())
            compared[part] = figures
        if self.missing is not None:
            compared["validation"] = {"reason": self.missing}
        return compared


def make_reference(
    engine: Engine,
    name: str,
    *,
    card: Card | None,
    task: Task,
    calibration: Calibration | None,
    encoder: TextEncoder,
    max_rows: int,
    min_rows: int = 0,
    progress: bool,
) -> Reference:
    """Compute the answers of one form of a model to the probe and to readable validation rows.

    Args:
        engine: The form.
        name: Its name in figures.
        card: The adapter's card, which holds the probe and names the rows. Without it, the bundled
            texts are the probe.
        task: What the labels are.
        calibration: What was fitted on validation in training, or None.
        encoder: From texts to inputs, as in training.
        max_rows: Most validation rows.
        min_rows: Rows to take if there are as many: those of validation, then those of train. If
            they cannot be read, the 600 bundled reviews are taken, without labels.
        progress: Whether to show bars.
    """
    if card:
        inputs = [np.array(ids, dtype=np.int32) for ids in card.probe.input_ids]
    else:
        inputs = _make_inputs(encoder, probe_texts())
    rows = {"probe": encoder.pack(inputs)}
    parts: dict[str, Rows] = {}
    raw_texts: list[Text] = []
    missing = None
    try:
        parts, raw_texts = _load_labelled(card, max_rows, min_rows)
        for part, found in parts.items():
            rows[part] = encoder.encode(found, progress=progress)
    except DataError as error:
        missing = error.message
        if min_rows:
            rows["reviews"] = encoder.pack(_make_inputs(encoder, review_texts()))
        log.info("compared without validation rows: %s", missing)
    logits = {}
    for part, encoded in rows.items():
        logits[part] = compute_logits(engine, encoded, progress=part if progress else None)
    return Reference(
        name,
        rows,
        logits,
        task,
        calibration,
        parts.get("validation"),
        raw_texts,
        missing,
        progress,
    )


def compare_readings(
    reference: Reference,
    engine: Engine,
    encoder: TextEncoder,
    one: list[NDArray[np.int32]],
    other: list[NDArray[np.int32]],
) -> dict[str, Any]:
    """Compute what reading the same texts in another way costs.

    Args:
        reference: Its validation rows are the texts.
        engine: The model.
        encoder: Puts inputs together.
        one: The input of each text, read in one way.
        other: The input of each text, read in the other way.

    Returns:
        `rows`, `changed` (texts that are read differently), `flips` (texts that get another label)
        and `accuracy_change`, which is null for a task without right and wrong.
    """
    changed = []
    for position, (input_ids, other_ids) in enumerate(zip(one, other, strict=True)):
        if not np.array_equal(input_ids, other_ids):
            changed.append(position)
    figures: dict[str, Any] = {"rows": len(one), "changed": len(changed)}
    assert reference.validation is not None
    labels = reference.validation.labels[changed]
    task, calibration = reference.task, reference.calibration
    has_right = task.find_right(reference.logits["probe"][:0], labels[:0], calibration) is not None
    figures |= {"flips": 0, "accuracy_change": 0.0 if has_right else None}
    if not changed:
        return figures
    logits, num_right = [], []
    for inputs in (one, other):
        packed = encoder.pack([inputs[position] for position in changed])
        logits.append(compute_logits(engine, packed))
        is_right = task.find_right(logits[-1], labels, calibration)
        num_right.append(None if is_right is None else int(is_right.sum()))
    figures["flips"] = int(task.find_flips(logits[0], logits[1], calibration).sum())
    before, after = num_right
    gained = None if before is None or after is None else (after - before) / len(one)
    figures["accuracy_change"] = gained
    return figures


def _make_inputs(encoder: TextEncoder, texts: list[str]) -> list[NDArray[np.int32]]:
    """Return the inputs of bundled texts. Where pairs are read, each text with the next one."""
    given: list[Text] = [*texts]
    if encoder.reads_pairs:
        given = [*zip(texts, [*texts[1:], texts[0]], strict=True)]
    return [encoder.frame(encoder.truncate(ids)) for ids in encoder.tokenise(given)]


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


def count_changes(
    compared: dict[str, Any], *, before: str, after: str
) -> tuple[str, int, int, int | None]:
    """Count what another form changes on the rows that decide.

    Args:
        compared: The differences, as `Reference.compare` returns them.
        before: Name of the one form in figures.
        after: Name of the other form.

    Returns:
        The names of the parts, their rows, the rows that get another label, and by how many fewer
        rows are right, or None if no rows with labels could be read.
    """
    parts = [part for part in LABELLED if "rows" in compared.get(part, {})]
    has_labels = bool(parts) and f"accuracy_{before}" in compared[parts[0]]
    if not parts:
        parts = ["reviews"] if "reviews" in compared else ["probe"]
    rows, flips, lost = 0, 0, 0
    for part in parts:
        figures = compared[part]
        rows += figures["rows"]
        flips += figures["flips"]
        if has_labels:
            fall = figures[f"accuracy_{before}"] - figures[f"accuracy_{after}"]
            lost += round(fall * figures["rows"])
    names = {"reviews": "bundled review"}
    return (
        " and ".join(names.get(part, part) for part in parts),
        rows,
        flips,
        lost if has_labels else None,
    )


def without_reasons(compared: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return figures without the reasons, which may quote a path or a cell of somebody's file."""
    kept: dict[str, dict[str, Any]] = {}
    for form, parts in compared.items():
        kept[form] = dict(parts)
        if "reason" in kept[form]["validation"]:
            kept[form]["validation"] = {"reason": "its rows could not be had where this was made"}
    return kept


def _load_labelled(
    card: Card | None, max_rows: int, min_rows: int
) -> tuple[dict[str, Rows], list[Text]]:
    """Return the rows of `validation`, and of `train` if needed, and the raw validation texts."""
    if card is None:
        raise DataError(
            "a merged folder does not say on which rows it was trained; export the adapter itself"
        )
    config = card.data.config
    if is_on_hub(config.source):
        prepare_hub()
    data = load_data(config, labels=tuple(card.labels))
    if data.validation.fingerprint != card.data.validation_sha256:
        raise DataError(
            f"{config.source}: changed since training, so its validation rows are other ones"
        )
    task = find_task(config.task)
    rows = sample(data.validation, task, num_rows=max(max_rows, min_rows), seed=config.split_seed)
    parts = {"validation": rows}
    num_lacking = min_rows - len(rows)
    if num_lacking > 0 and data.train.fingerprint == card.data.train_sha256:
        parts["train"] = sample(data.train, task, num_rows=num_lacking, seed=config.split_seed)
    raw_texts = list(rows.texts)
    if config.clean:
        role = "validation" if "validation" in data.counts else "train"
        raw_texts = load_raw_texts(config, rows, role=role)
    return parts, raw_texts
