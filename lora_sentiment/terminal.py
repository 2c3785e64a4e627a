"""How figures look on a terminal; the command line's verbs print through it."""

import sys
from collections.abc import Mapping
from typing import Any

import typer


def show_table(columns: Mapping[str, list[str]], notes: list[str], *, left: tuple[str, ...]) -> None:
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


def show_compared(compared: Mapping[str, Any]) -> None:
    """Print what a merge or export was compared on, and how far it was apart."""
    for what, blocks in compared.items():
        for rows, found in blocks.items():
            if not isinstance(found, dict):
                continue
            if "reason" in found:
                typer.echo(f"{what:<11} not compared on {rows}: {found['reason']}")
                continue
            accuracies = [f"{key.replace('_', ' ')} {found[key]:.4f}" for key in found if key.startswith("accuracy")]
            facts = [
                f"logits differ by {found['max_difference']:.2g} at most",
                f"{found['flips']:,} other labels",
                *accuracies,
            ]
            typer.echo(f"{what:<11} {found['rows']:,} {rows} rows: {', '.join(facts)}")


def show_scores(scores: Mapping[str, Any]) -> None:
    """Print metrics with their intervals."""
    from lora_sentiment.evaluation.statistics import show_interval

    width = max(map(len, scores))
    for metric, interval in scores.items():
        typer.echo(f"  {metric:<{width}} {show_interval(interval)}")
