import pytest
import torch

from lora_sentiment.model.base import load_base
from lora_sentiment.model.config import ModelConfig
from lora_sentiment.model.memory import Plan
from lora_sentiment.model.method_config import LoraMethod
from lora_sentiment.model.quantisation import Cut, Quantisation, measure_quantisation

IDS = [[2, 5, 6, 3], [2, 9, 3]]


@pytest.mark.parametrize(("quantize", "most"), [("int8", 0.05), ("nf4", 0.5), ("fp4", 0.5)])
def test_a_quantised_base_is_smaller_and_near(tiny_base, quantize, most):
    config = ModelConfig(name=str(tiny_base), max_length=16, quantize=quantize, dtype="float32")
    base = load_base(config, labels=("a", "b"))
    plan = Plan(base.shape, LoraMethod(), config, num_labels=2, evaluation_tokens=1024, fast=False)
    found = measure_quantisation(
        base,
        plan,
        engine="auto",
        cut=Cut(rows=1000, length=16, batch_size=2000),
        input_ids=IDS,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    assert 0 < found.cls_relative_difference < most
    linears = 2 * (4 * 32 * 32 + 2 * 32 * 64)
    kept = linears if quantize == "int8" else linears // 2
    saved = found.unquantised_bytes - found.base_bytes
    scales = 4 * linears - kept - saved
    assert 0 < scales < 4000
    # Unquantised it would run on the fast engine, which keeps less for the backward pass.
    assert found.unquantised_peak_bytes < found.peak_bytes
    assert found.verdict.startswith("it did not help here")


def test_the_head_and_the_embeddings_are_not_quantised(tiny_base):
    plain = load_base(ModelConfig(name=str(tiny_base), max_length=16), labels=("a", "b"))
    torch.manual_seed(3)
    first = load_base(ModelConfig(name=str(tiny_base), max_length=16), labels=("a", "b")).model.classifier.weight
    torch.manual_seed(3)
    base = load_base(ModelConfig(name=str(tiny_base), max_length=16, quantize="nf4"), labels=("a", "b"))
    assert torch.equal(base.model.classifier.weight, first)
    assert base.model.pre_classifier.weight.dtype == torch.float32
    words = "distilbert.embeddings.word_embeddings.weight"
    assert torch.equal(base.model.get_parameter(words), plain.model.get_parameter(words))
    assert base.sha256 == plain.sha256


@pytest.mark.parametrize(("peak", "helped"), [(900, True), (1000, False), (1200, False)])
def test_the_verdict_says_plainly_when_it_did_not_help(peak, helped):
    verdict = Quantisation("nf4", True, 100, 400, peak, 1000, 1.5, 0.01).verdict
    assert verdict.startswith("it did not help here") != helped
    assert "1.50 times" in verdict
