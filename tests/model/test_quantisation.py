import pytest
import torch

from lora_sentiment.model.base import load_base
from lora_sentiment.model.config import ModelConfig
from lora_sentiment.model.quantisation import Quantisation, measure_quantisation

IDS = [[2, 5, 6, 3], [2, 9, 3]]


@pytest.mark.parametrize(("quantize", "most"), [("int8", 0.05), ("nf4", 0.5), ("fp4", 0.5)])
def test_a_quantised_base_is_smaller_and_near(tiny_base, quantize, most):
    config = ModelConfig(name=str(tiny_base), max_length=16, quantize=quantize, dtype="float32")
    base = load_base(config, labels=("a", "b"))
    found = measure_quantisation(
        base, config, labels=("a", "b"), input_ids=IDS, dtype=torch.float32, device=torch.device("cpu")
    )
    assert 0 < found.cls_relative_difference < most
    linears = 2 * (4 * 32 * 32 + 2 * 32 * 64)
    kept = linears if quantize == "int8" else linears // 2
    saved = found.unquantised_bytes - found.base_bytes
    scales = 4 * linears - kept - saved
    assert 0 < scales < 4000


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


@pytest.mark.parametrize(
    ("saved", "ratio", "helped"), [(10, 1.5, False), (10, 0.9, True), (200, 1.5, True), (0, 1.0, True)]
)
def test_the_verdict_says_plainly_when_it_did_not_help(saved, ratio, helped):
    found = Quantisation("nf4", True, 1000, 1000 + saved, ratio, 0.01)
    verdict = found.verdict(peak_memory_bytes=1000)
    assert verdict.startswith("it did not help here") != helped
    assert f"{ratio:.2f} times" in verdict
