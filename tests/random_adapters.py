"""Adapters with random weights: made in a moment, and saved as training saves them."""

import json

import torch
from safetensors.torch import load_file, save_file

from lora_sentiment.adapter.folder import DataRecord, compute_probe, save
from lora_sentiment.files import hash_file, write_json
from lora_sentiment.models.load import load_base
from lora_sentiment.models.wrap import head_layers, make_trainable, trainable_tensors
from lora_sentiment.recipe.data import DataConfig
from lora_sentiment.recipe.model import ModelConfig

PROBE = [[2, 7, 9, 3], [2, 5, 3], [2, 20, 21, 22, 23, 24, 3]]


def save_random(
    folder,
    base,
    method,
    *,
    labels,
    probe=PROBE,
    record=None,
    spread=0.05,
    head=1.0,
    seed=1,
    max_length=16,
    task="single_label",
    **model,
):
    """Save an adapter whose trained tensors are random. Return the model and its base.

    `probe` holds the token ids of the probe's texts. `record` names other rows than those of a Hub
    data set `x/y`, whose task is `task`. `head` is a factor of the head's weights. Further options
    are the recipe's `model` keys.
    """
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    config = ModelConfig(name=str(base), max_length=max_length, **{"dtype": "float32", **model})
    loaded = load_base(config, labels=labels)
    trained = make_trainable(loaded, method, config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in trainable_tensors(trained).values():
            parameter.add_(torch.randn_like(parameter) * spread)
        for layer in head_layers(trained).values():
            layer.weight.mul_(head)
    save(
        folder,
        trained,
        base=loaded,
        labels=labels,
        model_config=config,
        method=method,
        data=record
        or DataRecord(
            config=DataConfig(source="x/y", task=task), train_sha256="0", validation_sha256="1"
        ),
        machine={"threads": 2},
        trained=compute_probe(trained, probe),
        tolerance=1e-4,
    )
    return trained, loaded


def reseal(folder):
    """Write the hashes of altered files into card.json, as a careful attacker would."""
    path = folder / "card.json"
    card = json.loads(path.read_text())
    card["files"] = {name: hash_file(folder / name) for name in card["files"]}
    write_json(path, card)


def alter_json(folder, name, **values):
    """Change top-level values of a JSON file, and reseal the folder."""
    path = folder / name
    write_json(path, json.loads(path.read_text()) | values)
    reseal(folder)


def alter_tensors(folder, change):
    """Let a function change the tensors of an adapter in place, and reseal the folder."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    reseal(folder)


def name_labels(number: int) -> tuple[str, ...]:
    """Return `number` labels: label-0, label-1 and so on."""
    return tuple(f"label-{i}" for i in range(number))
