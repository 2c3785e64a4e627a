"""The tracker that is always on: one line of metrics.csv for every logged step."""

import csv
import itertools
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, on_main_process

from lora_sentiment.errors import TrainingError

log = logging.getLogger("lora_sentiment")

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
    """An Accelerate tracker that appends to `metrics.csv`, flushed at every line.

    Lines of a run that was stopped stay; `rewind` removes those that it will write again.
    """

    name = "csv"
    requires_logging_directory = False
    main_process_only = True

    @on_main_process  # type: ignore[untyped-decorator]
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / "metrics.csv"
        with self._explain():
            self._open()

    def _open(self) -> None:
        self.file = self.path.open("a", newline="", encoding="utf-8")
        self.writer = csv.DictWriter(self.file, COLUMNS, restval="")
        if not self.file.tell():
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
        with self._explain():
            self.writer.writerow({"step": step, **values})
            self.file.flush()

    @on_main_process  # type: ignore[untyped-decorator]
    def sync(self) -> None:
        """Bring every line to disk, so that no checkpoint is ahead of them.

        Raises:
            TrainingError: If that fails, as `log` does.
        """
        with self._explain():
            self.file.flush()
            os.fsync(self.file.fileno())

    @on_main_process  # type: ignore[untyped-decorator]
    def rewind(self, step: int, *, evaluated: int) -> None:
        """Remove what a run that goes on will write again, and what was half written when it stopped.

        A file that holds anything else is first copied beside this one, with a warning; of it the sound lines stay.

        Args:
            step: The last optimizer step that stays.
            evaluated: The step of the last evaluation that stays.

        Raises:
            TrainingError: If that fails, as `log` does.
        """
        with self._explain():
            self.file.close()
            with self.path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
                header, *lines = file.readlines()
            if lines and not lines[-1].endswith("\n"):
                lines.pop()
            rows = (
                [_parse(line) for line in lines]
                if header.rstrip("\r\n") == ",".join(COLUMNS)
                else [{}]
            )
            if not all(rows):
                self._copy_damaged()
            kept = [
                row
                for row in rows
                if row and int(row["step"]) <= (step if row["loss"] else evaluated)
            ]
            aside = self.path.with_name("metrics.csv.aside")
            with aside.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(kept)
            aside.replace(self.path)
            self._open()

    def _copy_damaged(self) -> None:
        names = (
            self.path.with_name(f"metrics.csv.damaged-{number}") for number in itertools.count(1)
        )
        copy = next(path for path in names if not path.exists())
        shutil.copyfile(self.path, copy)
        log.warning(
            "%s: holds lines that no run wrote; it was copied to %s, and goes on with the others",
            self.path,
            copy.name,
        )

    @contextmanager
    def _explain(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"{self.path}: cannot be written: {error.strerror or error}; once it can be, the same command with "
                "--resume goes on from the last checkpoint"
            ) from error

    @on_main_process  # type: ignore[untyped-decorator]
    def finish(self) -> None:
        """Close the file."""
        self.file.close()


def _parse(line: str) -> dict[str, str]:
    """Return a line's fields by column; nothing where no run wrote it."""
    fields = line.rstrip("\r\n").split(",")
    sound = (
        line.isascii()
        and len(fields) == len(COLUMNS)
        and fields[0].isdigit()
        and len(fields[0]) < 16
    )
    return dict(zip(COLUMNS, fields, strict=True)) if sound else {}


def sync(trackers: Sequence[GeneralTracker]) -> None:
    """Bring what our own tracker wrote to disk, as `CsvTracker.sync` does."""
    for tracker in trackers:
        if isinstance(tracker, CsvTracker):
            tracker.sync()


def rewind(trackers: Sequence[GeneralTracker], step: int, *, evaluated: int) -> None:
    """Let no step stand twice in what a run that goes on writes again, as `CsvTracker.rewind` does.

    TensorBoard's files are only ever added to: it is told to hide what it has of later steps.
    """
    for tracker in trackers:
        if isinstance(tracker, CsvTracker):
            tracker.rewind(step, evaluated=evaluated)
        elif tracker.name == "tensorboard":
            tracker.writer.close()  # opened again, it writes purge_step first
            tracker.writer.purge_step = step + 1
