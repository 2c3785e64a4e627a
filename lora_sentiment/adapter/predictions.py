"""`predictions.safetensors` of an adapter folder: the logits of what was judged, so that runs can be paired.

No text is in it, and nothing here imports torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lora_sentiment.errors import AdapterError

PREDICTIONS = "predictions.safetensors"


@dataclass(frozen=True)
class Predictions:
    """What a run answered for one judged role.

    Attributes:
        logits: Shape (num_rows, num_labels).
        labels: Shape (num_rows,).
        fingerprint: SHA-256 of the rows' texts and labels: only equal rows can be paired.
    """

    logits: NDArray[np.float32]
    labels: NDArray[np.int64]
    fingerprint: str

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether each row is right, shape (num_rows,)."""
        return np.asarray(self.logits.argmax(axis=1) == self.labels)


def save_predictions(folder: Path, predictions: Mapping[str, Predictions]) -> None:
    """Write the predictions of every role."""
    tensors: dict[str, NDArray[np.generic]] = {}
    for role, found in predictions.items():
        tensors |= {f"{role}.logits": found.logits, f"{role}.labels": found.labels.astype(np.int64)}
        # As bytes and not as metadata, whose keys come in any order, where the bytes of equal runs should be equal.
        tensors[f"{role}.rows_sha256"] = np.frombuffer(
            bytes.fromhex(found.fingerprint), dtype=np.uint8
        )
    save_file(tensors, folder / PREDICTIONS)
    # safetensors writes for the owner alone, where every other file here can be read by all.
    (folder / PREDICTIONS).chmod(0o644)


def load_predictions(folder: Path) -> dict[str, Predictions]:
    """Read the predictions of every role; none where the folder has no such file.

    Raises:
        AdapterError: If the file is malformed.
    """
    path = folder / PREDICTIONS
    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="numpy") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        roles = [name.removesuffix(".logits") for name in found if name.endswith(".logits")]
        return {
            role: Predictions(
                found[f"{role}.logits"],
                found[f"{role}.labels"],
                found[f"{role}.rows_sha256"].tobytes().hex(),
            )
            for role in roles
        }
    except (OSError, SafetensorError, KeyError) as error:
        raise AdapterError(f"{path}: cannot be read: {error}") from error
