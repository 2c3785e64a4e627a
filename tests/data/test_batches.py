import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lora_sentiment.data.batches import TextEncoder, cut, make_batch, plan_epoch, shard
from lora_sentiment.data.rows import Rows

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(tiny_base):
    return AutoTokenizer.from_pretrained(tiny_base)


def rows_of(*texts):
    return Rows(list(texts), np.arange(len(texts)), np.arange(1, len(texts) + 1))


def test_a_short_text_is_encoded_as_the_tokenizer_does(tokenizer):
    encoded = TextEncoder.of(tokenizer, max_length=16, truncation="head").encode(
        rows_of("a good film")
    )
    assert encoded.input_ids.tolist() == tokenizer("a good film")["input_ids"]
    assert encoded.truncated == 0


def test_head_truncation_is_the_tokenizers_own(tokenizer):
    text = "a good film and so it was really a great plot"
    encoded = TextEncoder.of(tokenizer, max_length=8, truncation="head").encode(rows_of(text))
    assert encoded.input_ids.tolist() == tokenizer(text, truncation=True, max_length=8)["input_ids"]
    assert encoded.truncated == 1


def test_head_tail_keeps_the_first_quarter_and_the_last_three(tokenizer):
    text = "a b c d e f g h i j k l m n o p"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    encoded = TextEncoder.of(tokenizer, max_length=10, truncation="head_tail").encode(rows_of(text))
    assert encoded.input_ids.tolist() == [
        tokenizer.cls_token_id,
        *ids[:2],
        *ids[-6:],
        tokenizer.sep_token_id,
    ]


lengths_of = st.lists(st.integers(1, 60), min_size=1, max_size=120).map(
    lambda found: np.array(found, dtype=np.int64)
)


@given(lengths_of, st.integers(1, 9), st.integers(0, 3), st.integers(0, 3))
def test_an_epoch_holds_every_row_once(lengths, batch_size, seed, epoch):
    plan = plan_epoch(lengths, batch_size=batch_size, seed=seed, epoch=epoch)
    assert sorted(np.concatenate(plan).tolist()) == list(range(len(lengths)))
    assert sorted(map(len, plan), reverse=True)[: len(lengths) // batch_size] == [batch_size] * (
        len(lengths) // batch_size
    )


def test_epochs_differ_and_repeat():
    lengths = np.random.default_rng(0).integers(5, 500, 1000)
    plans = [plan_epoch(lengths, batch_size=32, seed=1, epoch=epoch) for epoch in (0, 1, 0)]
    assert [p.tolist() for p in plans[0]] == [p.tolist() for p in plans[2]]
    assert [p.tolist() for p in plans[0]] != [p.tolist() for p in plans[1]]


@pytest.mark.parametrize(
    "drawn",
    [
        np.minimum(np.random.default_rng(0).lognormal(5.3, 0.6, 20_000) + 8, 512),
        np.minimum(np.random.default_rng(0).exponential(10.3, 60_000) + 3, 66),
    ],
    ids=["like IMDB", "like SST-2"],
)
def test_buckets_pad_less_than_three_percent(drawn):
    lengths = drawn.astype(np.int64)
    steps = plan_epoch(lengths, batch_size=32, seed=0, epoch=0)
    padded = sum(
        len(part) * lengths[part].max()
        for step in steps
        for part in cut(step, lengths, max_tokens=4096)
    )
    assert padded / lengths.sum() < 1.03


@given(lengths_of, st.integers(8, 200))
def test_a_cut_holds_the_bound_and_every_row(lengths, max_tokens):
    index = np.arange(len(lengths))
    parts = cut(index, lengths, max_tokens=max_tokens)
    assert sorted(np.concatenate(parts).tolist()) == index.tolist()
    assert all(len(part) * lengths[part].max() <= max_tokens or len(part) == 1 for part in parts)


@given(lengths_of, st.integers(1, 4))
def test_shards_part_the_rows_and_their_work(lengths, num_processes):
    index = np.arange(len(lengths))
    shards = [
        shard(index, lengths, rank=rank, num_processes=num_processes)
        for rank in range(num_processes)
    ]
    assert sorted(np.concatenate(shards).tolist()) == index.tolist()
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_a_batch_is_padded_to_its_longest_row_and_masked(tokenizer):
    encoded = TextEncoder.of(tokenizer, max_length=16, truncation="head").encode(
        rows_of("a", "a good film")
    )
    batch = make_batch(encoded, np.array([1, 0]), device=CPU)
    assert batch.input_ids.shape == (2, 5)
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.input_ids[1, 3:].tolist() == [tokenizer.pad_token_id] * 2
    assert batch.labels.tolist() == [1, 0]
    assert batch.num_tokens == 8


def test_a_batch_of_equal_rows_has_no_mask(tokenizer):
    encoded = TextEncoder.of(tokenizer, max_length=16, truncation="head").encode(
        rows_of("a b", "c d")
    )
    assert make_batch(encoded, np.array([0, 1]), device=CPU).attention_mask is None
