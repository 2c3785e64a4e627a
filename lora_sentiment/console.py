"""Tables and progress bars, which one process of a launch prints."""

import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm.auto import tqdm

LOG_SECONDS = 15.0
"""Seconds between two lines of a progress bar in a log file."""


class LogHandler(logging.StreamHandler[Any]):
    """Writes lines to standard error. On a terminal they stand above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        if not self.stream.isatty():
            super().emit(record)
            return
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


def make_bar(total: int, *, desc: str, unit: str, show: bool) -> Any:
    """Return a tqdm bar on standard error.

    Args:
        total: Number of units.
        desc: The work that is going on.
        unit: Name of a unit. Tokens (`tok`) are shown in thousands.
        show: False for processes that print nothing.
    """
    is_terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=desc,
        unit=unit,
        unit_scale=unit == "tok",
        disable=not show,
        mininterval=0.2 if is_terminal else LOG_SECONDS,
        # On a terminal, a bar below another one goes when it is full. A log file keeps its line.
        leave=None if is_terminal else True,
    )


def show_table(
    columns: Mapping[str, list[str]], notes: list[str], *, left: tuple[str, ...]
) -> None:
    """Print columns side by side, and notes below.

    Args:
        columns: Heading to cells.
        notes: One sentence each.
        left: Headings of the columns that are aligned to the left.
    """
    table = Table(box=None, pad_edge=False)
    for heading in columns:
        table.add_column(heading, justify="left" if heading in left else "right", no_wrap=True)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    # A pipe has no width, so nothing is cut there.
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 400)
    console.print(table)
    for note in notes:
        typer.echo(f"* {note}")


def show_rich(text: Text) -> None:
    """Print styled text."""
    Console(highlight=False).print(text)


def is_main() -> bool:
    """Return whether this is the process of a launch that prints."""
    return os.environ.get("RANK", "0") == "0"
