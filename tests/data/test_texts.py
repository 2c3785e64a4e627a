"""Texts in a mapped file: what is written comes back, and nothing stays."""

import tempfile

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lora_sentiment.data.config import DataConfig
from lora_sentiment.data.rows import Rows, load_data
from lora_sentiment.data.texts import Texts, TextsWriter
from lora_sentiment.errors import DataError


def write(texts):
    writer = TextsWriter()
    for text in texts:
        writer.write(text)
    return writer.finish()


@given(st.lists(st.text(max_size=30)))
@example(["half a pair: \udcff", ""])
def test_texts_come_back_as_they_were_written(texts):
    found = write(texts)
    assert len(found) == len(texts)
    assert list(found) == found[:] == texts
    assert [found[i] for i in range(-len(texts), len(texts))] == texts * 2


def test_what_is_taken_keeps_its_order_and_can_be_taken_from_again():
    found = write(map(str, range(2500))).take(np.arange(2499, -1, -1))
    assert list(found) == [str(i) for i in range(2499, -1, -1)]
    assert found[1:9:3] == ["2498", "2495", "2492"]
    assert list(found.take(np.array([2, 0]))) == ["2497", "2499"]
    with pytest.raises(IndexError):
        found[2500]


def test_rows_of_a_source_lie_outside_memory_and_count_as_those_in_it(toy):
    rows = load_data(DataConfig(source=str(toy / "train.csv"))).train
    assert isinstance(rows.texts, Texts)
    assert isinstance(rows.take(np.array([3, 1])).texts, Texts)
    listed = Rows(list(rows.texts), rows.labels, rows.numbers)
    assert rows.fingerprint() == listed.fingerprint()
    assert rows.digests.tolist() == listed.digests.tolist()


def test_no_name_holds_a_text(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    writer = TextsWriter()
    writer.write("secret")
    assert list(tmp_path.iterdir()) == []
    assert writer.finish()[0] == "secret"


def test_no_room_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"none: the texts that were read cannot be put there: .*set TMPDIR"):
        write(["a"])
