"""Parameter counts and memory, from shapes alone: no weights are loaded and nothing is timed."""

from dataclasses import asdict, dataclass

from lora_sentiment.model.architecture import Shape
from lora_sentiment.model.config import FullMethod, LoraMethod

MICRO_BATCH_BYTES = 1 << 30
"""Activations that one micro-batch may save for backward, in bytes. Fixed, so that the cut repeats everywhere."""
MAX_MICRO_BATCH_TOKENS = 4096
"""A larger one does not run faster on a CPU: its buffers outgrow the caches and what glibc keeps between uses."""


@dataclass(frozen=True)
class ParameterCounts:
    """How many parameters are trained, where they stand, and what share of full fine-tuning that is.

    Attributes:
        adapter: In adapters beside the encoder; 0 for full fine-tuning.
        head: In pre_classifier and classifier.
        trainable: All that is trained.
        base: Encoder and head, which is what full fine-tuning trains.
        share: trainable / base.
    """

    adapter: int
    head: int
    trainable: int
    base: int
    share: float

    def as_dict(self) -> dict[str, float]:
        """Return the counts as report.json holds them."""
        return asdict(self)

    def __str__(self) -> str:
        parts = f"{self.adapter:,} adapter + {self.head:,} head" if self.adapter else "all"
        return f"{parts} = {self.trainable:,} trainable, {self.share:.3%} of {self.base:,}"


def count_parameters(shape: Shape, method: LoraMethod | FullMethod, *, num_labels: int) -> ParameterCounts:
    """Count what a method trains: LoRA adds r * (in + out) for every adapted linear (Hu et al. 2021, section 4.2)."""
    head = shape.num_head(num_labels)
    base = shape.num_encoder + head
    if isinstance(method, FullMethod):
        return ParameterCounts(adapter=0, head=head, trainable=base, base=base, share=1.0)
    adapter = shape.n_layers * sum(method.r * sum(shape.linear(name)) for name in method.linears)
    return ParameterCounts(
        adapter=adapter, head=head, trainable=adapter + head, base=base, share=(adapter + head) / base
    )


def activation_bytes(shape: Shape, *, length: int, element_bytes: int) -> int:
    """Estimate the bytes saved for backward per padded token at one length.

    A block saves about eight tensors of `dim` (inputs of its linears and norms, q, k, v, dropout masks), two of
    `hidden_dim` (before and after GELU) and two rows of attention probabilities per head.
    """
    block = 8 * shape.dim + 2 * shape.hidden_dim + 2 * shape.n_heads * length
    return shape.n_layers * block * element_bytes


def micro_batch_tokens(shape: Shape, *, max_length: int, element_bytes: int, checkpointing: bool = False) -> int:
    """Return the padded tokens one micro-batch may hold: a memory formula of shape, length and dtype, in 256s.

    Never less than one row of `max_length` tokens.
    """
    blocks = 1 if checkpointing else shape.n_layers
    per_token = activation_bytes(shape, length=max_length, element_bytes=element_bytes) * blocks // shape.n_layers
    tokens = min(MICRO_BATCH_BYTES // per_token, MAX_MICRO_BATCH_TOKENS) // 256 * 256
    return max(tokens, max_length)
