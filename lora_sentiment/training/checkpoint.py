"""Checkpoints: the state of a run between two steps, in safetensors and JSON.

A checkpoint is a folder `step-00000123` of three files:

- `state.safetensors`: the tensors
- `state.json`: counters and history
- `manifest.json`: size and SHA-256 of both, and the settings that must be equal to resume

The folder is written aside, synced to disk and renamed. Only then are older ones removed.
"""

import errno
import hashlib
import json
import logging
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
from lora_sentiment.files import replace_atomically, sync
from lora_sentiment.models.families import FAMILIES
from lora_sentiment.training.history import History

log = logging.getLogger("lora_sentiment")

SCHEMA = 3
TENSORS, STATE, MANIFEST = "state.safetensors", "state.json", "manifest.json"
RNG = "rng."
"""Prefix of the generators' states: tensors with one row for each process."""
_ABSENT = "<absent>"
_NEVER_ALLOWED = (
    "method.",
    "model.head",
    "model.max_length",
    "model.quantize",
    "model.truncation",
    "train.metric_for_best_model",
    *(f"base.{key}" for family in FAMILIES.values() for key in family.functions),
    "base_sha256",
    "labels",
    "tokenizer_sha256",
    "validation_sha256",
)
"""Prefixes of settings that --allow-changes does not cover.

With another value the tensors, or the best score so far, mean something else.
"""


@dataclass(frozen=True)
class Store:
    """The checkpoints of a run, and the conditions to resume from one.

    Attributes:
        run_folder: The folder of the unfinished run, `<output.dir>.run`.
        settings: Values that must be equal to resume bit for bit: dotted name to JSON value.
        resume: The recipe's `train.resume`.
        allow_changes: Resume although settings differ, where that is possible.
        limit: The recipe's `train.save_total_limit`.
    """

    run_folder: Path
    settings: Mapping[str, Any]
    resume: Literal["auto", "never", "always"] = "auto"
    allow_changes: bool = False
    limit: int = 2

    @property
    def folder(self) -> Path:
        """The folder of the checkpoints."""
        return checkpoint_folder(self.run_folder)


@dataclass
class Progress:
    """The counters and the history of a run.

    Attributes:
        step: Optimizer steps so far.
        history: Their history.
        schedule: Steps of the learning rate schedule; fewer where fp16's scaler skipped steps.
        best_metric: The best metric so far, its sign turned so that more is better; None before the
            first evaluation.
        waited: Evaluations since the best one.
        skipped: Steps in a row that fp16's scaler skipped.
        loss_scale: The scaler's scale, and the steps since it changed; None without a scaler.
        ranks: The singular values that AdaLoRA keeps, by tensor; None for other methods, and before
            the first pruning.
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
    """A checkpoint that was read and checked.

    Attributes:
        folder: Its folder.
        progress: Counters and history.
        tensors: By name, on the CPU.
        changes: The settings that differ, each as a sentence; empty unless changes are allowed.
    """

    folder: Path
    progress: Progress
    tensors: dict[str, torch.Tensor]
    changes: list[str] = field(default_factory=list)


class DamagedCheckpointError(TrainingError):
    """The files of a checkpoint are not as they were written."""


def checkpoint_folder(run_folder: Path) -> Path:
    """Return the folder of a run's checkpoints."""
    return run_folder / "checkpoints"


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Return the folders of a run's checkpoints, newest first, without reading them."""
    numbered = []
    for path in checkpoint_folder(run_folder).glob("step-*"):
        number = path.name.removeprefix("step-")
        if number.isascii() and number.isdigit() and len(number) < 16 and path.is_dir():
            numbered.append((int(number), path))
    return [path for _, path in sorted(numbered, reverse=True)]


def save_checkpoint(store: Store, progress: Progress, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write a checkpoint, then remove those beyond the limit. At each moment a whole one exists.

    Raises:
        TrainingError: If it cannot be written, with the path, the bytes needed and free, and the
            checkpoint to resume from.
    """
    packed = {}
    for name, tensor in sorted(tensors.items()):
        packed[name] = tensor.detach().to("cpu").contiguous()
    files = {TENSORS: pack_tensors(packed), STATE: json.dumps(asdict(progress)).encode()}
    files[MANIFEST] = _make_manifest(store.settings, files)
    place = store.folder / f"step-{progress.step:08d}"
    aside = store.folder / "unfinished"
    try:
        if not store.folder.exists():
            store.folder.mkdir()
            sync(store.run_folder)
        remove(aside)
        aside.mkdir()
        for name, content in files.items():
            _write(aside / name, content)
        # A damaged one stands here if the run was resumed from an older one.
        remove(place)
        replace_atomically(aside, place)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        num_bytes = sum(map(len, files.values()))
        raise _unwritable(store, place, num_bytes, error) from error
    _remove_others(store, place)
    return place


def load_checkpoint(store: Store, like: Mapping[str, torch.Tensor]) -> Checkpoint | None:
    """Return the newest whole checkpoint, or None where a run starts anew.

    Args:
        store: Where to look, and what must be equal.
        like: For each expected tensor one of the same name, shape and dtype.

    Raises:
        TrainingError: If no checkpoint can be used, or `train.resume=always` and there is none.
    """
    if store.resume == "never":
        return None
    folders = list_checkpoints(store.run_folder)
    for folder in folders:
        if folder.is_symlink():  # old checkpoints are removed, and this one lies elsewhere
            raise TrainingError(
                f"{folder}: is a link; remove it, or replace it by the folder that it points to"
            )
    faults = []
    for folder in folders:
        try:
            return _load(folder, store, like)
        except DamagedCheckpointError as error:
            log.warning("%s", error)
            faults.append(str(error))
    if faults:
        lines = "\n".join(faults)
        raise TrainingError(
            f"{lines}\nno checkpoint in {store.folder} is whole; train.resume=never starts anew"
        )
    if store.resume == "always":
        raise TrainingError(
            f"{store.folder}: holds no checkpoint to resume from; train.resume=auto starts anew"
        )
    return None


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write(path: Path, content: bytes) -> None:
    """Write one file of a checkpoint; tests replace this function."""
    path.write_bytes(content)


def _make_manifest(settings: Mapping[str, Any], files: Mapping[str, bytes]) -> bytes:
    records = {}
    for name, content in files.items():
        digest = hashlib.sha256(content).hexdigest()
        records[name] = {"bytes": len(content), "sha256": digest}
    manifest = {"schema": SCHEMA, "files": records, "settings": dict(settings)}
    return json.dumps(manifest).encode()


def _remove_others(store: Store, place: Path) -> None:
    """Remove checkpoints beyond the limit, and later ones, which the run did not resume from."""
    folders = list_checkpoints(store.run_folder)
    index = folders.index(place)
    for folder in [*folders[:index], *folders[index + store.limit :]]:
        try:
            remove(folder)
        except OSError as error:
            reason = error.strerror or error
            log.warning("%s: an old checkpoint cannot be removed: %s", folder, reason)


def _unwritable(store: Store, place: Path, num_bytes: int, error: OSError) -> TrainingError:
    is_full = error.errno == errno.ENOSPC
    reason = "the disk is full" if is_full else error.strerror or str(error)
    free = shutil.disk_usage(store.run_folder).free
    remedy = "make room" if is_full else "correct that"
    checkpoints = list_checkpoints(store.run_folder)
    if checkpoints:
        remedy += f", then the same command with train.resume=auto resumes from {checkpoints[0]}"
    else:
        remedy += ", then start again: there is no checkpoint yet"
    return TrainingError(
        f"{place}: the checkpoint cannot be written: {reason}; it needs {num_bytes:,} bytes, and "
        f"{free:,} are free; {remedy}"
    )


def _load(folder: Path, store: Store, like: Mapping[str, torch.Tensor]) -> Checkpoint:
    """Read a checkpoint and check it.

    Raises:
        DamagedCheckpointError: If a file is not as it was written, or does not fit the run.
        TrainingError: If it has another schema, or settings that may not differ.
    """
    try:
        manifest = json.loads(_read(folder / MANIFEST))
        _check_schema(folder, manifest["schema"])
        records = manifest["files"]
        settings = dict(manifest["settings"])
        content = {name: _read(folder / name, records[name]) for name in (TENSORS, STATE)}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedCheckpointError(
            f"{folder / MANIFEST}: is not as it was written: {error}"
        ) from error
    changes = _compare_settings(folder, settings, store)
    try:
        progress = TypeAdapter(Progress).validate_python(json.loads(content[STATE]))
        tensors = parse_tensors(content[TENSORS])
    except (SafetensorError, ValidationError, ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{folder}: is not as it was written: {error}") from error
    _check_tensors(folder / TENSORS, tensors, like, exact=not changes)
    return Checkpoint(folder, progress, tensors, changes)


def _check_schema(folder: Path, schema: Any) -> None:
    if schema != SCHEMA:
        raise TrainingError(
            f"{folder}: has schema {schema}, and this version reads schema {SCHEMA}; finish the "
            "run with the lora_sentiment that began it, or set train.resume=never to start anew"
        )


def _read(path: Path, record: Mapping[str, Any] | None = None) -> bytes:
    """Read a file; with a record check its size, before it is read, and its hash."""
    try:
        if path.is_symlink() or not path.is_file():
            raise DamagedCheckpointError(f"{path}: is missing, or no plain file")
        size = path.stat().st_size
        if record is not None and size != record["bytes"]:
            raise DamagedCheckpointError(
                f"{path}: has {size:,} bytes, and the manifest says {record['bytes']:,}"
            )
        content = path.read_bytes()
    except OSError as error:
        raise DamagedCheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if record is not None and hashlib.sha256(content).hexdigest() != record["sha256"]:
        raise DamagedCheckpointError(f"{path}: was changed: its hash is not the recorded one")
    return content


def _compare_settings(folder: Path, settings: Mapping[str, Any], store: Store) -> list[str]:
    """Return the settings that differ, each as a sentence.

    Raises:
        TrainingError: If there are any that are not allowed.
    """
    ours = json.loads(json.dumps(dict(store.settings)))
    never_allowed: tuple[str, ...] = _NEVER_ALLOWED
    if settings.get("method.kind") == "adalora":
        # AdaLoRA spreads its pruning over the steps of the whole run.
        never_allowed = (*never_allowed, "num_steps")
    changes, lines = [], []
    refuses_all = False
    for name in sorted(ours.keys() | settings.keys()):
        was, now = settings.get(name, _ABSENT), ours.get(name, _ABSENT)
        if was == now:
            continue
        change = f"{name}: was {was}, is {now}"
        changes.append(change)
        if name.startswith(never_allowed):
            refuses_all = True
            change += " (cannot be changed in a resumed run)"
        lines.append(f"  {change}")
    if not changes or (store.allow_changes and not refuses_all):
        return changes
    remedy = "put that back, or set train.resume=never to start anew and delete the checkpoints"
    if not refuses_all:
        remedy += ", or let `train --allow-changes` resume, though not bit for bit"
    differences = "\n".join(lines)
    raise TrainingError(f"{folder}: comes from a run with other settings:\n{differences}\n{remedy}")


def _check_tensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    like: Mapping[str, torch.Tensor],
    *,
    exact: bool,
) -> None:
    """Refuse tensors of other names, shapes or dtypes, and values that are not finite."""
    for name in sorted(tensors.keys() | like.keys()):
        # On another number of processes or another device the generators start from the seed.
        if name.startswith(RNG) and not exact:
            continue
        if name not in like:
            raise DamagedCheckpointError(f"{path}: {name} is unknown")
        if name not in tensors:
            raise DamagedCheckpointError(f"{path}: {name} is missing")
        tensor, expected = tensors[name], like[name]
        if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
            raise DamagedCheckpointError(
                f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, expected "
                f"{expected.dtype} {tuple(expected.shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise DamagedCheckpointError(f"{path}: {name} holds a value that is not finite")
