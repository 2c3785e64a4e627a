"""What Accelerate launched: the processes, the device, the threads, the precision."""

import logging
import os
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState

from lora_sentiment.errors import ModelError, RecipeError
from lora_sentiment.model.base import resolve_dtype
from lora_sentiment.training.trackers import CsvTracker

log = logging.getLogger("lora_sentiment")
_PRECISIONS = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}


def make_accelerator(
    dtype_name: str, *, report_to: tuple[str, ...] = (), run_folder: Path | None = None
) -> Accelerator:
    """Return the Accelerator for a compute dtype, after checking that the launch agrees with it.

    Also sets torch's threads to the usable cores of this process: `accelerate launch` sets OMP_NUM_THREADS=1, which
    would leave every core but one idle.

    Args:
        dtype_name: The recipe's `model.dtype`.
        report_to: Accelerate trackers beside the csv.
        run_folder: Where trackers write; None for no trackers.

    Raises:
        RecipeError: If the launcher was told another precision, DeepSpeed or FSDP.
        ModelError: If the dtype cannot be trained on this device.
    """
    state = PartialState()
    dtype = resolve_dtype(dtype_name, state.device)
    if dtype == torch.float16 and state.device.type == "cpu":
        raise ModelError("model.dtype=float16 needs a GPU; on this CPU use auto, float32 or bfloat16")
    _refuse_launch_settings(_PRECISIONS[dtype])
    set_threads(state)
    trackers = []
    if run_folder is not None:
        trackers = [*([CsvTracker(run_folder)] if state.is_main_process else []), *report_to]
    accelerator = Accelerator(mixed_precision=_PRECISIONS[dtype], log_with=trackers or None, project_dir=run_folder)
    if trackers:
        accelerator.init_trackers("lora_sentiment")
    return accelerator


def set_threads(state: PartialState) -> int:
    """Set torch's threads to the usable cores divided among the processes of this machine; return their number."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
    threads = max(1, cores // local)
    torch.set_num_threads(threads)
    log.info("%d usable cores, %d local processes: %d threads each", cores, local, threads)
    return threads


def _refuse_launch_settings(precision: str) -> None:
    for variable, name in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_FSDP", "FSDP")):
        if os.environ.get(variable, "false").lower() == "true":
            raise RecipeError(
                f"accelerate launch was told to use {name}; leave it out: these models are small enough without"
            )
    # "no" is what the launcher says when nobody asked for a precision.
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", precision):
        raise RecipeError(
            f"accelerate launch was told --mixed_precision {launched}, and the recipe's model.dtype means "
            f"{precision!r}; leave the flag out and set model.dtype"
        )
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation != "1":
        raise RecipeError(
            f"accelerate launch was told --gradient_accumulation_steps {accumulation}; leave it out: train.batch_size "
            "counts examples per optimizer step, and they are cut into micro-batches by memory"
        )
