"""The served adapters: loaded and verified on one shared base, and changed at run time."""

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
from typing import Any

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
    check_modules,
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
from lora_sentiment.models.token_limits import inference_tokens
from lora_sentiment.models.wrap import head_layers
from lora_sentiment.recipe.model import ModelConfig
from lora_sentiment.tasks.task import Calibration, Task
from lora_sentiment.training.processes import join_launch
from lora_sentiment.training.signals import is_out_of_memory

log = logging.getLogger("lora_sentiment")

Logits = NDArray[np.float32]
Index = NDArray[np.int64]
Signature = tuple[tuple[str, int, int, int], ...]
"""Name, inode, time and size of each file of a folder."""
WARM_UP_LENGTHS = (8, 64, 512)
"""Tokens of the texts that warm up a GPU, besides a full batch."""
TRIM_SECONDS = 1.0
"""Least time between two calls of `malloc_trim`, which takes milliseconds."""
SHARING_METHODS = ("lora", "head")
"""Methods that leave the base's weights unchanged, so that their adapters can share one base."""


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """One loaded adapter. It can answer even after the pool dropped it.

    Attributes:
        name: The folder's name, which requests use.
        folder: Its folder.
        labels: Label names; the index of a name is its label.
        encoder: From a text to token ids.
        task: What its labels are.
        calibration: What was fitted on validation in training, or None.
        clean: Whether texts are cleaned first, as they were for training.
        sha256: Hash of everything that decides an answer.
        method: Training method.
        num_parameters: Number of values that it adds to the base or replaces in it, with its head.
        part: Its low-rank pairs and head beside the shared base, or the forward pass of its own
            model.
    """

    name: str
    folder: Path
    labels: tuple[str, ...]
    encoder: TextEncoder
    task: Task
    calibration: Calibration | None
    clean: bool
    sha256: str
    method: str
    num_parameters: int
    part: Parts | Engine

    @property
    def form(self) -> str:
        """`low-rank`: computed together with others; `merged`: computed in batches of its own."""
        return "low-rank" if isinstance(self.part, Parts) else "merged"


class Pool:
    """One base and its adapters.

    Attributes:
        base: Name of the base.
        base_sha256: Its hash, which every adapter's card must name.
        dtype: Name of the compute dtype.
        adapters: Adapters by name. `add` and `refresh` replace this mapping and never change it.
    """

    def __init__(self, base: Base, *, source: str | None, watch: Path | None, dtype: str) -> None:
        self.base = base.name
        self.base_sha256 = base.sha256
        self.adapters: Mapping[str, LoadedAdapter] = {}
        self._fresh = base
        self._source = source
        self._watch = watch.resolve() if watch else None
        self._device = join_launch().device
        self._dtype_name = dtype
        self._dtype = resolve_dtype(dtype, self._device)
        self.dtype = str(self._dtype).removeprefix("torch.")
        self._signatures: dict[Path, Signature | None] = {}
        self._trimmed = time.monotonic()
        base.model.requires_grad_(False).eval()
        self._why_not_shared = why_not_on(self._device)
        if not base.family.fast:
            self._why_not_shared = f"the fast forward pass does not compute {base.family.name}"
        encoder: Any = base.model.get_submodule(base.family.encoder)
        if self._why_not_shared is None:
            try:
                check_modules(encoder)
            except UnsupportedModelError as error:
                self._why_not_shared = error.reason
        self._packs = False
        if self._why_not_shared is None:
            if self._device.type != "cpu":
                # The base stays on the CPU, where adapters are loaded.
                encoder = copy.deepcopy(encoder).to(self._device)
            self._packs = self._device.type == "cuda" and has_packable_heads(encoder)
            self._forward = FastForward(encoder, self._dtype)

    def add(self, folders: Sequence[Path]) -> None:
        """Load adapters and serve them beside the others. If one is refused, none is added.

        Raises:
            AdapterError: If an adapter is not what was saved, is for another base, or its name is
                taken.
            ModelError: If its base cannot be loaded.
        """
        adapters = dict(self.adapters)
        for folder in map(Path.resolve, folders):
            _refuse_taken(folder, adapters)
            self._signatures[folder] = _read_signature(folder)
            adapters[folder.name] = self._load(folder)
        self.adapters = adapters

    def refresh(self, is_stopped: Callable[[], bool] = lambda: False) -> None:
        """Load new and changed adapters of the watched folder, and drop removed ones.

        An adapter that cannot be loaded is logged, and tried again when one of its files changes:
        it may be half copied. If it was served before it changed, its old state is still served.

        Args:
            is_stopped: Called before each adapter is loaded. The look ends if it returns true.
        """
        if self._watch is None:
            return
        found = _find_adapters(self._watch)
        for name, adapter in self.adapters.items():
            if adapter.folder.parent == self._watch and adapter.folder not in found:
                log.info("%r: its folder is gone; it is not served any more", name)
                self.adapters = {key: kept for key, kept in self.adapters.items() if key != name}
        for folder in [folder for folder in self._signatures if folder not in found]:
            del self._signatures[folder]
        for folder, signature in found.items():
            if is_stopped():
                return
            if self._signatures.get(folder) == signature or not self._reload(folder):
                continue
            self._signatures[folder] = signature

    def _reload(self, folder: Path) -> bool:
        """Load an adapter of the watched folder. Return whether to wait until its files change."""
        others = {name: own for name, own in self.adapters.items() if own.folder != folder}
        try:
            _refuse_taken(folder, others)
            self.adapters = {**self.adapters, folder.name: self._load(folder)}
            log.info("%r: served from %r", folder.name, str(folder))
        except (AdapterError, ModelError, OSError) as error:
            state = "not served" if others == self.adapters else "served as before its change"
            log.warning("%r: %s: %s", str(folder), state, error)
        except (RuntimeError, MemoryError):
            # For example a full device. Nothing is wrong with the folder.
            log.exception("%r: could not be loaded; tried again at the next look", str(folder))
            return False
        return True

    def compute(self, adapters: Sequence[LoadedAdapter], encoded: Encoded) -> list[Logits]:
        """Compute rows, each with its adapter. Rows of low-rank adapters share batches.

        Args:
            adapters: The adapter of each row.
            encoded: The rows.

        Returns:
            The logits of each row, of shape (num_labels of its adapter,).
        """
        rows_of: dict[Engine | None, list[int]] = {}
        for row, adapter in enumerate(adapters):
            engine = None if isinstance(adapter.part, Parts) else adapter.part
            rows_of.setdefault(engine, []).append(row)
        logits: dict[int, Logits] = {}
        for engine, rows in rows_of.items():
            cut_rows = engine.cut if engine else self._cut
            for index in cut_rows(np.array(rows), encoded.lengths):
                if engine:
                    answers: Iterable[Logits] = engine.answer(encoded, index)
                else:
                    parts = [adapters[row].part for row in index]
                    answers = self._compute_mixed(parts, encoded, index)
                logits.update(zip(index.tolist(), answers, strict=True))
        self._trim_memory()
        return [logits[row] for row in range(len(adapters))]

    def warm_up(self, *, batch_tokens: int) -> None:
        """Compute texts of a few sizes with every adapter on a GPU.

        The first batch of a thread on a GPU compiles kernels, loads libraries and takes memory. On
        a CPU the check of each loaded adapter has done all of that.

        Args:
            batch_tokens: Most tokens of a batch.

        Raises:
            ModelError: If a batch does not fit into memory.
        """
        adapters = list(self.adapters.values())
        if self._device.type != "cuda" or not adapters:
            return
        started = time.perf_counter()
        longest = max(adapter.encoder.max_length for adapter in adapters)
        num_rows = max(1, batch_tokens // longest)
        full = list(itertools.islice(itertools.cycle(adapters), num_rows))
        batches = [(adapters, length) for length in WARM_UP_LENGTHS]
        try:
            for rows, length in [*batches, (full, longest)]:
                inputs = [_make_input(adapter.encoder, length) for adapter in rows]
                self.compute(rows, rows[0].encoder.pack(inputs))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise ModelError(
                f"serve: memory ran out on a batch of {batch_tokens:,} tokens; give --limit "
                f"batch_tokens=N with a smaller N, or fewer adapters: {str(error).splitlines()[0]}"
            ) from error
        log.info("warmed up in %.1f seconds", time.perf_counter() - started)

    def _trim_memory(self) -> None:
        """Let glibc return free memory to the system.

        Batches of many shapes leave free memory in pieces, which glibc keeps. Without this call the
        process grew by 44 % in ten minutes at saturation, and a pool alone took 1,231 MB instead of
        600 MB. With it, the process grows by 3 % (benchmarks/serve_load.md).
        """
        now = time.monotonic()
        if now - self._trimmed > TRIM_SECONDS and _malloc_trim is not None:
            self._trimmed = now
            _malloc_trim(0)

    def _cut(self, index: Index, lengths: Index) -> list[Index]:
        """Cut rows of low-rank adapters into batches."""
        cut_rows = cut_packed if self._packs else cut
        return cut_rows(index, lengths, max_tokens=inference_tokens(self._device.type))

    def _compute_mixed(self, parts: Sequence[Any], encoded: Encoded, index: Index) -> list[Logits]:
        """Compute one batch of rows of low-rank adapters."""
        if self._packs:
            rows = take_rows(encoded, index)
            return compute_mixed_packed(
                self._forward,
                rows,
                parts,
                pad_token_id=encoded.pad_token_id,
                has_types=encoded.has_types,
            )
        padded = []
        for values in pad(encoded, index):
            padded.append(None if values is None else torch.from_numpy(values).to(self._device))
        input_ids, mask, types = padded
        assert input_ids is not None
        return compute_mixed(self._forward, input_ids, mask, parts, types)

    def _load(self, folder: Path) -> LoadedAdapter:
        card = load_card(folder)
        self._refuse_other_base(folder, card)
        loaded, part = self._load_part(folder, card)
        # The folder may have been replaced since. This card was loaded and verified with the
        # weights.
        card = loaded.card
        self._refuse_other_base(folder, card)
        weights = [folder / name for name in (PEFT_WEIGHTS, CHANGED_WEIGHTS)]
        weights = [path for path in weights if path.is_file()]
        if not weights:
            raise AdapterError(f"{folder}: was removed while it was loaded")
        shapes = [shape for _, shape in read_header(weights[0]).values()]
        adapter = LoadedAdapter(
            name=folder.name,
            folder=folder,
            labels=tuple(card.labels),
            encoder=loaded.make_encoder(),
            task=card.task,
            calibration=card.calibration,
            clean=card.data.config.clean,
            sha256=card.sha256,
            method=card.method.kind,
            num_parameters=sum(map(math.prod, shapes)),
            part=part,
        )
        self._check_probe(adapter, card)
        return adapter

    def _refuse_other_base(self, folder: Path, card: Card) -> None:
        if card.base.base_sha256 != self.base_sha256:
            raise AdapterError(
                f"{folder}: is for the base {card.base.name!r} ({card.base.base_sha256[:12]}); "
                f"this server has {self.base!r} ({self.base_sha256[:12]}); start another server "
                "for it"
            )

    def _load_part(self, folder: Path, card: Card) -> tuple[Loaded, Parts | Engine]:
        """Load an adapter on the shared base if possible, else on its own base."""
        reason = self._why_not_shared
        shares = card.method.kind in SHARING_METHODS and card.base.quantize == "none"
        if reason is None and shares:
            fresh = _copy_with_labels(self._fresh, card.labels)
            loaded = load(folder, base=self._source, fresh=fresh)
            head = list(head_layers(loaded.model).values())
            try:
                return loaded, read_parts(
                    loaded.model, head=head, dtype=self._dtype, device=self._device
                )
            except UnsupportedModelError as error:
                reason = error.reason
        if reason is not None:
            log.info("%r: served merged: %s", folder.name, reason)
        loaded = load(folder, base=self._source, device=self._device)
        model: Any = loaded.model
        if isinstance(model, PeftModel) and card.base.quantize == "none":
            model = model.merge_and_unload(safe_merge=True)
        return loaded, prepare_engine(model, self._dtype_name, self._device)

    def _check_probe(self, adapter: LoadedAdapter, card: Card) -> None:
        """Compute the card's probe as a request, and compare it with the card's logits in fp32."""
        inputs = [np.array(ids, dtype=np.int32) for ids in card.probe.input_ids]
        logits = np.array(self.compute([adapter] * len(inputs), adapter.encoder.pack(inputs)))
        difference = float(np.abs(logits - np.array(card.probe.logits)).max())
        # The comparison is false for NaN too.
        expected = np.array(card.probe.logits)
        allowed = card.task.find_allowed_difference(expected, PROBE_TOLERANCE)
        if self._dtype == torch.float32 and not difference <= allowed:
            raise AdapterError(
                f"{adapter.folder}: its probe logits differ by {difference:.2g} from those that "
                f"were saved; allowed: {PROBE_TOLERANCE:g}"
            )


def load_pool(folders: Sequence[Path], *, watch: Path | None, base: str | None, dtype: str) -> Pool:
    """Load a base and adapters.

    Args:
        folders: Adapter folders. The first one names the base.
        watch: A folder whose adapter folders are served as long as they are there. Those in it are
            loaded now.
        base: Hub name or folder of the base, instead of the one that the first adapter names.
        dtype: Compute dtype: `auto`, `float32`, `bfloat16` or `float16`.

    Raises:
        AdapterError: If an adapter is not what was saved, is for another base, or two have the same
            name.
        ModelError: If there is no base, or it cannot be loaded.
    """
    if watch is not None and not watch.is_dir():
        raise AdapterError(f"--watch: {watch} is not a folder; make it first")
    known = list(folders)
    if watch is not None:
        known += _find_adapters(watch.resolve())
    name = base
    revision = None
    max_length = 8
    labels: tuple[str, ...] = ("0", "1")
    if known:
        card = load_card(known[0])
        labels = tuple(card.labels)  # a head that the base has must fit
        max_length = card.max_length
        if base is None:
            name = card.base.name
            revision = card.base.revision
    if name is None:
        raise ModelError(
            "no adapter was given and none is in the watched folder: name the base with --base"
        )
    config = ModelConfig(name=name, revision=revision, max_length=max_length, dtype="float32")
    pool = Pool(load_base(config, labels=labels), source=base, watch=watch, dtype=dtype)
    pool.add(folders)
    pool.refresh()
    return pool


def _find_adapters(watch: Path) -> dict[Path, Signature]:
    """Return the adapter folders in a folder, each with its signature."""
    signatures = {}
    for card in sorted(watch.glob("*/card.json")):
        signature = _read_signature(card.parent)
        if signature is not None:
            signatures[card.parent] = signature
    return signatures


def _read_signature(folder: Path) -> Signature | None:
    """Return a value that changes with the files of an adapter folder, or None without a card."""
    files = []
    # A file or the folder may be removed in this moment, and a link may lead nowhere.
    with suppress(OSError):
        for path in sorted(folder.iterdir()):
            with suppress(OSError):
                facts = path.stat()
                files.append((path.name, facts.st_ino, facts.st_mtime_ns, facts.st_size))
    if not any(name == "card.json" for name, *_ in files):
        return None
    return tuple(files)


def _refuse_taken(folder: Path, adapters: Mapping[str, LoadedAdapter]) -> None:
    if folder.name in adapters:
        raise AdapterError(
            f"{folder}: an adapter with the name {folder.name!r} is served already, from "
            f"{adapters[folder.name].folder}; rename one of the folders"
        )


def _make_input(encoder: TextEncoder, length: int) -> NDArray[np.int32]:
    """Return an input of a length, or of the longest that the adapter reads."""
    num_tokens = min(length, encoder.max_length) - 2
    return encoder.frame([encoder.sep_token_id] * num_tokens)


def _copy_modules(model: nn.Module) -> Any:
    """Copy the modules of a model. The copy shares the tensors."""
    # The memo of `deepcopy` holds what is copied already.
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _copy_with_labels(base: Base, labels: Sequence[str]) -> Base:
    """Return a base with other labels and a head for them. It shares all other tensors."""
    model = _copy_modules(base.model)
    model.config.num_labels = model.num_labels = len(labels)
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {name: i for i, name in enumerate(labels)}
    *inner, last = base.family.head
    width = base.config.hidden_size
    for name in inner:
        model.set_submodule(name, nn.Linear(width, width))
    model.set_submodule(last, nn.Linear(width, len(labels)))
    return replace(base, model=model)


def _find_malloc_trim() -> Callable[[int], int] | None:
    """Return `malloc_trim` of glibc, or None on another C library."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


_malloc_trim = _find_malloc_trim()
