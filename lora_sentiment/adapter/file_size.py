"""The bytes of an adapter file before it is written, from the model that would be saved."""

import json
import math
from typing import Any

from lora_sentiment.adapter.weights import get_saved_tensors
from lora_sentiment.models.sizes import make_meta_model
from lora_sentiment.models.wrap import make_head_dense
from lora_sentiment.recipe.method import AdaloraMethod, LoraMethod, Method
from lora_sentiment.recipe.model import ModelConfig


def adapter_bytes(config: Any, method: Method, model: ModelConfig) -> int:
    """Return the size of the safetensors file that a method leaves, in bytes.

    The file has eight bytes of length, a header in JSON padded to a multiple of eight, and the
    values in fp32 (https://github.com/huggingface/safetensors#format).

    Args:
        config: The base's config; its `num_labels` sizes the head.
        method: The recipe's `method` section.
        model: The recipe's `model` section.

    Raises:
        ModelError: If the method does not fit the base.
    """
    offset = 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, shape in sorted(saved_shapes(config, method, model).items()):
        end = offset + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8 + offset


def saved_shapes(config: Any, method: Method, model: ModelConfig) -> dict[str, list[int]]:
    """Return the shape of every tensor in an adapter file, by its name there.

    Raises:
        ModelError: If the method does not fit the base.
    """
    plain = model.model_copy(update={"quantize": "none", "double_quant": False})
    wrapped = make_meta_model(config, _as_saved(method), plain)
    make_head_dense(wrapped)
    return {name: list(tensor.shape) for name, tensor in get_saved_tensors(wrapped).items()}


def _as_saved(method: Method) -> Method:
    """Return the method whose tensors have the shapes that this one saves."""
    if isinstance(method, AdaloraMethod):
        # Pruning leaves this rank on average.
        return method.model_copy(update={"init_r": method.target_r})
    if isinstance(method, LoraMethod) and method.changes_base:
        # Saved as plain LoRA of twice the rank.
        ranks = {name: 2 * rank for name, rank in method.rank_pattern.items()}
        return method.model_copy(
            update={"r": 2 * method.r, "rank_pattern": ranks, "init_lora_weights": True}
        )
    return method
