"""Texts in a mapped file: what is written comes back, and nothing stays."""

import mmap
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lora_sentiment.data import batches
from lora_sentiment.data.batches import Encoded
from lora_sentiment.data.rows import Rows, load_data
from lora_sentiment.data.texts import Texts, store_texts
from lora_sentiment.errors import DataError
from lora_sentiment.recipe.data import DataConfig


@given(st.lists(st.text(max_size=30)))
@example(["half a pair: \udcff", ""])
def test_texts_come_back_as_they_were_written(texts):
    found = store_texts(texts)
    assert len(found) == len(texts)
    assert list(found) == found[:] == texts
    assert [found[i] for i in range(-len(texts), len(texts))] == texts * 2


def test_what_is_taken_keeps_its_order_and_can_be_taken_from_again():
    found = store_texts(map(str, range(2500))).take(np.arange(2499, -1, -1))
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
    assert rows.fingerprint == listed.fingerprint
    assert rows.digests.tolist() == listed.digests.tolist()


def test_no_name_holds_a_text(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    listed = []

    def texts():
        yield "secret"
        listed.extend(tmp_path.iterdir())

    assert store_texts(texts())[0] == "secret"
    assert listed == []


def test_no_room_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(
        DataError, match=r"none: the texts cannot be written to .*No such file.*TMPDIR"
    ):
        store_texts(["a"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device without room is Linux's")
@pytest.mark.parametrize("text", ["a", "a" * 10**5])
def test_room_that_ends_at_the_last_byte_is_the_same_message(tmp_path, monkeypatch, text):
    """A file is written to when it is flushed, and once more when it is closed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: Path("/dev/full").open("wb"))  # noqa: SIM115
    with pytest.raises(
        DataError,
        match=rf"{tmp_path}: the texts .*No space left on device; free some",
    ):
        store_texts([text])


def test_no_temporary_folder_at_all_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "none")])
    with pytest.raises(
        DataError, match=r"^the texts .*: No usable temporary directory .*set TMPDIR"
    ):
        store_texts(["a"])


class Counting(mmap.mmap):
    """A mapping that counts how often its pages are given back."""

    given_back = 0

    def madvise(self, option, *where):
        self.given_back += option == mmap.MADV_DONTNEED
        super().madvise(option, *where)


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="pages cannot be given back here")
def test_what_was_read_of_a_mapping_is_given_back(tmp_path):
    """Else a pass over all of it would show as a peak of memory."""
    path = tmp_path / "file"
    path.write_bytes(np.arange(5000, dtype="<i4").tobytes())
    with path.open("rb") as file:
        mapped = Counting(file.fileno(), 0, access=mmap.ACCESS_READ)
    ends = np.full(2500, 1)
    assert len(list(Texts(mapped, ends - 1, ends))) == 2500
    assert mapped.given_back == 3  # 1,000 texts at a time
    encoded = Encoded(
        np.frombuffer(mapped, dtype="<i4"), np.array([0, 2, 5000]), np.zeros(2), 0, pad_token_id=0
    )
    assert batches.pad(encoded, np.array([0]))[0].tolist() == [[0, 1]]
    assert mapped.given_back == 4
