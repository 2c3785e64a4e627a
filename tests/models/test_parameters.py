import pytest
import torch
from transformers import DistilBertConfig

from lora_sentiment.models.load import load_base
from lora_sentiment.models.sizes import count_parameters, make_meta_model
from lora_sentiment.models.wrap import make_trainable
from lora_sentiment.recipe.method import METHODS
from lora_sentiment.recipe.model import ModelConfig

CONFIG = ModelConfig(name="any")


def count(method, config=CONFIG, **shape):
    section = METHODS[method["kind"]](**method)
    return count_parameters(make_meta_model(DistilBertConfig(**shape), section, config))


@pytest.mark.parametrize(
    ("method", "adapter", "encoder"),
    [
        ({"kind": "lora"}, 147_456, 0),
        ({"kind": "lora", "target_modules": "all-linear"}, 663_552, 0),
        ({"kind": "lora", "use_dora": True}, 156_672, 0),
        ({"kind": "lora", "init_lora_weights": "pissa", "rank_pattern": {"q_lin": 4}}, 110_592, 0),
        ({"kind": "lora", "init_lora_weights": "orthogonal"}, 147_456, 0),
        ({"kind": "adalora"}, 221_328, 0),
        ({"kind": "ia3"}, 27_648, 0),
        ({"kind": "vera"}, 12_288, 0),
        ({"kind": "unfreeze", "last_layers": 1}, 0, 7_087_872),
        ({"kind": "head"}, 0, 0),
        ({"kind": "full"}, 0, 66_362_880),
    ],
    ids=str,
)
def test_the_documented_counts_of_distilbert_base(method, adapter, encoder):
    counts = count(method)
    assert (counts.adapter, counts.encoder, counts.head) == (adapter, encoder, 592_130)
    assert counts.trainable == adapter + encoder + 592_130
    assert counts.base == 66_955_010


def test_counts_in_one_line():
    assert (
        str(count({"kind": "lora"}))
        == "147,456 adapter + 592,130 head = 739,586 trainable (1.105% of 66,955,010)"
    )


@pytest.mark.parametrize(
    ("head", "trained"), [("full", 1122), ("classifier", 66), ("low_rank", 66 + 512 + 32)]
)
def test_a_head_that_is_trained_in_part_has_a_dense_base(head, trained):
    shape = {"dim": 32, "n_layers": 1, "hidden_dim": 64, "n_heads": 2}
    counts = count({"kind": "head"}, ModelConfig(name="any", head=head), **shape)
    assert counts.trainable == counts.head == trained
    assert counts.base == count({"kind": "full"}, **shape).trainable


@pytest.mark.parametrize("kind", ["none", "int8", "nf4"])
def test_a_loaded_base_has_the_counts_of_one_without_values(tiny_base, kind):
    config = ModelConfig(name=str(tiny_base), max_length=16, quantize=kind)
    base = load_base(config, labels=tuple("abcde"))
    method = METHODS["lora"]()
    expected = count_parameters(make_meta_model(base.config, method, config))
    wrapped = make_trainable(base, method, config, dtype=torch.float32)
    assert count_parameters(wrapped) == expected


def test_making_a_model_without_values_draws_no_random_numbers():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    count({"kind": "lora", "init_lora_weights": "orthogonal"})
    assert torch.rand(1) == expected
