"""The tracker that is always on: one line of metrics.csv for every logged step."""

import csv
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, on_main_process

COLUMNS = (
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "seconds",
    "eval_accuracy",
    "eval_log_loss",
    "eval_best",
)


class CsvTracker(GeneralTracker):  # type: ignore[misc]
    """An Accelerate tracker that appends to `metrics.csv`, flushed at every line."""

    name = "csv"
    requires_logging_directory = False
    main_process_only = True

    @on_main_process  # type: ignore[untyped-decorator]
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.file = (folder / "metrics.csv").open("w", newline="", encoding="utf-8")
        self.writer = csv.DictWriter(self.file, COLUMNS, restval="")
        self.writer.writeheader()

    @property
    def tracker(self) -> Any:
        """The csv writer."""
        return self.writer

    @on_main_process  # type: ignore[untyped-decorator]
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Do nothing: recipe.yaml holds the configuration."""

    @on_main_process  # type: ignore[untyped-decorator]
    def log(self, values: dict[str, Any], step: int | None, **_: Any) -> None:
        """Write one line; an empty field is a value that was not measured at this step."""
        self.writer.writerow({"step": step, **values})
        self.file.flush()

    @on_main_process  # type: ignore[untyped-decorator]
    def finish(self) -> None:
        """Close the file."""
        self.file.close()
