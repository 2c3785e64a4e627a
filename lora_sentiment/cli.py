"""The command line: `lora-sentiment VERB`. Only it and `terminal` print."""

import io
import json
import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from lora_sentiment.commands.terminal import (
    answer_lines,
    answer_table,
    explain_lines,
    refuse_combinations,
    show_compared,
    show_scores,
)
from lora_sentiment.console import is_main, show_table
from lora_sentiment.errors import (
    LoraSentimentError,
    ModelError,
    RecipeError,
    StoppedError,
    TrainingError,
)
from lora_sentiment.models.parameters import show_parameters
from lora_sentiment.recipe.recipe import Recipe, make_schema
from lora_sentiment.serve.config import make_config, show_limits

app = typer.Typer(
    name="lora-sentiment",
    help="Fine-tune DistilBERT classifiers with LoRA, judge them, and take them out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

EXIT_STOPPED = 75
"""Exit code of a run that was told to stop and is saved: sysexits.h's EX_TEMPFAIL, to be tried again."""

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of recipe keys, values in YAML."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the last checkpoint; means train.resume=always."),
    ] = False,
    allow_changes: Annotated[
        bool,
        typer.Option(
            "--allow-changes",
            help="Go on although recipe, data, versions or machine are others now.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a recipe and save its adapter. Under a launcher: accelerate launch -m lora_sentiment.train RECIPE."""
    loaded = Recipe.load(recipe, [*(overrides or ()), *(["train.resume=always"] if resume else ())])
    if allow_changes and loaded.train.resume == "never":
        raise RecipeError(
            "train: --allow-changes is of a run that goes on, and train.resume is never; leave one out"
        )
    from lora_sentiment.train import train as run_train
    from lora_sentiment.training.report import report_roles

    run = run_train(loaded, allow_changes=allow_changes)
    if not run.report:
        return
    if as_json:
        typer.echo(json.dumps(run.report))
        return
    parameters = run.report["parameters"]
    typer.echo(f"adapter     {run.adapter}")
    typer.echo(
        f"parameters  {show_parameters(parameters)}; {parameters['adapter_bytes']:,} bytes saved"
    )
    if "quantisation" in run.report:
        typer.echo(f"quantised   {run.report['quantisation']['verdict']}")
    for role in report_roles(run.report):
        typer.echo(f"{role} (95 % intervals)")
        show_scores(run.report[role])


@app.command()
def evaluate(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    source: Annotated[
        str | None,
        typer.Option(help="Judge on this file or Hub data set instead of the recorded one."),
    ] = None,
    split: Annotated[
        str,
        typer.Option(
            help="A judged role, such as test, or validation; of --source a split's own name."
        ),
    ] = "test",
    base: Annotated[
        str | None, typer.Option(help="Where to find the base, if not where the card says.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Compute dtype: auto, float32, bfloat16 or float16.")
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Score an adapter, rebuilt from its folder alone, its base checked by hash."""
    from lora_sentiment.commands.evaluate import evaluate as run_evaluate

    found = run_evaluate(adapter, source=source, split=split, base=base, dtype=dtype)
    if not is_main():
        return
    if as_json:
        typer.echo(json.dumps(found.as_dict()))
        return
    typer.echo(f"{found.split}: {found.num_rows:,} rows, 95 % intervals")
    show_scores({name: interval.as_dict() for name, interval in found.scores.items()})


AdapterArgument = Annotated[Path, typer.Argument(metavar="ADAPTER", help="Adapter folder.")]
OutArgument = Annotated[
    Path, typer.Argument(metavar="OUT", help="New folder; it appears finished or not at all.")
]
BaseOption = Annotated[
    str | None, typer.Option(help="Where to find the base, if not where the card says.")
]
IntoOption = Annotated[
    Literal["base", "dequantised"],
    typer.Option(
        help="Merge into the base as it was published, or what quantising had left of it."
    ),
]
RowsOption = Annotated[int, typer.Option(min=1, help="Most validation rows to compare on.")]


@app.command()
def merge(
    adapter: AdapterArgument,
    out: OutArgument,
    dtype: Annotated[
        str, typer.Option(help="Dtype of the weights: float32, bfloat16 or float16.")
    ] = "float32",
    into: IntoOption = "base",
    base: BaseOption = None,
    max_rows: RowsOption = 500,
    as_json: Json = False,
) -> None:
    """Merge an adapter into one stock model, reload that with plain transformers, and hold it to the adapter."""
    from lora_sentiment.adapter.merge import merge as run_merge

    done = run_merge(
        adapter, out, dtype=dtype, into=into, base=base, max_rows=max_rows, progress=True
    )
    if as_json:
        typer.echo(json.dumps(done.as_dict()))
        return
    typer.echo(f"merged      {done.folder} ({done.dtype}, into {done.into})")
    show_compared(done.compared)
    typer.echo(f"reading     {done.reading}")


@app.command()
def export(
    adapter: Annotated[
        Path,
        typer.Argument(metavar="ADAPTER", help="Adapter folder; for ONNX also a merged folder."),
    ],
    out: OutArgument,
    format: Annotated[
        Literal["safetensors", "onnx", "onnx-int8"], typer.Option(help="What to write.")
    ] = "onnx",
    into: IntoOption = "base",
    base: BaseOption = None,
    max_drop: Annotated[
        float | None,
        typer.Option(help="Most points of accuracy (of 100) that int8 may cost; 0.5 by default."),
    ] = None,
    max_rows: RowsOption = 500,
    as_json: Json = False,
) -> None:
    """Export an adapter for other runtimes, open it there, and hold its answers to the merged model's."""
    from lora_sentiment.adapter.export import export as run_export

    done = run_export(
        adapter,
        out,
        format=format,
        into=into,
        base=base,
        max_drop=max_drop,
        max_rows=max_rows,
        progress=True,
    )
    if as_json:
        typer.echo(json.dumps(done.as_dict()))
        return
    typer.echo(f"exported    {done.folder} ({done.format})")
    for name, size in done.bytes.items():
        speed = f", {done.texts_per_second[name]:,.1f} texts/s" if done.texts_per_second else ""
        typer.echo(f"file        {name}: {size:,} bytes{speed}")
    show_compared(done.compared)
    typer.echo(f"reading     {done.reading}")


@app.command()
def predict(
    context: typer.Context,
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="Adapter, merged or exported folder, or an .onnx file."
        ),
    ],
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TEXT]...", help="Texts; without any, the lines of standard input."
        ),
    ] = None,
    input: Annotated[
        Path | None, typer.Option(help="Table to read: csv, tsv, jsonl, parquet, or .gz of these.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Table to write, its columns and the new ones.")
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column of --input that is judged.")] = "text",
    encoding: Annotated[str, typer.Option(help="Encoding of --input.")] = "utf-8",
    prefix: Annotated[str, typer.Option(help="Begins the names of the new columns.")] = "",
    all_scores: Annotated[
        bool, typer.Option("--all-scores", help="Give the probability of every label.")
    ] = False,
    stride: Annotated[
        int | None,
        typer.Option(help="Read long texts whole, in windows that share this many tokens."),
    ] = None,
    calibrated: Annotated[
        bool, typer.Option("--calibrated", help="Use the temperature fitted at training.")
    ] = False,
    rows_per_part: Annotated[int, typer.Option(min=1, help="Rows in memory at once.")] = 10_000,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the last whole part of a stopped run.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --output.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show what each word does to the score.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(help="Write the explanations as a page; with --explain.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Of a stock PEFT folder: its labels in order, as a,b.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Of a stock folder: most tokens of a text.")
    ] = None,
    base: BaseOption = None,
    dtype: Annotated[
        str, typer.Option(help="Compute dtype: auto, float32, bfloat16 or float16.")
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Label texts, standard input, or a table however long."""
    refuse_combinations(context)
    from lora_sentiment.classifier import load

    names = [name.strip() for name in labels.split(",")] if labels else None
    classifier = load(model, labels=names, base=base, max_length=max_length, dtype=dtype)
    for sentence in classifier.unverified if is_main() else ():
        typer.echo(f"unverified: {sentence}", err=True)
    reading: dict[str, Any] = {"stride": stride, "calibrated": calibrated}
    if input and output:
        table = {
            "text_column": text_column,
            "encoding": encoding,
            "prefix": prefix,
            "all_scores": all_scores,
        }
        run = {"rows_per_part": rows_per_part, "resume": resume, "overwrite": overwrite}
        answer_table(classifier, input, output, as_json=as_json, **reading, **table, **run)
    elif explain and is_main():
        lines = texts or filter(str.strip, sys.stdin)
        explain_lines(classifier, lines, html=html, overwrite=overwrite, as_json=as_json, **reading)
    elif is_main():
        answer_lines(
            classifier, texts or sys.stdin, all_scores=all_scores, as_json=as_json, **reading
        )


@app.command()
def serve(
    adapters: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[ADAPTER]...", help="Adapter folders for one base."),
    ] = None,
    watch: Annotated[
        Path | None,
        typer.Option(help="Serve the adapter folders in this one, as long as they are there."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but loopback needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="A file with the key that requests must bring: Authorization: Bearer KEY."
        ),
    ] = None,
    no_api_key: Annotated[
        bool, typer.Option("--no-api-key", help="Listen anywhere without a key.")
    ] = False,
    limit: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help=show_limits())
    ] = None,
    access_log: Annotated[
        bool, typer.Option(help="Log each request: method, route, status, time.")
    ] = True,
    base: BaseOption = None,
    dtype: Annotated[
        str, typer.Option(help="Compute dtype: auto, float32, bfloat16 or float16.")
    ] = "auto",
) -> None:
    """Answer over HTTP with any number of adapters on one base, and show a page, until told to stop."""
    where: dict[str, Any] = {
        "host": host,
        "port": port,
        "access_log": access_log,
        "base": base,
        "dtype": dtype,
    }
    key: dict[str, Any] = {"api_key_file": api_key_file, "no_api_key": no_api_key}
    config = make_config(limit or [], adapters=tuple(adapters or ()), watch=watch, **where, **key)
    try:
        from lora_sentiment.serve.run import serve as run_server
    except ModuleNotFoundError as error:
        raise ModelError(
            f"serve needs an extra ({error}): pip install 'lora_sentiment[serve]'"
        ) from error
    run_server(config, announce=typer.echo)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Adapter, merged or exported folder.")],
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the Hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="Refuse a repository that all can see.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Send nothing: list the files and show the card.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Send a folder to the Hub, after checking its hashes and that nothing else lies in it."""
    from lora_sentiment.commands.push import push as run_push

    done = run_push(folder, name, private=private, dry_run=dry_run)
    if as_json:
        typer.echo(json.dumps(done.as_dict()))
        return
    for file, size in done.files:
        typer.echo(f"{size:>12,} {file}")
    if dry_run:
        typer.echo(done.card)
    typer.echo(f"{'would send to' if dry_run else 'sent to'} {done.url}")
    for note in done.notes:
        typer.echo(f"* {note}")


@app.command()
def validate(recipe: RecipeArgument, overrides: Overrides = None, as_json: Json = False) -> None:
    """Check a recipe without reading weights or data, and show it with its defaults."""
    loaded = Recipe.load(recipe, overrides or ())
    typer.echo(json.dumps(loaded.model_dump(mode="json")) if as_json else loaded.to_yaml().rstrip())


@app.command()
def data(recipe: RecipeArgument, overrides: Overrides = None, as_json: Json = False) -> None:
    """Read a recipe's rows, judged ones too, and show balance, lengths, duplicates, bad rows, and what leaks."""
    loaded = Recipe.load(recipe, overrides or ())
    from lora_sentiment.commands.data import survey

    found = survey(loaded)
    if is_main():
        typer.echo(json.dumps(found.as_dict()) if as_json else "\n".join(found.to_lines()))


@app.command()
def compare(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="RECIPE-or-ADAPTER...", help="Recipe files, adapter folders."),
    ],
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw trained parameters against accuracy, sized by memory, into this PNG."
        ),
    ] = None,
) -> None:
    """Set recipes and adapters side by side: what each trains, saves and holds, and, where it ran, what it gave.

    No weights and no data are read. A recipe's own output folder is looked at; the first row is what the others are
    paired with, on the rows that both were judged on.
    """
    from lora_sentiment.commands import compare as comparison

    rows = comparison.compare(paths)
    if plot:
        comparison.draw(rows, plot)
    if as_json:
        typer.echo(json.dumps([row.as_dict() for row in rows]))
    elif markdown:
        typer.echo(comparison.to_markdown(rows))
    else:
        show_table(comparison.make_columns(rows), comparison.make_notes(rows), left=comparison.LEFT)


@app.command()
def estimate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    budget: Annotated[
        str | None, typer.Option(help="Memory that the process may hold, such as 4GiB.")
    ] = None,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe", help="Take two real steps in a fresh process, and show the estimate's error."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Estimate a recipe's memory by length, and the largest micro-batch that fits a budget, without weights or data."""
    from lora_sentiment.commands import estimate as estimation

    loaded = Recipe.load(recipe, overrides or ())
    found = estimation.estimate(loaded, budget=estimation.parse_bytes(budget) if budget else None)
    probed = None
    if probe:
        from lora_sentiment.commands.probe import probe as run_probe

        probed = run_probe(loaded)
    if as_json:
        typer.echo(json.dumps({**found.as_dict(), "probe": probed and probed.as_dict()}))
        return
    notes = estimation.make_notes(found)
    if probed:
        beyond = (
            f" beyond the {probed.baseline / 2**20:,.0f} MiB of its imports"
            if probed.baseline
            else ""
        )
        notes.append(
            f"probe: {probed.rows} rows of {probed.length} tokens held {probed.measured / 2**20:,.0f} MiB{beyond}; "
            f"estimated {probed.estimated / 2**20:,.0f} MiB "
            f"({probed.error:+.1%})"
        )
    show_table(estimation.make_columns(found), notes, left=())


@app.command()
def sweep(
    recipe: RecipeArgument,
    assignments: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=[VALUE, VALUE]...", help="Keys with several values, and overrides."
        ),
    ],
    as_json: Json = False,
) -> None:
    """Run every combination of some values one after another, choose on validation, and say how to train the best."""
    from lora_sentiment.commands import sweep as sweeping

    done = sweeping.sweep(recipe, assignments)
    if as_json:
        typer.echo(json.dumps(done.as_dict()))
        return
    show_table(sweeping.make_columns(done), list(done.notes), left=sweeping.LEFT)
    if done.command is None:
        raise TrainingError("every run diverged, so there is no best one")
    typer.echo(done.command)


@app.command()
def doctor(
    hub: Annotated[
        bool, typer.Option("--hub/--no-hub", help="Ask whether the Hub can be reached.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Show versions, processor, memory, devices, Hub, and every known trap that this machine shows."""
    from lora_sentiment.commands.doctor import examine

    found = examine(hub=hub)
    typer.echo(json.dumps(found.as_dict()) if as_json else "\n".join(found.to_lines()))


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, which editors use to complete and check."""
    typer.echo(json.dumps(make_schema(), indent=2))


def _prepare_streams() -> None:
    """Read and write any byte, and end lines at newlines alone, so that lines and answers can be paired."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape", newline="\n")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line; what this package raises on purpose is shown as a message, without a traceback."""
    main_process = is_main()
    _prepare_streams()
    # What is being written aside goes when the process is told to stop.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # transformers' own deprecations are no news to a user of this package.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # Not the root logger: the Hub client shows its own lines, which would then stand twice.
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%X"))
    logging.getLogger("lora_sentiment").handlers = [handler]
    logging.getLogger("lora_sentiment").setLevel(logging.INFO if main_process else logging.WARNING)
    try:
        app(arguments)
    except StoppedError as error:
        if main_process:
            typer.echo(str(error), err=True)
        sys.exit(EXIT_STOPPED)
    except LoraSentimentError as error:
        who = "" if main_process else f" (process {os.environ['RANK']})"
        typer.echo(f"error{who}: {error}", err=True)
        sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    main()
