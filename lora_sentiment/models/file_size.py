"""The tensors of an adapter file by name and shape, and so its bytes, from shapes alone."""

import json
import math

from lora_sentiment.models.families import FP32, Shape
from lora_sentiment.models.parameters import unfrozen_names
from lora_sentiment.models.targets import Target, find_targets
from lora_sentiment.recipe.method import (
    LINEARS,
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


def adapter_bytes(shape: Shape, method: Method, *, num_labels: int) -> int:
    """Return the size of the safetensors file that a method leaves, in bytes.

    The values in fp32 behind the header: eight bytes of length, then JSON padded to a multiple of eight
    (https://github.com/huggingface/safetensors#format). The head is saved dense, whatever of it was trained.

    Raises:
        ModelError: If a pattern of the method matches nothing.
    """
    offset, header = 0, {}
    for name, sizes in sorted(saved_tensors(shape, method, num_labels=num_labels).items()):
        end = offset + FP32 * math.prod(sizes)
        header[name] = {"dtype": "F32", "shape": sizes, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":"))
    return 8 + -(-len(text) // 8) * 8 + offset


def saved_tensors(shape: Shape, method: Method, *, num_labels: int) -> dict[str, list[int]]:
    """Return the shape of every tensor in an adapter file, by its name there.

    Raises:
        ModelError: If a pattern of the method matches nothing.
    """
    head = {
        "pre_classifier.weight": [shape.dim, shape.dim],
        "pre_classifier.bias": [shape.dim],
        "classifier.weight": [num_labels, shape.dim],
        "classifier.bias": [num_labels],
    }
    match method:
        case FullMethod() | UnfreezeMethod():
            names = (
                list(shape.tensors())
                if isinstance(method, FullMethod)
                else unfrozen_names(shape, method)
            )
            return {f"distilbert.{name}": _encoder_shape(shape, name) for name in names} | head
        case HeadMethod():
            return head
        case _:
            found = {f"base_model.model.{name}": sizes for name, sizes in head.items()}
            for name, target in find_targets(shape, method).items():
                parts = _adapter_shapes(method, target)
                found |= {f"base_model.model.{name}.{part}": sizes for part, sizes in parts.items()}
            return found | shared_tensors(shape, method)


def shared_tensors(shape: Shape, method: Method) -> dict[str, list[int]]:
    """Return the shapes of what a method's adapters share and nothing trains: VeRA's fixed projections.

    Raises:
        ModelError: If a pattern of the method matches nothing.
    """
    if not isinstance(method, VeraMethod):
        return {}
    targets = find_targets(shape, method).values()
    widest_in, widest_out = (
        max(getattr(t, side) for t in targets) for side in ("in_features", "out_features")
    )
    return {"base_model.vera_A": [method.r, widest_in], "base_model.vera_B": [widest_out, method.r]}


def _adapter_shapes(method: PeftMethod, target: Target) -> dict[str, list[int]]:
    num_in, num_out, rank = target.in_features, target.out_features, target.rank
    match method:
        case LoraMethod():
            # Saved as plain LoRA of twice the rank where the start values came out of the base.
            rank *= 2 if method.changes_base else 1
            magnitude = {"lora_magnitude_vector": [num_out]} if method.use_dora else {}
            return {"lora_A.weight": [rank, num_in], "lora_B.weight": [num_out, rank], **magnitude}
        case AdaloraMethod():
            # What pruning leaves, on average.
            rank = method.target_r
            return {"lora_A": [rank, num_in], "lora_B": [num_out, rank], "lora_E": [rank, 1]}
        case Ia3Method():
            return {"ia3_l": [1, num_in] if target.feed_forward else [num_out, 1]}
        case VeraMethod():
            return {"vera_lambda_b": [num_out], "vera_lambda_d": [rank]}


def _encoder_shape(shape: Shape, name: str) -> list[int]:
    *_, module, part = name.split(".")
    if module in LINEARS:
        num_in, num_out = shape.linear(module)
        return [num_out, num_in] if part == "weight" else [num_out]
    rows = {
        "word_embeddings": shape.vocab_size,
        "position_embeddings": shape.max_position_embeddings,
    }
    return [rows[module], shape.dim] if module in rows else [shape.dim]
