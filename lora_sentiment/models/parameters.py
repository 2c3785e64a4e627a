"""Parameter counts and sizes of batches, from shapes alone: no weights are loaded and nothing is timed."""

import fnmatch
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from lora_sentiment.errors import ModelError
from lora_sentiment.models.families import Shape
from lora_sentiment.models.targets import Target, find_targets
from lora_sentiment.recipe.method import (
    AdaloraMethod,
    FullMethod,
    HeadMethod,
    Ia3Method,
    LoraMethod,
    Method,
    PeftMethod,
    UnfreezeMethod,
    VeraMethod,
)
from lora_sentiment.recipe.model import DEFAULT_HEAD_R, ModelConfig

MICRO_BATCH_BYTES = 1 << 30
"""Activations that one micro-batch may save for backward, in bytes. Fixed, so that the cut repeats everywhere."""
MAX_MICRO_BATCH_TOKENS = 4096
"""A larger one does not run faster on a CPU: its buffers outgrow the caches and what glibc keeps between uses."""
INFERENCE_TOKENS = 8192
"""Padded tokens of one forward without gradients."""
CUDA_INFERENCE_TOKENS = 32768
"""The same on a CUDA device: enough that launching the kernels takes less time than computing them."""
CPU_INFERENCE_TOKENS = 1024
"""The same on a CPU: larger buffers outgrow its caches, and glibc hands those of 32 MiB back to the kernel at every
free."""


@dataclass(frozen=True)
class ParameterCounts:
    """How many parameters are trained, where they stand, and what share of full fine-tuning that is.

    Attributes:
        adapter: Trained in adapters beside the encoder.
        encoder: Trained of the encoder's own.
        head: Trained in pre_classifier and classifier.
        trainable: All that is trained.
        base: Encoder and head, which is what full fine-tuning trains.
        share: trainable / base.
    """

    adapter: int
    encoder: int
    head: int
    trainable: int
    base: int
    share: float

    def as_dict(self) -> dict[str, float]:
        """Return the counts as report.json holds them."""
        return asdict(self)

    def __str__(self) -> str:
        return show_parameters(self.as_dict())


def show_parameters(counts: Mapping[str, float]) -> str:
    """Say counts, as `as_dict` or report.json hold them, in one line."""
    parts = " + ".join(
        f"{counts[name]:,} {name}" for name in ("adapter", "encoder", "head") if counts[name]
    )
    return (
        f"{parts} = {counts['trainable']:,} trainable ({counts['share']:.3%} of {counts['base']:,})"
    )


def count_parameters(
    shape: Shape, method: Method, model: ModelConfig, *, num_labels: int
) -> ParameterCounts:
    """Count what a method trains.

    LoRA adds r * (in + out) for every adapted linear (Hu et al. 2021, section 4.2).

    Raises:
        ModelError: If a pattern of the method matches nothing.
    """
    head = _head(shape, model, num_labels)
    base = shape.num_encoder + shape.num_head(num_labels)
    adapter = encoder = 0
    match method:
        case FullMethod():
            encoder = shape.num_encoder
        case UnfreezeMethod():
            encoder = sum(shape.tensors()[name] for name in unfrozen_names(shape, method))
        case HeadMethod():
            pass
        case _:
            targets = find_targets(shape, method)
            adapter = sum(_adapter(method, target) for target in targets.values())
    trainable = adapter + encoder + head
    return ParameterCounts(
        adapter=adapter,
        encoder=encoder,
        head=head,
        trainable=trainable,
        base=base,
        share=trainable / base,
    )


def unfrozen_names(shape: Shape, method: UnfreezeMethod) -> list[str]:
    """Return the encoder's tensors that `unfreeze` trains, under the checkpoint's own names.

    Raises:
        ModelError: If a pattern matches nothing, or the base has fewer blocks.
    """
    names = list(shape.tensors())
    if method.last_layers is not None:
        if method.last_layers > shape.n_layers:
            raise ModelError(
                f"method.last_layers: found {method.last_layers}; allowed: 1 to {shape.n_layers}, the base's blocks"
            )
        first = shape.n_layers - method.last_layers
        return [
            name
            for name in names
            if name.startswith("transformer.") and int(name.split(".")[2]) >= first
        ]
    found = set()
    for pattern in method.patterns or ():
        matching = fnmatch.filter(names, pattern)
        if not matching:
            raise ModelError(
                f"method.patterns: {pattern!r} matches no tensor of the encoder; they have names such as {names[-1]} "
                "(the head is governed by model.head)"
            )
        found.update(matching)
    return [name for name in names if name in found]


def _head(shape: Shape, model: ModelConfig, num_labels: int) -> int:
    classifier = (shape.dim + 1) * num_labels
    match model.head:
        case "full":
            return shape.num_head(num_labels)
        case "classifier":
            return classifier
        case "low_rank":
            return classifier + 2 * (model.head_r or DEFAULT_HEAD_R) * shape.dim + shape.dim


def _adapter(method: PeftMethod, target: Target) -> int:
    both = target.in_features + target.out_features
    match method:
        case LoraMethod():
            # DoRA trains one magnitude for each row of the weight.
            return target.rank * both + (target.out_features if method.use_dora else 0)
        case AdaloraMethod():
            return target.rank * (both + 1)
        case Ia3Method():
            return target.in_features if target.feed_forward else target.out_features
        case VeraMethod():
            return target.rank + target.out_features


def activation_bytes(shape: Shape, *, length: int, element_bytes: int) -> int:
    """Estimate the bytes saved for backward per padded token at one length.

    A block saves about eight tensors of `dim` (inputs of its linears and norms, q, k, v, dropout masks), two of
    `hidden_dim` (before and after GELU) and two rows of attention probabilities per head.
    """
    block = 8 * shape.dim + 2 * shape.hidden_dim + 2 * shape.n_heads * length
    return shape.n_layers * block * element_bytes


def micro_batch_tokens(
    shape: Shape, *, max_length: int, element_bytes: int, checkpointing: bool = False
) -> int:
    """Return the padded tokens one micro-batch may hold: a memory formula of shape, length and dtype, in 256s.

    Never less than one row of `max_length` tokens.
    """
    blocks = 1 if checkpointing else shape.n_layers
    per_token = (
        activation_bytes(shape, length=max_length, element_bytes=element_bytes)
        * blocks
        // shape.n_layers
    )
    tokens = min(MICRO_BATCH_BYTES // per_token, MAX_MICRO_BATCH_TOKENS) // 256 * 256
    return max(tokens, max_length)


def inference_tokens(device_type: str) -> int:
    """Return how many padded tokens a forward without gradients takes at once on a `cpu`, `cuda` or other device."""
    return {"cpu": CPU_INFERENCE_TOKENS, "cuda": CUDA_INFERENCE_TOKENS}.get(
        device_type, INFERENCE_TOKENS
    )
