"""The adapters that are served: loaded and verified once, beside one base; more come and go while it runs."""

import copy
import ctypes
import itertools
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import nn

from lora_sentiment.adapter.folder import PROBE_TOLERANCE, Card, Loaded, load, load_card
from lora_sentiment.adapter.safe_files import read_header
from lora_sentiment.adapter.weights import CHANGED_WEIGHTS, PEFT_WEIGHTS
from lora_sentiment.data.batches import Encoded, TextEncoder, cut, pad, take_rows
from lora_sentiment.data.packing import cut_packed
from lora_sentiment.errors import AdapterError, ModelError
from lora_sentiment.fast import (
    FastForward,
    Parts,
    UnsupportedModelError,
    compute_mixed,
    compute_mixed_packed,
    has_packable_heads,
    read_parts,
    why_not_on,
)
from lora_sentiment.models.dtype import resolve_dtype
from lora_sentiment.models.engine import Engine
from lora_sentiment.models.inference import prepare_engine
from lora_sentiment.models.load import Base, load_base
from lora_sentiment.models.parameters import inference_tokens
from lora_sentiment.models.wrap import head_layers
from lora_sentiment.recipe.model import ModelConfig
from lora_sentiment.training.processes import join_launch
from lora_sentiment.training.signals import is_out_of_memory

log = logging.getLogger("lora_sentiment")

Answers = NDArray[np.float32]
Ids = NDArray[np.int64]
Signature = tuple[tuple[str, int, int, int], ...]
WARM_UP_LENGTHS = (8, 64, 512)
"""Tokens of the texts by which a GPU is warmed up, beside a full batch."""
TRIM_SECONDS = 1.0
"""Least time between two returns of free memory to the system: one takes milliseconds."""
_SHARING = ("lora", "head")
"""Methods that leave the base's own weights as they are, so that a model can be rebuilt around a shared one."""


@dataclass(frozen=True, eq=False)
class Served:
    """One adapter that is loaded. It answers as long as something refers to it, also after the pool dropped it.

    Attributes:
        name: The folder's name, by which requests ask for it.
        folder: Where it was read.
        labels: Label names; the index of a name is its label.
        encoder: From a text to token ids.
        clean: Whether texts are cleaned first, as they were for training.
        sha256: Hash of what decides an answer.
        method: What was trained.
        num_parameters: Values that it adds to the base or replaces in it, its head among them.
        form: `low-rank`: computed beside all others, in one pass; `merged`: a model of its own, in its own batches.
        part: What it adds to the shared base, or the forward of its own model.
    """

    name: str
    folder: Path
    labels: tuple[str, ...]
    encoder: TextEncoder
    clean: bool
    sha256: str
    method: str
    num_parameters: int
    form: Literal["low-rank", "merged"]
    part: Parts | Engine


class Pool:
    """One base and its adapters by name.

    Attributes:
        base: Name of the base.
        base_sha256: Its hash, which every adapter's card must name.
        served: Adapters by name: a snapshot, which `add` and `refresh` replace and never change.
    """

    def __init__(self, base: Base, *, source: str | None, watch: Path | None, dtype: str) -> None:
        self.base, self.base_sha256 = base.name, base.sha256
        self.served: Mapping[str, Served] = {}
        self._fresh, self._source, self._watch = base, source, watch
        self._device = join_launch().device
        self._dtype_name, self._dtype = dtype, resolve_dtype(dtype, self._device)
        self._seen: dict[Path, Signature] = {}
        # Only glibc has it.
        self._trim = (
            getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
        )
        self._trimmed = time.monotonic()
        base.model.requires_grad_(False).eval()
        encoder: Any = copy.deepcopy(
            base.model, _tensors(base.model) if self._device.type == "cpu" else {}
        )
        self._forward = FastForward(encoder.distilbert.to(self._device), self._dtype)
        self._packs = self._device.type == "cuda" and has_packable_heads(encoder.distilbert)

    def add(self, folders: Sequence[Path]) -> None:
        """Load adapters and put them beside the others; none of them where one is refused.

        Raises:
            AdapterError: If one is not what was saved, is for another base, or its name is taken.
            ModelError: If its base cannot be loaded.
        """
        found = dict(self.served)
        for folder in map(Path.resolve, folders):
            _refuse_taken(folder, found)
            found[folder.name] = self._load(folder)
        self.served = found

    def refresh(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Look at the watched folder: pick up finished adapters, drop those that are gone, reload what changed.

        What cannot be served is logged, and tried again when any of its files changes: it may be half copied. One that
        was served before it changed so is served as it was.

        Args:
            stopped: Asked before each adapter is loaded; once it says yes, what is left is not looked at.
        """
        if self._watch is None:
            return
        there = _find(self._watch)
        for name, own in self.served.items():
            if own.folder in self._seen and own.folder not in there:
                log.info("%r: its folder is gone; not served any more", name)
                self.served = {other: kept for other, kept in self.served.items() if other != name}
        self._seen = {folder: seen for folder, seen in self._seen.items() if folder in there}
        for folder, signature in there.items():
            named = self.served[folder.name].folder if folder.name in self.served else None
            if named == folder and folder not in self._seen:
                self._seen[folder] = signature  # loaded by name, and watched from now on
            if stopped() or self._seen.get(folder) == signature:
                continue
            try:
                _refuse_taken(
                    folder, {name: own for name, own in self.served.items() if own.folder != folder}
                )
                self.served = {**self.served, folder.name: self._load(folder)}
                log.info("%r: served from %r", folder.name, str(folder))
            except (AdapterError, ModelError, OSError) as error:
                log.warning(
                    "%r: %s: %s",
                    str(folder),
                    "served as it was" if named == folder else "not served",
                    error,
                )
            except (RuntimeError, MemoryError):
                # Such as a device that was full for a moment: nothing is wrong with the folder, so it is tried again.
                log.exception("%r: could not be loaded; tried again at the next look", str(folder))
                continue
            self._seen[folder] = signature

    def compute(self, served: Sequence[Served], encoded: Encoded) -> list[Answers]:
        """Answer texts, each by its adapter: those of low-rank form together, others each in batches of their own.

        Args:
            served: One adapter a row.
            encoded: The rows.

        Returns:
            One array of logits a row: (num_labels of its adapter,).
        """
        groups: dict[int, list[int]] = {}
        for row, own in enumerate(served):
            groups.setdefault(0 if isinstance(own.part, Parts) else id(own.part), []).append(row)
        logits: dict[int, Answers] = {}
        for rows in groups.values():
            part = served[rows[0]].part
            cut_rows = part.cut if isinstance(part, Engine) else self._cut
            for index in cut_rows(np.array(rows), encoded.lengths):
                if isinstance(part, Engine):
                    found: Iterable[Answers] = part.answer(encoded, index)
                else:
                    found = self._answer_mixed([served[row].part for row in index], encoded, index)
                logits.update(zip(index.tolist(), found, strict=True))
        self._give_memory_back()
        return [logits[row] for row in range(len(served))]

    def warm_up(self, *, batch_tokens: int) -> None:
        """Answer texts of a few sizes with every adapter on a GPU, so that the first request finds all kernels loaded.

        The first answer of a thread there compiles kernels, loads libraries and takes memory. On a CPU the check of
        each adapter has done all that is done once, so nothing happens.

        Args:
            batch_tokens: Most tokens of a batch.

        Raises:
            ModelError: If a batch does not fit into memory.
        """
        every = list(self.served.values())
        if self._device.type != "cuda" or not every:
            return
        began = time.perf_counter()
        longest = max(own.encoder.max_length for own in every)
        num_rows = max(1, batch_tokens // longest)
        batches = [(every, length) for length in WARM_UP_LENGTHS]
        batches.append((list(itertools.islice(itertools.cycle(every), num_rows)), longest))
        try:
            for served, length in batches:
                self.compute(
                    served,
                    served[0].encoder.pack([_make_text(own.encoder, length) for own in served]),
                )
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise ModelError(
                f"serve: memory ran out on a batch of {batch_tokens:,} tokens; give --limit batch_tokens=N with a "
                f"smaller N, or fewer adapters: {str(error).splitlines()[0]}"
            ) from error
        log.info("warmed up in %.1f seconds", time.perf_counter() - began)

    def _give_memory_back(self) -> None:
        """Let glibc return what is free: batches of ever other shapes leave it in pieces, and it keeps them all."""
        now = time.monotonic()
        if self._trim and now - self._trimmed > TRIM_SECONDS:
            self._trimmed = now
            self._trim(0)

    def _cut(self, index: Ids, lengths: Ids) -> list[Ids]:
        """Cut texts of low-rank adapters into batches."""
        max_tokens = inference_tokens(self._device.type)
        return (cut_packed if self._packs else cut)(index, lengths, max_tokens=max_tokens)

    def _answer_mixed(
        self, parts: Sequence[Parts | Engine], encoded: Encoded, index: Ids
    ) -> list[Answers]:
        """Answer one batch of texts of low-rank adapters."""
        own = [part for part in parts if isinstance(part, Parts)]
        if self._packs:
            rows = take_rows(encoded, index)
            return compute_mixed_packed(self._forward, rows, own, pad_token_id=encoded.pad_token_id)
        input_ids, mask = pad(encoded, index)
        ids = torch.from_numpy(input_ids).to(self._device)
        padding = None if mask is None else torch.from_numpy(mask).to(self._device)
        return compute_mixed(self._forward, ids, padding, own)

    def _load(self, folder: Path) -> Served:
        card = load_card(folder)
        self._refuse_stranger(folder, card)
        loaded, part = self._open(folder, card)
        # The card that the weights were held against: another one may have come since the first look at it.
        card = loaded.card
        self._refuse_stranger(folder, card)
        weights = [
            path for path in (folder / PEFT_WEIGHTS, folder / CHANGED_WEIGHTS) if path.is_file()
        ]
        if not weights:
            raise AdapterError(f"{folder}: went away while it was loaded")
        served = Served(
            name=folder.name,
            folder=folder,
            labels=tuple(card.labels),
            encoder=TextEncoder.of(
                loaded.tokenizer, max_length=card.max_length, truncation=card.truncation
            ),
            clean=card.data.config.clean,
            sha256=card.sha256,
            method=card.method.kind,
            num_parameters=sum(math.prod(shape) for _, shape in read_header(weights[0]).values()),
            form="low-rank" if isinstance(part, Parts) else "merged",
            part=part,
        )
        self._check(served, card)
        return served

    def _refuse_stranger(self, folder: Path, card: Card) -> None:
        if card.base.base_sha256 != self.base_sha256:
            raise AdapterError(
                f"{folder}: is for the base {card.base.name!r} ({card.base.base_sha256[:12]}); this server has "
                f"{self.base!r} ({self.base_sha256[:12]}); serve it by a server of its own"
            )

    def _open(self, folder: Path, card: Card) -> tuple[Loaded, Parts | Engine]:
        """Load an adapter around the shared base where that stays as it is, else around one of its own."""
        reason = why_not_on(self._device)
        if reason is not None:
            log.info("%r: served merged: %s", folder.name, reason)
        elif card.method.kind in _SHARING and card.base.quantize == "none":
            loaded = load(folder, base=self._source, fresh=_with_labels(self._fresh, card.labels))
            head = list(head_layers(loaded.model).values())
            try:
                return loaded, read_parts(
                    loaded.model, head=head, dtype=self._dtype, device=self._device
                )
            except UnsupportedModelError as error:
                log.info("%r: served merged: %s", folder.name, error.reason)
        loaded = load(folder, base=self._source, device=self._device)
        model: Any = loaded.model
        if isinstance(model, PeftModel) and card.base.quantize == "none":
            model = model.merge_and_unload(safe_merge=True)
        return loaded, prepare_engine(model, self._dtype_name, self._device)

    def _check(self, served: Served, card: Card) -> None:
        """Ask the card's probe as requests are answered; a shorter dtype rounds, so there it would prove nothing."""
        inputs = [np.array(ids, dtype=np.int32) for ids in card.probe.input_ids]
        found = self.compute([served] * len(inputs), served.encoder.pack(inputs))
        difference = float(np.abs(np.array(found) - np.array(card.probe.logits)).max())
        if self._dtype == torch.float32 and not difference <= PROBE_TOLERANCE:
            raise AdapterError(
                f"{served.folder}: as served it answers its probe otherwise than when it was saved (logits differ by "
                f"{difference:.2g}, allowed {PROBE_TOLERANCE:g})"
            )


def load_pool(folders: Sequence[Path], *, watch: Path | None, base: str | None, dtype: str) -> Pool:
    """Load a base and adapters.

    Args:
        folders: Adapter folders; the first one says what the base is.
        watch: A folder whose adapter folders are served as long as they are there; those in it now are loaded.
        base: Where to find the base, if not where the first adapter says.
        dtype: Compute dtype: `auto`, `float32`, `bfloat16` or `float16`.

    Raises:
        AdapterError: If an adapter is not what was saved, is for another base, or two have the same name.
        ModelError: If there is no base, or it cannot be loaded.
    """
    if watch is not None and not watch.is_dir():
        raise AdapterError(f"--watch: {watch} is no folder; make it first")
    known = [*folders, *(_find(watch) if watch else ())]
    if not known and base is None:
        raise ModelError(
            "no adapter was given and none is in the watched folder: name the base with --base"
        )
    card = load_card(known[0]) if known else None
    name, revision = (base, None) if base or not card else (card.base.name, card.base.revision)
    max_length = card.max_length if card else 8
    config = ModelConfig(name=str(name), revision=revision, max_length=max_length, dtype="float32")
    pool = Pool(load_base(config, labels=("0", "1")), source=base, watch=watch, dtype=dtype)
    pool.add(folders)
    pool.refresh()
    return pool


def _find(watch: Path) -> dict[Path, Signature]:
    """Return the adapter folders inside a folder, each with what changes when one of its files does."""
    found = {}
    for folder in sorted(card.parent for card in watch.resolve().glob("*/card.json")):
        facts = {}
        # Removed in this moment, or a link to nowhere: that file, or the whole folder.
        with suppress(OSError):
            for path in sorted(folder.iterdir()):
                with suppress(OSError):
                    at = path.stat()
                    facts[path.name] = (path.name, at.st_ino, at.st_mtime_ns, at.st_size)
        if "card.json" in facts:
            found[folder] = tuple(facts.values())
    return found


def _refuse_taken(folder: Path, served: Mapping[str, Served]) -> None:
    if folder.name in served:
        raise AdapterError(
            f"{folder}: an adapter of the name {folder.name!r} is served already, from {served[folder.name].folder}; "
            "rename one of the folders"
        )


def _make_text(encoder: TextEncoder, length: int) -> NDArray[np.int32]:
    """Return an input of a length, or of the longest that an adapter reads."""
    room = min(length, encoder.max_length) - 2
    return encoder.frame([encoder.sep_token_id] * room)


def _tensors(model: nn.Module) -> dict[int, Any]:
    """Return what `copy.deepcopy` takes for copied already: a copy of the modules around the same tensors."""
    return {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}


def _with_labels(base: Base, labels: Sequence[str]) -> Base:
    """Return a base whose head has room for other labels, around the same tensors."""
    model: Any = copy.deepcopy(base.model, _tensors(base.model))
    names = dict(enumerate(labels))
    model.config.num_labels, model.num_labels = len(labels), len(labels)
    model.config.id2label, model.config.label2id = names, {name: i for i, name in names.items()}
    model.pre_classifier = nn.Linear(base.shape.dim, base.shape.dim)
    model.classifier = nn.Linear(base.shape.dim, len(labels))
    return replace(base, model=model)
