"""What comes from outside in the middle of a run: signals to stop, and memory that runs out."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

import torch

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_SECONDS = 1.0
"""Signals this close are one: a terminal's Ctrl-C reaches every process, and a launcher passes it on once more."""
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "not enough memory",
    "MPS backend out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""How it is worded: by torch's allocators on the CPU on Linux and macOS, on Windows and on Apple's GPU; by CUDA's
driver, such as where a graph is made; by cuBLAS."""


class StopSignals:
    """Notes the first SIGINT or SIGTERM instead of obeying it; the second is obeyed as it would have been before.

    A context manager; the handlers before it are put back at its end. Outside the main thread, where Python installs no
    handler, it notes nothing, and a signal that is ignored (as under nohup) stays so.

    Attributes:
        name: Of the signal that came, such as SIGTERM; None before it.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note) or signal.SIG_DFL
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        # Nothing is logged here: a handler may run in the middle of another line's writing.
        if self.name is None:
            self.name, self._since = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._since > SAME_SECONDS:
            signal.signal(number, self._previous[number])
            signal.raise_signal(number)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error of torch says that memory ran out, on a device or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in _OUT_OF_MEMORY
    )
