"""The scripts beside the package."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def make_bert(**changes) -> BertModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = BertConfig(**sizes, num_attention_heads=4, max_position_embeddings=12, **changes)
    bert = BertModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for tensor in bert.parameters():  # no bias and no token type is zero
            tensor.normal_()
    return bert


def test_a_bert_in_distilberts_architecture_has_equal_outputs():
    bert = make_bert(hidden_act="relu")
    distilbert = load_script("bert_to_distilbert").convert(bert)
    inputs = {"input_ids": torch.randint(1, 50, (3, 12)), "attention_mask": torch.ones(3, 12)}
    inputs["attention_mask"][1, 7:] = 0
    with torch.no_grad():
        expected, found = bert(**inputs)[0], distilbert(**inputs)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [{"layer_norm_eps": 1e-5}, {"is_decoder": True}])
def test_a_bert_that_distilbert_cannot_equal_is_refused(changes):
    with pytest.raises(ValueError, match="is a decoder, or layer_norm_eps"):
        load_script("bert_to_distilbert").convert(make_bert(**changes))
