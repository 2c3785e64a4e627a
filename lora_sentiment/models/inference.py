"""Logits by torch: of many rows, sharded over processes, or of one batch as an engine."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn

from lora_sentiment.console import make_bar
from lora_sentiment.data.batches import Encoded, cut, make_batch, shard, take_rows
from lora_sentiment.data.packing import cut_packed, pack_rows
from lora_sentiment.data.texts import release_pages
from lora_sentiment.fast.attention import attention_backends
from lora_sentiment.fast.encoder import takes_packed_rows
from lora_sentiment.fast.transfer import HostBuffers
from lora_sentiment.models.engine import Engine
from lora_sentiment.models.parameters import inference_tokens


def predict_logits(
    model: nn.Module, encoded: Encoded, *, accelerator: Accelerator, progress: str | None = None
) -> NDArray[np.float32]:
    """Compute the logits of every row, dropout off, each process its share.

    Args:
        model: A sequence classifier on the accelerator's device; its training mode is put back afterwards.
        encoded: The rows.
        accelerator: Says which share is this process's, and carries the logits to all of them.
        progress: What to write before a progress bar; None for no bar.

    Returns:
        Logits of shape (num_rows, num_labels), the same on every process.
    """
    lengths = encoded.lengths
    device = accelerator.device
    own = shard(
        np.arange(len(encoded)),
        lengths,
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    packs = packs_rows(model, device)
    max_tokens = inference_tokens(device.type)
    parts = (cut_packed if packs else cut)(own, lengths, max_tokens=max_tokens)
    num_labels = int(model.config.num_labels)  # type: ignore[union-attr, arg-type]
    logits = torch.zeros(len(encoded), num_labels, device=device)
    host = HostBuffers(device)
    found = []
    was_training = model.training
    model.eval()
    bar = make_bar(
        int(lengths[own].sum()), desc=progress or "", unit="tok", show=progress is not None
    )
    with torch.inference_mode(), bar:
        for part in parts:
            with accelerator.autocast():
                if packs:
                    rows = take_rows(encoded, part)
                    own_logits = compute_packed(
                        model, rows, device=device, pad_token_id=encoded.pad_token_id, host=host
                    )
                    release_pages(encoded.input_ids.base)
                else:
                    batch = make_batch(encoded, part, device=device)
                    with attention_backends(device):
                        own_logits = model(
                            input_ids=batch.input_ids, attention_mask=batch.attention_mask
                        ).logits
            found.append(own_logits.float())
            bar.update(int(lengths[part].sum()))
        if parts:
            # Once, after all parts: moving the order to a GPU waits for what the GPU was given before.
            order = torch.from_numpy(np.concatenate(parts)).to(device)
            logits[order] = torch.cat(found)
        # Every process filled its own rows and left zeros elsewhere: the sum is exact on sizes that do not divide.
        summed = accelerator.reduce(logits, reduction="sum")
    model.train(was_training)
    return np.asarray(summed.cpu().numpy(), dtype=np.float32)


def packs_rows(model: nn.Module, device: torch.device) -> bool:
    """Return whether a model takes packed rows on a device: a GPU with the fast forward pass."""
    return device.type == "cuda" and takes_packed_rows(model)


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
        device: Where to.
        pad_token_id: Fills the few tokens by which the rows fall short of a round number.
        host: Memory to copy from, for many calls in a row; by default some for this call.
    """
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    size = round_size(sum(lengths))
    packed = pack_rows(
        rows,
        size=size,
        num_rows=len(rows),
        num_spare=math.ceil(size / longest),
        max_length=longest,
        pad_token_id=pad_token_id,
    )
    arrays = (packed.input_ids, packed.position_ids, packed.cu_seq_lens)
    there = (host or HostBuffers(device)).send(arrays)
    input_ids, position_ids, cu_seq_lens = there.split_with_sizes([len(each) for each in arrays])
    return PackedRows(input_ids, position_ids, cu_seq_lens, longest)


def compute_packed(
    model: nn.Module,
    rows: Sequence[NDArray[np.int32]],
    *,
    device: torch.device,
    pad_token_id: int,
    host: HostBuffers | None = None,
) -> Tensor:
    """Compute the logits of rows in one forward pass without padding between them.

    Args:
        model: Takes packed rows.
        rows: Token ids of each row.
        device: Where the model is.
        pad_token_id: Fills the few tokens by which the rows fall short of a round number.
        host: Memory to copy from, for many calls in a row; by default some for this call.

    Returns:
        Logits on the device, shape (num_rows, num_labels).
    """
    packed = pack_on_device(rows, device=device, pad_token_id=pad_token_id, host=host)
    logits: Tensor = model(
        input_ids=packed.input_ids[None],
        position_ids=packed.position_ids[None],
        cu_seq_lens_q=packed.cu_seq_lens,
        max_length_q=packed.max_length,
    ).logits
    return logits[: len(rows)]


def round_size(num_tokens: int) -> int:
    """Round up to a multiple of an eighth of a power of two, and of 8. This adds at most 12.5 % from 64 tokens on."""
    step = max(8, (1 << (num_tokens - 1).bit_length()) // 16)
    return math.ceil(num_tokens / step) * step


def make_engine(model: nn.Module, *, autocast: torch.dtype = torch.float32) -> Engine:
    """Return the forward of a model on the device where it is.

    Args:
        model: A sequence classifier in eval mode.
        autocast: Compute dtype of what is not in one dtype throughout; float32 leaves all as it is.
    """
    device = next(model.parameters()).device

    @contextmanager
    def computing() -> Iterator[None]:
        with (
            torch.inference_mode(),
            torch.autocast(device.type, dtype=autocast, enabled=autocast != torch.float32),
        ):
            yield

    def compute(
        input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64] | None
    ) -> NDArray[np.float32]:
        mask = None if attention_mask is None else torch.from_numpy(attention_mask).to(device)
        with computing(), attention_backends(device):
            logits = model(
                input_ids=torch.from_numpy(input_ids).to(device), attention_mask=mask
            ).logits
        return np.asarray(logits.float().cpu().numpy(), dtype=np.float32)

    def compute_rows(rows: Sequence[NDArray[np.int32]]) -> NDArray[np.float32]:
        with computing():
            logits = compute_packed(model, rows, device=device, pad_token_id=0)
        return np.asarray(logits.float().cpu().numpy(), dtype=np.float32)

    max_tokens = inference_tokens(device.type)
    return Engine(compute, max_tokens, compute_rows if packs_rows(model, device) else None)
