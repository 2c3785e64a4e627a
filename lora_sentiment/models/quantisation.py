"""What quantising a base saved and cost, measured on this machine before training starts."""

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

ROUNDS = 5
"""Timed forward passes of each encoder, in turn. One more before them is not timed: libraries set themselves up."""


CUDA_ROUND = 512
"""Bytes that torch's allocator rounds every tensor on a GPU up to."""


@dataclass(frozen=True)
class Cut:
    """A run's largest micro-batch.

    Attributes:
        rows: Its texts.
        length: Tokens of each.
        batch_size: Texts of an optimizer step.
    """

    rows: int
    length: int
    batch_size: int


@dataclass(frozen=True)
class Quantisation:
    """A quantised base beside the same base unquantised in the compute dtype, on the engine that each would run on.

    Attributes:
        quantize: `int8`, `nf4` or `fp4`.
        double_quant: Whether the 4-bit scales are quantised too.
        base_bytes: Bytes of the encoder's weights, scales included; embeddings and norms are in the compute dtype.
            On a GPU as its allocator holds them.
        unquantised_bytes: The same unquantised.
        peak_bytes: Estimated peak of the run at its longest length.
        unquantised_peak_bytes: The same unquantised.
        forward_time_ratio: Time of a forward over that of the unquantised base, under the autocast of a run: median of
            alternating rounds. On a CPU it is of the probe's texts. On a GPU it is of the run's largest micro-batch: a
            small one takes as long as its launches. It is only reported, it decides nothing.
        cls_relative_difference: Root mean square change of the [CLS] vectors over that of the unquantised ones.
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
        """Return the figures as report.json holds them, with a sentence that says whether it helped."""
        return {**asdict(self), "verdict": self.verdict}

    @property
    def verdict(self) -> str:
        """What was saved and what it cost, and plainly when it did not help: less memory is what it is for."""
        smaller = (self.unquantised_bytes - self.base_bytes) / 2**20
        figures = (
            f"{self.quantize} made the encoder's weights {smaller:,.1f} MiB smaller; the run's estimated peak is "
            f"{self.peak_bytes / 2**20:,.0f} MiB, unquantised {self.unquantised_peak_bytes / 2**20:,.0f} MiB; a "
            f"forward took {self.forward_time_ratio:.2f} times as long, and its [CLS] vectors moved by "
            f"{self.cls_relative_difference:.2%}"
        )
        return (
            figures
            if self.peak_bytes < self.unquantised_peak_bytes
            else f"it did not help here: {figures}"
        )


def measure_quantisation(
    base: Base,
    plan: Plan,
    *,
    engine: str,
    cut: Cut,
    input_ids: list[list[int]],
    dtype: torch.dtype,
    device: torch.device,
) -> Quantisation:
    """Compare a quantised base with the same base unquantised, on texts of our own.

    Args:
        base: The quantised base, not yet wrapped.
        plan: What fixes the memory of the run.
        engine: The recipe's `train.engine`.
        cut: How the run's largest micro-batch is cut.
        input_ids: One list of ids a text.
        dtype: Compute dtype of the unquantised base.
        device: Where both run.
    """
    config = plan.model.model_copy(update={"quantize": "none", "double_quant": False})
    with torch.random.fork_rng(devices=[]):
        plain = load_base(config, labels=tuple(map(str, range(plan.num_labels))))
    plain.model.to(device, dtype)
    fast = runs_fast(plan.method, config, engine=engine)
    if fast:
        use_fast_encoder(plain.model, compute_dtype=dtype)
    encoders = [loaded.model.get_submodule("distilbert").eval() for loaded in (plain, base)]
    for parameter in encoders[1].parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(
                dtype
            )  # as `make_trainable` will: all of it is frozen
    width = max(map(len, input_ids))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in input_ids], device=device)
    mask = torch.tensor(
        [[1] * len(row) + [0] * (width - len(row)) for row in input_ids], device=device
    )
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    with torch.inference_mode(), attention_backends(device), autocast:
        unquantised, quantised = (_encode(encoder, ids, mask) for encoder in encoders)
        if device.type == "cuda":
            ratio = _compare_times(encoders, _fill_batch(input_ids, cut).to(device), None)
        else:
            ratio = _compare_times(encoders, ids, mask)
    return Quantisation(
        quantize=plan.model.quantize,
        double_quant=plan.model.double_quant,
        base_bytes=_bytes(encoders[1]),
        unquantised_bytes=_bytes(encoders[0]),
        peak_bytes=_peak(plan, cut),
        unquantised_peak_bytes=_peak(replace(plan, model=config, fast=fast), cut),
        forward_time_ratio=ratio,
        cls_relative_difference=float((quantised - unquantised).norm() / unquantised.norm()),
    )


def _peak(plan: Plan, cut: Cut) -> int:
    return estimate_memory(plan, rows=cut.rows, length=cut.length, batch_size=cut.batch_size).peak


def _fill_batch(input_ids: list[list[int]], cut: Cut) -> torch.Tensor:
    """Return the ids of a run's largest micro-batch, without padding; shape (rows, length)."""
    flat = torch.tensor([each for row in input_ids for each in row])
    size = cut.rows * cut.length
    return flat.repeat(math.ceil(size / len(flat)))[:size].view(cut.rows, cut.length)


def _compare_times(
    encoders: list[nn.Module], ids: torch.Tensor, mask: torch.Tensor | None
) -> float:
    """Return the median time of the second encoder over that of the first, in alternating rounds after one of each."""
    seconds: list[list[float]] = [[], []]
    for round_number in range(ROUNDS + 1):
        for encoder, times in zip(encoders, seconds, strict=True):
            began = time.perf_counter()
            _encode(encoder, ids, mask)
            if round_number > 0:
                times.append(time.perf_counter() - began)
    return statistics.median(seconds[1]) / statistics.median(seconds[0])


def _encode(encoder: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the [CLS] vectors on the host, which waits for a GPU."""
    vectors: torch.Tensor = (
        encoder(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0].float().cpu()
    )
    return vectors


def _bytes(encoder: nn.Module) -> int:
    """Count the bytes of an encoder's tensors, bitsandbytes' scales included."""
    tensors = list(encoder.parameters())
    for module in encoder.modules():
        weight = getattr(module, "weight", None)
        # 8 bits: the scales stand in the module's state once it ran; 4 bits: in the weight's, nested where doubled.
        scales = [getattr(getattr(module, "state", None), "SCB", None)]
        state = getattr(weight, "quant_state", None)
        while state is not None:
            scales += [state.absmax, state.code]
            state = state.state2
        tensors += [scale for scale in scales if scale is not None]
    return sum(_held_bytes(tensor) for tensor in tensors)


def _held_bytes(tensor: torch.Tensor) -> int:
    size = tensor.numel() * tensor.element_size()
    if tensor.device.type == "cuda":
        # What torch's allocator counts as allocated.
        return math.ceil(size / CUDA_ROUND) * CUDA_ROUND
    return size
