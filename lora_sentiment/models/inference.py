"""Logits by torch: of many rows, sharded over processes, or of one batch as an engine."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn

from lora_sentiment.console import make_bar
from lora_sentiment.data.batches import Encoded, cut, make_batch, shard, split_types, take_rows
from lora_sentiment.data.packing import cut_packed
from lora_sentiment.data.texts import release_pages
from lora_sentiment.fast import (
    HostBuffers,
    attention_backends,
    pack_on_device,
    takes_packed_rows,
    use_fast_encoder,
)
from lora_sentiment.models.dtype import resolve_dtype
from lora_sentiment.models.engine import Engine
from lora_sentiment.models.load import cast_frozen
from lora_sentiment.models.token_limits import inference_tokens

log = logging.getLogger("lora_sentiment")


def predict_logits(
    model: nn.Module, encoded: Encoded, *, accelerator: Accelerator, progress: str | None = None
) -> NDArray[np.float32]:
    """Compute the logits of every row without dropout. Each process computes its share.

    Args:
        model: A sequence classifier on the accelerator's device. Its training mode is restored.
        encoded: The rows.
        accelerator: Gives this process its share, and every process the logits.
        progress: Text before a progress bar; None for no bar.

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
    cut_rows = cut_packed if packs else cut
    parts = cut_rows(own, lengths, max_tokens=inference_tokens(device.type))
    num_labels = int(model.config.num_labels)  # type: ignore[union-attr, arg-type]
    logits = torch.zeros(len(encoded), num_labels, device=device)
    host = HostBuffers(device)
    outputs = []
    was_training = model.training
    model.eval()
    num_tokens = int(lengths[own].sum())
    bar = make_bar(num_tokens, desc=progress or "", unit="tok", show=progress is not None)
    with torch.inference_mode(), bar:
        for part in parts:
            with accelerator.autocast():
                if packs:
                    rows = take_rows(encoded, part)
                    output = compute_packed(
                        model,
                        rows,
                        device=device,
                        pad_token_id=encoded.pad_token_id,
                        has_types=encoded.has_types,
                        host=host,
                    )
                    release_pages(encoded.input_ids.base)
                else:
                    batch = make_batch(encoded, part, device=device)
                    output = compute_padded(
                        model, batch.input_ids, batch.attention_mask, batch.token_type_ids
                    )
            outputs.append(output.float())
            bar.update(int(lengths[part].sum()))
        if parts:
            # After all parts: moving the order to a GPU waits for all earlier work of the GPU.
            order = torch.from_numpy(np.concatenate(parts)).to(device)
            logits[order] = torch.cat(outputs)
        # Each process filled its own rows and left zeros elsewhere, so the sum is exact. It works
        # for shares of different sizes.
        summed = accelerator.reduce(logits, reduction="sum")
    model.train(was_training)
    return np.asarray(summed.cpu().numpy(), dtype=np.float32)


def packs_rows(model: nn.Module, device: torch.device) -> bool:
    """Return whether a model takes packed rows on a device: a GPU with the fast forward pass."""
    return device.type == "cuda" and takes_packed_rows(model)


def compute_packed(
    model: nn.Module,
    rows: Sequence[NDArray[np.int32]],
    *,
    device: torch.device,
    pad_token_id: int,
    has_types: bool = False,
    host: HostBuffers | None = None,
) -> Tensor:
    """Compute the logits of rows in one forward pass without padding between them.

    Args:
        model: A model that takes packed rows.
        rows: Token ids of each row.
        device: The model's device.
        pad_token_id: Fills up to a round number of tokens.
        has_types: As `Encoded.has_types`.
        host: Buffers for many calls in a row; by default new ones.

    Returns:
        Logits on the device, shape (num_rows, num_labels).
    """
    packed = pack_on_device(rows, device=device, pad_token_id=pad_token_id, host=host)
    logits: Tensor = model(
        **name_ids(packed.input_ids[None], has_types=has_types),
        position_ids=packed.position_ids[None],
        cu_seq_lens_q=packed.cu_seq_lens,
        max_length_q=packed.max_length,
    ).logits
    return logits[: len(rows)]


def name_ids(input_ids: Tensor, *, has_types: bool) -> dict[str, Tensor]:
    """Return ids as arguments of a model. A model without pairs gets no token types."""
    if not has_types:
        return {"input_ids": input_ids}
    ids, types = split_types(input_ids)
    return {"input_ids": ids, "token_type_ids": types}


def compute_padded(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, types: Tensor | None
) -> Tensor:
    """Compute the logits of rows that are padded to equal length, as `pad` returns them."""
    given = {} if types is None else {"token_type_ids": types}
    with attention_backends(input_ids.device):
        logits: Tensor = model(input_ids=input_ids, attention_mask=attention_mask, **given).logits
    return logits


def make_fast(model: nn.Module, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Freeze a model in a compute dtype on a device, with the fast forward pass if it fits."""
    model = cast_frozen(model, dtype=dtype, device=device)
    reason = use_fast_encoder(model, compute_dtype=dtype)
    if reason is not None:
        log.info("stock engine: %s", reason)
    return model


def prepare_engine(model: nn.Module, dtype_name: str, device: torch.device) -> Engine:
    """Return the forward pass of a model in a compute dtype on a device, the fast one if it fits.

    Raises:
        ModelError: If there is no dtype of that name, or the device does not compute in it.
    """
    dtype = resolve_dtype(dtype_name, device)
    return make_engine(make_fast(model, dtype=dtype, device=device).eval(), autocast=dtype)


def make_engine(model: nn.Module, *, autocast: torch.dtype = torch.float32) -> Engine:
    """Return the forward pass of a model on its device.

    Args:
        model: A sequence classifier in eval mode.
        autocast: Compute dtype of modules that have several dtypes; float32 changes nothing.
    """
    device = next(model.parameters()).device

    @contextmanager
    def computing() -> Iterator[None]:
        is_short = autocast != torch.float32
        with (
            torch.inference_mode(),
            torch.autocast(device.type, dtype=autocast, enabled=is_short),
        ):
            yield

    def send(values: NDArray[np.int64] | None) -> Tensor | None:
        return None if values is None else torch.from_numpy(values).to(device)

    def compute(
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64] | None,
        token_type_ids: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float32]:
        ids = torch.from_numpy(input_ids).to(device)
        with computing():
            logits = compute_padded(model, ids, send(attention_mask), send(token_type_ids))
        return np.asarray(logits.float().cpu().numpy(), dtype=np.float32)

    def compute_rows(
        rows: Sequence[NDArray[np.int32]], *, has_types: bool = False
    ) -> NDArray[np.float32]:
        with computing():
            logits = compute_packed(model, rows, device=device, pad_token_id=0, has_types=has_types)
        return np.asarray(logits.float().cpu().numpy(), dtype=np.float32)

    max_tokens = inference_tokens(device.type)
    return Engine(compute, max_tokens, compute_rows if packs_rows(model, device) else None)
