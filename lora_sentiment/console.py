"""What every verb prints: tables and progress bars, by one process."""

import os
import sys
from collections.abc import Mapping
from typing import Any

import typer
from tqdm.auto import tqdm

LOG_SECONDS = 15.0


def make_bar(total: int, *, desc: str, unit: str, show: bool) -> Any:
    """Return a tqdm bar on standard error.

    Args:
        total: Units in all.
        desc: What is going on.
        unit: What is counted; tokens are shown in thousands.
        show: False for processes that do not speak.
    """
    interval = 0.2 if sys.stderr.isatty() else LOG_SECONDS
    return tqdm(
        total=total,
        desc=desc,
        unit=unit,
        unit_scale=unit == "tok",
        disable=not show,
        mininterval=interval,
    )


def show_table(
    columns: Mapping[str, list[str]], notes: list[str], *, left: tuple[str, ...]
) -> None:
    """Print columns side by side, and notes below."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in columns:
        table.add_column(heading, justify="left" if heading in left else "right", no_wrap=True)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    # A pipe has no width: nothing is cut there.
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 400)
    console.print(table)
    for note in notes:
        typer.echo(f"* {note}")


def is_main() -> bool:
    """Return whether this is the process that speaks."""
    return os.environ.get("RANK", "0") == "0"
