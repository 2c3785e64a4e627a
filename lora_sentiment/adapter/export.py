"""Export an adapter for other runtimes: a merged model, or an ONNX file that was found to answer as that model does."""

import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from lora_sentiment.adapter.exported_card import make_exported_card
from lora_sentiment.adapter.folder import Card, load_card
from lora_sentiment.adapter.graph import check_packages, quantise_graph, write_graph
from lora_sentiment.adapter.merge import MAX_DIFFERENCE, WEIGHTS, merge, write_aside
from lora_sentiment.adapter.onnx import PLAIN, QUANTISED, open_session
from lora_sentiment.adapter.stamp import Stamp, check_files, read_stamp, write_stamp
from lora_sentiment.bundled import probe_texts
from lora_sentiment.data.batches import INFERENCE_TOKENS, Encoded, TextEncoder, cut, encode, pad
from lora_sentiment.data.rows import Rows, load_data, sample
from lora_sentiment.errors import AdapterError, DataError, ModelError
from lora_sentiment.files import hash_file
from lora_sentiment.model.base import Base, load_base
from lora_sentiment.model.config import ModelConfig
from lora_sentiment.progress import make_bar

log = logging.getLogger("lora_sentiment")

Format = Literal["safetensors", "onnx", "onnx-int8"]
Engine = Callable[[NDArray[np.int64], NDArray[np.int64] | None], NDArray[np.float32]]
COPIED = ("config.json", "tokenizer.json", "tokenizer_config.json")
SPEED_ROWS, SPEED_ROUNDS = 16, 5


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
    """

    folder: Path
    format: Format
    compared: dict[str, dict[str, Any]]
    texts_per_second: dict[str, float]
    bytes: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        return {**vars(self), "folder": str(self.folder)}


def export(
    adapter: Path,
    out: Path,
    *,
    format: Format,
    base: str | None = None,
    max_drop: float = 0.5,
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
        base: Where to find an adapter's base, if not where it says.
        max_drop: Most points of accuracy (of 100) that int8 may cost.
        max_rows: Most validation rows to compare on.
        progress: Show bars.

    Raises:
        AdapterError: If the place is taken, the folder is not the one that was saved, or an exported file answers
            otherwise than it should.
        ModelError: If an option is none of those allowed, the ONNX packages are missing, or the base cannot be loaded.
    """
    if format not in get_args(Format):
        raise ModelError(f"format: found {format!r}; allowed: {', '.join(get_args(Format))}")
    if max_rows < 1:
        raise ModelError(f"max_rows: found {max_rows}; allowed: 1 or more")
    if format == "safetensors":
        compared = merge(adapter, out, base=base, max_rows=max_rows, progress=progress).compared
        return Export(out, format, compared, {}, {WEIGHTS: (out / WEIGHTS).stat().st_size})
    check_packages()
    with write_aside(out) as aside:
        card = load_card(adapter) if (adapter / "card.json").is_file() else None
        merged = aside / "merged" if card else adapter
        if card:
            merge(adapter, merged, base=base, max_rows=max_rows, progress=progress)
        elif base is not None:
            raise ModelError(f"{adapter}: is no adapter, so it needs no base; leave out --base")
        stamp = _read_merged(merged)
        for name in COPIED:
            shutil.copyfile(merged / name, aside / name)
        (aside / "onnx").mkdir()
        model = _load_merged(merged, stamp)
        reference = _ask(model, stamp, card, max_rows=max_rows, progress=progress)
        write_graph(model.model, aside / PLAIN)
        engines = {PLAIN: open_session(aside / PLAIN)}
        compared = {"onnx": reference.compare(engines[PLAIN])}
        reference.check_exact(compared["onnx"], out)
        if format == "onnx-int8":
            quantise_graph(aside / PLAIN, aside / QUANTISED)
            engines[QUANTISED] = open_session(aside / QUANTISED)
            compared["onnx-int8"] = reference.compare(engines[QUANTISED])
            reference.check_drop(compared["onnx-int8"], out, max_drop=max_drop)
        if card:
            shutil.rmtree(merged)
        _finish(aside, stamp, compared, tuple(engines), name=out.name)
    speed = reference.race(engines) if format == "onnx-int8" else {}
    compared = {**stamp.compared, **compared}
    return Export(out, format, compared, speed, {name: (out / name).stat().st_size for name in engines})


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
    check_files(folder, stamp.files)
    for name in COPIED:
        if not (folder / name).is_file():
            raise AdapterError(f"{folder / name}: is missing; copy the whole folder")
    return stamp


def _load_merged(folder: Path, stamp: Stamp) -> Base:
    """Load a merged folder in fp32, whatever it is stored in."""
    config = ModelConfig(name=str(folder.resolve()), max_length=stamp.max_length, dtype="float32")
    base = load_base(config, labels=_read_labels(folder))
    base.model.eval()
    return base


def _read_labels(folder: Path) -> tuple[str, ...]:
    names = json.loads((folder / "config.json").read_text(encoding="utf-8"))["id2label"]
    return tuple(names[str(i)] for i in range(len(names)))


@dataclass(frozen=True)
class _Reference:
    """What the merged model answers.

    Attributes:
        rows: `probe`, and `validation` where its rows could be had.
        logits: The answers to each, (num_rows, num_labels).
        missing: Why there are no validation rows, or None.
        progress: Show bars.
    """

    rows: dict[str, Encoded]
    logits: dict[str, NDArray[np.float32]]
    missing: str | None
    progress: bool

    def compare(self, engine: Engine) -> dict[str, Any]:
        """Return how far an exported file's answers are from these."""
        found: dict[str, Any] = {}
        for name, encoded in self.rows.items():
            ours, theirs = self.logits[name], _answer(engine, encoded, name, show=self.progress)
            difference = float(np.abs(theirs - ours).max())
            found[name] = {
                "rows": len(encoded),
                "max_difference": difference if np.isfinite(difference) else None,
                "flips": int((theirs.argmax(axis=1) != ours.argmax(axis=1)).sum()),
            }
            if name == "validation":
                for key, logits in (("accuracy_merged", ours), ("accuracy_exported", theirs)):
                    found[name][key] = float((logits.argmax(axis=1) == encoded.labels).mean())
        if self.missing is not None:
            found["validation"] = {"reason": self.missing}
        return found

    def check_exact(self, found: dict[str, Any], out: Path) -> None:
        """Refuse a file in fp32 whose logits are not the merged model's."""
        for name, logits in self.logits.items():
            difference, allowed = found[name]["max_difference"], MAX_DIFFERENCE * max(1.0, float(logits.std()))
            if difference is None or difference > allowed:
                shown = (
                    "are not finite" if difference is None else f"differ by {difference:.2g}, allowed {allowed:.2g},"
                )
                raise AdapterError(
                    f"{out}: not written, because the ONNX file answers otherwise than the merged model: its logits "
                    f"{shown} on the {name} rows"
                )

    def check_drop(self, found: dict[str, Any], out: Path, *, max_drop: float) -> None:
        """Note how many points int8 costs, and refuse it past `max_drop`."""
        name = next(reversed(self.rows))
        if found[name]["max_difference"] is None:
            raise AdapterError(f"{out}: not written, because the int8 file's logits are not finite on the {name} rows")
        if name == "validation":
            found["drop"] = 100 * (found[name]["accuracy_merged"] - found[name]["accuracy_exported"])
            what = "accuracy falls by {:.2f} points"
        else:
            found["drop"] = 100 * found[name]["flips"] / found[name]["rows"]
            what = "{:.2f} % of labels change"
        if not found["drop"] <= max_drop:
            raise AdapterError(
                f"{out}: not written, because in int8 {what.format(found['drop'])} on {found[name]['rows']:,} {name} "
                f"rows, allowed {max_drop:g}; use --format onnx, or raise --max-drop"
            )

    def race(self, engines: dict[str, Engine]) -> dict[str, float]:
        """Return each engine's texts per second: the median of SPEED_ROUNDS turns over a few rows."""
        rows = next(reversed(self.rows.values()))
        few = np.linspace(0, len(rows) - 1, min(SPEED_ROWS, len(rows))).astype(np.int64)
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(SPEED_ROUNDS):
            for name, engine in engines.items():
                start = time.perf_counter()
                for part in cut(few, rows.lengths, max_tokens=INFERENCE_TOKENS):
                    engine(*pad(rows, part))
                seconds[name].append(time.perf_counter() - start)
        return {name: len(few) / float(np.median(found)) for name, found in seconds.items()}


def _ask(base: Base, stamp: Stamp, card: Card | None, *, max_rows: int, progress: bool) -> _Reference:
    """Let the merged model answer the probe, and validation rows where they can be had."""
    encoder = TextEncoder.of(base.tokenizer, max_length=stamp.max_length, truncation=stamp.truncation)
    if card:
        inputs = [np.array(ids, dtype=np.int32) for ids in card.probe.input_ids]
    else:
        inputs = [encoder.frame(encoder.truncate(ids)) for ids in encoder.tokenise(probe_texts())]
    rows, missing = {"probe": encoder.pack(inputs)}, None
    try:
        found = _validation_rows(card, max_rows)
        rows["validation"] = encode(
            found, tokenizer=base.tokenizer, max_length=stamp.max_length, truncation=stamp.truncation, progress=progress
        )
    except DataError as error:
        missing = str(error)
        log.info("export: compared on the probe alone, without validation rows: %s", missing)

    def compute(input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64] | None) -> NDArray[np.float32]:
        mask = None if attention_mask is None else torch.from_numpy(attention_mask)
        with torch.inference_mode():
            output = base.model(input_ids=torch.from_numpy(input_ids), attention_mask=mask)
        return np.asarray(output.logits.numpy(), dtype=np.float32)

    logits = {name: _answer(compute, encoded, name, show=progress) for name, encoded in rows.items()}
    return _Reference(rows, logits, missing, progress)


def _validation_rows(card: Card | None, max_rows: int) -> Rows:
    if card is None:
        raise DataError("a merged folder does not say on which rows it was trained; export the adapter itself")
    config = card.data.config
    rows = load_data(config).validation
    if rows.fingerprint() != card.data.validation_sha256:
        raise DataError(f"{config.source}: changed since training, so its validation rows are other ones")
    return sample(rows, num_rows=max_rows, seed=config.split_seed)


def _answer(engine: Engine, encoded: Encoded, name: str, *, show: bool) -> NDArray[np.float32]:
    """Return the logits of rows, (num_rows, num_labels)."""
    parts, order = [], cut(np.arange(len(encoded)), encoded.lengths, max_tokens=INFERENCE_TOKENS)
    with make_bar(int(encoded.lengths.sum()), desc=name, unit="tok", show=show) as bar:
        for index in order:
            parts.append(engine(*pad(encoded, index)))
            bar.update(int(encoded.lengths[index].sum()))
    logits = np.concatenate(parts)
    return np.asarray(logits[np.argsort(np.concatenate(order))], dtype=np.float32)


def _finish(
    aside: Path, stamp: Stamp, compared: dict[str, dict[str, Any]], graphs: tuple[str, ...], *, name: str
) -> None:
    """Write the README and the stamp of an exported folder."""
    # A reason may quote a path or a cell of someone's file, and the stamp travels with the model.
    unread = {"reason": "its rows could not be had where it was exported"}
    public = {
        file: {part: unread if part == "validation" and "reason" in value else value for part, value in found.items()}
        for file, found in compared.items()
    }
    update = {
        "dtype": "float32",
        "compared": {**stamp.compared, **public},
        "files": {file: hash_file(aside / file) for file in (*graphs, "tokenizer.json")},
    }
    stamp = stamp.model_copy(update=update)
    text = make_exported_card(name, _read_labels(aside), stamp)
    (aside / "README.md").write_text(text, encoding="utf-8")
    write_stamp(aside, stamp)
