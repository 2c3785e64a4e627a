"""The folder of an unfinished run, `<output.dir>.run`: claimed by one run at a time, cleared of what is of no use."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from lora_sentiment import __version__
from lora_sentiment.errors import LoraSentimentError, RecipeError, TrainingError, show
from lora_sentiment.files import hold_file
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.training.checkpoint import FOLDER, list_checkpoints

ADAPTER, LOCK, REPLACED = "adapter", "lock", "replaced"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "numpy")
"""Those without whose very versions, and ours, a run does not go on bit for bit."""
_BASE = ("activation", "attention_dropout", "dropout", "n_heads", "seq_classif_dropout")
"""What of a base's config.json changes its answers, or a step, and no tensor."""
_FULL = ("No space left on device", "Disk quota exceeded", "not enough space on the disk")
"""How a system words it; safetensors passes only the words on."""
_FREE = {"train.resume", "train.save_steps", "train.save_total_limit", "train.report_to"}
"""Keys of a recipe that change no bit."""


def name_run_folder(recipe: Recipe) -> Path:
    """Return where a recipe's run keeps what is not finished."""
    return recipe.folder.with_name(recipe.folder.name + ".run")


@contextmanager
def claim(recipe: Recipe, state: PartialState) -> Iterator[Path]:
    """Hold a run's folder, before anything is loaded; checkpoints in it stay unless `train.resume` is never.

    Every process enters; the main one looks, locks and writes, and all raise alike. Other machines need no such folder.

    Raises:
        RecipeError: If the output folder is taken, holds something else, or cannot be made; if another run is at work
            in it; if an earlier run left an adapter in it and no checkpoint to go on from.
    """
    run_folder = name_run_folder(recipe)
    fault: list[LoraSentimentError | None] = [None]
    with ExitStack() as held:
        if state.is_main_process:
            try:
                _refuse_taken(recipe)
                _lock(run_folder, held)
                _clear(recipe, run_folder)
            except RecipeError as error:
                fault = [error]
            except (
                OSError
            ) as error:  # a path that is too long, or a folder above it that may not be entered
                reason = f"{show(str(recipe.folder))} cannot be looked at: {error.strerror}"
                fault = [RecipeError(f"output.dir: {reason}; set another")]
        if found := broadcast_object_list(fault)[0]:
            raise found
        yield run_folder


def _refuse_taken(recipe: Recipe) -> None:
    folder = recipe.folder
    if folder.exists() and not recipe.output.overwrite:
        raise RecipeError(f"{folder}: exists; set output.overwrite=true or another output.dir")
    if folder.exists() and not (folder / "card.json").is_file():
        raise RecipeError(
            f"{folder}: is no adapter folder, so it is not replaced; set another output.dir"
        )


def _lock(run_folder: Path, held: ExitStack) -> None:
    path = run_folder / LOCK
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        held.enter_context(hold_file(path))
    except BlockingIOError as error:
        raise RecipeError(
            f"{run_folder}: another run is at work here; wait, or set another output.dir"
        ) from error
    except FileExistsError as error:
        raise RecipeError(
            f"{run_folder}: another run is at work here; wait, or set another output.dir; if none is, remove {path}"
        ) from error
    except OSError as error:
        raise RecipeError(f"output.dir: {run_folder} cannot be made: {error.strerror}") from error


def _clear(recipe: Recipe, run_folder: Path) -> None:
    """Remove what this run will write again: all of it, but for what a run that goes on needs."""
    goes_on = recipe.train.resume != "never" and bool(list_checkpoints(run_folder / FOLDER))
    replaces = recipe.folder.exists()
    aside = run_folder / ADAPTER
    if goes_on and (aside.is_symlink() or (aside.exists() and not aside.is_dir())):
        raise RecipeError(f"{aside}: is no folder, and the adapter is written there; move it away")
    for left in (run_folder / ADAPTER / "card.json", run_folder / REPLACED):
        if left.exists() and not replaces and not goes_on:
            raise RecipeError(
                f"{run_folder}: holds an adapter of an earlier run; move it away, or delete the folder"
            )
    try:
        for path in run_folder.iterdir():
            # What was replaced by a finished adapter is needed no more, nor is anything of a run that starts anew.
            if path.name != LOCK and (not goes_on or (path.name == REPLACED and replaces)):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    except OSError as error:
        raise RecipeError(
            f"output.dir: {run_folder} cannot be cleared: {error.strerror}"
        ) from error


def make_settings(
    recipe: Recipe, found: Mapping[str, Any], *, machine: Mapping[str, Any], base: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what must be equal to go on bit for bit, by dotted name.

    Args:
        recipe: Whose sections are compared, but for `output` and what changes no bit.
        found: What was loaded: hashes, labels, steps.
        machine: The facts of machine and launch that fix the bytes.
        base: The configuration of the base.
    """
    sections = recipe.model_dump(mode="json", include={"data", "model", "method", "train"})
    packages = [*PACKAGES, *(("bitsandbytes",) if recipe.model.quantize != "none" else ())]
    versions = {"lora_sentiment": __version__, **{name: version(name) for name in packages}}
    named = {
        "versions": versions,
        "machine": {**machine, "instructions": _instructions()},
        "base": {name: base[name] for name in _BASE},
        **sections,
    }
    flat = {
        f"{section}.{key}": value
        for section, values in named.items()
        for key, value in values.items()
    }
    return {name: value for name, value in flat.items() if name not in _FREE} | dict(found)


def _instructions() -> str:
    """Return what the CPU's kernels are chosen by: processors of one name may differ in it, and then bits do."""
    flags = torch.cpu.get_capabilities()
    vectors = sorted(
        name
        for name, there in flags.items()
        if there is True and name.startswith(("avx", "amx", "sve"))
    )
    return " ".join([torch.backends.cpu.get_cpu_capability(), *vectors])


@contextmanager
def explain_full_disk(run_folder: Path) -> Iterator[None]:
    """Say in one line that the disk is full, and what is kept: after the training it is an adapter that does not fit.

    Raises:
        TrainingError: If a file cannot be written for that.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not any(words in str(error) for words in _FULL):
            raise
        whole = list_checkpoints(run_folder / FOLDER)
        kept = (
            f"; what was trained is in {whole[0]}: the same command with --resume goes on"
            if whole
            else ""
        )
        free = f"{shutil.disk_usage(run_folder).free:,} bytes are free in {run_folder}"
        raise TrainingError(
            f"the disk is full: {' '.join(str(error).split())}; {free}; make room{kept}"
        ) from error


def make_aside(run_folder: Path) -> Path:
    """Return an empty folder for the adapter; what an earlier start of the same run left there is written again."""
    aside = run_folder / ADAPTER
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir()
    return aside


def drop_checkpoints(run_folder: Path) -> None:
    """Remove the checkpoints of a run whose adapter is in its place."""
    if (checkpoints := run_folder / FOLDER).exists():
        shutil.rmtree(checkpoints)
