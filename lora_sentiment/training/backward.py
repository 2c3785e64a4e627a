"""Gradients of one micro-batch. Rows are padded, or packed and replayed as CUDA graphs."""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn

from lora_sentiment.data.batches import Encoded, cut, make_batch
from lora_sentiment.data.packing import Packed, PackPlan, cut_packed, pack
from lora_sentiment.fast import GraphRunner, HostBuffers, attention_backends

LossSum = Callable[[Tensor, Tensor], Tensor]
"""From logits (num_rows, num_labels) and labels (num_rows,) to the loss summed over rows."""


class Backward(Protocol):
    """Cuts the rows of a step into micro-batches, and adds the gradients of each."""

    def cut(self, index: NDArray[np.int64], *, max_tokens: int) -> list[NDArray[np.int64]]:
        """Cut rows into micro-batches of at most `max_tokens` tokens."""
        ...

    def count_tokens(self, part: NDArray[np.int64]) -> int:
        """Count the tokens of a micro-batch as `cut` does."""
        ...

    def add_gradients(self, part: NDArray[np.int64], *, total: float) -> Tensor:
        """Add the gradients of a micro-batch to the parameters' own, and return its loss.

        Args:
            part: The rows of the micro-batch.
            total: What the loss summed over rows is divided by.
        """
        ...


class PaddedBackward:
    """Micro-batches of rows that are padded to equal length.

    Attributes:
        lengths: Lengths that rows are padded up to, ascending; None to pad to the longest row of a micro-batch.
    """

    def __init__(
        self,
        model: nn.Module,
        encoded: Encoded,
        *,
        loss_sum: LossSum,
        accelerator: Accelerator,
        lengths: tuple[int, ...] | None,
    ) -> None:
        self.model = model
        self.encoded = encoded
        self.loss_sum = loss_sum
        self.accelerator = accelerator
        self.lengths = lengths

    def cut(self, index: NDArray[np.int64], *, max_tokens: int) -> list[NDArray[np.int64]]:
        """Cut rows into micro-batches of at most `max_tokens` tokens, padding included.

        Where lengths are few, so are the numbers of rows: a step is cut into equal parts.
        """
        if self.lengths is None:
            return cut(index, self.encoded.lengths, max_tokens=max_tokens)
        longest_first = index[np.argsort(-self.encoded.lengths[index], kind="stable")]
        if not len(index):
            return []
        fitting = max(1, max_tokens // self._padded_length(longest_first))
        return np.array_split(longest_first, math.ceil(len(index) / fitting))

    def _padded_length(self, part: NDArray[np.int64]) -> int:
        """Return the length that the rows of a micro-batch are padded to."""
        longest = int(self.encoded.lengths[part].max())
        return next((length for length in self.lengths or () if length >= longest), longest)

    def count_tokens(self, part: NDArray[np.int64]) -> int:
        """Count the tokens of a micro-batch, padding included."""
        return len(part) * self._padded_length(part)

    def add_gradients(self, part: NDArray[np.int64], *, total: float) -> Tensor:
        """Add the gradients of a micro-batch to the parameters' own, and return its loss."""
        device = self.accelerator.device
        batch = make_batch(self.encoded, part, device=device, lengths=self.lengths)
        with self.accelerator.autocast(), attention_backends(device):
            logits = self.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask
            ).logits
        loss = self.loss_sum(logits, batch.labels) / total
        self.accelerator.backward(loss)
        return loss.detach()


class _Inputs(NamedTuple):
    """The static input of one size: all fields are views of `buffer`, int32, which one copy fills."""

    buffer: Tensor
    input_ids: Tensor
    position_ids: Tensor
    cu_seq_lens: Tensor
    labels: Tensor
    total: Tensor


class PackedBackward:
    """Micro-batches of rows that lie one after another, in arrays of few sizes.

    Attributes:
        plan: The sizes.
        graphs: Replays forward and backward of each size; None to run them eagerly.
    """

    def __init__(
        self,
        model: nn.Module,
        encoded: Encoded,
        *,
        plan: PackPlan,
        loss_sum: LossSum,
        accelerator: Accelerator,
        graphs: GraphRunner | None,
    ) -> None:
        self.model = model
        self.encoded = encoded
        self.plan = plan
        self.loss_sum = loss_sum
        self.accelerator = accelerator
        self.graphs = graphs
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._loss = torch.zeros((), device=accelerator.device)
        self._inputs: dict[int, _Inputs] = {}
        self._host = HostBuffers(accelerator.device)

    def cut(self, index: NDArray[np.int64], *, max_tokens: int) -> list[NDArray[np.int64]]:
        """Cut rows into micro-batches of at most `max_tokens` tokens."""
        return cut_packed(index, self.encoded.lengths, max_tokens=max_tokens)

    def count_tokens(self, part: NDArray[np.int64]) -> int:
        """Count the tokens of a micro-batch; the padding behind them is left out."""
        return int(self.encoded.lengths[part].sum())

    def add_gradients(self, part: NDArray[np.int64], *, total: float) -> Tensor:
        """Add the gradients of a micro-batch to the parameters' own, and return its loss.

        The loss is valid until the next call.
        """
        inputs = self._fill(pack(self.encoded, part, plan=self.plan), total)
        if self.graphs is None:
            self._compute(inputs)
        else:
            self.graphs.run(len(inputs.input_ids), lambda: self._compute(inputs))
        return self._loss

    def _compute(self, inputs: _Inputs) -> None:
        with self.accelerator.autocast():
            logits = self.model(
                input_ids=inputs.input_ids[None],
                position_ids=inputs.position_ids[None],
                cu_seq_lens_q=inputs.cu_seq_lens,
                max_length_q=self.plan.max_length,
            ).logits
        labels = inputs.labels.long()
        loss = self.loss_sum(logits[: len(labels)], labels) / inputs.total
        scaler = self.accelerator.scaler
        # One operation adds all gradients, where `backward` would launch a kernel for each.
        grads = torch.autograd.grad(
            loss if scaler is None else scaler.scale(loss), self._parameters
        )
        torch._foreach_add_(self._gradients(), list(grads))
        self._loss.copy_(loss.detach())

    def _gradients(self) -> list[Tensor]:
        """The parameters' own gradients, zero where there were none."""
        found = []
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            found.append(parameter.grad)
        return found

    def _fill(self, packed: Packed, total: float) -> _Inputs:
        """Copy a micro-batch to the static input of its size."""
        fields = [
            packed.input_ids,
            packed.position_ids,
            packed.cu_seq_lens,
            packed.labels.astype(np.int32),
            np.array([total], dtype=np.float32).view(np.int32),
        ]
        size = len(packed.input_ids)
        if size not in self._inputs:
            num_values = sum(len(field) for field in fields)
            buffer = torch.empty(num_values, dtype=torch.int32, device=self.accelerator.device)
            ids, positions, starts, labels, number = buffer.split_with_sizes(
                [len(field) for field in fields]
            )
            self._inputs[size] = _Inputs(
                buffer, ids, positions, starts, labels, number.view(torch.float32)[0]
            )
        inputs = self._inputs[size]
        self._host.send(fields, inputs.buffer)
        return inputs
