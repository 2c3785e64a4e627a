"""Trace the ONNX graph of a classifier, and store it in 8 bits."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lora_sentiment.adapter.onnx import INPUTS, OUTPUT, TYPES
from lora_sentiment.errors import ModelError
from lora_sentiment.models.families import DISTILBERT, family_of

OPSET = 18
"""torch writes this version without conversion."""
IR_VERSION = 8
"""Version of the file format. ONNX Runtime 1.15 reads it, with OPSET. torch writes a newer one, which
ONNX Runtime before 1.18 refuses, but nothing in the graph needs that."""
BLOCK = 16
"""Neighbouring weights that share a scale in `compress_weights`."""


class FirstTokenBlock(nn.Module):
    """The last block of DistilBERT, computed for [CLS] alone: the head reads nothing else.

    Only the first token has a query and goes through the feed-forward. Every token has a key and a
    value. This saves about a seventh of a six-layer model's time.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, **_: object
    ) -> torch.Tensor:
        """Return the block's output for the first token.

        Args:
            hidden_states: (batch, length, dim).
            attention_mask: Added to the scores, (batch, 1, length or 1, length), or None without
                padding.

        Returns:
            (batch, 1, dim).
        """
        block, attention = self.block, self.block.attention

        def heads(projected: torch.Tensor) -> torch.Tensor:
            return projected.reshape(*projected.shape[:2], attention.n_heads, -1).transpose(1, 2)

        first = hidden_states[:, :1]
        keys, values = heads(attention.k_lin(hidden_states)), heads(attention.v_lin(hidden_states))
        scores = heads(attention.q_lin(first)) @ keys.transpose(2, 3) * attention.scaling
        if attention_mask is not None:
            scores = scores + attention_mask[:, :, :1]
        mixed = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
        attended = block.sa_layer_norm(attention.out_lin(mixed) + first)
        answer: torch.Tensor = block.output_layer_norm(block.ffn(attended) + attended)
        return answer


def check_packages() -> None:
    """Refuse an export to ONNX if a package for it is not installed.

    Raises:
        ModelError: Naming the packages.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ModelError(
            f"export to ONNX needs {', '.join(missing)}: pip install 'lora_sentiment[onnx]'"
        )


def write_graph(model: Any, path: Path, *, has_types: bool = False) -> None:
    """Write a classifier as one ONNX file. Its inputs may have any batch size and length.

    Args:
        model: A stock sequence classifier in fp32 and eval mode. It is left unchanged.
        path: The new file.
        has_types: Whether types of tokens are an input.

    Raises:
        ModelError: If torch cannot trace it.
    """
    import onnx  # late: of the extra `onnx`

    family = family_of(model.config)
    layers = model.get_submodule(f"{family.encoder}.{family.blocks}")
    last, attention = layers[-1], model.config._attn_implementation
    # An axis of size 1 would become a constant.
    example = torch.ones(2, 16, dtype=torch.int64)
    mask = torch.ones_like(example)
    mask[1, 8:] = 0
    inputs = dict(zip(INPUTS, (example, mask), strict=True))
    if has_types:
        inputs[TYPES] = 1 - mask
    try:
        if family is DISTILBERT:
            layers[-1] = FirstTokenBlock(last)
        # SDPA adds checks for fully masked rows, which ONNX Runtime does not fuse away.
        model.set_attn_implementation("eager")
        with _quiet():
            program = torch.onnx.export(
                model,
                kwargs=inputs,
                input_names=list(inputs),
                output_names=[OUTPUT],
                dynamic_shapes={name: {0: "batch", 1: "length"} for name in inputs},
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ModelError(f"torch cannot export this model to ONNX: {error}") from error
    finally:
        layers[-1] = last
        model.set_attn_implementation(attention)
    assert program is not None
    graph = program.model_proto
    graph.ir_version = IR_VERSION
    _remove_origins(graph)
    onnx.save(graph, path)


def quantise_graph(path: Path, quantised: Path) -> None:
    """Write an ONNX file again with int8 weights and dynamic quantisation.

    Each column of weights has its own scale.

    Weights take 7 of the 8 bits. On CPUs without VNNI, sums of 8-bit products saturate, and the
    answers would depend on the machine.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic  # late: as `onnx`

    with _quiet():
        quantize_dynamic(
            path, quantised, per_channel=True, reduce_range=True, weight_type=QuantType.QInt8
        )


def compress_weights(path: Path, compressed: Path) -> None:
    """Write an ONNX file again with its matrices as int8 and one scale for each BLOCK weights.

    Standard operators multiply both. ONNX Runtime does so once, when it opens the file, and then
    computes in fp32: as fast as before, and without rounding of activations.
    """
    import onnx  # late: of the extra `onnx`

    model = onnx.load(path)
    graph = model.graph
    restore = []
    for tensor in list(graph.initializer):
        weights = onnx.numpy_helper.to_array(tensor)
        if weights.dtype != np.float32 or weights.ndim != 2 or weights.size % BLOCK:
            continue
        name = tensor.name
        blocks = weights.reshape(-1, BLOCK)
        scales = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
        scales[scales == 0] = 1
        stored = {
            f"{name}_int8": np.rint(blocks / scales).astype(np.int8),
            f"{name}_scales": scales,
            f"{name}_shape": np.array(weights.shape, dtype=np.int64),
        }
        graph.initializer.remove(tensor)
        for key, values in stored.items():
            graph.initializer.append(onnx.numpy_helper.from_array(values, key))
        fp32, scaled = f"{name}_fp32", f"{name}_scaled"
        restore += [
            onnx.helper.make_node("Cast", [f"{name}_int8"], [fp32], to=onnx.TensorProto.FLOAT),
            onnx.helper.make_node("Mul", [fp32, f"{name}_scales"], [scaled]),
            onnx.helper.make_node("Reshape", [scaled, f"{name}_shape"], [name]),
        ]
    nodes = [*restore, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, compressed)


def _remove_origins(graph: Any) -> None:
    """Remove torch's notes about each node: paths of this machine, and shapes from before folding.

    The quantiser refuses those shapes, because they no longer fit.
    """
    del graph.graph.value_info[:], graph.metadata_props[:], graph.graph.metadata_props[:]
    for item in (
        *graph.graph.node,
        *graph.graph.input,
        *graph.graph.output,
        *graph.graph.initializer,
    ):
        del item.metadata_props[:]
        item.doc_string = ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the log and the warnings of the exporter and the quantiser."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
