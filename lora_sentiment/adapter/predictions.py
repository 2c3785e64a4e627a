"""Save and load `predictions.safetensors`, the logits for all judged rows.

`compare` pairs runs by it. The file holds no text. This module imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lora_sentiment.errors import AdapterError

PREDICTIONS = "predictions.safetensors"


@dataclass(frozen=True)
class Predictions:
    """The answers of a run to the rows of one judged role.

    Attributes:
        logits: Shape (num_rows, num_labels).
        labels: The labels of the rows, as their task has them.
        fingerprint: SHA-256 of the rows' texts and labels. Only equal rows can be paired.
    """

    logits: NDArray[np.float32]
    labels: NDArray[Any]
    fingerprint: str


def save_predictions(folder: Path, predictions: Mapping[str, Predictions]) -> None:
    """Write the predictions of every role."""
    tensors: dict[str, NDArray[np.generic]] = {}
    for role, own in predictions.items():
        tensors[f"{role}.logits"] = own.logits
        tensors[f"{role}.labels"] = own.labels
        # Not as metadata: safetensors writes its keys in any order, and the bytes must repeat.
        fingerprint = bytes.fromhex(own.fingerprint)
        tensors[f"{role}.rows_sha256"] = np.frombuffer(fingerprint, dtype=np.uint8)
    save_file(tensors, folder / PREDICTIONS)
    # safetensors makes the file readable for its owner alone. All other files here are readable
    # for everyone.
    (folder / PREDICTIONS).chmod(0o644)


def load_predictions(folder: Path) -> dict[str, Predictions]:
    """Read the predictions of every role. A folder without the file has none.

    Raises:
        AdapterError: If the file is malformed.
    """
    path = folder / PREDICTIONS
    if not path.is_file():
        return {}
    predictions = {}
    try:
        with safe_open(path, framework="numpy") as file:
            names = [name for name in file.keys() if name.endswith(".logits")]  # noqa: SIM118
            for name in names:
                role = name.removesuffix(".logits")
                predictions[role] = Predictions(
                    file.get_tensor(name),
                    file.get_tensor(f"{role}.labels"),
                    file.get_tensor(f"{role}.rows_sha256").tobytes().hex(),
                )
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path}: cannot be read: {error}") from error
    return predictions
