import copy
import dataclasses

import pytest
import torch
from peft import PeftModel

from lora_sentiment.errors import ModelError
from lora_sentiment.fast.encoder import use_fast_encoder
from lora_sentiment.models.families import DISTILBERT
from lora_sentiment.models.load import load_base
from lora_sentiment.models.wrap import (
    frozen_tensors,
    head_layers,
    make_trainable,
    penalty,
    trainable_tensors,
)
from lora_sentiment.recipe.method import (
    AdaloraMethod,
    FullMethod,
    HeadMethod,
    LoraMethod,
    UnfreezeMethod,
)
from lora_sentiment.recipe.model import ModelConfig

CONFIG = ModelConfig(name="any")


@pytest.fixture
def base(tiny_base):
    torch.manual_seed(0)
    return load_base(ModelConfig(name=str(tiny_base), max_length=16), labels=("no", "yes"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_trains_adapters_and_head_in_fp32_and_freezes_the_rest(base, dtype):
    model = make_trainable(base, LoraMethod(r=4), CONFIG, dtype=dtype)
    assert isinstance(model, PeftModel)
    trainable = trainable_tensors(model)
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    assert {p.dtype for p in frozen_tensors(model).values()} == {dtype}
    kinds = {name.split(".")[-3] if "lora_" in name else name.split(".")[2] for name in trainable}
    assert kinds == {"lora_A", "lora_B", "pre_classifier", "classifier"}


@pytest.mark.parametrize(("use_rslora", "expected"), [(False, 4.0), (True, 8.0)])
def test_the_update_is_scaled_as_peft_does(base, use_rslora, expected):
    model = make_trainable(
        base, LoraMethod(r=4, lora_alpha=16, use_rslora=use_rslora), CONFIG, dtype=torch.float32
    )
    q_lin = model.base_model.model.distilbert.transformer.layer[0].attention.q_lin
    assert q_lin.scaling["default"] == expected


def test_only_the_named_linears_are_adapted(base):
    model = make_trainable(
        base, LoraMethod(target_modules=("k_lin", "lin2")), CONFIG, dtype=torch.float32
    )
    adapted = {
        name.split(".lora_A")[0].rsplit(".", 1)[1]
        for name in trainable_tensors(model)
        if "lora_A" in name
    }
    assert adapted == {"k_lin", "lin2"}


def test_full_trains_everything_in_fp32(base):
    model = make_trainable(base, FullMethod(kind="full"), CONFIG, dtype=torch.bfloat16)
    assert frozen_tensors(model) == {}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_new_adapter_changes_no_answer(base):
    ids = torch.tensor([[2, 5, 6, 3]])
    before = base.model.eval()(input_ids=ids).logits
    model = make_trainable(base, LoraMethod(), CONFIG, dtype=torch.float32).eval()
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            UnfreezeMethod(kind="unfreeze", last_layers=3),
            "last_layers: found 3; allowed: 1 to 2",
        ),
        (
            UnfreezeMethod(kind="unfreeze", patterns=("classifier.*",)),
            "matches no tensor of the encoder",
        ),
        (AdaloraMethod(kind="adalora", tinit=2, tfinal=3), "leave no step of 5 to prune in"),
    ],
)
def test_a_method_that_does_not_fit_the_base_is_refused(base, method, message):
    with pytest.raises(ModelError, match=message):
        make_trainable(base, method, CONFIG, dtype=torch.float32, num_steps=5)


def test_unfreeze_trains_what_it_names_and_the_head(base):
    method = UnfreezeMethod(
        kind="unfreeze", patterns=("transformer.layer.1.ffn.*", "*.LayerNorm.bias")
    )
    names = set(trainable_tensors(make_trainable(base, method, CONFIG, dtype=torch.bfloat16)))
    ffn = {
        f"distilbert.transformer.layer.1.ffn.{name}.{part}"
        for name in ("lin1", "lin2")
        for part in ("weight", "bias")
    }
    head = {
        f"{name}.{part}" for name in ("pre_classifier", "classifier") for part in ("weight", "bias")
    }
    assert names == ffn | head | {"distilbert.embeddings.LayerNorm.bias"}


@pytest.mark.parametrize(
    "pattern",
    [
        "*.bias",
        "*norm.weight",
        "*.LayerNorm.*",
        "embeddings.word_embeddings.*",
        "embeddings.position_embeddings.*",
    ],
)
def test_what_is_trained_of_a_bf16_base_gets_the_gradients_of_fp32(base, pattern):
    method = UnfreezeMethod(kind="unfreeze", patterns=(pattern,))
    ids = torch.tensor([[2, 5, 6, 7, 3], [2, 9, 8, 4, 3]])
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = make_trainable(
            dataclasses.replace(base, model=copy.deepcopy(base.model)), method, CONFIG, dtype=dtype
        )
        assert use_fast_encoder(model.eval(), compute_dtype=dtype) is None
        model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
        found.append(
            {name: p.grad for name, p in trainable_tensors(model).items() if "k_lin" not in name}
        )
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        assert found[1][name].dtype == torch.float32
        assert (found[1][name] - expected).norm() <= 0.1 * expected.norm(), name


def test_a_low_rank_head_starts_as_the_identity_where_it_is_new(base):
    config = ModelConfig(name="any", head="low_rank", head_r=2)
    model = make_trainable(base, HeadMethod(kind="head"), config, dtype=torch.float32)
    x = torch.randn(3, 32)
    torch.testing.assert_close(model.pre_classifier(x), x)


def test_a_head_of_the_checkpoint_is_kept(base):
    weight = base.model.pre_classifier.weight.detach().clone()
    trained = dataclasses.replace(base, new_layers=())
    config = ModelConfig(name="any", head="classifier")
    model = make_trainable(trained, LoraMethod(), config, dtype=torch.float32)
    assert torch.equal(head_layers(model)["pre_classifier"].weight, weight)


def test_a_rank_above_the_head_is_refused(base):
    with pytest.raises(ModelError, match="head_r: found 40; allowed: 1 to 32"):
        make_trainable(
            base,
            LoraMethod(),
            ModelConfig(name="any", head="low_rank", head_r=40),
            dtype=torch.float32,
        )


def test_adalora_pays_for_factors_that_are_not_orthogonal(base):
    method = AdaloraMethod(kind="adalora", orth_reg_weight=0.5)
    model = make_trainable(base, method, CONFIG, dtype=torch.float32)
    with torch.no_grad():
        for name, factor in trainable_tensors(model).items():
            if ".lora_A." in name or ".lora_B." in name:
                torch.nn.init.orthogonal_(factor)
    assert penalty(model, method).item() == pytest.approx(0, abs=1e-4)
    with torch.no_grad():
        for name, factor in trainable_tensors(model).items():
            if ".lora_A." in name:
                factor.mul_(2**0.5)
    # ||2 I - I|| of twelve rows is sqrt(12), for one factor of every two.
    assert penalty(model, method).item() == pytest.approx(0.5 * 12**0.5 / 2, rel=1e-4)
    assert penalty(model, LoraMethod()) is None


@pytest.mark.parametrize(
    "pattern", [r".*attention.*", r".*\.layer\.0.*", r".*q_lin|.*embeddings.*"]
)
def test_a_regular_expression_adapts_linears_and_nothing_else(base, pattern):
    model = make_trainable(base, LoraMethod(target_modules=pattern), CONFIG, dtype=torch.float32)
    adapted = {
        name.split(".lora_A")[0].rpartition(".")[2]
        for name in trainable_tensors(model)
        if ".lora_A." in name
    }
    assert adapted <= set(DISTILBERT.linear_names)
    assert "q_lin" in adapted


def test_a_frozen_head_layer_stays_in_fp32(base):
    model = make_trainable(
        base, LoraMethod(), ModelConfig(name="any", head="classifier"), dtype=torch.bfloat16
    )
    assert {p.dtype for layer in head_layers(model).values() for p in layer.parameters()} == {
        torch.float32
    }


def test_adalora_in_fp16_is_refused(base):
    with pytest.raises(ModelError, match="fp16's loss scaling skips steps"):
        make_trainable(
            base, AdaloraMethod(kind="adalora"), CONFIG, dtype=torch.float16, num_steps=9
        )
