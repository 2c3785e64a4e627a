import csv

import pytest
from accelerate import Accelerator

from lora_sentiment.errors import TrainingError
from lora_sentiment.training import history
from lora_sentiment.training.history import (
    EvalPoint,
    History,
    MetricsFile,
    TrainPoint,
    hide_later_steps,
)


def train_point(step):
    return TrainPoint(step, step / 2, step / 10, 0.1, 1.0, tokens=9 * step, seconds=step / 4)


def eval_point(step):
    return EvalPoint(
        step,
        step / 2,
        {"accuracy": 0.9, "log_loss": 0.3},
        0.9,
        True,
        tokens=9 * step,
        seconds=step / 4,
    )


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_each_point_is_one_line_at_once(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.csv", History(), metrics=("accuracy", "log_loss"))
    metrics.write(train_point(1))
    metrics.write(eval_point(1))
    trained, evaluated = read(tmp_path / "metrics.csv")
    plain = {"step": "1", "epoch": "0.5", "tokens": "9", "seconds": "0.25"}
    assert {key: value for key, value in trained.items() if value} == {
        **plain, "loss": "0.1", "learning_rate": "0.1", "grad_norm": "1.0",
    }  # fmt: skip
    assert {key: value for key, value in evaluated.items() if value} == {
        **plain, "eval_accuracy": "0.9", "eval_log_loss": "0.3", "eval_best": "1",
    }  # fmt: skip
    metrics.close()


def test_a_resumed_run_writes_the_file_from_its_history_whatever_is_in_it(tmp_path):
    path = tmp_path / "metrics.csv"
    whole = MetricsFile(path, History(), metrics=("accuracy", "log_loss"))
    points = [train_point(1), train_point(2), eval_point(2), train_point(3)]
    for point in points:
        whole.write(point)
    whole.close()
    expected = path.read_bytes()
    path.write_bytes(expected + b"4,0.\xff")
    again = MetricsFile(
        path,
        History([train_point(1), train_point(2)], [eval_point(2)]),
        metrics=("accuracy", "log_loss"),
    )
    again.write(train_point(3))
    again.close()
    assert path.read_bytes() == expected


def test_a_folder_of_its_name_is_one_message(tmp_path):
    with pytest.raises(TrainingError, match=r"cannot be written: Is a directory; correct that"):
        MetricsFile(tmp_path, History(), metrics=("accuracy", "log_loss"))


def test_a_full_disk_is_one_message(tmp_path, monkeypatch):
    class FullDisk(csv.DictWriter):
        def writerow(self, row):
            raise OSError(28, "No space left on device")

    metrics = MetricsFile(tmp_path / "metrics.csv", History(), metrics=("accuracy", "log_loss"))
    monkeypatch.setattr(metrics, "writer", FullDisk(metrics.file, history.COLUMNS))
    with pytest.raises(
        TrainingError,
        match=r"metrics\.csv: cannot be written: No space left .*resume=auto resumes",
    ):
        metrics.write(train_point(1))
    metrics.close()


def test_tensorboard_shows_no_step_twice_after_resuming(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last in ((1, 5), (4, 6)):  # killed after 5, resumed from the checkpoint of 3
        accelerator = Accelerator(log_with=["tensorboard"], project_dir=tmp_path)
        accelerator.init_trackers("x")
        hide_later_steps(accelerator.trackers, first - 1)
        for step in range(first, last + 1):
            accelerator.log({"loss": step / 10}, step=step)
        accelerator.end_training()
    found = EventAccumulator(str(tmp_path / "x"))
    found.Reload()
    assert [event.step for event in found.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
