"""Gradients of one micro-batch, whose rows are padded to equal length, or packed."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn

from lora_sentiment.data.batches import Encoded, cut, make_batch
from lora_sentiment.data.packing import Packed, PackPlan, cut_packed, pack
from lora_sentiment.fast import GraphRunner, HostBuffers
from lora_sentiment.models.inference import compute_padded, name_ids

LossSum = Callable[[Tensor, Tensor], Tensor]
"""From logits (num_rows, num_labels) and labels (num_rows, ...) to the loss summed over rows."""


class PaddedBackward:
    """Gradients of micro-batches whose rows are padded to equal length.

    Attributes:
        lengths: Lengths that rows are padded to, ascending. None pads to the longest row of each
            micro-batch.
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

        With a few fixed lengths, a step is cut into parts of equally many rows, so that shapes are
        few too.
        """
        if self.lengths is None:
            return cut(index, self.encoded.lengths, max_tokens=max_tokens)
        longest_first = index[np.argsort(-self.encoded.lengths[index], kind="stable")]
        if not len(index):
            return []
        num_fitting = max(1, max_tokens // self._padded_length(longest_first))
        return np.array_split(longest_first, math.ceil(len(index) / num_fitting))

    def _padded_length(self, part: NDArray[np.int64]) -> int:
        """Return the length that the rows of a micro-batch are padded to."""
        longest = int(self.encoded.lengths[part].max())
        return next((length for length in self.lengths or () if length >= longest), longest)

    def count_tokens(self, part: NDArray[np.int64]) -> int:
        """Count the tokens of a micro-batch, padding included."""
        return len(part) * self._padded_length(part)

    def add_gradients(self, part: NDArray[np.int64], *, total: float) -> Tensor:
        """Add the gradients of a micro-batch to those of the parameters, and return its loss.

        Args:
            part: The rows of the micro-batch.
            total: The loss summed over rows is divided by this value.
        """
        device = self.accelerator.device
        batch = make_batch(self.encoded, part, device=device, lengths=self.lengths)
        with self.accelerator.autocast():
            logits = compute_padded(
                self.model, batch.input_ids, batch.attention_mask, batch.token_type_ids
            )
        loss = self.loss_sum(logits, batch.labels) / total
        self.accelerator.backward(loss)
        return loss.detach()


class _Inputs(NamedTuple):
    """The static input of one size. All fields are views of `buffer`, filled by one copy."""

    buffer: Tensor
    input_ids: Tensor
    position_ids: Tensor
    cu_seq_lens: Tensor
    labels: Tensor
    total: Tensor


class PackedBackward:
    """Gradients of micro-batches whose rows lie one after another, in arrays of a few sizes.

    Attributes:
        plan: The sizes.
        graphs: Replays forward and backward pass of each size; None runs them eagerly.
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
        """Count the tokens of a micro-batch, without the padding after them."""
        return int(self.encoded.lengths[part].sum())

    def add_gradients(self, part: NDArray[np.int64], *, total: float) -> Tensor:
        """Add the gradients of a micro-batch to those of the parameters, and return its loss.

        Args:
            part: The rows of the micro-batch.
            total: The loss summed over rows is divided by this value.

        Returns:
            The loss, valid until the next call.
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
                **name_ids(inputs.input_ids[None], has_types=self.encoded.has_types),
                position_ids=inputs.position_ids[None],
                cu_seq_lens_q=inputs.cu_seq_lens,
                max_length_q=self.plan.max_length,
            ).logits
        labels = self._read_labels(inputs.labels)
        loss = self.loss_sum(logits[: len(labels)], labels) / inputs.total
        scaler = self.accelerator.scaler
        scaled = loss if scaler is None else scaler.scale(loss)
        # One operation adds all gradients; `backward` would launch a kernel for each.
        grads = torch.autograd.grad(scaled, self._parameters)
        torch._foreach_add_(self._gradients(), list(grads))
        self._loss.copy_(loss.detach())

    def _read_labels(self, words: Tensor) -> Tensor:
        """Return labels of the buffer in the shape and kind of the task."""
        is_float = self.encoded.labels.dtype.kind == "f"
        labels = words.view(torch.float32) if is_float else words.long()
        return labels.view(-1, *self.encoded.labels.shape[1:])

    def _gradients(self) -> list[Tensor]:
        """Return the parameters' gradients, zero where there were none."""
        gradients = []
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        return gradients

    def _fill(self, packed: Packed, total: float) -> _Inputs:
        """Copy a micro-batch to the static input of its size."""
        fields = [
            packed.input_ids,
            packed.position_ids,
            packed.cu_seq_lens,
            _to_words(packed.labels),
            np.array([total], dtype=np.float32).view(np.int32),
        ]
        size = len(packed.input_ids)
        if size not in self._inputs:
            sizes = [len(field) for field in fields]
            buffer = torch.empty(sum(sizes), dtype=torch.int32, device=self.accelerator.device)
            ids, positions, starts, labels, number = buffer.split_with_sizes(sizes)
            self._inputs[size] = _Inputs(
                buffer, ids, positions, starts, labels, number.view(torch.float32)[0]
            )
        inputs = self._inputs[size]
        self._host.send(fields, inputs.buffer)
        return inputs


def _to_words(labels: NDArray[Any]) -> NDArray[np.int32]:
    """Return labels as 32-bit words in one axis."""
    is_float = labels.dtype.kind == "f"
    words = labels.astype(np.float32).view(np.int32) if is_float else labels.astype(np.int32)
    return words.reshape(-1)


Backward = PaddedBackward | PackedBackward
