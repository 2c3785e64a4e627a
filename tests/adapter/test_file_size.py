import pytest
import torch
from safetensors import safe_open

from lora_sentiment.adapter.file_size import adapter_bytes, saved_shapes
from lora_sentiment.adapter.weights import (
    CHANGED_WEIGHTS,
    PEFT_WEIGHTS,
    save_as_plain_lora,
    save_weights,
)
from lora_sentiment.models.load import load_base
from lora_sentiment.models.wrap import make_head_dense, make_trainable
from lora_sentiment.recipe.method import METHODS
from lora_sentiment.recipe.model import ModelConfig

LABELS = ("a", "b", "c")


@pytest.mark.parametrize(
    ("method", "head"),
    [
        ({"kind": "lora"}, "full"),
        ({"kind": "lora", "target_modules": "all-linear", "rank_pattern": {"lin1": 3}}, "full"),
        ({"kind": "lora", "use_dora": True}, "full"),
        ({"kind": "lora", "init_lora_weights": "pissa", "r": 4}, "full"),
        ({"kind": "lora"}, "low_rank"),
        ({"kind": "adalora", "init_r": 4, "target_r": 4}, "full"),
        ({"kind": "ia3"}, "full"),
        ({"kind": "vera", "r": 5, "target_modules": "all-linear"}, "full"),
        ({"kind": "unfreeze", "patterns": ["*.bias", "embeddings.*"]}, "full"),
        ({"kind": "head"}, "classifier"),
        ({"kind": "full"}, "full"),
    ],
    ids=str,
)
def test_names_shapes_and_bytes_are_those_of_a_saved_adapter(tiny_base, tmp_path, method, head):
    config = ModelConfig(name=str(tiny_base), max_length=16, head=head)
    section = METHODS[method["kind"]](**method)
    base = load_base(config, labels=LABELS)
    model = make_trainable(base, section, config, dtype=torch.float32, num_steps=10)
    make_head_dense(model)
    for name, parameter in model.named_parameters():
        if "lora_E" in name:
            # A singular value of zero is not saved.
            parameter.data.fill_(1.0)
    if method.get("init_lora_weights") == "pissa":
        save_as_plain_lora(tmp_path, model, load_base(config, labels=LABELS), section, config)
    else:
        save_weights(tmp_path, model)
    file = next(
        tmp_path / name for name in (PEFT_WEIGHTS, CHANGED_WEIGHTS) if (tmp_path / name).is_file()
    )
    with safe_open(file, framework="pt") as opened:
        found = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118 - no mapping
    assert saved_shapes(base.config, section, config) == found
    assert adapter_bytes(base.config, section, config) == file.stat().st_size
