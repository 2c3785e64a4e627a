"""Score a saved adapter, rebuilt from its folder alone."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import ValidationError

from lora_sentiment.adapter.folder import Card, load
from lora_sentiment.adapter.report_page import make_report_page
from lora_sentiment.data.rows import Rows, load_data, load_judged, load_rows
from lora_sentiment.data.sources import find_source, is_on_hub, make_source
from lora_sentiment.errors import DRAWING_FAULTS, AdapterError, DataError, one_line
from lora_sentiment.evaluation.statistics import Interval
from lora_sentiment.files import check_new_file, write_file_aside
from lora_sentiment.hub import prepare_hub
from lora_sentiment.models.dtype import resolve_dtype
from lora_sentiment.models.inference import make_fast, predict_logits
from lora_sentiment.recipe.data import FROM_PYTHON, DataConfig
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
    data: Mapping[str, Any] | None = None,
    split: str = "test",
    text_column: str | None = None,
    text_pair_column: str | None = None,
    label_column: str | None = None,
    encoding: str | None = None,
    on_bad_row: str | None = None,
    base: str | None = None,
    dtype: str = "auto",
    html: Path | None = None,
    with_texts: bool = False,
) -> Evaluation:
    """Score an adapter folder.

    Args:
        folder: An adapter folder. Its base is found where the card says, and checked by its hash.
        source: Rows to score on instead of the recorded source: a file or a Hub data set.
        data: Rows to score on instead of the recorded ones: role to its table, as `train` takes
            them. `split` is the role.
        split: A judged role, such as `test`, or `validation` as training had it. Of `source`, the
            name of its split.
        text_column: Column of `source` or `data` with the text, if it is not the recorded one.
        text_pair_column: Column of `source` or `data` with the second text of a pair, if it is not
            the recorded one.
        label_column: Column of `source` or `data` with the label, if it is not the recorded one.
        encoding: Encoding of `source`, if it is not the recorded one.
        on_bad_row: `error` or `drop`, for bad rows of `source` or `data`; by default as recorded.
        base: Where to find the base, if not where the card says.
        dtype: Compute dtype, as `model.dtype` of a recipe.
        html: Write the report page of these rows to this new file, outside of the folder.
        with_texts: Show the texts of wrong answers on the page.

    Raises:
        AdapterError: If the folder, base or tokenizer is not the one that was saved.
        DataError: If the rows cannot be read, there is no such split, or the page cannot be written.
    """
    if html is not None:
        _check_page(html, folder)
    reading = {
        "text_column": text_column,
        "text_pair_column": text_pair_column,
        "label_column": label_column,
        "encoding": encoding,
        "on_bad_row": on_bad_row,
    }
    given = {name: value for name, value in reading.items() if value is not None}
    if data is not None and (source is not None or encoding is not None):
        raise DataError("evaluate: data replaces source, and has no encoding; leave these out")
    if given and source is None and data is None:
        raise DataError(
            "found without another source; the recorded rows are read as in training",
            key=f"data.{next(iter(given))}",
            advice={"data.source": "; name one by {}, or leave it out"},
        )
    state = join_launch()
    accelerator = make_accelerator(state, dtype)
    loaded = load(folder, base=base, device=accelerator.device)
    card = loaded.card
    compute_dtype = resolve_dtype(dtype, accelerator.device)
    model = make_fast(loaded.model, dtype=compute_dtype, device=accelerator.device)
    if source is None and data is None:
        rows = _read_recorded(card, split)
    else:
        rows = _read_given(card, source, data, split, given)
    is_main = accelerator.is_main_process
    encoded = loaded.make_encoder().encode(rows, progress=is_main)
    with explain_lost_process(state):
        logits = predict_logits(
            model, encoded, accelerator=accelerator, progress=split if is_main else None
        )
    scores = card.task.score(
        logits, encoded.labels, names=card.labels, calibration=card.calibration
    )
    if html is not None and is_main:
        name, task = folder.resolve().name, card.task
        with TemporaryDirectory() as drawn:
            picture = Path(drawn) / task.picture
            try:
                task.draw(
                    logits,
                    encoded.labels,
                    picture,
                    names=card.labels,
                    title=f"{name}: {split}",
                    calibration=card.calibration,
                )
            except DRAWING_FAULTS as error:
                log.warning("%s: has no %s: %s", html, task.picture_text, one_line(str(error)))
            page = make_report_page(
                name,
                card,
                split,
                logits,
                encoded,
                rows.numbers,
                scores={split: scores},
                pictures={"training curve": folder / "training.png", task.picture_text: picture},
                texts=rows.texts if with_texts else None,
            )
        try:
            with write_file_aside(html) as aside:
                aside.write_text(page, encoding="utf-8")
        except OSError as error:
            raise DataError(f"{html}: cannot be written: {error.strerror or error}") from error
    return Evaluation(split=split, num_rows=len(rows), scores=scores)


def _check_page(html: Path, folder: Path) -> None:
    """Refuse a page before there is work to lose.

    Raises:
        DataError: The file exists, its folder does not, or it stands in the adapter folder.
    """
    check_new_file(html)
    if folder.resolve() in html.resolve().parents:
        raise DataError(f"{html}: stands in the adapter folder; name a file elsewhere")


def _read_given(
    card: Card,
    source: str | None,
    data: Mapping[str, Any] | None,
    split: str,
    given: dict[str, str],
) -> Rows:
    """Return the rows of a split of another source than the recorded one, or of a table."""
    tables = None
    if data is not None:
        tables = make_source(data, for_training=False)
    place = FROM_PYTHON if source is None else source
    if is_on_hub(place):
        prepare_hub()
    if "text_pair_column" in given and not card.reads_pairs:
        raise DataError(
            f"found {given['text_pair_column']!r}, but the adapter reads single texts; leave it out",
            key="data.text_pair_column",
        )
    recorded = card.data.config.model_dump()
    if recorded["labels"] is None and is_on_hub(card.data.config.source):
        # Older versions did not record that a Hub data set has put its names in order.
        recorded["labels"] = card.labels
    if "label_column" in given:
        recorded["label_columns"] = None
    other = {"source": place, "splits": None, "config": None, "revision": None}
    try:
        config = DataConfig.model_validate(recorded | other | given)
    except ValidationError as error:
        first = error.errors()[0]
        fault = first.get("ctx", {}).get("error", first["msg"])
        raise DataError(f"evaluate: {'.'.join(map(str, first['loc']))} {fault}") from error
    rows, counts = load_rows(config, split=split, labels=tuple(card.labels), source=tables)
    for fault, numbers in counts.dropped.items():
        log.warning(
            "%s: %s, DROPPED: %s rows, the first is row %s",
            place, fault, f"{len(numbers):,}", f"{numbers[0]:,}",
        )  # fmt: skip
    return rows


def _read_recorded(card: Card, role: str) -> Rows:
    """Return the rows of a role that training judged, or of validation."""
    if is_on_hub(card.data.config.source):
        prepare_hub()
    try:
        return _find_recorded(card, role)
    except DataError as error:
        # No option sets how these rows are read.
        raise DataError(f"{error.message}; other rows can be named with --source") from error


def _find_recorded(card: Card, role: str) -> Rows:
    """Read the rows of a role from where training found them."""
    config = card.data.config
    judged = find_source(config).judged
    if role in judged:
        rows, counts = load_judged(config, role=role, labels=tuple(card.labels))
        if rows is None:
            raise DataError(
                f"{config.source}: the {counts.read:,} rows of {role} have no labels (all are -1)"
            )
        return rows
    carved_roles = ["test"] if role == "test" or card.data.carved_test_sha256 else []
    allowed = [*(judged or carved_roles), "validation"]
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
