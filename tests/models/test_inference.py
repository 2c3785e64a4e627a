import numpy as np
import torch
from accelerate import PartialState

from lora_sentiment.data.batches import Encoded, TextEncoder, pad
from lora_sentiment.data.rows import Rows
from lora_sentiment.fast.encoder import use_fast_encoder
from lora_sentiment.models import inference, token_limits
from lora_sentiment.models.engine import compute_logits
from lora_sentiment.models.inference import make_engine, predict_logits
from lora_sentiment.models.load import load_base
from lora_sentiment.models.token_limits import inference_tokens
from lora_sentiment.recipe.model import ModelConfig
from lora_sentiment.training.processes import make_accelerator
from tests.conftest import toy_rows


def test_sorted_batches_give_each_rows_own_logits_in_order(tiny_base, monkeypatch):
    monkeypatch.setattr(token_limits, "CPU_INFERENCE_TOKENS", 40)
    torch.manual_seed(0)
    base = load_base(ModelConfig(name=str(tiny_base), max_length=16), labels=("no", "yes"))
    texts = [text for text, _ in toy_rows(23)]
    rows = Rows(texts, np.zeros(23, dtype=np.int64), np.arange(23))
    encoded = TextEncoder.of(base.tokenizer, max_length=16, truncation="head").encode(rows)
    model = base.model.train()
    logits = predict_logits(model, encoded, accelerator=make_accelerator(PartialState(), "float32"))
    assert model.training
    model.eval()
    # 1e-5: what is promised for fp32; another padded shape adds up in another order.
    for row, text in zip(logits, texts, strict=True):
        alone = model(
            **{"input_ids": base.tokenizer(text, return_tensors="pt")["input_ids"]}
        ).logits[0]
        np.testing.assert_allclose(row, alone.detach().numpy(), atol=1e-5)


def shapes_taken(model):
    """The shapes of the batches that a model is given from now on."""
    taken = []
    model.register_forward_pre_hook(
        lambda _, __, given: taken.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    return taken


def test_a_cpu_is_given_no_more_than_it_takes_at_once(tiny_base, monkeypatch):
    monkeypatch.setattr(token_limits, "CPU_INFERENCE_TOKENS", 40)
    torch.manual_seed(0)
    base = load_base(ModelConfig(name=str(tiny_base), max_length=64), labels=("no", "yes"))
    lengths = np.array([13, 3, 16, 4, 50, 8])
    ids = np.random.default_rng(0).integers(5, 60, lengths.sum(), dtype=np.int32)
    encoded = Encoded(ids, np.r_[0, lengths.cumsum()], np.zeros(6, dtype=np.int64), 0, 0)
    model = base.model.eval()
    taken, engine = shapes_taken(model), make_engine(model)
    found = compute_logits(engine, encoded)
    assert taken == [(1, 50), (2, 16), (3, 8)]  # the longest alone, though it is longer
    taken.clear()
    np.testing.assert_allclose(
        predict_logits(model, encoded, accelerator=make_accelerator(PartialState(), "float32")),
        found,
        atol=1e-5,
    )
    assert taken == [(1, 50), (2, 16), (3, 8)]
    whole = engine.compute(*pad(encoded, np.arange(6)))
    np.testing.assert_allclose(found, whole, atol=1e-5)


def test_packed_rows_give_the_logits_of_padded_ones_in_the_rows_order(tiny_base, monkeypatch):
    monkeypatch.setattr(token_limits, "CPU_INFERENCE_TOKENS", 40)
    torch.manual_seed(0)
    model = load_base(
        ModelConfig(name=str(tiny_base), max_length=64), labels=("no", "yes")
    ).model.eval()
    lengths = np.array([13, 3, 16, 4, 50, 8])
    ids = np.random.default_rng(0).integers(5, 60, lengths.sum(), dtype=np.int32)
    encoded = Encoded(ids, np.r_[0, lengths.cumsum()], np.zeros(6, dtype=np.int64), 0, 0)
    assert make_engine(model).compute_rows is None
    expected = compute_logits(make_engine(model), encoded)
    assert use_fast_encoder(model, compute_dtype=torch.float32) is None
    monkeypatch.setattr(inference, "packs_rows", lambda model, device: True)
    taken, engine = shapes_taken(model), make_engine(model)
    np.testing.assert_allclose(compute_logits(engine, encoded), expected, atol=1e-5)
    assert taken == [(1, 56), (1, 32), (1, 16)]  # 50, then 16 + 13, then 8 + 4 + 3
    taken.clear()
    accelerator = make_accelerator(PartialState(), "float32")
    np.testing.assert_allclose(
        predict_logits(model, encoded, accelerator=accelerator), expected, atol=1e-5
    )
    assert sum(length for _, length in taken) <= 1.125 * lengths.sum() + 8 * len(taken)


def test_a_gpu_takes_more_at_once_than_a_cpu():
    assert inference_tokens("cpu") < inference_tokens("cuda")
