import csv

import pytest
from accelerate import Accelerator

from lora_sentiment.errors import TrainingError
from lora_sentiment.training.trackers import CsvTracker, rewind


def test_every_logged_step_is_one_line_at_once(tmp_path):
    accelerator = Accelerator(log_with=[CsvTracker(tmp_path)])
    accelerator.init_trackers("x", config={"a": 1})
    accelerator.log({"loss": 0.5, "learning_rate": 0.1}, step=1)
    accelerator.log({"eval_accuracy": 0.9}, step=1)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["loss"] for row in rows] == ["0.5", ""]
    assert [row["eval_accuracy"] for row in rows] == ["", "0.9"]
    accelerator.end_training()


def test_going_on_neither_loses_nor_doubles_lines(tmp_path):
    tracker = CsvTracker(tmp_path)
    for step in (1, 2, 3):
        tracker.log({"loss": step / 10, "tokens": 1, "seconds": 0.1}, step=step)
    tracker.log({"eval_accuracy": 0.9}, step=2)
    tracker.log({"eval_accuracy": 0.8}, step=3)
    tracker.file.write("4,0.")  # stopped in the middle of a line
    tracker.finish()
    again = CsvTracker(tmp_path)
    again.rewind(3, evaluated=2)
    again.log({"eval_accuracy": 0.7}, step=3)
    again.sync()
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = [(row["step"], row["loss"], row["eval_accuracy"]) for row in csv.DictReader(file)]
    again.finish()
    assert rows == [
        ("1", "0.1", ""),
        ("2", "0.2", ""),
        ("3", "0.3", ""),
        ("2", "", "0.9"),
        ("3", "", "0.7"),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize(
    ("change", "steps"),
    [
        (lambda whole: whole + b"7,0.5,\xff\r\n", ["1", "2", "3"]),
        (
            lambda whole: whole + "\N{SUPERSCRIPT TWO},1,1,1,1,1,1,1,1,1\r\n".encode(),
            ["1", "2", "3"],
        ),
        (lambda whole: b"note,0\n".join(whole.partition(b"1,,")[::2]), ["2", "3"]),
        (lambda whole: b"step,ep", ["3"]),
    ],
    ids=["no UTF-8", "no step", "a line changed", "half a header"],
)
def test_lines_that_no_run_wrote_are_kept_beside_the_sound_ones(tmp_path, caplog, change, steps):
    tracker = CsvTracker(tmp_path)
    for step in (1, 2):
        tracker.log({"loss": step / 10}, step=step)
    tracker.finish()
    path, kept = tmp_path / "metrics.csv", tmp_path / "metrics.csv.damaged-2"
    (tmp_path / "metrics.csv.damaged-1").write_text("of an earlier time")
    damaged = change(path.read_bytes())
    path.write_bytes(damaged)
    again = CsvTracker(tmp_path)
    again.rewind(2, evaluated=2)
    again.log({"loss": 0.3}, step=3)
    again.finish()
    with path.open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == steps
    assert kept.read_bytes() == damaged
    assert (
        "metrics.csv: holds lines that no run wrote; it was copied to metrics.csv.damaged-2"
        in caplog.text
    )


def test_a_folder_of_its_name_is_one_message(tmp_path):
    (tmp_path / "metrics.csv").mkdir()
    with pytest.raises(
        TrainingError, match=r"metrics\.csv: cannot be written: Is a directory; once it can be"
    ):
        CsvTracker(tmp_path)


def test_tensorboard_shows_no_step_twice_after_going_on(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last in ((1, 5), (4, 6)):  # killed after 5, gone on from the checkpoint of 3
        accelerator = Accelerator(log_with=["tensorboard"], project_dir=tmp_path)
        accelerator.init_trackers("x")
        rewind(accelerator.trackers, first - 1, evaluated=first - 1)
        for step in range(first, last + 1):
            accelerator.log({"loss": step / 10}, step=step)
        accelerator.end_training()
    found = EventAccumulator(str(tmp_path / "x"))
    found.Reload()
    assert [event.step for event in found.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_a_disk_that_is_full_is_one_message(tmp_path, monkeypatch):
    tracker = CsvTracker(tmp_path)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_sentiment.training.trackers.os.fsync", full)
    with pytest.raises(
        TrainingError, match=r"metrics\.csv: cannot be written: No space left .* --resume goes on"
    ):
        tracker.sync()
    tracker.finish()
