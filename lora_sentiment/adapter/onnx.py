"""An ONNX file that answers token ids, by ONNX Runtime on the CPU.

Nothing here imports torch.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_sentiment.errors import AdapterError, ModelError
from lora_sentiment.models.engine import Engine
from lora_sentiment.models.token_limits import inference_tokens

PLAIN, QUANTISED = "onnx/model.onnx", "onnx/model_quantized.onnx"
"""Where text-embeddings-inference and transformers.js look; the second for transformers.js' dtype `q8`."""
INPUTS, OUTPUT = ("input_ids", "attention_mask"), "logits"
"""Names of the graph's inputs and output, those that transformers.js and text-embeddings-inference feed and read."""


def open_session(path: Path) -> Engine:
    """Open an ONNX classifier.

    It computes with one thread a usable core, or with as many as OMP_NUM_THREADS says.

    Raises:
        AdapterError: If the file is missing, cannot be read, or is no classifier of texts.
        ModelError: If ONNX Runtime is not installed.
    """
    runtime, faults = _import_runtime()
    if not path.is_file():
        raise AdapterError(
            f"{path}: no such file; `lora-sentiment export ADAPTER OUT --format onnx` writes one"
        )
    options = runtime.SessionOptions()
    options.intra_op_num_threads = count_threads()
    options.log_severity_level = 3  # errors alone: they are raised too
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except faults as error:
        raise AdapterError(
            f"{path}: ONNX Runtime cannot open it: {_first_line(error)}; export it again"
        ) from error
    inputs, outputs = (
        [i.name for i in session.get_inputs()],
        [o.name for o in session.get_outputs()],
    )
    if sorted(inputs) != sorted(INPUTS) or OUTPUT not in outputs:
        raise AdapterError(
            f"{path}: has the inputs {', '.join(inputs)} and the outputs {', '.join(outputs)}; a classifier of this "
            f"package has {', '.join(INPUTS)} and {OUTPUT}"
        )

    def answer(
        input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64] | None
    ) -> NDArray[np.float32]:
        mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
        try:
            (logits,) = session.run([OUTPUT], dict(zip(INPUTS, (input_ids, mask), strict=True)))
        except faults as error:
            raise AdapterError(
                f"{path}: ONNX Runtime cannot compute it: {_first_line(error)}"
            ) from error
        return np.asarray(logits, dtype=np.float32)

    return Engine(answer, inference_tokens("cpu"))


def count_threads() -> int:
    """Return OMP_NUM_THREADS where it is set, as for torch, else how many cores this process may use."""
    # A list is for nested parallel regions; the first is the outermost.
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    usable = (
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    return len(usable)


def _import_runtime() -> tuple[Any, tuple[type[Exception], ...]]:
    """Return ONNX Runtime and what it raises, which has no common root below Exception."""
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
    return next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    )
