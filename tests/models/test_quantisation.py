import shutil

import pytest
import torch
from transformers import DistilBertConfig, DistilBertModel

from lora_sentiment.models.load import load_base
from lora_sentiment.models.memory import Plan
from lora_sentiment.models.quantisation import Quantisation, _fill_batch, measure_quantisation
from lora_sentiment.recipe.method import LoraMethod
from lora_sentiment.recipe.model import ModelConfig

IDS = [[2, 5, 6, 3], [2, 9, 3]]


@pytest.fixture(scope="module")
def wide_base(tiny_base, tmp_path_factory):
    """As wide as a block with one scale: bitsandbytes 0.50 mixes up narrower rows on AVX-512."""
    folder = shutil.copytree(tiny_base, tmp_path_factory.mktemp("wide") / "base")
    torch.manual_seed(0)
    DistilBertModel(
        DistilBertConfig.from_pretrained(folder, dim=64, hidden_dim=128, initializer_range=0.1)
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("quantize", "most"), [("int8", 0.05), ("nf4", 0.5), ("fp4", 0.5)])
def test_a_quantised_base_is_smaller_and_near(wide_base, quantize, most):
    config = ModelConfig(name=str(wide_base), max_length=16, quantize=quantize, dtype="float32")
    base = load_base(config, labels=("a", "b"))
    plan = Plan(base.config, LoraMethod(), config)
    found = measure_quantisation(
        base,
        plan,
        rows=1000,
        length=16,
        batch_size=2000,
        input_ids=IDS,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    assert 0 < found.cls_relative_difference < most
    linears = 2 * (4 * 64 * 64 + 2 * 64 * 128)
    kept = linears if quantize == "int8" else linears // 2
    saved = found.unquantised_bytes - found.base_bytes
    scales = 4 * linears - kept - saved
    assert 0 < scales < linears // 8
    # Unquantised it would run on the fast engine, which keeps less for the backward pass.
    assert found.unquantised_peak_bytes < found.peak_bytes
    assert found.verdict.startswith("it did not help here")


@pytest.mark.parametrize("quantize", ["nf4", "fp4"])
def test_4_bit_weights_stay_what_they_are_on_every_cpu(tiny_base, monkeypatch, quantize):
    """With avx512_bf16, bitsandbytes would pack them again at the first answer. Training would fail."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    config = ModelConfig(
        name=str(tiny_base), max_length=16, quantize=quantize, double_quant=True, dtype="float32"
    )
    model = load_base(config, labels=("a", "b")).model
    ids = torch.tensor([[2, 5, 6, 3]])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    embeddings = model.get_input_embeddings().weight.requires_grad_(True)
    with torch.no_grad():
        answered = model.eval()(input_ids=ids).logits
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    logits = model(input_ids=ids).logits
    torch.testing.assert_close(logits, answered)
    logits.sum().backward()
    assert embeddings.grad.norm() > 0


def test_the_head_and_the_embeddings_are_not_quantised(tiny_base):
    plain = load_base(ModelConfig(name=str(tiny_base), max_length=16), labels=("a", "b"))
    torch.manual_seed(3)
    first = load_base(
        ModelConfig(name=str(tiny_base), max_length=16), labels=("a", "b")
    ).model.classifier.weight
    torch.manual_seed(3)
    base = load_base(
        ModelConfig(name=str(tiny_base), max_length=16, quantize="nf4"), labels=("a", "b")
    )
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


def test_a_batch_to_time_has_the_shape_of_a_micro_batch():
    assert _fill_batch(IDS, rows=2, length=5).tolist() == [
        [2, 5, 6, 3, 2],
        [9, 3, 2, 5, 6],
    ]
