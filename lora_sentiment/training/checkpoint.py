"""Checkpoints: what a run changes, in safetensors and JSON, so that it goes on bit for bit wherever it was stopped.

A checkpoint is a folder `step-00000123` of three files. `state.safetensors` holds tensors, `state.json` all else,
`manifest.json` the SHA-256 and size of both, what must be equal to go on, and its own hash. All three are written aside
and synced before the folder takes its name, and only then are older ones removed.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import FiniteFloat, NonNegativeInt, PositiveFloat, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as pack_tensors

from lora_sentiment.errors import TrainingError
from lora_sentiment.files import sync_folder, take_place
from lora_sentiment.training.history import History

log = logging.getLogger("lora_sentiment")

SCHEMA = 1
TENSORS, STATE, MANIFEST = "state.safetensors", "state.json", "manifest.json"
FOLDER = "checkpoints"
"""Of a run's folder."""
RNG = "rng."
"""Begins the names of the generators' states, one row a process."""
_ASIDE, _REMOVED = "unfinished", "removed"
_MANIFEST_BYTES = 1 << 20
_FIXED = (
    "method.",
    "model.head",
    "model.max_length",
    "model.quantize",
    "model.truncation",
    "train.metric_for_best_model",
    "base.activation",
    "base.n_heads",
    "base_sha256",
    "labels",
    "tokenizer_sha256",
    "validation_sha256",
)
"""Beginnings of the settings without which the tensors, or the best score so far, mean something else."""
_MISSING = "<absent>"


@dataclass(frozen=True)
class Store:
    """Where the checkpoints of a run are, and when one may be gone on with.

    Attributes:
        folder: `<output.dir>.run/checkpoints`.
        settings: What must be equal to go on bit for bit: dotted name to JSON value.
        resume: The recipe's `train.resume`.
        allow_changes: Go on although settings differ, where that can be done at all.
        limit: The recipe's `train.save_total_limit`.
    """

    folder: Path
    settings: Mapping[str, Any]
    resume: Literal["auto", "never", "always"] = "auto"
    allow_changes: bool = False
    limit: int = 2


@dataclass
class Progress:
    """What of a run is no tensor.

    Attributes:
        step: Optimizer steps taken.
        history: What happened in them.
        schedule: Steps of the learning rate's schedule: fewer where fp16's scaler skipped some.
        best_metric: The best so far, its sign turned so that more is better; None before the first evaluation.
        waited: Evaluations since then.
        skipped: Steps in a row that fp16's scaler skipped.
        loss_scale: The scaler's scale, and the steps since it last changed; None without a scaler.
        ranks: Which singular values AdaLoRA keeps, by tensor; None before its first pruning and for other methods.
    """

    step: NonNegativeInt
    history: History
    schedule: NonNegativeInt
    best_metric: FiniteFloat | None = None
    waited: NonNegativeInt = 0
    skipped: NonNegativeInt = 0
    loss_scale: tuple[PositiveFloat, NonNegativeInt] | None = None
    ranks: dict[str, list[bool]] | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that verified.

    Attributes:
        folder: Where it was read.
        progress: What is no tensor.
        tensors: By name, on the CPU.
        changes: Settings that differ, each as a sentence; empty unless changes are allowed.
    """

    folder: Path
    progress: Progress
    tensors: dict[str, torch.Tensor]
    changes: list[str] = field(default_factory=list)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the folders of finished checkpoints, newest first, whatever is in them."""
    found = {_step(path): path for path in folder.glob("step-*") if _step(path) is not None}
    return [found[step] for step in sorted(found, reverse=True)]  # type: ignore[type-var]


def save_checkpoint(store: Store, progress: Progress, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write a checkpoint so that at every moment the last good one is whole; then remove those beyond the limit.

    Raises:
        TrainingError: If it cannot be written: with path, bytes needed and free, and the checkpoint to resume from.
    """
    place = store.folder / f"step-{progress.step:08d}"
    files = {
        TENSORS: pack_tensors(
            {name: t.detach().to("cpu").contiguous() for name, t in sorted(tensors.items())}
        ),
        STATE: json.dumps(asdict(progress)).encode(),
    }
    files[MANIFEST] = _make_manifest(store.settings, files)
    aside = store.folder / _ASIDE
    try:
        if not store.folder.exists():
            store.folder.mkdir(parents=True)
            sync_folder(store.folder.parent)
        _remove(aside, store.folder)
        aside.mkdir()
        for name, content in files.items():
            _write(aside / name, content)
        if os.path.lexists(
            place
        ):  # one that was broken: the run went on from an older one and is here again
            _remove(place, store.folder)
        take_place(aside, place)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        needed = sum(map(len, files.values()))
        raise TrainingError(_say_unwritable(store, place, needed, error)) from error
    _remove_old(store, progress.step)
    return place


def load_checkpoint(store: Store, like: Mapping[str, torch.Tensor]) -> Checkpoint | None:
    """Return the newest checkpoint that verifies, or None where a run starts anew.

    Args:
        store: Where to look, and what must be equal.
        like: A tensor of the same name, shape and dtype for each that is expected.

    Raises:
        TrainingError: If there are checkpoints and none can be gone on with, or none is there and one must be.
    """
    if store.resume == "never":
        return None
    folders = list_checkpoints(store.folder)
    for folder in folders:
        if folder.is_symlink():  # removing old ones could not tell what of it is ours
            raise TrainingError(
                f"{folder}: is a link; remove it, or move the folder that it means in its place"
            )
    faults = []
    for folder in folders:
        try:
            content, settings = _read_files(folder, like)
            changes = _compare(folder, settings, store)
            progress, tensors = _parse(folder, content, like, exact=not changes)
        except _BrokenError as error:
            log.warning("%s", error)
            faults.append(str(error))
            continue
        return Checkpoint(folder, progress, tensors, changes)
    if faults:
        told = "\n".join(faults)
        raise TrainingError(
            f"{told}\nno checkpoint in {store.folder} is whole; train.resume=never starts anew"
        )
    if store.resume == "always":
        raise TrainingError(
            f"{store.folder}: holds no checkpoint to resume from; train.resume=auto starts anew"
        )
    return None


class _BrokenError(TrainingError):
    """A checkpoint is not what was written."""


def _write(path: Path, content: bytes) -> None:
    """Write one file of a checkpoint; every byte of one comes through here."""
    path.write_bytes(content)


def _make_manifest(settings: Mapping[str, Any], files: Mapping[str, bytes]) -> bytes:
    records = {
        name: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()}
        for name, c in files.items()
    }
    values = {"schema": SCHEMA, "files": records, "settings": dict(settings)}
    return json.dumps(values | {"sha256": _hash_values(values)}).encode()


def _hash_values(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _remove(path: Path, folder: Path) -> None:
    """Remove a folder so that, stopped in between, nothing half removed keeps its name."""
    removed = folder / _REMOVED
    _delete(removed)
    if os.path.lexists(path):
        path.rename(removed)
        _delete(removed)


def _delete(path: Path) -> None:
    """Remove what is there, if anything: of a link only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_old(store: Store, step: int) -> None:
    """Remove what is beyond the limit, and later steps, which were broken or of a future that was given up."""
    kept = 0
    for path in list_checkpoints(store.folder):
        kept += (number := _step(path) or 0) <= step
        if number > step or kept > store.limit:
            try:
                _remove(path, store.folder)
            except OSError as error:
                log.warning(
                    "%s: an old checkpoint cannot be removed: %s", path, error.strerror or error
                )


def _say_unwritable(store: Store, place: Path, needed: int, error: OSError) -> str:
    whole = list_checkpoints(store.folder)
    last = (
        f"the last good one is {whole[0]}: resume from it (--resume)"
        if whole
        else "there is none yet: start again"
    )
    room = next(path for path in (store.folder, *store.folder.absolute().parents) if path.exists())
    free = f"{needed:,} bytes are needed and {shutil.disk_usage(room).free:,} free"
    full = error.errno == errno.ENOSPC
    reason = "the disk is full" if full else error.strerror or str(error)
    when = "there is room" if full else "it can be"
    return f"{place}: the checkpoint cannot be written: {reason}; {free}; {last} once {when}"


def _step(path: Path) -> int | None:
    number = path.name.removeprefix("step-")
    return (
        int(number)
        if number.isascii() and number.isdigit() and len(number) < 16 and path.is_dir()
        else None
    )


def _read_files(
    folder: Path, like: Mapping[str, torch.Tensor]
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return the two files' content and the manifest's settings, sizes and hashes checked."""
    try:
        manifest = json.loads(_read(folder / MANIFEST, _MANIFEST_BYTES))
        if (
            _hash_values({key: value for key, value in manifest.items() if key != "sha256"})
            != manifest["sha256"]
        ):
            raise _BrokenError(
                f"{folder / MANIFEST}: was changed: its hash is not the recorded one"
            )
        if manifest["schema"] > SCHEMA:
            raise TrainingError(
                f"{folder}: has schema {manifest['schema']}; this version reads up to {SCHEMA}; upgrade lora_sentiment"
            )
        # A row of states a process, and a header; a wrong size is told before that many bytes are read.
        room = sum(tensor.nbytes for tensor in like.values()) + 1024 * len(like) + (64 << 20)
        bounds = {TENSORS: room, STATE: (1 << 20) + 1024 * (_step(folder) or 0)}
        content = {}
        for name, bound in bounds.items():
            record = manifest["files"][name]
            content[name] = _read(folder / name, bound, size=record["bytes"])
            if hashlib.sha256(content[name]).hexdigest() != record["sha256"]:
                raise _BrokenError(
                    f"{folder / name}: was changed: its hash is not the recorded one"
                )
        return content, dict(manifest["settings"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _BrokenError(f"{folder / MANIFEST}: is not what was written: {error}") from error


def _read(path: Path, bound: int, *, size: int | None = None) -> bytes:
    """Read a file whose size is known or bounded before a byte of it is."""
    try:
        found = path.lstat()
        if not path.is_file() or path.is_symlink():
            raise _BrokenError(f"{path}: is no file")
        if (size is not None and found.st_size != size) or found.st_size > bound:
            expected = f"{size:,}" if size is not None and size <= bound else f"at most {bound:,}"
            raise _BrokenError(f"{path}: has {found.st_size:,} bytes, expected {expected}")
        with path.open("rb") as file:
            return file.read(found.st_size)
    except OSError as error:
        raise _BrokenError(f"{path}: cannot be read: {error.strerror}") from error


def _compare(folder: Path, settings: Mapping[str, Any], store: Store) -> list[str]:
    """Return the settings that differ, each as a sentence.

    Raises:
        TrainingError: If there are any, and they are not allowed or cannot be.
    """
    ours = json.loads(json.dumps(dict(store.settings)))
    pairs = {
        name: (settings.get(name, _MISSING), ours.get(name, _MISSING))
        for name in ours.keys() | settings.keys()
    }
    names = sorted(name for name, (was, now) in pairs.items() if was != now)
    told = {name: f"{name}: was {pairs[name][0]}, is {pairs[name][1]}" for name in names}
    pruned = (
        settings.get("method.kind") == "adalora"
    )  # its pruning is spread over the steps of the whole run
    fixed = [name for name in names if name.startswith(_FIXED) or (pruned and name == "num_steps")]
    if names and (fixed or not store.allow_changes):
        lines = "\n".join(
            f"  {told[name]}{' (cannot be gone on with)' if name in fixed else ''}"
            for name in names
        )
        how = "" if fixed else ", or --allow-changes to go on all the same, not bit for bit"
        raise TrainingError(
            f"{folder}: is of a run that differs in:\n{lines}\nput that back, or set train.resume=never to start anew "
            f"(which deletes the checkpoints){how}"
        )
    return list(told.values())


def _is_consistent(progress: Progress) -> bool:
    """Return whether everything is of the steps that were taken, and of no later one."""
    history = progress.history
    taken = [point.step for point in history.steps]
    told = [progress.schedule, history.best_step, *(point.step for point in history.evaluations)]
    return (
        taken == [*range(1, progress.step + 1)]
        and max(told) <= progress.step
        and history.max_tokens > 0
    )


def _parse(
    folder: Path, content: Mapping[str, bytes], like: Mapping[str, torch.Tensor], *, exact: bool
) -> tuple[Progress, dict[str, torch.Tensor]]:
    """Return what the files hold, names, shapes, dtypes and values checked."""
    try:
        progress = TypeAdapter(Progress).validate_python(json.loads(content[STATE]))
        tensors = parse_tensors(content[TENSORS])
    except (SafetensorError, ValidationError, ValueError, RecursionError) as error:
        raise _BrokenError(f"{folder}: is not what was written: {error}") from error
    if progress.step != _step(folder) or not _is_consistent(progress):
        raise _BrokenError(f"{folder / STATE}: its history is not that of the folder's step")
    # On another number of processes or another device the generators start from the seed.
    names = [name for name in tensors.keys() | like.keys() if exact or not name.startswith(RNG)]
    for name in sorted(names):
        if name not in tensors or name not in like:
            raise _BrokenError(
                f"{folder / TENSORS}: {name} is {'unknown' if name in tensors else 'missing'}"
            )
        found, expected = tensors[name], like[name]
        if found.shape != expected.shape or found.dtype != expected.dtype:
            raise _BrokenError(
                f"{folder / TENSORS}: {name} is {found.dtype} {tuple(found.shape)}, expected {expected.dtype} "
                f"{tuple(expected.shape)}"
            )
        if not torch.isfinite(found).all():
            raise _BrokenError(f"{folder / TENSORS}: {name} holds a value that is not finite")
    return progress, tensors
