import numpy as np
import torch
from accelerate import Accelerator

from lora_sentiment.data.batches import encode
from lora_sentiment.data.rows import Rows
from lora_sentiment.model import inference
from lora_sentiment.model.base import load_base
from lora_sentiment.model.config import ModelConfig
from lora_sentiment.model.inference import predict_logits
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
