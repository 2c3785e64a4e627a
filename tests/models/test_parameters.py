import pytest
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from lora_sentiment.models.families import Shape
from lora_sentiment.models.load import load_base
from lora_sentiment.models.parameters import count_parameters, micro_batch_tokens
from lora_sentiment.models.wrap import make_trainable, trainable_tensors
from lora_sentiment.recipe.method import FullMethod, LoraMethod
from lora_sentiment.recipe.model import ModelConfig

CONFIG = ModelConfig(name="any")


def test_distilbert_base_at_rank_8_on_q_and_v():
    counts = count_parameters(
        Shape(), LoraMethod(r=8, target_modules=("q_lin", "v_lin")), CONFIG, num_labels=2
    )
    assert (counts.adapter, counts.head, counts.trainable, counts.base) == (
        147_456,
        592_130,
        739_586,
        66_955_010,
    )
    assert (
        str(counts) == "147,456 adapter + 592,130 head = 739,586 trainable (1.105% of 66,955,010)"
    )


def test_distilbert_base_at_rank_8_on_all_linears():
    counts = count_parameters(
        Shape(), LoraMethod(r=8, target_modules="all-linear"), CONFIG, num_labels=2
    )
    assert counts.adapter == 663_552


def test_the_closed_form_is_stock_distilberts_count():
    import torch

    with torch.device("meta"):
        model = DistilBertForSequenceClassification(DistilBertConfig(num_labels=2))
    counts = count_parameters(Shape(), FullMethod(kind="full"), CONFIG, num_labels=2)
    assert (
        counts.trainable == counts.base == sum(p.numel() for p in model.parameters()) == 66_955_010
    )


@pytest.mark.parametrize(
    "method",
    [
        LoraMethod(),
        LoraMethod(r=3, target_modules=("k_lin", "out_lin", "lin1", "lin2")),
        LoraMethod(target_modules="all-linear", use_rslora=True),
        FullMethod(kind="full"),
    ],
    ids=lambda m: m.kind,
)
@pytest.mark.parametrize("num_labels", [2, 5])
def test_the_closed_form_is_what_is_trained(tiny_base, method, num_labels):
    import torch

    base = load_base(
        ModelConfig(name=str(tiny_base), max_length=16), labels=tuple("abcde"[:num_labels])
    )
    counts = count_parameters(base.shape, method, CONFIG, num_labels=num_labels)
    model = make_trainable(base, method, CONFIG, dtype=torch.float32)
    assert sum(p.numel() for p in trainable_tensors(model).values()) == counts.trainable


def test_a_micro_batch_holds_a_row_and_shrinks_with_the_model():
    small, large = Shape(dim=128, hidden_dim=512), Shape(dim=1024, hidden_dim=4096)
    assert micro_batch_tokens(small, max_length=64, element_bytes=4) == 4096
    assert micro_batch_tokens(large, max_length=512, element_bytes=4) < 2048
    assert micro_batch_tokens(Shape(n_layers=500), max_length=512, element_bytes=4) == 512


def test_checkpointing_and_half_precision_allow_more():
    tokens = micro_batch_tokens(Shape(), max_length=512, element_bytes=4)
    assert micro_batch_tokens(Shape(), max_length=512, element_bytes=2) > tokens
    assert micro_batch_tokens(Shape(), max_length=512, element_bytes=4, checkpointing=True) > tokens
