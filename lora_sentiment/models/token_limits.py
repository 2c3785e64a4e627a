"""How many tokens are computed at once. Importing this file imports no torch.

The limits are formulas and not measurements: the cut into micro-batches decides the bytes of an
adapter, so it must be the same on every machine.
"""

from typing import Any

from lora_sentiment.models.families import family_of

MICRO_BATCH_BYTES = 1 << 30
"""Bytes of activations that one micro-batch may save for the backward pass."""
MAX_MICRO_BATCH_TOKENS = 4096
"""A larger micro-batch is no faster on a CPU: its buffers outgrow the caches and what glibc keeps
between uses."""
INFERENCE_TOKENS = 8192
"""Padded tokens of one forward pass without gradients."""
CUDA_INFERENCE_TOKENS = 32768
"""The same on a CUDA device: computing the kernels then takes longer than launching them."""
CPU_INFERENCE_TOKENS = 1024
"""The same on a CPU. Larger buffers outgrow its caches, and glibc returns buffers of 32 MiB to the
kernel at every free."""


def micro_batch_tokens(
    config: Any, *, max_length: int, element_bytes: int, checkpointing: bool = False
) -> int:
    """Return the padded tokens of one micro-batch.

    It is a multiple of 256, or one row of `max_length` tokens. The formula counts what a block
    saves for each token: about eight tensors of the hidden size (inputs of linears and norms,
    queries, keys, values, dropout masks), two of the feed-forward network's width (before and after
    GELU), and two rows of attention probabilities for each head.

    Args:
        config: The base's config.
        max_length: Tokens of the longest text.
        element_bytes: Bytes of the compute dtype.
        checkpointing: Whether activations are recomputed, so that one block's are held at a time.
    """
    width = getattr(config, family_of(config).width)
    block = 8 * config.hidden_size + 2 * width + 2 * config.num_attention_heads * max_length
    num_blocks = 1 if checkpointing else config.num_hidden_layers
    token_bytes: int = num_blocks * block * element_bytes
    tokens = min(MICRO_BATCH_BYTES // token_bytes, MAX_MICRO_BATCH_TOKENS) // 256 * 256
    return max(tokens, max_length)


def inference_tokens(device_type: str) -> int:
    """Return the padded tokens of one forward pass without gradients on a type of device."""
    if device_type == "cpu":
        return CPU_INFERENCE_TOKENS
    if device_type == "cuda":
        return CUDA_INFERENCE_TOKENS
    return INFERENCE_TOKENS
