"""A folder appears whole at its place, or not at all."""

import os

import pytest

from lora_sentiment.errors import AdapterError
from lora_sentiment.files import publish, replace_atomically, write_file_aside


def test_publishing_takes_a_free_place_or_replaces_when_told(tmp_path):
    for name, text in (("first", "1"), ("second", "2")):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "file").write_text(text)
    publish(tmp_path / "run/first", tmp_path / "out", overwrite=False)
    with pytest.raises(AdapterError, match="exists"):
        publish(tmp_path / "run/second", tmp_path / "out", overwrite=False)
    assert (tmp_path / "out/file").read_text() == "1"
    publish(tmp_path / "run/second", tmp_path / "out", overwrite=True)
    assert (tmp_path / "out/file").read_text() == "2"
    assert list((tmp_path / "run").iterdir()) == []


def test_everything_that_a_folder_holds_is_on_disk_before_it_is_renamed(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_ino), fsync(handle))
    )
    (tmp_path / "aside/onnx").mkdir(parents=True)
    (tmp_path / "aside/onnx/model.onnx").write_bytes(b"1")
    held = [path.stat().st_ino for path in (tmp_path / "aside", *(tmp_path / "aside").rglob("*"))]
    replace_atomically(tmp_path / "aside", tmp_path / "out")
    assert sorted(synced) == sorted([*held, tmp_path.stat().st_ino])


def test_a_file_written_aside_replaces_no_device_and_no_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError), write_file_aside(tmp_path / "pipe") as aside:
        aside.write_text("x")
    assert (tmp_path / "pipe").is_fifo()
    assert len(list(tmp_path.iterdir())) == 1
