"""Pairs of texts: read from every kind of source, joined by the tokenizer's template, cut, and refused."""

import json

import numpy as np
import pandas as pd
import pytest

from lora_sentiment.data.batches import TextEncoder, pad, split_types
from lora_sentiment.data.rows import load_data
from lora_sentiment.data.sources import make_source, mark_as_given
from lora_sentiment.errors import DataError, ModelError
from lora_sentiment.recipe.data import DataConfig
from tests.tiny_families import make_tokenizer

WORDS = ("good", "bad", "film", "book", "plot", "so", "it")
ROWS = [
    {"question": f"{WORDS[i % 7]} film", "answer": f"{WORDS[i % 5]} book {i}", "label": i % 2}
    for i in range(40)
]
COLUMNS = {"text_column": "question", "text_pair_column": "answer"}


def write_rows(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DataConfig(source=str(path), **COLUMNS)


def encode(model_type, rows, max_length):
    encoder = TextEncoder.of(
        make_tokenizer(model_type),
        max_length=max_length,
        truncation="head",
        reads_pairs=True,
        has_types=model_type == "bert",
    )
    return encoder, encoder.encode(rows)


@pytest.mark.parametrize("model_type", ["distilbert", "bert", "roberta", "deberta-v2"])
@pytest.mark.parametrize("max_length", [8, 11, 32])
def test_pairs_are_joined_and_cut_as_the_tokenizer_does_it(model_type, max_length, tmp_path):
    words = ["good", "bad", "film", "book", "plot", "so", "it", "was", "fine", "cold"]
    rows = []
    for first in range(1, 10):
        for second in range(1, 10, 2):
            pair = {"question": " ".join(words[:first]), "answer": " ".join(words[:second])}
            rows.append({**pair, "label": first % 2})
    data = load_data(write_rows(tmp_path / "d.jsonl", rows))
    encoder, encoded = encode(model_type, data.train, max_length)
    stock = make_tokenizer(model_type)(
        *map(list, zip(*data.train.texts, strict=True)),
        truncation=True,
        max_length=max_length,
        return_token_type_ids=True,
    )
    input_ids, _, types = pad(encoded, np.arange(len(encoded)))
    for row, length in enumerate(encoded.lengths):
        assert input_ids[row, :length].tolist() == stock["input_ids"][row]
        if model_type == "bert":
            assert types[row, :length].tolist() == stock["token_type_ids"][row]
    assert (types is not None) == (model_type == "bert")
    assert input_ids.max() < len(make_tokenizer(model_type))
    assert encoded.truncated == sum(
        encoder.count(ids) > encoder.room for ids in encoder.tokenise(data.train.texts)
    )


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "frame", "list"])
def test_pairs_come_from_every_kind_of_rows(kind, tmp_path):
    source = None
    config = write_rows(tmp_path / "d.jsonl")
    frame = pd.DataFrame(ROWS)
    if kind == "csv":
        frame.to_csv(tmp_path / "d.csv", index=False)
    elif kind == "parquet":
        frame.to_parquet(tmp_path / "d.parquet")
    elif kind != "jsonl":
        source = make_source({"train": frame if kind == "frame" else ROWS}, for_training=True)
        config = mark_as_given(config)
    if source is None:
        config = config.model_copy(update={"source": str(tmp_path / f"d.{kind}")})
    data = load_data(config, source=source)
    expected = load_data(write_rows(tmp_path / "d.jsonl"))
    assert data.train.texts[0] == expected.train.texts[0]
    assert isinstance(data.train.texts[0], tuple)
    assert data.train.fingerprint == expected.train.fingerprint


def test_both_texts_count_for_duplicates_leaks_and_fingerprints(tmp_path):
    same_question = [{**row, "question": "good film"} for row in ROWS]
    data = load_data(write_rows(tmp_path / "d.jsonl", same_question))
    assert len(np.unique(data.seen_texts)) == len(ROWS)
    moved = [{**row, "question": row["answer"], "answer": row["question"]} for row in ROWS]
    other = load_data(write_rows(tmp_path / "e.jsonl", moved))
    swapped = load_data(write_rows(tmp_path / "f.jsonl"))
    assert other.train.fingerprint != swapped.train.fingerprint


BROKEN = {
    "an empty second text": ({"answer": "  "}, "row 3: text is empty; column 'answer'"),
    "an empty first text": ({"question": ""}, "row 3: text is empty; column 'question'"),
    "a missing second text": ({"answer": None}, "row 3: text is missing; column 'answer'"),
    "a number": ({"answer": 3}, "row 3: text is int, not a string; column 'answer'"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_pair_is_told_by_row_and_column(change, message, tmp_path):
    rows = [dict(row) for row in ROWS]
    rows[2] |= change
    with pytest.raises(DataError) as caught:
        load_data(write_rows(tmp_path / "d.jsonl", rows))
    assert message in str(caught.value)
    dropped = write_rows(tmp_path / "d.jsonl", rows).model_copy(update={"on_bad_row": "drop"})
    assert load_data(dropped).counts["train"].kept == len(ROWS) - 1


def test_a_missing_column_of_the_second_text_is_told(tmp_path):
    config = write_rows(tmp_path / "d.jsonl").model_copy(update={"text_pair_column": "answers"})
    with pytest.raises(DataError, match=r"no column 'answers'.*data\.text_pair_column"):
        load_data(config)


def test_a_tokenizer_without_a_template_for_pairs_is_refused():
    tokenizer = make_tokenizer("bert")
    tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(ModelError, match="no template that joins a pair"):
        TextEncoder.of(tokenizer, max_length=16, truncation="head", reads_pairs=True)


def test_ids_of_several_adapters_hold_types_where_one_reads_pairs():
    encoder = TextEncoder.of(
        make_tokenizer("bert"), max_length=16, truncation="head", reads_pairs=True, has_types=True
    )
    (pair,) = encoder.tokenise([("good", "bad film")])
    single = np.array([2, 9, 3], dtype=np.int32)
    assert not encoder.pack([single]).has_types
    mixed = encoder.pack([single, encoder.frame(pair)])
    assert mixed.has_types
    _, types = split_types(mixed.input_ids)
    assert types.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1]
