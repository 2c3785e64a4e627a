"""What Accelerate launched: the processes, the device, the threads, the precision."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers

from lora_sentiment.errors import ModelError, RecipeError
from lora_sentiment.model.base import resolve_dtype
from lora_sentiment.training.trackers import CsvTracker

log = logging.getLogger("lora_sentiment")
_PRECISIONS = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}


def join_launch() -> PartialState:
    """Join the other processes of this launch, after refusing what this package does not train with.

    Also sets torch's threads: `accelerate launch` sets OMP_NUM_THREADS=1, which leaves every core but one idle.

    Raises:
        RecipeError: If the launcher was told to use DeepSpeed, FSDP or gradient accumulation, or its processes were
            not joined.
    """
    for variable, name in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_FSDP", "FSDP")):
        if os.environ.get(variable, "false").lower() == "true":
            raise RecipeError(f"accelerate launch was told to use {name}; leave it out: these models fit without")
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation != "1":
        raise RecipeError(
            f"accelerate launch was told --gradient_accumulation_steps {accumulation}; leave it out: train.batch_size "
            "counts examples per optimizer step, and they are cut into micro-batches by memory"
        )
    # Accelerate joins processes on CPUs only when told that there is no accelerator.
    state = PartialState(cpu=not torch.accelerator.is_available())
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != state.num_processes:
        raise RecipeError(f"{launched} processes were launched and Accelerate joined {state.num_processes} of them")
    set_threads(state)
    return state


def make_accelerator(
    state: PartialState, dtype_name: str, *, report_to: tuple[str, ...] = (), run_folder: Path | None = None
) -> Accelerator:
    """Return the Accelerator for a compute dtype.

    Args:
        state: What `join_launch` returned.
        dtype_name: The recipe's `model.dtype`.
        report_to: Accelerate trackers beside the csv.
        run_folder: Where trackers write; None for no trackers.

    Raises:
        RecipeError: If the launcher was told another precision or a tracker is not installed.
        ModelError: If the dtype cannot be computed on this device.
    """
    dtype = resolve_dtype(dtype_name, state.device)
    if dtype == torch.float16 and state.device.type == "cpu":
        raise ModelError("model.dtype=float16 needs a GPU; on this CPU use auto, float32 or bfloat16")
    precision = _PRECISIONS[dtype]
    # "no" is what the launcher says when nobody asked for a precision.
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", precision):
        raise RecipeError(
            f"accelerate launch was told --mixed_precision {launched}, and the recipe's model.dtype means "
            f"{precision!r}; leave the flag out and set model.dtype"
        )
    trackers: list[Any] = []
    if run_folder is not None:
        check_trackers(report_to)
        trackers = [*([CsvTracker(run_folder)] if state.is_main_process else []), *report_to]
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        # Accelerate keeps the first precision for the life of a process; a notebook trains more than once.
        AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=precision, log_with=trackers or None, project_dir=run_folder)
    if trackers:
        accelerator.init_trackers("lora_sentiment")
    return accelerator


def check_trackers(names: tuple[str, ...]) -> None:
    """Refuse trackers that are not installed, which Accelerate would leave out without a word.

    Raises:
        RecipeError: Naming the first one.
    """
    installed = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
    for name in names:
        if name not in installed:
            raise RecipeError(f"train.report_to: {name} is not installed; pip install {name}, or leave it out")


def set_threads(state: PartialState) -> int:
    """Set torch's threads to the usable cores divided among the processes of this machine; return their number."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
    threads = max(1, cores // local)
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    log.info("%d usable cores, %d local processes: %d threads each", cores, local, threads)
    return threads
