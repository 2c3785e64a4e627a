"""Logits by torch: of many rows, sharded over processes, or of one batch as an engine."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn

from lora_sentiment.data.batches import Encoded, cut, make_batch, shard
from lora_sentiment.data.packing import cut_packed, pack_rows
from lora_sentiment.fast.attention import attention_backends
from lora_sentiment.model.encoder import takes_packed_rows
from lora_sentiment.model.engine import Engine
from lora_sentiment.model.parameters import inference_tokens
from lora_sentiment.progress import make_bar


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
        np.arange(len(encoded)), lengths, rank=accelerator.process_index, num_processes=accelerator.num_processes
    )
    packs = packs_rows(model, device)
    max_tokens = inference_tokens(device.type)
    parts = (cut_packed if packs else cut)(own, lengths, max_tokens=max_tokens)
    num_labels = int(model.config.num_labels)  # type: ignore[union-attr, arg-type]
    logits = torch.zeros(len(encoded), num_labels, device=device)
    was_training = model.training
    model.eval()
    bar = make_bar(int(lengths[own].sum()), desc=progress or "", unit="tok", show=progress is not None)
    with torch.inference_mode(), bar:
        for part in parts:
            with accelerator.autocast():
                if packs:
                    rows = [encoded.input_ids[encoded.offsets[i] : encoded.offsets[i + 1]] for i in part]
                    found = compute_packed(model, rows, device=device, pad_token_id=encoded.pad_token_id)
                else:
                    batch = make_batch(encoded, part, device=device)
                    with attention_backends(device):
                        found = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            logits[torch.from_numpy(part).to(device)] = found.float()
            bar.update(int(lengths[part].sum()))
        # Every process filled its own rows and left zeros elsewhere: the sum is exact on sizes that do not divide.
        summed = accelerator.reduce(logits, reduction="sum")
    model.train(was_training)
    return np.asarray(summed.cpu().numpy(), dtype=np.float32)


def packs_rows(model: nn.Module, device: torch.device) -> bool:
    """Return whether rows lie one after another without padding: on a GPU, where the fast forward pass runs."""
    return device.type == "cuda" and takes_packed_rows(model)


def compute_packed(
    model: nn.Module, rows: Sequence[NDArray[np.int32]], *, device: torch.device, pad_token_id: int
) -> Tensor:
    """Compute the logits of rows in one forward pass without padding between them.

    Args:
        model: Takes packed rows.
        rows: Token ids of each row.
        device: Where the model is.
        pad_token_id: Fills the few tokens by which the rows fall short of a round number.

    Returns:
        Logits on the device, shape (num_rows, num_labels).
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
    host = torch.from_numpy(np.concatenate(arrays))
    if device.type == "cuda":
        host = host.pin_memory()
    input_ids, position_ids, cu_seq_lens = host.to(device, non_blocking=True).split_with_sizes(
        [len(each) for each in arrays]
    )
    logits: Tensor = model(
        input_ids=input_ids[None], position_ids=position_ids[None], cu_seq_lens_q=cu_seq_lens, max_length_q=longest
    ).logits
    return logits[: len(rows)]


def round_size(num_tokens: int) -> int:
    """Return the next multiple of an eighth of a power of two, which pads by 12.5 % at most, and of 8."""
    step = max(8, (1 << (num_tokens - 1).bit_length()) // 16)
    return math.ceil(num_tokens / step) * step


def make_engine(model: nn.Module, *, autocast: torch.dtype = torch.float32) -> Engine:
    """Return the forward of a model on the device where it is.

    Args:
        model: A sequence classifier in eval mode.
        autocast: Compute dtype of what is not in one dtype throughout; float32 leaves all as it is.
    """
    device = next(model.parameters()).device

    def compute(input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64] | None) -> NDArray[np.float32]:
        with torch.inference_mode(), torch.autocast(device.type, dtype=autocast, enabled=autocast != torch.float32):
            if packs_rows(model, device):
                rows = _unpad(input_ids, attention_mask)
                logits = compute_packed(model, rows, device=device, pad_token_id=0)
            else:
                mask = None if attention_mask is None else torch.from_numpy(attention_mask).to(device)
                with attention_backends(device):
                    logits = model(input_ids=torch.from_numpy(input_ids).to(device), attention_mask=mask).logits
        return np.asarray(logits.float().cpu().numpy(), dtype=np.float32)

    return Engine(compute, inference_tokens(device.type))


def _unpad(input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64] | None) -> list[NDArray[np.int32]]:
    ids = input_ids.astype(np.int32)
    if attention_mask is None:
        return list(ids)
    return [row[:length] for row, length in zip(ids, attention_mask.sum(axis=1), strict=True)]
