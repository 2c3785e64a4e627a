import numpy as np
import torch
from accelerate import Accelerator

from lora_sentiment.data.batches import encode
from lora_sentiment.data.rows import Rows
from lora_sentiment.model import inference
from lora_sentiment.model.base import load_base
from lora_sentiment.model.config import ModelConfig
from lora_sentiment.model.inference import make_engine, predict_logits
from tests.conftest import toy_rows


def test_sorted_batches_give_each_rows_own_logits_in_order(tiny_base, monkeypatch):
    monkeypatch.setattr(inference, "INFERENCE_TOKENS", 40)
    torch.manual_seed(0)
    base = load_base(ModelConfig(name=str(tiny_base), max_length=16), labels=("no", "yes"))
    texts = [text for text, _ in toy_rows(23)]
    rows = Rows(texts, np.zeros(23, dtype=np.int64), np.arange(23))
    encoded = encode(rows, tokenizer=base.tokenizer, max_length=16, truncation="head")
    model = base.model.train()
    logits = predict_logits(model, encoded, accelerator=Accelerator())
    assert model.training
    model.eval()
    # 1e-5: what is promised for fp32; another padded shape adds up in another order.
    for row, text in zip(logits, texts, strict=True):
        alone = model(**{"input_ids": base.tokenizer(text, return_tensors="pt")["input_ids"]}).logits[0]
        np.testing.assert_allclose(row, alone.detach().numpy(), atol=1e-5)


def test_a_cpu_takes_a_batch_in_parts_and_gives_each_row_its_own_logits(tiny_base, monkeypatch):
    monkeypatch.setattr(inference, "CPU_INFERENCE_TOKENS", 40)
    base = load_base(ModelConfig(name=str(tiny_base), max_length=64), labels=("no", "yes"))
    model, taken = base.model.eval(), []
    model.register_forward_pre_hook(
        lambda _, __, given: taken.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    input_ids = np.random.default_rng(0).integers(5, 60, (11, 16))
    mask = (np.arange(16) < np.arange(3, 14)[:, None]).astype(np.int64)
    found = make_engine(model)(input_ids, mask)
    # Two rows of 16 a part, each part cut to its own longest row.
    assert taken == [(2, 4), (2, 6), (2, 8), (2, 10), (2, 12), (1, 13)]
    whole = model(input_ids=torch.from_numpy(input_ids), attention_mask=torch.from_numpy(mask)).logits
    np.testing.assert_allclose(found, whole.detach().numpy(), atol=1e-5)
    assert make_engine(model)(np.full((2, 50), 7), None).shape == (2, 2)
    assert taken[-2:] == [(1, 50)] * 2
