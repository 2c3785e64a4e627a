"""What Accelerate launched: the processes, the device, the threads, the precision."""

import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather_object
from torch.distributed import DistError

from lora_sentiment.errors import DataError, ModelError, RecipeError, TrainingError
from lora_sentiment.models.dtype import resolve_dtype
from lora_sentiment.training.signals import SIGNALS
from lora_sentiment.training.trackers import CsvTracker

log = logging.getLogger("lora_sentiment")
_PRECISIONS = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}
_OWN = {
    "data.source", "model.name", "machine.cpu", "machine.instructions", "machine.threads",
    "machine.max_tokens_per_micro_batch",
}  # fmt: skip
"""What may differ between the machines of a launch: where things lie, and how fast each is."""
_GLOO_FAULT = re.compile(r"\bgloo[/\\](?:[\w.-]+[/\\])*[\w.-]+\.(?:cc|h):\d+")
"""gloo begins what it tells with the line of its own source."""
_MOST = 1_000_000
_BOUNDS = {
    "WORLD_SIZE": (1, _MOST), "RANK": (0, _MOST), "LOCAL_WORLD_SIZE": (1, _MOST), "LOCAL_RANK": (-1, _MOST),
    "MASTER_PORT": (0, 65535),
}  # fmt: skip
"""The numbers that a launcher passes on, and what each can be."""


def join_launch() -> PartialState:
    """Join the other processes of this launch, after refusing what this package does not train with.

    Also sets torch's threads: `accelerate launch` sets OMP_NUM_THREADS=1, which leaves every core but one idle.

    Raises:
        RecipeError: If the launcher was told to use DeepSpeed, FSDP or gradient accumulation, its numbers are none, its
            address is unknown, or its processes were not joined.
    """
    size = _read_size()
    for variable, name in (
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "FSDP"),
    ):
        if os.environ.get(variable, "false").lower() == "true":
            raise RecipeError(
                f"accelerate launch was told to use {name}; leave it out: these models fit without"
            )
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation != "1":
        raise RecipeError(
            f"accelerate launch was told --gradient_accumulation_steps {accumulation}; leave it out: train.batch_size "
            "counts examples per optimizer step, and they are cut into micro-batches by memory"
        )
    with _announce(size) if size > 1 and not PartialState._shared_state else nullcontext():
        # Accelerate joins processes on CPUs only when told that there is no accelerator.
        state = PartialState(cpu=not torch.accelerator.is_available())
    launched = int(os.environ.get("WORLD_SIZE", "1"))  # under mpirun it is Accelerate that sets it
    if launched != state.num_processes:
        raise RecipeError(
            f"{launched} processes were launched and Accelerate joined {state.num_processes} of them"
        )
    set_threads(state)
    return state


def _read_size() -> int:
    """Return how many processes were launched; torch tells numbers that are none by a traceback."""
    for name, (least, most) in _BOUNDS.items():
        text = os.environ.get(name, str(least))
        if not re.fullmatch(r"-?[0-9]{1,9}", text) or not least <= int(text) <= most:
            raise RecipeError(
                f"{name} is {text[:40]!r} in the environment, where a launcher puts a whole number from {least} to "
                f"{most:,}; unset it, or start with accelerate launch or torchrun"
            )
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if rank >= size and "WORLD_SIZE" in os.environ:
        raise RecipeError(
            f"RANK is {rank} in the environment, and WORLD_SIZE {size}: ranks go from 0 to {size - 1}"
        )
    return size


@contextmanager
def _announce(size: int) -> Iterator[None]:
    """Say what is waited for; torch says nothing, asks for an unknown address for minutes, and hears no signal."""
    address, port = (
        os.environ.get("MASTER_ADDR", "127.0.0.1"),
        os.environ.get("MASTER_PORT", "29500"),
    )
    # The first process of every machine speaks; of the others the command line shows warnings alone.
    first = os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("RANK", "0") != "0"
    level = logging.WARNING if first else logging.INFO
    log.log(
        level, "joining %d processes at %s:%s; this waits until all have come", size, address, port
    )
    try:
        socket.getaddrinfo(address, None)
    except (OSError, UnicodeError) as error:
        raise RecipeError(
            f"MASTER_ADDR is {address[:80]!r} in the environment, and no such machine is known here ({error}); "
            "it is the name or address of the machine of process 0"
        ) from error
    before = {}
    if threading.current_thread() is threading.main_thread():
        # A handler of Python's runs only once the wait is over; nothing is written yet that it would clear away.
        before = {
            number: handler for number in SIGNALS if callable(handler := signal.getsignal(number))
        }
        for number in before:
            signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def explain_loss(state: PartialState) -> Iterator[None]:
    """Say in one line that another process is gone, where torch shows how far down the connection broke.

    The system closes the connections of a process that dies, so the others know as soon as they exchange anything; the
    patience of a collective (30 minutes with gloo) is for slow work, and no shorter one is needed.

    Raises:
        TrainingError: If an exchange failed.
    """
    try:
        yield
    except RuntimeError as error:
        if state.num_processes == 1 or not (
            isinstance(error, DistError) or _GLOO_FAULT.search(str(error))
        ):
            raise
        raise TrainingError(
            "another process of this launch is gone, so this one ends; look for its message, or, where it was killed "
            "(did memory run out?), for the launcher's; what was saved stays, and the same command goes on from there: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error


def refuse_differences(facts: Mapping[str, Any]) -> None:
    """Refuse, on all processes alike, that they have read different things: each reads the disk of its own machine.

    Args:
        facts: What must be equal, by name, apart from what may be each machine's own.

    Raises:
        DataError: Naming what differs, and on which process.
    """
    every = gather_object([{name: value for name, value in facts.items() if name not in _OWN}])
    for rank, own in enumerate(every):
        if found := [name for name in every[0] | own if own.get(name) != every[0].get(name)]:
            first, other = (str(told.get(found[0]))[:80] for told in (every[0], own))
            raise DataError(
                f"process {rank} has another {', '.join(found)} than process 0 ({other}, not {first}); give every "
                "machine the same recipe, rows, base and versions"
            )


def make_accelerator(
    state: PartialState,
    dtype_name: str,
    *,
    report_to: tuple[str, ...] = (),
    run_folder: Path | None = None,
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
        raise ModelError(
            "model.dtype=float16 needs a GPU; on this CPU use auto, float32 or bfloat16"
        )
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
    accelerator = Accelerator(
        mixed_precision=precision, log_with=trackers or None, project_dir=run_folder
    )
    if trackers:
        accelerator.init_trackers("lora_sentiment")
    return accelerator


def describe_machine(dtype: torch.dtype, *, max_tokens: int | None) -> dict[str, Any]:
    """Return the facts of machine and launch that fix the bytes of the result.

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


def check_trackers(names: tuple[str, ...]) -> None:
    """Refuse trackers that are not installed, which Accelerate would leave out without a word.

    Raises:
        RecipeError: Naming the first one.
    """
    installed = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
    for name in names:
        if name not in installed:
            raise RecipeError(
                f"train.report_to: {name} is not installed; pip install {name}, or leave it out"
            )


def set_threads(state: PartialState) -> int:
    """Set torch's threads to the usable cores divided among the processes of this machine; return their number."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
    threads = max(1, cores // local)
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    log.info("%d usable cores, %d local processes: %d threads each", cores, local, threads)
    return threads
