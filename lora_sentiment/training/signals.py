"""Signals that stop a run, and errors that mean memory ran out."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

import torch

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_SECONDS = 1.0
"""Signals within this time count as one.

A terminal's Ctrl-C reaches every process, and a launcher then passes it on again.
"""
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "not enough memory",
    "MPS backend out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""Messages of torch's allocators on Linux and macOS, on Windows and on Apple's GPU, of CUDA's
driver, for example where a graph is made, and of cuBLAS."""


class StopSignals:
    """A context that records the first SIGINT or SIGTERM, and passes the second to the old handler.

    The old handlers are set again at its end. Outside the main thread, where Python can set no
    handler, nothing is recorded. An ignored signal (as under nohup) stays ignored.

    Attributes:
        name: The name of the recorded signal, such as SIGTERM; None before it.
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
        # Nothing is logged here: a handler may run while another line is being written.
        if self.name is None:
            self.name, self._since = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._since > SAME_SECONDS:
            signal.signal(number, self._previous[number])
            signal.raise_signal(number)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error of torch means that memory ran out, on a device or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in _OUT_OF_MEMORY
    )
