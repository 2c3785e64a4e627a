"""What quantising a base saved and cost, measured on this machine before training starts."""

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from lora_sentiment.model.base import Base, load_base
from lora_sentiment.model.config import ModelConfig

ROUNDS = 5


@dataclass(frozen=True)
class Quantisation:
    """A quantised base beside the same base unquantised in the compute dtype.

    Attributes:
        quantize: `int8`, `nf4` or `fp4`.
        double_quant: Whether the 4-bit scales are quantised too.
        base_bytes: Bytes of the encoder's weights, scales included; embeddings and norms stay as they are.
        unquantised_bytes: The same unquantised.
        forward_time_ratio: Time of a forward of the probe over that of the unquantised base: median of alternating
            rounds. It is only reported, it decides nothing.
        cls_relative_difference: Root mean square change of the [CLS] vectors over that of the unquantised ones.
    """

    quantize: str
    double_quant: bool
    base_bytes: int
    unquantised_bytes: int
    forward_time_ratio: float
    cls_relative_difference: float

    def as_dict(self, *, peak_memory_bytes: int) -> dict[str, Any]:
        """Return the figures as report.json holds them, with a sentence that says whether it helped."""
        return {**asdict(self), "verdict": self.verdict(peak_memory_bytes=peak_memory_bytes)}

    def verdict(self, *, peak_memory_bytes: int) -> str:
        """Say in one sentence what was saved and what it cost, and plainly when it did not help."""
        saved = self.unquantised_bytes - self.base_bytes
        share = saved / (peak_memory_bytes + max(saved, 0))
        time_taken = f"{self.forward_time_ratio:.2f} times the time of the unquantised base"
        figures = (
            f"{self.quantize} made the encoder's weights {saved / 2**20:,.1f} MiB smaller ({share:.1%} of what the run "
            f"would have held at its peak); a forward took {time_taken}, and its [CLS] vectors moved by "
            f"{self.cls_relative_difference:.2%}"
        )
        # Less than a twentieth of the memory lets no larger run fit.
        return figures if share >= 0.05 or self.forward_time_ratio <= 1 else f"it did not help here: {figures}"


def measure_quantisation(
    base: Base,
    config: ModelConfig,
    *,
    labels: tuple[str, ...],
    input_ids: list[list[int]],
    dtype: torch.dtype,
    device: torch.device,
) -> Quantisation:
    """Compare a quantised base with the same base unquantised, on texts of our own.

    Args:
        base: The quantised base, not yet wrapped.
        config: The recipe's `model` section.
        labels: Label names in order.
        input_ids: One list of ids a text.
        dtype: Compute dtype of the unquantised base.
        device: Where both run.
    """
    with torch.random.fork_rng(devices=[]):
        plain = load_base(config.model_copy(update={"quantize": "none", "double_quant": False}), labels=labels)
    encoders = [loaded.model.get_submodule("distilbert").to(device).eval() for loaded in (plain, base)]
    encoders[0].to(dtype)
    width = max(map(len, input_ids))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in input_ids], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in input_ids], device=device)
    seconds: list[list[float]] = [[], []]
    vectors = []
    with torch.inference_mode():
        for _ in range(ROUNDS):
            vectors = [_timed(encoder, ids, mask, times) for encoder, times in zip(encoders, seconds, strict=True)]
    unquantised, quantised = vectors
    return Quantisation(
        quantize=config.quantize,
        double_quant=config.double_quant,
        base_bytes=_bytes(encoders[1]),
        unquantised_bytes=_bytes(encoders[0]),
        forward_time_ratio=statistics.median(seconds[1]) / statistics.median(seconds[0]),
        cls_relative_difference=float((quantised - unquantised).norm() / unquantised.norm()),
    )


def _timed(encoder: nn.Module, ids: torch.Tensor, mask: torch.Tensor, seconds: list[float]) -> torch.Tensor:
    began = time.perf_counter()
    vectors: torch.Tensor = encoder(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0].float().cpu()
    seconds.append(time.perf_counter() - began)
    return vectors


def _bytes(encoder: nn.Module) -> int:
    """Count the bytes of an encoder's tensors, bitsandbytes' scales included."""
    total = sum(p.numel() * p.element_size() for p in encoder.parameters())
    for module in encoder.modules():
        weight = getattr(module, "weight", None)
        # 8 bits: the scales stand in the module's state once it ran; 4 bits: in the weight's, nested where doubled.
        scales = [getattr(getattr(module, "state", None), "SCB", None)]
        state = getattr(weight, "quant_state", None)
        while state is not None:
            scales += [state.absmax, state.code]
            state = state.state2
        total += sum(s.numel() * s.element_size() for s in scales if s is not None)
    return total
