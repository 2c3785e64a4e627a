"""Export an adapter for other runtimes: a merged model, or an ONNX file that was found to answer as that model does."""

import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from lora_sentiment.adapter.comparison import Reference, ask, find_fault, without_reasons
from lora_sentiment.adapter.exported_card import make_exported_card
from lora_sentiment.adapter.folder import load_card
from lora_sentiment.adapter.graph import check_packages, quantise_graph, write_graph
from lora_sentiment.adapter.merge import TOKENIZER, WEIGHTS, Into, merge, write_aside
from lora_sentiment.adapter.merge_record import Stamp, check_stamp, read_stamp, write_stamp
from lora_sentiment.adapter.merged_card import say_reading
from lora_sentiment.adapter.onnx import PLAIN, QUANTISED, open_session
from lora_sentiment.adapter.safe_files import read_labels
from lora_sentiment.data.batches import Encoded, TextEncoder, cut, pad
from lora_sentiment.errors import AdapterError, ModelError
from lora_sentiment.files import hash_file
from lora_sentiment.models.engine import Engine
from lora_sentiment.models.inference import make_engine
from lora_sentiment.models.load import Base, load_base
from lora_sentiment.recipe.model import ModelConfig

log = logging.getLogger("lora_sentiment")

Format = Literal["safetensors", "onnx", "onnx-int8"]
COPIED = ("config.json", *TOKENIZER)
SPEED_ROWS, SPEED_ROUNDS = 16, 5
MAX_DROP = 0.5
"""Points of accuracy (of 100) that int8 may cost unless told otherwise."""


@dataclass(frozen=True)
class Export:
    """An exported model that was found to answer as it should.

    Attributes:
        folder: Where it stands.
        format: `safetensors`, `onnx` or `onnx-int8`.
        compared: What each step was compared on and how far it was apart: the merge with the adapter, as in `Merge`;
            `onnx`, and `onnx-int8`, with the merged model. Each of these two has `probe` and `validation` with their
            `rows`, `max_difference` of a logit, `flips` of the likeliest label, and on validation both accuracies; or
            the `reason` why rows could not be had. `onnx-int8` has `drop`, in points.
        texts_per_second: File name to texts per second, measured in turns; empty unless int8 was asked for.
        bytes: File name to size, of the weights.
        reading: How texts were read in training, and what of it other runtimes do not do.
    """

    folder: Path
    format: Format
    compared: dict[str, dict[str, Any]]
    texts_per_second: dict[str, float]
    bytes: dict[str, int]
    reading: str

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        return {**vars(self), "folder": str(self.folder)}


def export(
    adapter: Path,
    out: Path,
    *,
    format: Format,
    into: Into = "base",
    base: str | None = None,
    max_drop: float | None = None,
    max_rows: int = 500,
    progress: bool = False,
) -> Export:
    """Write a model for other runtimes, open it there, and compare it with the merged model.

    In fp32 every logit must be within MAX_DIFFERENCE times max(1, standard deviation of the logits). In int8 accuracy
    on validation rows may be `max_drop` points lower; without such rows, that share of the probe may get another label.

    Args:
        adapter: An adapter folder, or for ONNX also a merged folder.
        out: The new folder; it appears finished or not at all.
        format: `safetensors` is `merge`; `onnx` writes `onnx/model.onnx` in fp32; `onnx-int8` also
            `onnx/model_quantized.onnx`.
        into: What an adapter is merged into, as in `merge`.
        base: Where to find an adapter's base, if not where it says.
        max_drop: Most points of accuracy (of 100) that int8 may cost, MAX_DROP by default; only for `onnx-int8`.
        max_rows: Most validation rows to compare on.
        progress: Show bars.

    Raises:
        AdapterError: If the place is taken, the folder is not the one that was saved, or an exported file answers
            otherwise than it should.
        ModelError: If an option is none of those allowed, the ONNX packages are missing, or the base cannot be loaded.
    """
    _check_options(format, max_rows, max_drop)
    if format == "safetensors":
        done = merge(adapter, out, into=into, base=base, max_rows=max_rows, progress=progress)
        return Export(
            out, format, done.compared, {}, {WEIGHTS: (out / WEIGHTS).stat().st_size}, done.reading
        )
    check_packages()
    with write_aside(out) as aside:
        card = load_card(adapter) if (adapter / "card.json").is_file() else None
        merged = aside / "merged" if card else adapter
        if card:
            _merge(adapter, merged, out, into=into, base=base, max_rows=max_rows, progress=progress)
        elif base is not None or into != "base":
            raise ModelError(
                f"{adapter}: is no adapter, so nothing is merged; leave out --base and --into"
            )
        stamp = _read_merged(merged)
        _copy_files(merged, aside)
        model = _load_merged(merged, stamp)
        encoder = TextEncoder.of(
            model.tokenizer, max_length=stamp.max_length, truncation=stamp.truncation
        )
        engine = make_engine(model.model)
        reference = ask(
            engine, "merged", card=card, encoder=encoder, max_rows=max_rows, progress=progress
        )
        write_graph(model.model, aside / PLAIN)
        engines = {PLAIN: open_session(aside / PLAIN)}
        compared = {"onnx": _check_exact(reference, engines[PLAIN], out)}
        speed: dict[str, float] = {}
        if format == "onnx-int8":
            quantise_graph(aside / PLAIN, aside / QUANTISED)
            engines[QUANTISED] = open_session(aside / QUANTISED)
            compared["onnx-int8"] = _check_drop(
                reference, engines[QUANTISED], out, MAX_DROP if max_drop is None else max_drop
            )
            speed = _race(engines, next(reversed(reference.rows.values())))
        if card:
            shutil.rmtree(merged)
        _finish(aside, stamp, compared, tuple(engines), name=out.name)
    sizes = {name: (out / name).stat().st_size for name in engines}
    return Export(
        out,
        format,
        {**stamp.compared, **compared},
        speed,
        sizes,
        say_reading(stamp, other="another runtime"),
    )


def _check_options(format: str, max_rows: int, max_drop: float | None) -> None:
    if format not in get_args(Format):
        raise ModelError(f"format: found {format!r}; allowed: {', '.join(get_args(Format))}")
    if max_rows < 1:
        raise ModelError(f"max_rows: found {max_rows}; allowed: 1 or more")
    if max_drop is not None and format != "onnx-int8":
        raise ModelError(
            f"max_drop: found {max_drop} with format {format}, which drops nothing; leave it out"
        )


def _merge(adapter: Path, merged: Path, out: Path, **options: Any) -> None:
    try:
        merge(adapter, merged, **options)
    except AdapterError as error:
        # Nobody asked for the folder where it would have stood.
        raise AdapterError(str(error).replace(str(merged), str(out))) from error


def _copy_files(merged: Path, aside: Path) -> None:
    for name in COPIED:
        shutil.copyfile(merged / name, aside / name)
    (aside / "onnx").mkdir()


def _read_merged(folder: Path) -> Stamp:
    """Return the stamp of a merged folder, whose files are checked."""
    stamp = read_stamp(folder)
    if stamp is None:
        raise AdapterError(
            f"{folder}: is neither an adapter (no card.json) nor a merged model of this package (no stamp in "
            "config.json); merge the adapter first, or name its folder"
        )
    if WEIGHTS not in stamp.files:
        raise AdapterError(f"{folder}: was exported before; name the adapter, or the merged folder")
    check_stamp(folder, stamp, needed=(WEIGHTS, *TOKENIZER))
    for name in COPIED:
        if not (folder / name).is_file():
            raise AdapterError(f"{folder / name}: is missing; copy the whole folder")
    return stamp


def _load_merged(folder: Path, stamp: Stamp) -> Base:
    """Load a merged folder in fp32, whatever it is stored in."""
    config = ModelConfig(name=str(folder.resolve()), max_length=stamp.max_length, dtype="float32")
    base = load_base(config, labels=read_labels(folder))
    base.model.eval()
    return base


def _check_exact(reference: Reference, engine: Engine, out: Path) -> dict[str, Any]:
    """Compare a file in fp32, and refuse it if its logits are not the merged model's."""
    found = reference.compare(engine, "exported", exact=True)
    if fault := find_fault(found):
        raise AdapterError(
            f"{out}: not written, the ONNX file answers otherwise than the merged model: {fault}"
        )
    return found


def _check_drop(reference: Reference, engine: Engine, out: Path, max_drop: float) -> dict[str, Any]:
    """Compare a file in int8, note how many points it costs, and refuse it past `max_drop`."""
    found = reference.compare(engine, "exported", exact=False)
    if fault := find_fault(found):
        raise AdapterError(f"{out}: not written, because of the int8 file {fault}")
    name = "validation" if "rows" in found["validation"] else "probe"
    figures = found[name]
    if name == "validation":
        found["drop"] = 100 * (figures["accuracy_merged"] - figures["accuracy_exported"])
        what = "accuracy falls by {:.2f} points"
    else:
        found["drop"] = 100 * figures["flips"] / figures["rows"]
        what = "{:.2f} % of labels change"
    if not found["drop"] <= max_drop:
        raise AdapterError(
            f"{out}: not written, because in int8 {what.format(found['drop'])} on {figures['rows']:,} {name} rows, "
            f"allowed {max_drop:g}; use --format onnx, or raise --max-drop"
        )
    return found


def _race(engines: dict[str, Engine], rows: Encoded) -> dict[str, float]:
    """Return each engine's texts per second: the median of SPEED_ROUNDS turns over a few rows."""
    few = np.linspace(0, len(rows) - 1, min(SPEED_ROWS, len(rows))).astype(np.int64)
    batches = {
        name: [pad(rows, part) for part in cut(few, rows.lengths, max_tokens=engine.max_tokens)]
        for name, engine in engines.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(SPEED_ROUNDS):
        for name, engine in engines.items():
            start = time.perf_counter()
            for batch in batches[name]:
                engine.compute(*batch)
            seconds[name].append(time.perf_counter() - start)
    return {name: len(few) / float(np.median(found)) for name, found in seconds.items()}


def _finish(
    aside: Path,
    stamp: Stamp,
    compared: dict[str, dict[str, Any]],
    graphs: tuple[str, ...],
    *,
    name: str,
) -> None:
    """Write the README and the stamp of an exported folder."""
    update = {
        "dtype": "float32",
        "compared": {**stamp.compared, **without_reasons(compared)},
        "files": {file: hash_file(aside / file) for file in (*graphs, *TOKENIZER)},
    }
    stamp = stamp.model_copy(update=update)
    text = make_exported_card(name, read_labels(aside), stamp)
    (aside / "README.md").write_text(text, encoding="utf-8")
    write_stamp(aside, stamp)
