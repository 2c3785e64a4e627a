"""Export an adapter for other runtimes, as a merged model or an ONNX file."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from lora_sentiment.adapter.card import describe_reading, make_exported_card, read_metadata
from lora_sentiment.adapter.comparison import (
    JUDGED_ROWS,
    Reference,
    count_changes,
    find_fault,
    make_reference,
    without_reasons,
)
from lora_sentiment.adapter.folder import Card, load_card
from lora_sentiment.adapter.graph import (
    check_packages,
    compress_weights,
    quantise_graph,
    write_graph,
)
from lora_sentiment.adapter.merge import (
    WEIGHTS,
    Into,
    check_max_rows,
    merge,
    merge_aside,
)
from lora_sentiment.adapter.merge_record import (
    TOKENIZER,
    MergeRecord,
    check_merge_record,
    read_merge_record,
    write_merge_record,
)
from lora_sentiment.adapter.onnx import PLAIN, QUANTISED, open_session
from lora_sentiment.adapter.safe_files import ExplainLibraryError, read_labels, read_task
from lora_sentiment.cleaning import remove_cleaning
from lora_sentiment.data.batches import Encoded, TextEncoder, cut
from lora_sentiment.errors import AdapterError, ModelError
from lora_sentiment.files import hash_file, write_aside
from lora_sentiment.models.engine import Engine
from lora_sentiment.models.families import FAMILIES
from lora_sentiment.models.inference import make_engine
from lora_sentiment.models.load import load_base
from lora_sentiment.recipe.model import ModelConfig

Format = Literal["safetensors", "onnx", "onnx-int8", "onnx-int8-weights"]
EIGHT_BIT = {"onnx-int8": quantise_graph, "onnx-int8-weights": compress_weights}
"""How to write a file in 8 bits, by format."""
COPIED = ("config.json", *TOKENIZER)
SPEED_ROWS, SPEED_ROUNDS = 16, 5
MAX_DROP = 0.5
"""Most points of accuracy (of 100) that 8 bits may cost by default."""


@dataclass(frozen=True)
class Export:
    """An exported model that answers as it must.

    Attributes:
        folder: Its folder.
        format: One of `Format`.
        compared: The differences of each step: of the merge from the adapter, as in `Merge`, and of
            the ONNX files from the merged model. Each has `probe` and `validation`, as
            `Reference.compare` returns them. A file in 8 bits also has `drop`, in points.
        texts_per_second: File name to speed, measured in turns. Empty unless a file has 8 bits.
        bytes: File name to size, of the weights.
        readings: As in `Merge`, of the merged model.
        reading: How texts were read in training, and which of it other runtimes do not do.
    """

    folder: Path
    format: Format
    compared: dict[str, dict[str, Any]]
    texts_per_second: dict[str, float]
    bytes: dict[str, int]
    readings: dict[str, dict[str, Any]]
    reading: str

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        return {**vars(self), "folder": str(self.folder)}


def export(
    adapter: Path,
    out: Path,
    *,
    format: Format,
    into: Into | None = None,
    base: str | None = None,
    max_drop: float | None = None,
    max_rows: int = 500,
    progress: bool = False,
) -> Export:
    """Write a model for other runtimes. Open it there and compare it with the merged model.

    In fp32, every logit must be within MAX_DIFFERENCE times max(1, standard deviation of the
    logits). In 8 bits, accuracy may be `max_drop` points lower, on JUDGED_ROWS rows of validation and
    train. Without such rows, that share of the bundled reviews may get another label.

    Args:
        adapter: An adapter folder, or for ONNX also a merged folder.
        out: The new folder. It appears when it is finished.
        format: `safetensors` is `merge`. `onnx` writes `onnx/model.onnx` in fp32. The others also
            write `onnx/model_quantized.onnx`: `onnx-int8-weights` stores weights in 8 bits and
            computes in fp32, `onnx-int8` also computes in 8 bits.
        into: The weights that an adapter is merged into, as in `merge`.
        base: Place of an adapter's base, if it is not where the adapter says.
        max_drop: Most points of accuracy (of 100) that 8 bits may cost, MAX_DROP by default. Only
            for formats with 8 bits.
        max_rows: Most validation rows to compare on.
        progress: Whether to show bars.

    Raises:
        AdapterError: If `out` exists, the folder is not the one that was saved, or an exported file
            answers differently.
        ModelError: If an option has a value that is not allowed, the ONNX packages are missing, or
            the base cannot be loaded.
    """
    if format not in get_args(Format):
        raise ModelError(f"format: found {format!r}; allowed: {', '.join(get_args(Format))}")
    check_max_rows(max_rows)
    if max_drop is not None and format not in EIGHT_BIT:
        raise ModelError(
            f"max_drop: found {max_drop} with format {format}, which loses nothing; leave it out"
        )
    if format == "safetensors":
        done = merge(adapter, out, into=into, base=base, max_rows=max_rows, progress=progress)
        sizes = {WEIGHTS: (out / WEIGHTS).stat().st_size}
        return Export(out, format, done.compared, {}, sizes, done.readings, done.reading)
    check_packages()
    with write_aside(out) as aside:
        card = load_card(adapter) if (adapter / "card.json").is_file() else None
        merged = adapter
        if card:
            merged = aside / "merged"
            merged.mkdir()
            merge_aside(
                adapter,
                merged,
                out,
                dtype="float32",
                into=into,
                base=base,
                max_rows=max_rows,
                progress=progress,
            )
        elif base is not None or into is not None:
            raise ModelError(
                f"{adapter}: is not an adapter, so nothing is merged; leave out --base and --into"
            )
        record = _read_merged(merged)
        source = read_metadata(merged)
        labels = read_labels(merged)
        for name in COPIED:
            shutil.copyfile(merged / name, aside / name)
        model, reference = _load_merged(
            merged,
            record,
            labels,
            card,
            max_rows=max_rows,
            min_rows=JUDGED_ROWS if format in EIGHT_BIT else 0,
            progress=progress,
        )
        (aside / "onnx").mkdir()
        has_types = record.reads_pairs and FAMILIES[record.model_type].token_types
        write_graph(model, aside / PLAIN, has_types=has_types)
        engines = {PLAIN: open_session(aside / PLAIN)}
        compared = {"onnx": _compare_exact(reference, engines[PLAIN], out)}
        speed: dict[str, float] = {}
        if format in EIGHT_BIT:
            EIGHT_BIT[format](aside / PLAIN, aside / QUANTISED)
            engines[QUANTISED] = open_session(aside / QUANTISED)
            allowed = MAX_DROP if max_drop is None else max_drop
            compared[format] = _compare_int8(
                reference, engines[QUANTISED], out, format=format, max_drop=allowed
            )
            rows = reference.rows
            speed = _measure_speed(engines, rows.get("validation", rows["probe"]))
        if card:
            shutil.rmtree(merged)
        exported = record.model_copy(
            update={
                "dtype": "float32",
                "compared": {**record.compared, **without_reasons(compared)},
                "files": {file: hash_file(aside / file) for file in engines},
            }
        )
        readme = make_exported_card(out.name, labels, exported, source, task=read_task(aside))
        (aside / "README.md").write_text(readme, encoding="utf-8")
        write_merge_record(aside, exported)
    return Export(
        out,
        format,
        {**record.compared, **compared},
        speed,
        {name: (out / name).stat().st_size for name in engines},
        record.readings,
        describe_reading(record, other="another runtime"),
    )


def _read_merged(folder: Path) -> MergeRecord:
    """Return the record of a merged folder, after checking its files."""
    record = read_merge_record(folder)
    if record is None:
        raise AdapterError(
            f"{folder}: is neither an adapter (no card.json) nor a merged model of this package "
            "(config.json has no lora_sentiment); merge the adapter first, or name its folder"
        )
    if WEIGHTS not in record.files:
        raise AdapterError(f"{folder}: was exported before; name the adapter, or the merged folder")
    check_merge_record(folder, record, weights=WEIGHTS)
    return record


def _load_merged(
    folder: Path,
    record: MergeRecord,
    labels: tuple[str, ...],
    card: Card | None,
    *,
    max_rows: int,
    min_rows: int,
    progress: bool,
) -> tuple[Any, Reference]:
    """Load a merged model in fp32, whatever its dtype, and compute its answers to compare with."""
    config = ModelConfig(name=str(folder.resolve()), max_length=record.max_length, dtype="float32")
    base = load_base(config, labels=labels, problem_type=read_task(folder).head_type)
    base.model.eval()
    if record.cleaning_steps:
        with ExplainLibraryError(folder / "tokenizer.json"):
            remove_cleaning(base.tokenizer.backend_tokenizer, record.cleaning_steps)
    encoder = TextEncoder.of(
        base.tokenizer,
        max_length=record.max_length,
        truncation=record.truncation,
        reads_pairs=record.reads_pairs,
        has_types=base.family.token_types,
    )
    reference = make_reference(
        make_engine(base.model),
        "merged",
        card=card,
        task=read_task(folder),
        calibration=record.calibration,
        encoder=encoder,
        max_rows=max_rows,
        min_rows=min_rows,
        progress=progress,
    )
    return base.model, reference


def _compare_exact(reference: Reference, engine: Engine, out: Path) -> dict[str, Any]:
    """Compare an fp32 file with the merged model, and refuse other logits."""
    compared = reference.compare(engine, "exported", exact=True)
    fault = find_fault(compared)
    if fault:
        raise AdapterError(
            f"{out}: not written, because the ONNX file answers differently from the merged model: "
            f"{fault}"
        )
    return compared


def _compare_int8(
    reference: Reference, engine: Engine, out: Path, *, format: Format, max_drop: float
) -> dict[str, Any]:
    """Compare an 8-bit file with the merged model, and refuse a `drop` of more than `max_drop`."""
    compared = reference.compare(engine, "exported", exact=False)
    fault = find_fault(compared)
    if fault:
        raise AdapterError(f"{out}: not written, because of the 8-bit file: {fault}")
    name, rows, flips, lost = count_changes(compared, before="merged", after="exported")
    if lost is None:
        drop = 100 * flips / rows
        change = f"{drop:.2f} % of labels change"
        reason = (
            "; accuracy cannot be measured, because no validation rows could be read, and it may "
            "fall by as much"
        )
    else:
        drop = 100 * lost / rows
        change = f"accuracy falls by {drop:.2f} points"
        reason = ""
    if not drop <= max_drop:
        other = "onnx-int8-weights or onnx" if format == "onnx-int8" else "onnx"
        raise AdapterError(
            f"{out}: not written, because in 8 bits {change} on {rows:,} {name} rows, "
            f"allowed {max_drop:g}{reason}; use --format {other}, or raise --max-drop"
        )
    compared["drop"] = drop
    return compared


def _measure_speed(engines: dict[str, Engine], rows: Encoded) -> dict[str, float]:
    """Return each engine's texts per second: the median of alternating rounds over a few rows."""
    few = np.linspace(0, len(rows) - 1, min(SPEED_ROWS, len(rows))).astype(np.int64)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(SPEED_ROUNDS):
        for name, engine in engines.items():
            parts = cut(few, rows.lengths, max_tokens=engine.max_tokens)
            start = time.perf_counter()
            for part in parts:
                engine.answer(rows, part)
            seconds[name].append(time.perf_counter() - start)
    return {name: len(few) / float(np.median(taken)) for name, taken in seconds.items()}
