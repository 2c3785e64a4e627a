import pytest
import torch
from peft import PeftModel

from lora_sentiment.model.base import load_base
from lora_sentiment.model.config import FullMethod, LoraMethod, ModelConfig
from lora_sentiment.model.methods import frozen_tensors, make_trainable, trainable_tensors


@pytest.fixture
def base(tiny_base):
    torch.manual_seed(0)
    return load_base(ModelConfig(name=str(tiny_base), max_length=16), labels=("no", "yes"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_trains_adapters_and_head_in_fp32_and_freezes_the_rest(base, dtype):
    model = make_trainable(base, LoraMethod(r=4), dtype=dtype)
    assert isinstance(model, PeftModel)
    trainable = trainable_tensors(model)
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    assert {p.dtype for p in frozen_tensors(model).values()} == {dtype}
    kinds = {name.split(".")[-3] if "lora_" in name else name.split(".")[2] for name in trainable}
    assert kinds == {"lora_A", "lora_B", "pre_classifier", "classifier"}


@pytest.mark.parametrize(("use_rslora", "expected"), [(False, 4.0), (True, 8.0)])
def test_the_update_is_scaled_as_peft_does(base, use_rslora, expected):
    model = make_trainable(base, LoraMethod(r=4, lora_alpha=16, use_rslora=use_rslora), dtype=torch.float32)
    q_lin = model.base_model.model.distilbert.transformer.layer[0].attention.q_lin
    assert q_lin.scaling["default"] == expected


def test_only_the_named_linears_are_adapted(base):
    model = make_trainable(base, LoraMethod(target_modules=("k_lin", "lin2")), dtype=torch.float32)
    adapted = {name.split(".lora_A")[0].rsplit(".", 1)[1] for name in trainable_tensors(model) if "lora_A" in name}
    assert adapted == {"k_lin", "lin2"}


def test_full_trains_everything_in_fp32(base):
    model = make_trainable(base, FullMethod(kind="full"), dtype=torch.bfloat16)
    assert frozen_tensors(model) == {}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_new_adapter_changes_no_answer(base):
    ids = torch.tensor([[2, 5, 6, 3]])
    before = base.model.eval()(input_ids=ids).logits
    model = make_trainable(base, LoraMethod(), dtype=torch.float32).eval()
    assert torch.equal(model(input_ids=ids).logits, before)
