"""The folder of an unfinished run, `<output.dir>.run`: one run at a time, and what it may keep."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout
from safetensors import SafetensorError

from lora_sentiment import __version__
from lora_sentiment.errors import RecipeError, TrainingError, show
from lora_sentiment.files import lock_file
from lora_sentiment.models.families import FAMILIES
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.training.checkpoint import checkpoint_folder, list_checkpoints, remove
from lora_sentiment.training.processes import run_on_main

ADAPTER, LOCK, REPLACED = "adapter", "lock", "replaced"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "numpy")
"""A run resumes bit for bit only with the same versions of these packages and of this one."""
_NO_SETTINGS = {"train.resume", "train.save_steps", "train.save_total_limit", "train.report_to"}
"""Keys of a recipe that change no bit of the result."""
_DISK_FULL = ("No space left on device", "Disk quota exceeded", "not enough space on the disk")
"""Messages of operating systems. safetensors passes on the message alone, without the number."""


def name_run_folder(recipe: Recipe) -> Path:
    """Return the folder of a recipe's unfinished run."""
    return recipe.folder.with_name(recipe.folder.name + ".run")


@contextmanager
def lock_run_folder(recipe: Recipe) -> Iterator[Path]:
    """Make a run's folder, lock it, and remove what this run does not need.

    Checkpoints stay unless `train.resume` is never. All processes call this; the main one makes the
    folder. Other machines need none.

    Raises:
        RecipeError: If the output folder is taken or cannot be made, another run is at work in the
            run's folder, or an earlier run left an adapter in it.
    """
    run_folder = name_run_folder(recipe)
    with ExitStack() as locked:
        run_on_main(lambda: _prepare(recipe, run_folder, locked))
        yield run_folder


def _prepare(recipe: Recipe, run_folder: Path, locked: ExitStack) -> None:
    folder = recipe.folder
    try:
        exists = folder.exists()
    except OSError as error:  # the path is too long, or a folder above it may not be entered
        raise RecipeError(
            f"output.dir: {show(str(folder))} cannot be looked at: {error.strerror}; set another"
        ) from error
    if exists and not recipe.output.overwrite:
        raise RecipeError(f"{folder}: exists; set output.overwrite=true or another output.dir")
    if exists and not (folder / "card.json").is_file():
        raise RecipeError(
            f"{folder}: is no adapter folder, so it is not replaced; set another output.dir"
        )
    lock_folder(run_folder, locked)
    try:
        _clear(recipe, run_folder)
    except OSError as error:
        raise RecipeError(
            f"output.dir: {run_folder} cannot be cleared: {error.strerror}"
        ) from error


def lock_folder(folder: Path, locked: ExitStack) -> None:
    """Make a folder and lock it.

    Args:
        folder: Its place is decided by `output.dir`.
        locked: Releases the lock at its end.

    Raises:
        RecipeError: If another run has the lock, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        locked.enter_context(lock_file(folder / LOCK))
    except Timeout as error:
        raise RecipeError(
            f"{folder}: another run is at work here; wait, or set another output.dir"
        ) from error
    except OSError as error:
        raise RecipeError(f"output.dir: {folder} cannot be made: {error.strerror}") from error


def _clear(recipe: Recipe, run_folder: Path) -> None:
    """Remove everything that this run writes again, but for the files that a resumed run needs."""
    resumes = recipe.train.resume != "never" and bool(list_checkpoints(run_folder))
    adapter, replaced = run_folder / ADAPTER, run_folder / REPLACED
    if resumes:
        if adapter.is_symlink() or (adapter.exists() and not adapter.is_dir()):
            raise RecipeError(
                f"{adapter}: is no folder, and the adapter is written there; move it away"
            )
        if recipe.folder.exists():
            # An earlier adapter that the finished one has replaced.
            remove(replaced)
        return
    if not recipe.folder.exists() and ((adapter / "card.json").exists() or replaced.exists()):
        raise RecipeError(
            f"{run_folder}: holds an adapter of an earlier run; move it away, or delete the folder"
        )
    for path in run_folder.iterdir():
        if path.name != LOCK:
            remove(path)


def make_settings(
    recipe: Recipe, facts: Mapping[str, Any], *, machine: Mapping[str, Any], base: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the values that must be equal to resume bit for bit, by dotted name.

    Args:
        recipe: All its sections count but `output`, and all keys but those that change no bit.
        facts: Facts of what was loaded: hashes, labels, steps.
        machine: Facts of machine and launch.
        base: The configuration of the base.
    """
    packages = list(PACKAGES)
    if recipe.model.quantize != "none":
        packages.append("bitsandbytes")
    versions = {name: version(name) for name in packages}
    family = FAMILIES[base["model_type"]]
    # These change the base's answers or a step, and no tensor.
    keys = sorted([*family.functions, *family.dropout_keys])
    sections = {
        **recipe.model_dump(mode="json", include={"data", "model", "method", "train"}),
        "versions": {"lora_sentiment": __version__, **versions},
        "machine": {**machine, "instructions": _instructions()},
        "base": {name: base.get(name) for name in keys},
    }
    settings = dict(facts)
    for section, values in sections.items():
        for key, value in values.items():
            name = f"{section}.{key}"
            if name not in _NO_SETTINGS:
                settings[name] = value
    return settings


def _instructions() -> str:
    """Return the CPU's vector instructions.

    They decide the kernels and so the bits; CPUs of one name may differ in them.
    """
    names = [torch.backends.cpu.get_cpu_capability()]
    for name, present in sorted(torch.cpu.get_capabilities().items()):
        if present is True and name.startswith(("avx", "amx", "sve")):
            names.append(name)
    return " ".join(names)


@contextmanager
def explain_full_disk(run_folder: Path) -> Iterator[None]:
    """Report a full disk in one line, with the checkpoint that holds what was trained.

    Raises:
        TrainingError: If a file cannot be written because the disk is full.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        message = " ".join(str(error).split())
        if not any(words in message for words in _DISK_FULL):
            raise
        free = shutil.disk_usage(run_folder).free
        remedy = "make room"
        checkpoints = list_checkpoints(run_folder)
        if checkpoints:
            remedy += (
                f", then the same command with train.resume=auto resumes from {checkpoints[0]}"
            )
        raise TrainingError(
            f"the disk is full: {message}; {free:,} bytes are free in {run_folder}; {remedy}"
        ) from error


def make_adapter_folder(run_folder: Path) -> Path:
    """Make an empty folder for the adapter, in the place of one that an earlier start left."""
    folder = run_folder / ADAPTER
    remove(folder)
    folder.mkdir()
    return folder


def remove_checkpoints(run_folder: Path) -> None:
    """Remove the checkpoints of a run whose adapter is in its place."""
    remove(checkpoint_folder(run_folder))
