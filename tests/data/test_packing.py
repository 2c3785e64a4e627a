"""Rows lie one after another in arrays of few sizes: each whole, none mixed with padding."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lora_sentiment.data.batches import Encoded, plan_epoch, shard
from lora_sentiment.data.packing import (
    CANDIDATES,
    MAX_SIZES,
    NO_LABEL,
    PLANNED_EPOCHS,
    PackPlan,
    choose_sizes,
    cut_packed,
    pack,
    pack_rows,
    plan_packing,
)
from lora_sentiment.training.backward import PaddedBackward

PAD = 0
lengths_of = st.lists(st.integers(1, 60), min_size=1, max_size=120).map(
    lambda found: np.array(found, dtype=np.int64)
)


def encoded_of(lengths):
    """Rows of ids that say which row and which place they are of; no id is the padding's."""
    ids = [100 * (row + 1) + place for row, length in enumerate(lengths) for place in range(length)]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    labels = np.arange(len(lengths), dtype=np.int64) % 3
    return Encoded(np.array(ids, dtype=np.int32), offsets, labels, 0, PAD)


def round_up(values, sizes):
    return sum(min(size for size in sizes if size >= value) for value in values)


def fewest_tokens(needed, limit):
    """What the best sizes give: every choice of at most `limit` multiples of eight is tried."""
    values = sorted({8 * math.ceil(value / 8) for value in needed})
    found = []
    for count in range(1, min(limit, len(values)) + 1):
        for others in itertools.combinations(values[:-1], count - 1):
            found.append(round_up(needed, [*others, values[-1]]))
    return min(found)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=12), st.integers(1, 5))
def test_no_other_sizes_round_up_less(needed, limit):
    sizes = choose_sizes(np.array(needed), limit=limit)
    assert round_up(needed, sizes) == fewest_tokens(needed, limit)


@given(st.lists(st.integers(1, 100_000), min_size=1, max_size=200), st.integers(1, 25))
def test_sizes_are_few_and_ascending_and_hold_every_array(needed, limit):
    sizes = choose_sizes(np.array(needed), limit=limit)
    assert 1 <= len(sizes) <= limit
    assert list(sizes) == sorted(set(sizes))
    assert all(size % 8 == 0 for size in sizes)
    assert sizes[-1] >= max(needed)
    assert sizes[-1] < max(needed) + 8 * math.ceil(max(needed) / (8 * CANDIDATES))


@given(lengths_of, st.integers(1, 200))
def test_a_packed_cut_keeps_the_order_and_the_bound(lengths, max_tokens):
    index = np.random.default_rng(0).permutation(len(lengths))
    parts = cut_packed(index, lengths, max_tokens=max_tokens)
    assert np.concatenate(parts).tolist() == index.tolist()
    assert all(lengths[part].sum() <= max_tokens or len(part) == 1 for part in parts)
    assert all(len(part) for part in parts)


def test_micro_batches_are_few_and_of_similar_size():
    lengths = np.full(32, 10)
    parts = cut_packed(np.arange(32), lengths, max_tokens=310)
    assert [len(part) for part in parts] == [16, 16]
    assert len(cut_packed(np.arange(32), lengths, max_tokens=320)) == 1
    assert cut_packed(np.arange(0), lengths, max_tokens=10) == []


def sequences(packed):
    """(ids, positions) of each sequence."""
    pairs = itertools.pairwise(packed.cu_seq_lens)
    return [(packed.input_ids[a:b].tolist(), packed.position_ids[a:b].tolist()) for a, b in pairs]


@given(
    lengths=st.lists(st.integers(1, 20), max_size=6),
    missing=st.integers(0, 3),
    left=st.integers(0, 60),
    num_spare=st.integers(1, 5),
)
def test_rows_are_laid_out_whole_and_padding_is_apart(lengths, missing, left, num_spare):
    rows = [np.arange(1, length + 1, dtype=np.int32) + 100 * i for i, length in enumerate(lengths)]
    num_rows = len(rows) + missing
    size = sum(lengths) + missing + left
    settings = {"num_rows": num_rows, "num_spare": num_spare, "max_length": 20, "pad_token_id": PAD}
    if left > 20 * num_spare:
        with pytest.raises(ValueError, match="do not fit"):
            pack_rows(rows, size=size, **settings)
        return
    packed = pack_rows(rows, size=size, **settings)
    assert len(packed.input_ids) == len(packed.position_ids) == size
    assert len(packed.cu_seq_lens) == num_rows + num_spare + 1
    assert (packed.cu_seq_lens[0], packed.cu_seq_lens[-1]) == (0, size)
    assert {packed.input_ids.dtype, packed.position_ids.dtype, packed.cu_seq_lens.dtype} == {
        np.dtype(np.int32)
    }
    found = sequences(packed)
    assert [ids for ids, _ in found[: len(rows)]] == [row.tolist() for row in rows]
    assert [ids for ids, _ in found[len(rows) : num_rows]] == [[PAD]] * missing
    assert all(set(ids) <= {PAD} for ids, _ in found[num_rows:])
    assert all(positions == list(range(len(positions))) for _, positions in found)
    assert max(len(ids) for ids, _ in found[len(rows) :]) <= 20
    assert packed.labels.tolist() == [NO_LABEL] * num_rows


@pytest.mark.parametrize(
    ("size", "num_rows", "message"),
    [
        (12, 1, "2 rows of 9 tokens do not fit into 1 rows of 12"),
        (8, 2, "2 rows of 9 tokens do not fit into 2 rows of 8"),
        (10, 4, "2 rows of 9 tokens do not fit into 4 rows of 10"),
        (40, 2, "2 rows of 9 tokens do not fit into 2 rows of 40"),
    ],
    ids=["too many rows", "too many tokens", "no room for absent rows", "too much padding"],
)
def test_rows_that_do_not_fit_are_refused(size, num_rows, message):
    rows = [np.arange(4, dtype=np.int32), np.arange(5, dtype=np.int32)]
    settings = {"num_spare": 3, "max_length": 10, "pad_token_id": PAD}
    with pytest.raises(ValueError, match=message):
        pack_rows(rows, size=size, num_rows=num_rows, **settings)


def test_no_size_is_found_for_too_many_tokens():
    plan = PackPlan((8, 16), num_rows=3, num_spare=1, max_length=8)
    assert plan.size_for(8, 3) == 8
    assert plan.size_for(7, 2) == 8
    assert plan.size_for(8, 2) == 16  # the absent row takes a token
    with pytest.raises(ValueError, match="17 tokens do not fit into 16"):
        plan.size_for(16, 2)


@given(
    lengths=lengths_of,
    batch_size=st.integers(1, 12),
    max_tokens=st.integers(1, 400),
    seed=st.integers(0, 5),
    num_processes=st.integers(1, 3),
    epoch=st.sampled_from([0, PLANNED_EPOCHS + 4]),
)
def test_every_row_of_an_epoch_is_packed_once(
    lengths, batch_size, max_tokens, seed, num_processes, epoch
):
    """Also in an epoch whose steps nobody looked at when sizes were chosen."""
    encoded = encoded_of(lengths)
    seen = []
    for rank in range(num_processes):
        plan = plan_packing(
            lengths,
            batch_size=batch_size,
            max_tokens=max_tokens,
            max_length=int(lengths.max()),
            seed=seed,
            num_epochs=9,
            rank=rank,
            num_processes=num_processes,
        )
        assert len(plan.sizes) <= MAX_SIZES
        for step in plan_epoch(lengths, batch_size=batch_size, seed=seed, epoch=epoch):
            own = shard(step, lengths, rank=rank, num_processes=num_processes)
            for part in cut_packed(own, lengths, max_tokens=max_tokens):
                packed = pack(encoded, part, plan=plan)
                assert len(packed.input_ids) in plan.sizes
                rows = sequences(packed)[: len(part)]
                expected = [[100 * (i + 1) + place for place in range(lengths[i])] for i in part]
                assert [ids for ids, _ in rows] == expected
                labels = encoded.labels[part].tolist()
                absent = [NO_LABEL] * (plan.num_rows - len(part))
                assert packed.labels.tolist() == labels + absent
                seen += part.tolist()
    assert sorted(seen) == list(range(len(lengths)))


def test_a_row_longer_than_a_cut_fits_on_a_process_that_had_none_in_the_planned_epochs():
    lengths = np.ones(201, dtype=np.int64)
    lengths[7] = 60
    settings = {"batch_size": 2, "seed": 0}
    plan = plan_packing(
        lengths, max_tokens=5, max_length=60, num_epochs=9, num_processes=2, **settings
    )
    # The last step of an epoch has one row, which the first process takes.
    last_rows = {}
    for epoch in range(400):
        steps = plan_epoch(lengths, epoch=epoch, **settings)
        last_rows[epoch] = next(int(step[0]) for step in steps if len(step) == 1)
    late = [epoch for epoch, row in last_rows.items() if row == 7]
    assert min(late) >= PLANNED_EPOCHS
    assert len(pack(encoded_of(lengths), np.array([7]), plan=plan).input_ids) >= 60


# Name, column of texts, most tokens of a row, most padding.
DATA = {
    "imdb": ("text", 512, 0.04),
    "ag_news": ("text", 128, 0.04),
    "sst2": ("sentence", 128, 0.07),
}


def count_tokens(tokenizer, texts):
    """Tokens of each text with [CLS] and [SEP]: a word is tokenised once for all texts."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    words = [text.split(" ") for text in texts]
    known = list(set().union(*words))
    found = backend.encode_batch_fast(known, add_special_tokens=False)
    counts = dict(zip(known, map(len, found), strict=True))
    return np.array([2 + sum(map(counts.__getitem__, row)) for row in words], dtype=np.int64)


@pytest.fixture(scope="module")
def real_lengths(shared):
    """Tokens of each training row, by name of the data."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/minilm-l6-distilbert")
    found = {}
    for name, (column, max_length, _) in DATA.items():
        texts = pq.read_table(shared / f"data/{name}/train.parquet")[column].to_pylist()
        some = texts[:: len(texts) // 50]
        whole = tokenizer(some, truncation=True, max_length=max_length)["input_ids"]
        found[name] = np.minimum(count_tokens(tokenizer, texts), max_length)
        assert found[name][:: len(texts) // 50].tolist() == list(map(len, whole))
    return found


@pytest.mark.shared
@pytest.mark.parametrize("name", DATA)
def test_real_data_take_twenty_shapes_and_little_padding(name, real_lengths):
    _, max_length, most_padding = DATA[name]
    lengths = real_lengths[name]
    plan = plan_packing(
        lengths,
        batch_size=32,
        max_tokens=32 * max_length,
        max_length=max_length,
        seed=42,
        num_epochs=PLANNED_EPOCHS,
    )
    for epoch in (0, PLANNED_EPOCHS):  # one that was looked at, and one that was not
        steps = plan_epoch(lengths, batch_size=32, seed=42, epoch=epoch)
        shapes = [(plan.num_rows, plan.size_for(int(lengths[i].sum()), len(i))) for i in steps]
        assert len(set(shapes)) <= 20
        cuts = [cut_packed(i, lengths, max_tokens=32 * max_length // 3) for i in steps]
        assert max(map(len, cuts)) <= 4  # as on a card that holds a third of the largest step
        padded = sum(size for _, size in shapes)
        assert padded / lengths.sum() - 1 <= most_padding


@pytest.mark.shared
@pytest.mark.parametrize("max_tokens", [10**6, 5461, 4096])
@pytest.mark.parametrize("name", DATA)
def test_padded_rows_take_few_shapes_within_the_limit_however_a_step_is_cut(
    name, max_tokens, real_lengths
):
    lengths = real_lengths[name]
    _, _, most_padding = DATA[name]
    steps = plan_epoch(lengths, batch_size=32, seed=42, epoch=0)
    longest = [*(int(lengths[step].max()) for step in steps), int(lengths.max())]
    backward = object.__new__(PaddedBackward)
    backward.encoded = SimpleNamespace(lengths=lengths)
    backward.lengths = (*choose_sizes(np.array(longest), multiple=1)[:-1], int(lengths.max()))
    shapes, padded = set(), 0
    for step in steps:
        parts = backward.cut(step, max_tokens=max_tokens)
        assert sorted(np.concatenate(parts)) == sorted(step)
        for part in parts:
            tokens = backward.count_tokens(part)
            assert tokens <= max_tokens
            shapes.add((len(part), tokens // len(part)))
            padded += tokens
    assert len(shapes) <= 40
    assert len({length for _, length in shapes}) <= 20
    assert padded / lengths.sum() - 1 <= most_padding
