import csv

from accelerate import Accelerator

from lora_sentiment.training.trackers import CsvTracker


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
