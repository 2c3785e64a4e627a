"""Adapters with random weights, of any method and any labels, made in a moment and saved as training would."""

from pathlib import Path

import torch

from lora_sentiment.adapter.folder import DataRecord, compute_probe, save
from lora_sentiment.data.config import DataConfig
from lora_sentiment.model.base import load_base
from lora_sentiment.model.config import ModelConfig
from lora_sentiment.model.method_config import LoraMethod
from lora_sentiment.model.methods import make_trainable, trainable_tensors

PROBE = [[2, 7, 9, 3], [2, 5, 3], [2, 20, 21, 22, 23, 24, 3]]


def save_adapter(folder: Path, base: Path, *, method=None, num_labels=2, seed=0, max_length=16, **model) -> Path:
    """Save an adapter whose trained tensors are random; further options are the recipe's `model` keys."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    method = method or LoraMethod(r=4, lora_alpha=8)
    labels = tuple(f"label-{i}" for i in range(num_labels))
    config = ModelConfig(name=str(base), max_length=max_length, **model)
    loaded = load_base(config, labels=labels)
    trained = make_trainable(loaded, method, config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in trainable_tensors(trained).values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    save(
        folder,
        trained,
        base=loaded,
        labels=labels,
        model_config=config,
        method=method,
        data=DataRecord(config=DataConfig(source="x/y"), train_sha256="0", validation_sha256="1"),
        machine={},
        trained=compute_probe(trained, PROBE),
        tolerance=1e-3,
    )
    return folder
