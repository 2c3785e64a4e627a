"""The command line: `lora-sentiment VERB`. The only room that prints."""

import json
import logging
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from lora_sentiment.data.config import report_roles
from lora_sentiment.errors import LoraSentimentError
from lora_sentiment.model.parameters import show_parameters
from lora_sentiment.recipe import Recipe, make_schema

app = typer.Typer(
    name="lora-sentiment",
    help="Fine-tune DistilBERT classifiers with LoRA, and judge them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of recipe keys, values in YAML.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@app.command()
def train(recipe: RecipeArgument, overrides: Overrides = None, as_json: Json = False) -> None:
    """Train a recipe and save its adapter. Under a launcher: accelerate launch -m lora_sentiment.train RECIPE."""
    loaded = Recipe.load(recipe, overrides or ())
    from lora_sentiment.train import train as run_train

    run = run_train(loaded)
    if not run.report:
        return
    if as_json:
        typer.echo(json.dumps(run.report))
        return
    parameters = run.report["parameters"]
    typer.echo(f"adapter     {run.adapter}")
    typer.echo(f"parameters  {show_parameters(parameters)}; {parameters['adapter_bytes']:,} bytes saved")
    if "quantisation" in run.report:
        typer.echo(f"quantised   {run.report['quantisation']['verdict']}")
    for role in report_roles(run.report):
        typer.echo(f"{role} (95 % intervals)")
        _show_scores(run.report[role])


@app.command()
def evaluate(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    source: Annotated[
        str | None, typer.Option(help="Judge on this file or Hub data set instead of the recorded one.")
    ] = None,
    split: Annotated[
        str, typer.Option(help="A judged role, such as test, or validation; of --source a split's own name.")
    ] = "test",
    base: Annotated[str | None, typer.Option(help="Where to find the base, if not where the card says.")] = None,
    dtype: Annotated[str, typer.Option(help="Compute dtype: auto, float32, bfloat16 or float16.")] = "auto",
    as_json: Json = False,
) -> None:
    """Score an adapter, rebuilt from its folder alone, its base checked by hash."""
    from lora_sentiment.evaluate import evaluate as run_evaluate

    found = run_evaluate(adapter, source=source, split=split, base=base, dtype=dtype)
    if not _is_main():
        return
    if as_json:
        typer.echo(json.dumps(found.as_dict()))
        return
    typer.echo(f"{found.split}: {found.num_rows:,} rows, 95 % intervals")
    _show_scores({name: interval.as_dict() for name, interval in found.scores.items()})


@app.command()
def validate(recipe: RecipeArgument, overrides: Overrides = None, as_json: Json = False) -> None:
    """Check a recipe without reading weights or data, and show it with its defaults."""
    loaded = Recipe.load(recipe, overrides or ())
    typer.echo(json.dumps(loaded.model_dump(mode="json")) if as_json else loaded.to_yaml().rstrip())


@app.command()
def compare(
    paths: Annotated[list[Path], typer.Argument(metavar="RECIPE-or-ADAPTER...", help="Recipe files, adapter folders.")],
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw trained parameters against accuracy, sized by memory, into this PNG.")
    ] = None,
) -> None:
    """Set recipes and adapters side by side: what each trains, saves and holds, and, where it ran, what it gave.

    No weights and no data are read. A recipe's own output folder is looked at; the first row is what the others are
    paired with, on the rows that both were judged on.
    """
    from lora_sentiment import compare as comparison

    rows = comparison.compare(paths)
    if plot:
        comparison.draw(rows, plot)
    if as_json:
        typer.echo(json.dumps([row.as_dict() for row in rows]))
    elif markdown:
        typer.echo(comparison.to_markdown(rows))
    else:
        _show_table(comparison.make_columns(rows), comparison.make_notes(rows), left=comparison.LEFT)


@app.command()
def estimate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    budget: Annotated[str | None, typer.Option(help="Memory that the process may hold, such as 4GiB.")] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Take two real steps in a fresh process, and show the estimate's error.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Estimate a recipe's memory by length, and the largest micro-batch that fits a budget, without weights or data."""
    from lora_sentiment import estimate as estimation

    loaded = Recipe.load(recipe, overrides or ())
    found = estimation.estimate(loaded, budget=estimation.parse_bytes(budget) if budget else None)
    probed = None
    if probe:
        from lora_sentiment.probe import probe as run_probe

        probed = run_probe(loaded)
    if as_json:
        typer.echo(json.dumps({**found.as_dict(), "probe": probed and probed.as_dict()}))
        return
    notes = estimation.make_notes(found)
    if probed:
        notes.append(
            f"probe: {probed.rows} rows of {probed.length} tokens held {probed.measured / 2**20:,.0f} MiB beyond the "
            f"{probed.baseline / 2**20:,.0f} MiB of its imports; estimated {probed.estimated / 2**20:,.0f} MiB "
            f"({probed.error:+.1%})"
        )
    _show_table(estimation.make_columns(found), notes, left=())


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, which editors use to complete and check."""
    typer.echo(json.dumps(make_schema(), indent=2))


def _show_table(columns: Mapping[str, list[str]], notes: list[str], *, left: tuple[str, ...]) -> None:
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


def _show_scores(scores: Mapping[str, Any]) -> None:
    from lora_sentiment.evaluation.statistics import show_interval

    width = max(map(len, scores))
    for metric, interval in scores.items():
        typer.echo(f"  {metric:<{width}} {show_interval(interval)}")


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line; what this package raises on purpose is shown as a message, without a traceback."""
    is_main = _is_main()
    # transformers' own deprecations are no news to a user of this package.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # Not the root logger: the Hub client shows its own lines, which would then stand twice.
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%X"))
    logging.getLogger("lora_sentiment").handlers = [handler]
    logging.getLogger("lora_sentiment").setLevel(logging.INFO if is_main else logging.WARNING)
    try:
        app(arguments)
    except LoraSentimentError as error:
        who = "" if is_main else f" (process {os.environ['RANK']})"
        typer.echo(f"error{who}: {error}", err=True)
        sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    main()
