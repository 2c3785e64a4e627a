"""Copies from the host to a GPU: asynchronous ones, and those of packed rows."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_sentiment.data.packing import pack_rows

NUM_BUFFERS = 16
"""Most copies under way at once. A buffer holds one micro-batch: 130 KB for 16,384 tokens."""


class HostBuffers:
    """Pinned host memory, used in turn for copies to a GPU.

    A copy from plain memory waits for all earlier work of the GPU, and so may pinning memory. These
    buffers are pinned once. Each is written again only after the copy from it is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: list[Tensor | None] = [None] * NUM_BUFFERS
        self._copied: list[torch.cuda.Event | None] = [None] * NUM_BUFFERS
        self._next = 0

    def send(self, arrays: Sequence[NDArray[np.int32]], to: Tensor | None = None) -> Tensor:
        """Copy arrays to the device, one after another.

        Args:
            arrays: Arrays of one axis.
            to: Destination, int32, of their length together; by default a new tensor.

        Returns:
            The destination, shape (num_values,).
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


class PackedRows(NamedTuple):
    """Rows one after another on a device, as `FastForward.encode_packed` takes them.

    Attributes:
        input_ids: Token ids, int32, shape (num_tokens,).
        position_ids: Place of each token in its row, same shape.
        cu_seq_lens: Where each row starts, then where the padding's sequences start, and the end.
        max_length: Tokens of the longest row.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seq_lens: Tensor
    max_length: int


def pack_on_device(
    rows: Sequence[NDArray[np.int32]],
    *,
    device: torch.device,
    pad_token_id: int,
    host: HostBuffers | None = None,
) -> PackedRows:
    """Pack rows and copy them to a device with one asynchronous copy.

    Args:
        rows: Token ids of each row.
        device: Destination.
        pad_token_id: Fills up to a round number of tokens.
        host: Buffers for many calls in a row; by default new ones.
    """
    longest = max(len(row) for row in rows)
    size = round_size(sum(len(row) for row in rows))
    packed = pack_rows(
        rows,
        size=size,
        num_rows=len(rows),
        num_spare=math.ceil(size / longest),
        max_length=longest,
        pad_token_id=pad_token_id,
    )
    arrays = (packed.input_ids, packed.position_ids, packed.cu_seq_lens)
    copied = (host or HostBuffers(device)).send(arrays)
    input_ids, position_ids, cu_seq_lens = copied.split_with_sizes([len(each) for each in arrays])
    return PackedRows(input_ids, position_ids, cu_seq_lens, longest)


def round_size(num_tokens: int) -> int:
    """Round up to a multiple of 8 and of an eighth of a power of two.

    This adds at most 12.5 % from 64 tokens on.
    """
    step = max(8, (1 << (num_tokens - 1).bit_length()) // 16)
    return math.ceil(num_tokens / step) * step
