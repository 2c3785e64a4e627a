"""The gain and cost of a quantised base, measured on this machine before training starts."""

import math
import statistics
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from lora_sentiment.fast import attention_backends, use_fast_encoder
from lora_sentiment.models.load import Base, load_base
from lora_sentiment.models.memory import Plan, estimate_memory, runs_fast
from lora_sentiment.models.sizes import weight_tensors

ROUNDS = 5
"""Timed forward passes of each encoder, in turn. One more before them is not timed."""
CUDA_ROUND = 512
"""torch's allocator rounds every tensor on a GPU up to a multiple of this number of bytes."""


@dataclass(frozen=True)
class Quantisation:
    """A quantised base beside the same base unquantised, each on the engine that it would run on.

    The unquantised base is in the compute dtype.

    Attributes:
        quantize: `int8`, `nf4` or `fp4`.
        double_quant: Whether the 4-bit scales are quantised too.
        base_bytes: Bytes of the encoder's weights with their scales. Embeddings and norms are in
            the compute dtype. On a GPU, the bytes that its allocator holds.
        unquantised_bytes: The same unquantised.
        peak_bytes: Estimated peak of the run at its longest length.
        unquantised_peak_bytes: The same unquantised.
        forward_time_ratio: Time of a forward pass over that of the unquantised base, under the
            autocast of a run: median of alternating rounds. On a CPU, of the probe's texts. On a
            GPU, of the run's largest micro-batch: the time of a small one is that of its launches.
            It is reported, and decides nothing.
        cls_relative_difference: Root mean square change of the [CLS] vectors over that of the
            unquantised vectors.
    """

    quantize: str
    double_quant: bool
    base_bytes: int
    unquantised_bytes: int
    peak_bytes: int
    unquantised_peak_bytes: int
    forward_time_ratio: float
    cls_relative_difference: float

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as report.json holds them, with a verdict."""
        return {**asdict(self), "verdict": self.verdict}

    @property
    def verdict(self) -> str:
        """Saving and cost in a sentence. It says so if the peak of memory did not shrink."""
        smaller = (self.unquantised_bytes - self.base_bytes) / 2**20
        figures = (
            f"{self.quantize} made the encoder's weights {smaller:,.1f} MiB smaller; the run's "
            f"estimated peak is {self.peak_bytes / 2**20:,.0f} MiB, unquantised "
            f"{self.unquantised_peak_bytes / 2**20:,.0f} MiB; a forward took "
            f"{self.forward_time_ratio:.2f} times as long, and its [CLS] vectors moved by "
            f"{self.cls_relative_difference:.2%}"
        )
        if self.peak_bytes < self.unquantised_peak_bytes:
            return figures
        return f"it did not help here: {figures}"


def measure_quantisation(
    base: Base,
    plan: Plan,
    *,
    rows: int,
    length: int,
    batch_size: int,
    input_ids: list[list[int]],
    dtype: torch.dtype,
    device: torch.device,
) -> Quantisation:
    """Compare a quantised base with the same base unquantised, on texts of this package.

    Args:
        base: The quantised base, not yet wrapped.
        plan: The facts that decide the memory of the run.
        rows: Texts of the run's largest micro-batch.
        length: Tokens of each of them.
        batch_size: Texts of an optimizer step.
        input_ids: Token ids of each text.
        dtype: Compute dtype.
        device: Device of both.
    """
    config = plan.model.model_copy(update={"quantize": "none", "double_quant": False})
    with torch.random.fork_rng(devices=[]):
        plain = load_base(config, labels=tuple(map(str, range(plan.config.num_labels))))
    plain.model.to(device, dtype)
    plain_plan = replace(plan, model=config)
    if runs_fast(plain_plan):
        use_fast_encoder(plain.model, compute_dtype=dtype)
    name = base.family.encoder
    encoders = [loaded.model.get_submodule(name).eval() for loaded in (plain, base)]
    for parameter in encoders[1].parameters():
        if parameter.is_floating_point():
            # `make_trainable` will do the same: all of them are frozen.
            parameter.data = parameter.data.to(dtype)
    ids = [torch.tensor(row, device=device) for row in input_ids]
    mask = [torch.ones_like(row) for row in ids]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    padded_mask = torch.nn.utils.rnn.pad_sequence(mask, batch_first=True)
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    with torch.inference_mode(), attention_backends(device), autocast:
        unquantised, quantised = (_encode(encoder, padded, padded_mask) for encoder in encoders)
        if device.type == "cuda":
            filled = _fill_batch(input_ids, rows, length).to(device)
            ratio = _compare_times(encoders, filled, None)
        else:
            ratio = _compare_times(encoders, padded, padded_mask)
    sizes = {"rows": rows, "length": length, "batch_size": batch_size}
    return Quantisation(
        quantize=plan.model.quantize,
        double_quant=plan.model.double_quant,
        base_bytes=_count_bytes(encoders[1]),
        unquantised_bytes=_count_bytes(encoders[0]),
        peak_bytes=estimate_memory(plan, **sizes).peak,
        unquantised_peak_bytes=estimate_memory(plain_plan, **sizes).peak,
        forward_time_ratio=ratio,
        cls_relative_difference=float((quantised - unquantised).norm() / unquantised.norm()),
    )


def _fill_batch(input_ids: list[list[int]], rows: int, length: int) -> torch.Tensor:
    """Return a micro-batch of the ids without padding, shape (rows, length)."""
    flat = torch.tensor([token for row in input_ids for token in row])
    size = rows * length
    return flat.repeat(math.ceil(size / len(flat)))[:size].view(rows, length)


def _compare_times(
    encoders: list[nn.Module], ids: torch.Tensor, mask: torch.Tensor | None
) -> float:
    """Return the median time of the second encoder over that of the first, in alternating rounds.

    The first round is not timed: libraries set themselves up in it.
    """
    seconds: list[list[float]] = [[], []]
    for _ in range(ROUNDS + 1):
        for encoder, times in zip(encoders, seconds, strict=True):
            began = time.perf_counter()
            _encode(encoder, ids, mask)
            times.append(time.perf_counter() - began)
    first, second = (statistics.median(times[1:]) for times in seconds)
    return second / first


def _encode(encoder: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the [CLS] vectors on the host. This waits for a GPU."""
    hidden: torch.Tensor = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return hidden[:, 0].float().cpu()


def _count_bytes(encoder: nn.Module) -> int:
    """Count the bytes of an encoder's tensors with bitsandbytes' scales."""
    total = 0
    for tensor in weight_tensors(encoder):
        size = tensor.numel() * tensor.element_size()
        if tensor.device.type == "cuda":
            size = math.ceil(size / CUDA_ROUND) * CUDA_ROUND
        total += size
    return total
