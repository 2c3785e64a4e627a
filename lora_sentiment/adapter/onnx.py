"""Compute logits with an ONNX file, by ONNX Runtime on the CPU. This module imports no torch."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_sentiment.errors import AdapterError, ModelError
from lora_sentiment.models.engine import Engine
from lora_sentiment.models.token_limits import inference_tokens

PLAIN, QUANTISED = "onnx/model.onnx", "onnx/model_quantized.onnx"
"""The paths in which text-embeddings-inference and transformers.js look. `q8` of transformers.js is
the second."""
INPUTS, TYPES, OUTPUT = ("input_ids", "attention_mask"), "token_type_ids", "logits"
"""The names of inputs and output that transformers.js and text-embeddings-inference use. A file has
TYPES too if it reads pairs and its base knows types of tokens."""


def open_session(path: Path) -> Engine:
    """Open an ONNX classifier.

    It computes with one thread for each usable core, or with OMP_NUM_THREADS threads.

    Raises:
        AdapterError: If the file is missing, cannot be read, or is not a classifier of texts.
        ModelError: If ONNX Runtime is not installed.
    """
    runtime, faults = _import_runtime()
    if not path.is_file():
        raise AdapterError(
            f"{path}: no such file; `lora-sentiment export ADAPTER OUT --format onnx` writes one"
        )
    options = runtime.SessionOptions()
    options.intra_op_num_threads = count_threads()
    options.log_severity_level = 3  # errors only; they are raised too
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except faults as error:
        raise AdapterError(
            f"{path}: ONNX Runtime cannot open it: {_first_line(error)}; export it again"
        ) from error
    inputs = [tensor.name for tensor in session.get_inputs()]
    outputs = [tensor.name for tensor in session.get_outputs()]
    has_types = TYPES in inputs
    expected = [*INPUTS, TYPES] if has_types else list(INPUTS)
    if sorted(inputs) != sorted(expected) or OUTPUT not in outputs:
        raise AdapterError(
            f"{path}: has the inputs {', '.join(inputs)} and the outputs {', '.join(outputs)}; a "
            f"classifier of this package has {', '.join(INPUTS)} and {OUTPUT}"
        )

    def answer(
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64] | None,
        token_type_ids: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float32]:
        mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
        given = dict(zip(INPUTS, (input_ids, mask), strict=True))
        if has_types:
            given[TYPES] = np.zeros_like(mask) if token_type_ids is None else token_type_ids
        try:
            (logits,) = session.run([OUTPUT], given)
        except faults as error:
            raise AdapterError(
                f"{path}: ONNX Runtime cannot compute it: {_first_line(error)}"
            ) from error
        return np.asarray(logits, dtype=np.float32)

    return Engine(answer, inference_tokens("cpu"))


def count_threads() -> int:
    """Return OMP_NUM_THREADS if it is set, as torch does, else the number of usable cores."""
    # A list has one number for each level of nested parallel regions. The first is the outermost.
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _import_runtime() -> tuple[Any, tuple[type[Exception], ...]]:
    """Return ONNX Runtime and its exceptions, which have no common base class below Exception."""
    try:
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as state
    except ImportError as error:
        raise ModelError(
            f"ONNX needs an extra ({error}): pip install 'lora_sentiment[onnx]'"
        ) from error
    names = (
        "Fail",
        "InvalidArgument",
        "InvalidGraph",
        "InvalidProtobuf",
        "NoSuchFile",
        "NotImplemented",
    )
    return onnxruntime, tuple(getattr(state, name) for name in (*names, "RuntimeException"))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
