"""The size of a micro-batch on a GPU, from its free memory and the measured bytes of a token."""

import logging
import math
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from lora_sentiment.errors import TrainingError
from lora_sentiment.fast import attention_backends
from lora_sentiment.models.inference import compute_packed, packs_rows
from lora_sentiment.models.token_limits import inference_tokens
from lora_sentiment.training.signals import is_out_of_memory

log = logging.getLogger("lora_sentiment")

SHARE = 0.92
"""Share of the free memory that a run may use. The allocator rounds sizes and leaves gaps."""
ROUND = 1024
"""A size that memory limits is a multiple of this number of tokens.

A small change of the free memory then does not change the size.
"""
TRAINED_BYTES = 16
"""Bytes of a trained parameter beside its value: gradient, two moments and best copy, in fp32."""


@dataclass(frozen=True)
class Measured:
    """Measured memory of a device, in bytes.

    Attributes:
        per_token: Memory of each token of a micro-batch in forward and backward pass.
        fixed: Memory of these passes that does not depend on the size of the micro-batch.
        evaluation: Peak of a forward pass without gradients over a full batch.
        free: Memory that is not in use.
    """

    per_token: float
    fixed: float
    evaluation: int
    free: int


def fit_micro_batch(
    measured: Measured, *, num_trained: int, most: int, least: int, graphs: bool
) -> int:
    """Return the most tokens that a micro-batch may have.

    Args:
        measured: The measured memory.
        num_trained: Number of trained parameters.
        most: Tokens of the largest step; no micro-batch is larger.
        least: Tokens of the longest row; no micro-batch needs to be smaller.
        graphs: Whether steps are replayed as CUDA graphs. Graphs hold their memory until the run
            ends, and the first step of each size runs beside them.
    """
    copies = 2 if graphs else 1
    left = SHARE * measured.free - measured.evaluation - TRAINED_BYTES * num_trained
    tokens = (left / copies - measured.fixed) / measured.per_token
    if tokens >= most:
        return most
    return max(least, math.floor(tokens / ROUND) * ROUND)


def choose_max_tokens(
    model: nn.Module, *, accelerator: Accelerator, max_length: int, batch_size: int, graphs: bool
) -> int:
    """Measure a CUDA device and return the most tokens of a micro-batch.

    These are the tokens of a whole step where the memory allows that.

    Args:
        model: On the accelerator's device, with its forward pass in place.
        accelerator: Says device and precision.
        max_length: Most tokens of a row.
        batch_size: Rows of a step on this process.
        graphs: Whether steps are replayed as CUDA graphs.
    """
    measured = measure_micro_batch(
        model, accelerator=accelerator, max_length=max_length, batch_size=batch_size
    )
    log.info(
        "%s MiB are free on the GPU; a token of a micro-batch takes %s KiB",
        f"{measured.free / 2**20:,.0f}",
        f"{measured.per_token / 2**10:,.1f}",
    )
    return fit_micro_batch(
        measured,
        num_trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        most=batch_size * max_length,
        least=max_length,
        graphs=graphs,
    )


def free_bytes(device: torch.device) -> int:
    """Return the memory of a CUDA device that this process may still take, in bytes.

    Memory that the allocator keeps unused is included.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    free, total = torch.cuda.mem_get_info(index)
    reserved = torch.cuda.memory_reserved(index)
    fraction = torch.cuda.get_per_process_memory_fraction(index)
    allowed = int(total * fraction) - reserved
    return min(free, allowed) + reserved - torch.cuda.memory_allocated(device)


def measure_micro_batch(
    model: nn.Module, *, accelerator: Accelerator, max_length: int, batch_size: int
) -> Measured:
    """Run forward and backward passes over rows of the longest length, and measure their memory.

    Gradients are removed, generators are reset, and no weight changes.

    Args:
        model: On the accelerator's CUDA device, with its forward pass in place.
        accelerator: Says device and precision.
        max_length: Most tokens of a row.
        batch_size: Rows of a step on this process.

    Raises:
        TrainingError: If a pass does not fit into memory.
    """
    device = accelerator.device
    few, many = 1, max(2, min(8, batch_size))
    was_training = model.training
    try:
        with torch.random.fork_rng(devices=[device]):
            model.train()
            # Libraries take memory of their own in a first pass.
            _peak(model, accelerator, few, max_length)
            peaks = [_peak(model, accelerator, rows, max_length) for rows in (few, many)]
            model.eval()
            rows = max(1, inference_tokens(device.type) // max_length)
            with torch.inference_mode():
                evaluation = _peak(model, accelerator, rows, max_length)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            "the GPU's memory ran out while the bytes of a token were measured, with at most "
            f"{many} rows of {max_length} tokens and an evaluation of "
            f"{inference_tokens(device.type):,} tokens; set train.max_tokens_per_micro_batch "
            f"yourself, lower model.max_length, or free memory: {str(error).splitlines()[0]}"
        ) from error
    model.train(was_training)
    per_token = (peaks[1] - peaks[0]) / ((many - few) * max_length)
    fixed = max(0.0, peaks[0] - per_token * few * max_length)
    return Measured(per_token, fixed, evaluation, free_bytes(device))


def _peak(model: nn.Module, accelerator: Accelerator, rows: int, length: int) -> int:
    """Return the peak bytes of one pass over `rows` rows, without those held before it."""
    device = accelerator.device
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with accelerator.autocast():
        if packs_rows(model, device):
            ids = [np.zeros(length, dtype=np.int32)] * rows
            logits = compute_packed(model, ids, device=device, pad_token_id=0)
        else:
            input_ids = torch.zeros(rows, length, dtype=torch.int64, device=device)
            mask = torch.ones_like(input_ids)
            with attention_backends(device):
                logits = model(input_ids=input_ids, attention_mask=mask).logits
    if torch.is_grad_enabled():
        torch.autograd.backward(logits.float().sum())
        for parameter in model.parameters():
            parameter.grad = None
    return torch.cuda.max_memory_allocated(device) - before
