"""A faster forward pass of DistilBERT, and its parts for GPUs. Other packages import from here.

It is optional: with `train.engine=stock`, transformers' own forward pass computes everything.
"""

from lora_sentiment.fast.attention import attention_backends
from lora_sentiment.fast.encoder import (
    FastForward,
    UnsupportedModelError,
    check_modules,
    has_packable_heads,
    takes_packed_rows,
    use_fast_encoder,
    use_stock_encoder,
    why_not_on,
)
from lora_sentiment.fast.fused import why_not_fused
from lora_sentiment.fast.graphs import GraphRunner
from lora_sentiment.fast.mixed import Parts, compute_mixed, compute_mixed_packed, read_parts
from lora_sentiment.fast.transfer import HostBuffers, pack_on_device

__all__ = [
    "FastForward",
    "GraphRunner",
    "HostBuffers",
    "Parts",
    "UnsupportedModelError",
    "attention_backends",
    "check_modules",
    "compute_mixed",
    "compute_mixed_packed",
    "has_packable_heads",
    "pack_on_device",
    "read_parts",
    "takes_packed_rows",
    "use_fast_encoder",
    "use_stock_encoder",
    "why_not_fused",
    "why_not_on",
]
