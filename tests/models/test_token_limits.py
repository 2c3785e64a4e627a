import pytest
from transformers import DistilBertConfig

from lora_sentiment.models.token_limits import micro_batch_tokens


@pytest.mark.parametrize(
    ("shape", "length", "element_bytes", "checkpointing", "tokens"),
    [
        ({}, 64, 4, False, 3072),
        ({}, 512, 4, False, 1792),
        ({}, 512, 4, True, 4096),
        ({}, 512, 2, False, 3584),
        ({"dim": 384, "hidden_dim": 1536}, 512, 4, False, 2304),
        ({"dim": 1024, "hidden_dim": 4096, "n_heads": 16}, 512, 4, False, 1280),
        ({"dim": 128, "hidden_dim": 512, "n_heads": 2, "n_layers": 2}, 64, 4, False, 4096),
        ({"n_layers": 500}, 512, 4, False, 512),
        ({"n_layers": 500}, 64, 4, True, 4096),
    ],
)
def test_the_cut_is_the_same_for_ever(shape, length, element_bytes, checkpointing, tokens):
    """It decides the bytes of an adapter: these numbers never change."""
    assert tokens == micro_batch_tokens(
        DistilBertConfig(**shape),
        max_length=length,
        element_bytes=element_bytes,
        checkpointing=checkpointing,
    )
