"""Logits by torch: of many rows, sharded over processes, or of one batch as an engine."""

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import nn

from lora_sentiment.data.batches import Encoded, cut, make_batch, shard
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
    own = shard(
        np.arange(len(encoded)), lengths, rank=accelerator.process_index, num_processes=accelerator.num_processes
    )
    parts = cut(own, lengths, max_tokens=inference_tokens(accelerator.device.type))
    num_labels = int(model.config.num_labels)  # type: ignore[union-attr, arg-type]
    logits = torch.zeros(len(encoded), num_labels, device=accelerator.device)
    was_training = model.training
    model.eval()
    bar = make_bar(int(lengths[own].sum()), desc=progress or "", unit="tok", show=progress is not None)
    with torch.inference_mode(), bar:
        for part in parts:
            batch = make_batch(encoded, part, device=accelerator.device)
            with accelerator.autocast():
                output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            logits[torch.from_numpy(part).to(logits.device)] = output.logits.float()
            bar.update(batch.num_tokens)
        # Every process filled its own rows and left zeros elsewhere: the sum is exact on sizes that do not divide.
        summed = accelerator.reduce(logits, reduction="sum")
    model.train(was_training)
    return np.asarray(summed.cpu().numpy(), dtype=np.float32)


def make_engine(model: nn.Module, *, autocast: torch.dtype = torch.float32) -> Engine:
    """Return the forward of a model on the device where it is.

    Args:
        model: A sequence classifier in eval mode.
        autocast: Compute dtype of what is not in one dtype throughout; float32 leaves all as it is.
    """
    device = next(model.parameters()).device

    def compute(input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64] | None) -> NDArray[np.float32]:
        mask = None if attention_mask is None else torch.from_numpy(attention_mask).to(device)
        with torch.inference_mode(), torch.autocast(device.type, dtype=autocast, enabled=autocast != torch.float32):
            output = model(input_ids=torch.from_numpy(input_ids).to(device), attention_mask=mask)
        return np.asarray(output.logits.float().cpu().numpy(), dtype=np.float32)

    return Engine(compute, inference_tokens(device.type))
