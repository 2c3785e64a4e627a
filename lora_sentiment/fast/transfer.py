"""Asynchronous copies from the host to a GPU."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NUM_BUFFERS = 16
"""Copies that may be under way at once. Each buffer holds one micro-batch, about 130 KB for 16,384 tokens."""


class HostBuffers:
    """Pinned host memory that is used in turn for copies to a GPU.

    A copy from plain memory waits for all that the GPU was given before, and so may pinning memory anew. These buffers
    are pinned once. One is written again only when the copy from it is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: list[Tensor | None] = [None] * NUM_BUFFERS
        self._copied: list[torch.cuda.Event | None] = [None] * NUM_BUFFERS
        self._next = 0

    def send(self, arrays: Sequence[NDArray[np.int32]], to: Tensor | None = None) -> Tensor:
        """Copy arrays to the device, one after another.

        Args:
            arrays: What to copy, each of one axis.
            to: Where to, int32, of their length together; by default a new tensor.

        Returns:
            The tensor that holds them, shape (num_values,).
        """
        num_values = sum(len(array) for array in arrays)
        if to is None:
            to = torch.empty(num_values, dtype=torch.int32, device=self.device)
        if self.device.type != "cuda":
            return to.copy_(torch.from_numpy(np.concatenate(arrays)))
        place = self._next
        self._next = (place + 1) % NUM_BUFFERS
        event = self._copied[place]
        if event is not None:
            event.synchronize()
        buffer = self._buffers[place]
        if buffer is None or len(buffer) < num_values:
            buffer = torch.empty(num_values + num_values // 4, dtype=torch.int32, pin_memory=True)
            self._buffers[place] = buffer
        host = buffer[:num_values]
        np.concatenate(arrays, out=host.numpy())
        to.copy_(host, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._copied[place] = event
        return to
