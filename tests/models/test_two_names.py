"""One encoder under DistilBERT's names and under BERT's: equal hidden states, equal gradients."""

import subprocess
import sys

import pytest
import torch

from lora_sentiment.models.load import load_base
from lora_sentiment.models.wrap import make_trainable, trainable_tensors
from lora_sentiment.recipe.method import LoraMethod
from lora_sentiment.recipe.model import ModelConfig

pytestmark = pytest.mark.shared
NAMES = {
    "distilbert.transformer.layer": "bert.encoder.layer",
    "attention.q_lin": "attention.self.query",
    "attention.v_lin": "attention.self.value",
}
LENGTHS = (40, 13, 128)


@pytest.fixture(scope="module")
def models(shared, tmp_path_factory):
    """The same encoder under both names, each with LoRA of the same values on query and value."""
    folder = tmp_path_factory.mktemp("bert") / "base"
    script = shared / "models/to_bert.py"
    subprocess.run([sys.executable, str(script), str(folder)], check=True, capture_output=True)
    found = []
    for place in (shared / "models/minilm-l6-distilbert", folder):
        torch.manual_seed(0)
        base = load_base(ModelConfig(name=str(place), max_length=128), labels=("no", "yes"))
        model = make_trainable(base, LoraMethod(), ModelConfig(name="any"), dtype=torch.float32)
        found.append(model.eval())
    old, new = found
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainable_tensors(old).items():
            if ".lora_" in name:
                parameter.normal_(std=0.02, generator=generator)
                new.get_parameter(rename(name)).copy_(parameter)
    return old, new


def rename(name):
    for before, after in NAMES.items():
        name = name.replace(before, after)
    return name


def encode(model):
    """Return the last hidden states of rows of several lengths, padded."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = torch.randint(1000, 30000, (length,), generator=generator)
        mask[row, :length] = 1
    encoder = getattr(model.base_model.model, model.base_model.model.base_model_prefix)
    hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return hidden, mask


def test_the_last_hidden_states_are_equal(models):
    with torch.no_grad():
        (old, mask), (new, _) = (encode(model) for model in models)
    assert (old - new)[mask.bool()].abs().max() <= 1e-5


def test_the_gradients_of_a_function_of_cls_are_equal(models):
    old, new = models
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(len(LENGTHS), 384, generator=generator)
    for model in models:
        model.zero_grad()
        (encode(model)[0][:, 0] * weights).tanh().sum().backward()
    names = [name for name in trainable_tensors(old) if ".lora_" in name]
    assert len(names) == 2 * 2 * 6
    for name in names:
        expected, found = old.get_parameter(name).grad, new.get_parameter(rename(name)).grad
        assert expected.norm() > 0
        assert (found - expected).norm() <= 1e-4 * expected.norm(), name
