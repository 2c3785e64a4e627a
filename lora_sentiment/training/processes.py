"""The launch of a run: processes, device, threads, precision and trackers."""

import atexit
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import broadcast_object_list, gather_object
from torch.distributed import DistError

from lora_sentiment.errors import (
    DataError,
    LoraSentimentError,
    ModelError,
    RecipeError,
    TrainingError,
)
from lora_sentiment.models.dtype import resolve_dtype
from lora_sentiment.training.signals import SIGNALS

log = logging.getLogger("lora_sentiment")
Result = TypeVar("Result")

_PRECISIONS = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}
_MACHINES_OWN = {
    "data.source",
    "model.name",
    "machine.cpu",
    "machine.instructions",
    "machine.threads",
    "machine.max_tokens_per_micro_batch",
}
"""Settings that may differ between the machines of a launch: paths and speeds."""
_GLOO_ERROR = re.compile(r"\bgloo[/\\](?:[\w.-]+[/\\])*[\w.-]+\.(?:cc|h):\d+")
"""An error of gloo starts with a line of gloo's source."""
_MOST = 1_000_000
_LAUNCH_NUMBERS = {
    "WORLD_SIZE": (1, _MOST),
    "RANK": (0, _MOST),
    "LOCAL_WORLD_SIZE": (1, _MOST),
    "LOCAL_RANK": (-1, _MOST),
    "MASTER_PORT": (0, 65535),
}
"""Environment variables that a launcher sets, with their least and greatest values."""


def join_launch() -> PartialState:
    """Join the other processes of this launch and set torch's threads.

    `accelerate launch` sets OMP_NUM_THREADS=1, which would leave all cores but one idle.

    Raises:
        RecipeError: If the launcher asks for DeepSpeed, FSDP or gradient accumulation, its numbers
            or its address are wrong, or not all processes joined.
    """
    num_launched = _check_launch_numbers()
    for variable, name in (
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "FSDP"),
    ):
        if os.environ.get(variable, "false").lower() == "true":
            raise RecipeError(
                f"accelerate launch was told to use {name}, which these models do not need; remove "
                "the option"
            )
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation != "1":
        raise RecipeError(
            f"accelerate launch was told --gradient_accumulation_steps {accumulation}; remove the "
            "option: train.batch_size counts the examples of an optimizer step, and memory decides "
            "their micro-batches"
        )
    joins = num_launched > 1 and not PartialState._shared_state
    with _announce_joining(num_launched) if joins else nullcontext():
        # Accelerate joins processes on CPUs only when it is told that there is no accelerator.
        state = PartialState(cpu=not torch.accelerator.is_available())
    # Read again: under mpirun it is Accelerate that sets WORLD_SIZE.
    num_launched = int(os.environ.get("WORLD_SIZE", "1"))
    if num_launched != state.num_processes:
        raise RecipeError(
            f"{num_launched} processes were launched, and Accelerate joined {state.num_processes} "
            "of them"
        )
    if state.backend == "gloo":
        atexit.register(_leave_gloo)
    set_threads(state)
    return state


def _leave_gloo() -> None:
    """Disconnect at the end of this process, which is otherwise aborted now and then.

    Gloo's threads would still run. NCCL is left alone: its end may wait for a process that failed.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _check_launch_numbers() -> int:
    """Return the number of launched processes. For a wrong number torch prints a traceback."""
    for name, (least, most) in _LAUNCH_NUMBERS.items():
        text = os.environ.get(name, str(least))
        if not re.fullmatch(r"-?[0-9]{1,9}", text) or not least <= int(text) <= most:
            raise RecipeError(
                f"{name} is {text[:40]!r} in the environment; a launcher sets a whole number from "
                f"{least} to {most:,}; unset it, or start with accelerate launch or torchrun"
            )
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    if rank >= size and "WORLD_SIZE" in os.environ:
        raise RecipeError(
            f"RANK is {rank} in the environment, and WORLD_SIZE {size}: ranks go from 0 to "
            f"{size - 1}"
        )
    return size


@contextmanager
def _announce_joining(num_processes: int) -> Iterator[None]:
    """Log what this process waits for, refuse an unknown address, and let signals end the wait.

    torch logs nothing, retries an unknown address for minutes, and handles no signal.
    """
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = os.environ.get("MASTER_PORT", "29500")
    # The first process of each machine logs. Other processes than the main one show warnings only.
    leads = os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("RANK", "0") != "0"
    level = logging.WARNING if leads else logging.INFO
    log.log(level, "waiting for all %d processes at %s:%s", num_processes, address, port)
    try:
        socket.getaddrinfo(address, None)
    except (OSError, UnicodeError) as error:
        raise RecipeError(
            f"MASTER_ADDR is {address[:80]!r} in the environment, and no such machine is known "
            f"here ({error}); set it to the name or address of the machine of process 0"
        ) from error
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        # A Python handler would run only after the wait. Nothing is written yet that it removes.
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):
                handlers[number] = handler
                signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def set_threads(state: PartialState) -> int:
    """Divide the usable cores among the processes of this machine; return torch's threads."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
    threads = max(1, cores // local)
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
        log.info("usable cores: %d, processes: %d, threads of each: %d", cores, local, threads)
    return threads


@contextmanager
def explain_lost_process(state: PartialState) -> Iterator[None]:
    """Report a lost process in one line; torch reports where the connection broke.

    The system closes the connections of a process that dies. The others get an error at their next
    exchange, long before the timeout of a collective (30 minutes with gloo).

    Raises:
        TrainingError: If an exchange failed.
    """
    try:
        yield
    except RuntimeError as error:
        is_lost = isinstance(error, DistError) or _GLOO_ERROR.search(str(error))
        if state.num_processes == 1 or not is_lost:
            raise
        raise TrainingError(
            "another process of this launch ended, so this one ends too; see its message, or the "
            "launcher's if it was killed (did memory run out?); checkpoints stay, and the same "
            f"command resumes from them: {' '.join(str(error).split())[:200]}"
        ) from error


def run_on_main(function: Callable[[], Result]) -> Result:
    """Call a function on the main process; return its result, or raise its error, on all of them.

    Args:
        function: Its result is sent to the other processes.

    Raises:
        LoraSentimentError: If the function raised it.
    """
    outcome: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            outcome = [function(), None]
        except LoraSentimentError as error:
            outcome = [None, error]
    result, fault = broadcast_object_list(outcome)
    if fault is not None:
        raise fault
    return result  # type: ignore[no-any-return]


def refuse_differences(facts: Mapping[str, Any]) -> None:
    """Refuse, on all processes, facts that differ between processes.

    Each process reads the disk of its own machine.

    Args:
        facts: Values by name. Names that may differ between machines are left out.

    Raises:
        DataError: With the names that differ, and the process.
    """
    compared = {name: value for name, value in facts.items() if name not in _MACHINES_OWN}
    gathered = gather_object([compared])
    first = gathered[0]
    for rank, other in enumerate(gathered):
        names = [name for name in first | other if other.get(name) != first.get(name)]
        if names:
            there = str(other.get(names[0]))[:80]
            here = str(first.get(names[0]))[:80]
            raise DataError(
                f"process {rank} has another {', '.join(names)} than process 0 ({there}, not "
                f"{here}); give every machine the same recipe, rows, base and versions"
            )


def make_accelerator(
    state: PartialState,
    dtype_name: str,
    *,
    report_to: tuple[str, ...] = (),
    run_folder: Path | None = None,
) -> Accelerator:
    """Make the Accelerator for a compute dtype.

    Args:
        state: The result of `join_launch`.
        dtype_name: The recipe's `model.dtype`.
        report_to: Accelerate trackers.
        run_folder: The folder that trackers write to; None for no trackers.

    Raises:
        RecipeError: If the launcher asks for another precision, or a tracker is not installed.
        ModelError: If this device cannot compute in the dtype.
    """
    dtype = resolve_dtype(dtype_name, state.device)
    if dtype == torch.float16 and state.device.type == "cpu":
        raise ModelError(
            "float16 needs a GPU; on this CPU use auto, float32 or bfloat16", key="model.dtype"
        )
    precision = _PRECISIONS[dtype]
    # The launcher says "no" when nobody asked for a precision.
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", precision):
        raise RecipeError(
            f"accelerate launch was told --mixed_precision {launched}, but the dtype is "
            f"{precision!r}; remove the option of the launcher"
        )
    trackers = list(report_to) if run_folder is not None else []
    _check_trackers(trackers)
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        # Accelerate keeps the first precision for the life of a process; a notebook trains twice.
        AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=precision, log_with=trackers or None, project_dir=run_folder
    )
    if trackers:
        accelerator.init_trackers("lora_sentiment")
    return accelerator


def _check_trackers(names: list[str]) -> None:
    """Refuse trackers that are not installed; Accelerate leaves them out without a message."""
    installed = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
    for name in names:
        if name not in installed:
            raise RecipeError(
                f"train.report_to: {name} is not installed; pip install {name}, or remove it"
            )


def describe_machine(dtype: torch.dtype, *, max_tokens: int | None) -> dict[str, Any]:
    """Return the facts of machine and launch that decide the bytes of the result.

    Args:
        dtype: Compute dtype.
        max_tokens: Most padded tokens of a micro-batch; None where the free memory decided it.
    """
    state = PartialState()
    return {
        "device": state.device.type,
        "cpu": str(torch.cpu.get_capabilities().get("cpu_name", "unknown")),
        "threads": torch.get_num_threads(),
        "num_processes": state.num_processes,
        "dtype": str(dtype).removeprefix("torch."),
        "max_tokens_per_micro_batch": max_tokens,
    }
