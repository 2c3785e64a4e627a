"""Token ids on disk: the same as those made in memory, whole or not there."""

import mmap
import os
import stat
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from lora_sentiment.data import batches, cache
from lora_sentiment.data.batches import TextEncoder, pad
from lora_sentiment.data.rows import Rows
from tests.conftest import toy_rows

TEXTS = [text for text, _ in toy_rows(2300)]


def rows_of(texts=TEXTS, label=0):
    return Rows(texts, np.full(len(texts), label), np.arange(len(texts)))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache, which takes rows however few."""
    monkeypatch.setattr(cache, "cache_folder", lambda: tmp_path / "ids")
    monkeypatch.setattr(batches, "CACHED_ROWS", 1)
    return tmp_path / "ids"


@pytest.fixture
def encoder(tiny_base):
    return TextEncoder.of(
        AutoTokenizer.from_pretrained(tiny_base), max_length=9, truncation="head_tail"
    )


@pytest.fixture
def in_memory(encoder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(batches, "CACHED_ROWS", 10**9)
        return encoder.encode(rows_of())


def same(one, other):
    arrays = ("input_ids", "offsets", "labels", "whole_lengths", "lengths")
    return one.truncated == other.truncated > 0 and all(
        getattr(one, name).tolist() == getattr(other, name).tolist() for name in arrays
    )


def test_kept_ids_are_those_made_in_memory_and_no_text_is_tokenised_twice(
    folder, encoder, in_memory, monkeypatch
):
    made = encoder.encode(rows_of())
    assert same(made, in_memory)
    monkeypatch.setattr(TextEncoder, "tokenise", None)
    kept = encoder.encode(rows_of())
    assert same(kept, in_memory)
    base = kept.input_ids.base
    assert isinstance(
        base.obj if isinstance(base, memoryview) else base, mmap.mmap
    )  # mapped, not read
    index = np.array([7, 2000, 3])
    assert pad(kept, index)[0].tolist() == pad(in_memory, index)[0].tolist()


def test_few_rows_are_not_kept(folder, encoder, monkeypatch):
    monkeypatch.setattr(batches, "CACHED_ROWS", len(TEXTS) + 1)
    encoder.encode(rows_of())
    assert not folder.exists()


def test_all_that_decides_the_ids_is_in_their_key(folder, encoder, tiny_base, monkeypatch):
    upper = AutoTokenizer.from_pretrained(tiny_base)
    upper.add_tokens(["good"])
    several = [
        (encoder, rows_of()),
        (encoder, rows_of(TEXTS[:-1])),
        (encoder, rows_of(TEXTS[::-1])),
        (
            TextEncoder.of(
                AutoTokenizer.from_pretrained(tiny_base), max_length=8, truncation="head_tail"
            ),
            rows_of(),
        ),
        (
            TextEncoder.of(
                AutoTokenizer.from_pretrained(tiny_base), max_length=9, truncation="head"
            ),
            rows_of(),
        ),
        (TextEncoder.of(upper, max_length=9, truncation="head_tail"), rows_of()),
    ]
    for number, (own, rows) in enumerate(several, start=1):
        own.encode(rows)
        assert len(list(folder.iterdir())) == number
    assert encoder.encode(rows_of(label=1)).labels.tolist() == [1] * len(TEXTS)  # labels do not
    assert len(list(folder.iterdir())) == number
    monkeypatch.setattr(batches, "LAYOUT", batches.LAYOUT + 1)
    encoder.encode(rows_of())
    assert len(list(folder.iterdir())) == number + 1


def test_other_ids_of_the_same_tokens_need_another_layout_number(encoder):
    """Where this fails, raise `LAYOUT`, and state here what the ids are now."""
    found = [
        replace(encoder, truncation=way)
        .frame(replace(encoder, truncation=way).truncate(list(range(20))))
        .tolist()
        for way in ("head", "head_tail")
    ]
    first, last = encoder.cls_token_id, encoder.sep_token_id
    ids = [[first, *range(7), last], [first, 0, *range(14, 20), last]]
    assert (batches.LAYOUT, found) == (1, ids)


def test_nobody_else_may_read_kept_ids(folder, encoder):
    old = os.umask(0o022)
    try:
        encoder.encode(rows_of())
    finally:
        os.umask(old)
    (place,) = folder.iterdir()
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in place.iterdir()] == [0o600] * 3


@pytest.mark.parametrize("damage", ["a byte", "half", "no card", "no ids", "no JSON"])
def test_damaged_ids_are_made_again_and_that_is_said(folder, encoder, in_memory, caplog, damage):
    encoder.encode(rows_of())
    (place,) = folder.iterdir()
    ids, card = place / "input_ids.i4", place / "card.json"
    content = bytearray(ids.read_bytes())
    if damage == "a byte":
        content[4000] ^= 1
        ids.write_bytes(content)
    elif damage == "half":
        ids.write_bytes(content[: len(content) // 2])
    elif damage == "no JSON":
        card.write_text("{")
    else:
        (card if damage == "no card" else ids).unlink()
    assert same(encoder.encode(rows_of()), in_memory)
    assert "cannot be used" in caplog.text
    caplog.clear()
    assert same(encoder.encode(rows_of()), in_memory)
    assert "cannot be used" not in caplog.text


def test_ids_that_were_half_written_are_made_again(folder, encoder, in_memory, monkeypatch):
    def stop(self, texts):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TextEncoder, "tokenise", stop)
        with pytest.raises(KeyboardInterrupt):
            encoder.encode(rows_of())
    assert list(folder.iterdir()) == []
    assert same(encoder.encode(rows_of()), in_memory)


def test_a_second_run_waits_for_the_ids_of_the_first(folder, encoder, in_memory, monkeypatch):
    started = threading.Event()
    tokenise = TextEncoder.tokenise
    calls = []

    def slowly(self, texts):
        calls.append(len(texts))
        started.set()
        time.sleep(0.2)
        return tokenise(self, texts)

    monkeypatch.setattr(TextEncoder, "tokenise", slowly)
    found = []
    first = threading.Thread(target=lambda: found.append(encoder.encode(rows_of())))
    first.start()
    assert started.wait(60)
    found.append(encoder.encode(rows_of()))
    first.join(60)
    assert all(same(own, in_memory) for own in found)
    assert len(found) == 2
    assert sum(calls) == len(TEXTS)
    assert len(list(folder.iterdir())) == 1


def test_names_that_go_while_old_ones_are_looked_for_are_no_matter(
    folder, encoder, in_memory, caplog
):
    folder.mkdir()
    (folder / "nowhere").symlink_to(folder / "no such")
    listed = Path.iterdir
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "iterdir", lambda self: [*listed(self), self / ".removed"])
        assert same(encoder.encode(rows_of()), in_memory)
    assert caplog.text == ""
    assert len(list(folder.iterdir())) == 2


def test_a_folder_that_may_not_be_looked_into_is_said_and_costs_nothing_else(
    folder, encoder, in_memory, caplog, monkeypatch
):
    def refuse(self, *arguments, **values):
        raise PermissionError(13, "Permission denied")

    for name in ("stat", "mkdir"):
        monkeypatch.setattr(Path, name, refuse)
    assert same(encoder.encode(rows_of()), in_memory)
    assert caplog.messages == [
        f"token ids cannot be kept in {folder} (Permission denied): they stay in memory"
    ]


def test_a_cache_that_cannot_be_written_is_said_and_costs_nothing_else(
    folder, encoder, in_memory, caplog
):
    folder.write_text("a file")
    assert same(encoder.encode(rows_of()), in_memory)
    assert "they stay in memory" in caplog.text


def test_ids_that_no_run_used_for_long_are_removed(folder, encoder):
    encoder.encode(rows_of())
    (old,) = folder.iterdir()
    before = time.time() - (cache.KEPT_DAYS + 1) * 24 * 3600
    os.utime(old, (before, before))
    encoder.encode(rows_of())  # used again, so it is not old
    encoder.encode(rows_of(TEXTS[:500]))
    assert old.exists()
    os.utime(old, (before, before))
    encoder.encode(rows_of(TEXTS[:400]))
    assert not old.exists()
