"""The command line: `lora-sentiment VERB`. Only this module and `console` print."""

import io
import json
import logging
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperGroup

from lora_sentiment import __version__
from lora_sentiment.console import LogHandler, is_main, show_rich, show_table
from lora_sentiment.errors import (
    DataError,
    LoraSentimentError,
    ModelError,
    RecipeError,
    StoppedError,
    TrainingError,
    one_line,
)
from lora_sentiment.files import write_file_aside
from lora_sentiment.models.families import refuse_unknown_linears
from lora_sentiment.models.parameters import show_parameters
from lora_sentiment.recipe.recipe import Recipe, make_schema
from lora_sentiment.serve.config import make_config, show_limits

if TYPE_CHECKING:
    from lora_sentiment.classifier import Classifier

# Every verb imports its own module when it runs: `--help`, `validate` and `schema` load no torch.


class _Verbs(TyperGroup):
    """The verbs. An unknown option may be a text that begins with `-`, or a recipe's setting."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.TyperException as error:
            # typer does not export its NoSuchOption, which alone has this attribute.
            context = getattr(error, "ctx", None)
            if hasattr(error, "possibilities") and context is not None:
                taken = {parameter.name for parameter in context.command.params}
                if "texts" in taken:
                    error.message += "; a text that begins with - goes after --"
                elif "recipe" in taken:
                    error.message += "; a recipe's setting is written key=value, without dashes"
            raise


app = typer.Typer(
    name="lora-sentiment",
    cls=_Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

EXIT_STOPPED = 75
"""Exit code of a run that was saved when a signal stopped it: EX_TEMPFAIL of sysexits.h."""

OPTIONS = {
    "data.source": "source",
    "data.text_column": "text_column",
    "data.text_pair_column": "text_pair_column",
    "data.label_column": "label_column",
    "data.encoding": "encoding",
    "data.on_bad_row": "on_bad_row",
    "model.name": "base",
    "model.dtype": "dtype",
    "model.max_length": "max_length",
}
"""Recipe key to the parameter by which a verb without recipe sets it, if the verb has it."""

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of recipe keys, values in YAML."),
]
AdapterArgument = Annotated[Path, typer.Argument(metavar="ADAPTER", help="Adapter folder.")]
OutArgument = Annotated[
    Path, typer.Argument(metavar="OUT", help="New folder. It appears when it is complete.")
]
BaseOption = Annotated[
    str | None, typer.Option(help="Where the base is, if not where the card says.")
]
DtypeOption = Annotated[
    str, typer.Option(help="Compute dtype: auto, float32, bfloat16 or float16.")
]
IntoOption = Annotated[
    Literal["base", "dequantised"] | None,
    typer.Option(
        help="Merge into the published base, or into the dequantised one. By default the first "
        "that stays within the limits."
    ),
]
RowsOption = Annotated[
    int,
    typer.Option(
        min=1,
        help="Most validation rows to compare on; 500 for a quantised base or another dtype.",
    ),
]
FoldsOption = Annotated[int, typer.Option(min=2, help="Number of folds.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def describe(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Fine-tune small text encoders with LoRA, evaluate them, and export them."""


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Resume the last checkpoint: train.resume=always."),
    ] = False,
    allow_changes: Annotated[
        bool,
        typer.Option(
            "--allow-changes",
            help="Resume although recipe, data, versions or machine have changed.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a recipe and save its adapter.

    Under a launcher: accelerate launch -m lora_sentiment.train RECIPE.
    """
    overrides = list(overrides or ())
    if resume:
        overrides.append("train.resume=always")
    loaded = Recipe.load(recipe, overrides)
    if allow_changes and loaded.train.resume == "never":
        raise RecipeError(
            "train: --allow-changes needs a resumed run, but train.resume=never starts a new one; "
            "remove one of the two"
        )
    from lora_sentiment.train import train as run_train
    from lora_sentiment.training.report import report_roles, show_progress

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
        _show_scores(run.report[role])
        if "parent" in run.report:
            typer.echo(
                f"  against {loaded.model.adapter}: {show_progress(run.report['parent'][role])}"
            )
    typer.echo(f"next        lora-sentiment predict {shlex.quote(str(run.adapter))} TEXT")


@app.command()
def evaluate(
    adapter: AdapterArgument,
    source: Annotated[
        str | None,
        typer.Option(help="Score on this file or Hub data set instead of the recorded one."),
    ] = None,
    split: Annotated[
        str,
        typer.Option(help="A scored role, such as test, or validation; or a split of --source."),
    ] = "test",
    text_column: Annotated[
        str | None, typer.Option(help="Column of --source with the text.")
    ] = None,
    text_pair_column: Annotated[
        str | None, typer.Option(help="Column of --source with the second text of a pair.")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Column of --source with the label.")
    ] = None,
    encoding: Annotated[str | None, typer.Option(help="Encoding of --source.")] = None,
    on_bad_row: Annotated[
        Literal["error", "drop"] | None,
        typer.Option(help="What to do with an empty text or an unknown label of --source."),
    ] = None,
    base: BaseOption = None,
    dtype: DtypeOption = "auto",
    html: Annotated[
        Path | None, typer.Option(help="Write the report page of these rows to this file.")
    ] = None,
    with_texts: Annotated[
        bool, typer.Option("--with-texts", help="Show the texts of errors; with --html.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Score an adapter, rebuilt from its folder alone. The base is checked by its hash."""
    if html is None and with_texts:
        raise RecipeError("evaluate: --with-texts shows texts on a page; name it with --html")
    from lora_sentiment.commands.evaluate import evaluate as run_evaluate

    evaluation = run_evaluate(
        adapter,
        source=source,
        split=split,
        text_column=text_column,
        text_pair_column=text_pair_column,
        label_column=label_column,
        encoding=encoding,
        on_bad_row=on_bad_row,
        base=base,
        dtype=dtype,
        html=html,
        with_texts=with_texts,
    )
    if not is_main():
        return
    if as_json:
        typer.echo(json.dumps(evaluation.as_dict()))
        return
    typer.echo(f"{evaluation.split}: {evaluation.num_rows:,} rows, 95 % intervals")
    _show_scores({name: interval.as_dict() for name, interval in evaluation.scores.items()})


@app.command()
def merge(
    adapter: AdapterArgument,
    out: OutArgument,
    dtype: Annotated[
        str, typer.Option(help="Dtype of the weights: float32, bfloat16 or float16.")
    ] = "float32",
    into: IntoOption = None,
    base: BaseOption = None,
    truncation: Annotated[
        Literal["head"] | None,
        typer.Option(
            help="Let the merged model read the first tokens, as stock runtimes do, and measure "
            "what that costs. By default as in training."
        ),
    ] = None,
    max_rows: RowsOption = 500,
    as_json: Json = False,
) -> None:
    """Merge an adapter into its base, load the result with transformers, and compare the two."""
    from lora_sentiment.adapter.merge import merge as run_merge

    done = run_merge(
        adapter,
        out,
        dtype=dtype,
        into=into,
        base=base,
        truncation=truncation,
        max_rows=max_rows,
        progress=True,
    )
    if as_json:
        typer.echo(json.dumps(done.as_dict()))
        return
    typer.echo(f"merged      {done.folder} ({done.dtype}, into {done.into})")
    show_compared(done.compared)
    typer.echo(f"reading     {done.reading}")
    typer.echo(
        f'use         pipeline("text-classification", "{done.folder}")(texts, truncation=True)'
    )


@app.command()
def export(
    adapter: Annotated[
        Path,
        typer.Argument(metavar="ADAPTER", help="Adapter folder; for ONNX also a merged folder."),
    ],
    out: OutArgument,
    format: Annotated[
        Literal["safetensors", "onnx", "onnx-int8", "onnx-int8-weights"],
        typer.Option(
            help="What to write. onnx-int8 also computes in 8 bits; onnx-int8-weights only stores "
            "weights in 8 bits."
        ),
    ] = "onnx",
    into: IntoOption = None,
    base: BaseOption = None,
    max_drop: Annotated[
        float | None,
        typer.Option(help="Most accuracy points (of 100) that 8 bits may cost; by default 0.5."),
    ] = None,
    max_rows: RowsOption = 500,
    as_json: Json = False,
) -> None:
    """Export an adapter for other runtimes, run it there, and compare it with the merged model."""
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
            metavar="[TEXT]...",
            help="Texts; without any, the lines of standard input. A pair has a tab between its "
            "two texts.",
        ),
    ] = None,
    input: Annotated[
        Path | None, typer.Option(help="Table to read: csv, tsv, jsonl, parquet, or .gz of these.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Table to write: the input's columns and the new ones.")
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column of --input to answer.")] = "text",
    text_pair_column: Annotated[
        str | None, typer.Option(help="Column of --input with the second text of a pair.")
    ] = None,
    encoding: Annotated[str, typer.Option(help="Encoding of --input.")] = "utf-8",
    prefix: Annotated[str, typer.Option(help="Start of the new columns' names.")] = "",
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
    coverage: Annotated[
        float | None,
        typer.Option(
            help="Give the set of labels that holds the right one with this probability, such as "
            "0.95; needs data.calibration_fraction at training."
        ),
    ] = None,
    rows_per_part: Annotated[int, typer.Option(min=1, help="Rows in memory at once.")] = 10_000,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the last whole part of a stopped run.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace --output, or --html.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show the effect of each word on the score.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(help="Write the explanations as a page; with --explain.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Labels of a stock PEFT folder, in order, as a,b.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Most tokens of a text, for a stock folder.")
    ] = None,
    base: BaseOption = None,
    dtype: DtypeOption = "auto",
    as_json: Json = False,
) -> None:
    """Label texts, standard input, or a table of any length."""
    _refuse_ignored_options(context)
    from lora_sentiment.classifier import load
    from lora_sentiment.commands.predict import (
        predict_file,
        predict_lines,
        show_answer,
        show_summary,
    )
    from lora_sentiment.tasks.label_sets import describe_short_labels

    names = [name.strip() for name in labels.split(",")] if labels else None
    classifier = load(model, labels=names, base=base, max_length=max_length, dtype=dtype)
    if is_main():
        for sentence in classifier.unverified:
            typer.echo(f"unverified: {sentence}", err=True)
    if coverage is not None:
        classifier.predict([], stride=stride, coverage=coverage)
        short = describe_short_labels(classifier.calibration, coverage, classifier.labels)
        if short and is_main():
            typer.echo(f"note: {short}", err=True)
    if input and output:
        summary = predict_file(
            classifier,
            input=input,
            output=output,
            text_column=text_column,
            text_pair_column=text_pair_column,
            encoding=encoding,
            prefix=prefix,
            all_scores=all_scores,
            stride=stride,
            calibrated=calibrated,
            coverage=coverage,
            rows_per_part=rows_per_part,
            resume=resume,
            overwrite=overwrite,
        )
        if is_main():
            typer.echo(json.dumps(vars(summary)) if as_json else show_summary(summary, output))
        return
    if not is_main():
        return
    if explain:
        lines = texts or (line.rstrip("\r\n") for line in sys.stdin)
        options: dict[str, Any] = {"stride": stride, "calibrated": calibrated}
        _explain(classifier, lines, html=html, overwrite=overwrite, as_json=as_json, **options)
        return
    answers = predict_lines(
        classifier, texts or sys.stdin, stride=stride, calibrated=calibrated, coverage=coverage
    )
    for answer in answers:
        typer.echo(show_answer(answer, classifier.task, all_scores=all_scores, as_json=as_json))


@app.command()
def serve(
    adapters: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[ADAPTER]...", help="Adapter folders for one base."),
    ] = None,
    watch: Annotated[
        Path | None,
        typer.Option(help="Serve the adapter folders in this folder, as they come and go."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Any address but loopback needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="File with the key for requests: Authorization: Bearer KEY."),
    ] = None,
    no_api_key: Annotated[
        bool, typer.Option("--no-api-key", help="Listen on any address without a key.")
    ] = False,
    limit: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help=show_limits())
    ] = None,
    access_log: Annotated[
        bool, typer.Option(help="Log each request: method, route, status, time.")
    ] = True,
    base: BaseOption = None,
    dtype: DtypeOption = "auto",
) -> None:
    """Serve any number of adapters of one base over HTTP, with a page, until a signal."""
    config = make_config(
        limit or [],
        adapters=tuple(adapters or ()),
        watch=watch,
        host=host,
        port=port,
        access_log=access_log,
        base=base,
        dtype=dtype,
        api_key_file=api_key_file,
        no_api_key=no_api_key,
    )
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
        bool, typer.Option("--private", help="Refuse a public repository; make a private one.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Send nothing: list the files and show the card.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Send a folder to the Hub, after checking its hashes and that it holds no other files."""
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
    refuse_unknown_linears(loaded.method)
    typer.echo(json.dumps(loaded.model_dump(mode="json")) if as_json else loaded.to_yaml().rstrip())


@app.command()
def data(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    suspects: Annotated[
        Path | None,
        typer.Option(help="Train on folds, and write the rows with likely wrong labels as csv."),
    ] = None,
    folds: Annotated[
        int | None, typer.Option(min=2, help="Number of folds of --suspects; by default 5.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Read a recipe's rows; show balance, lengths, duplicates, bad rows and leaks."""
    loaded = Recipe.load(recipe, overrides or ())
    if suspects:
        from lora_sentiment.commands.suspects import find_suspects

        counts = find_suspects(loaded, suspects, num_folds=folds or 5)
        if is_main():
            shown = ", ".join(f"{reason}: {count:,}" for reason, count in counts.items())
            typer.echo(json.dumps(counts) if as_json else f"{suspects}: {shown or 'no suspect'}")
        return
    if folds:
        raise RecipeError("data: --folds is for --suspects; name its file, or leave it out")
    from lora_sentiment.commands.data import describe_data
    from lora_sentiment.data.report import report_lines

    report = describe_data(loaded)
    if is_main():
        typer.echo(json.dumps(report) if as_json else "\n".join(report_lines(report)))


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
    """Compare recipes and adapters: what each trains, saves and holds, and its scores if it ran.

    No weights and no data are read. The scores of a recipe are those in its output folder. The
    other rows are paired with the first one, on the rows that both were scored on.
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
            "--probe", help="Take two real steps in a new process, and show the estimate's error."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Estimate a recipe's memory by length, and the largest micro-batch within a budget.

    No weights and no data are read.
    """
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
        notes.append(str(probed))
    show_table(estimation.make_columns(found), notes, left=())


@app.command()
def sweep(
    recipe: RecipeArgument,
    assignments: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=AXIS...",
            help="Axes: KEY=[A, B], KEY=log(LOW, HIGH), KEY=uniform(LOW, HIGH), KEY=int(LOW, "
            "HIGH). KEY=VALUE is an override.",
        ),
    ],
    sampler: Annotated[
        Literal["grid", "random", "tpe"] | None,
        typer.Option(
            help="grid runs every combination of lists, and is the default for lists without "
            "--trials and --budget; else tpe. random and tpe stop runs that fall behind the median."
        ),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1000,
            help="Trials, those of earlier starts included. Without a grid or a budget 20.",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Time, such as 90s, 20min or 2h, after which no trial starts. The running one "
            "ends, and --seeds come on top. Each start has the whole budget."
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Seeds of the best: it is trained again with the next ones.")
    ] = 1,
    write: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Write the recipe with the best values to this file."),
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(file_okay=False, help="Draw Optuna's plots into this folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Search the best values of some keys with Optuna, and choose on validation.

    A sweep that was stopped goes on when it is started again. No judged row is read.
    """
    try:
        from lora_sentiment.commands import sweep as sweeping
    except ModuleNotFoundError as error:
        raise ModelError(
            f"sweep needs an extra ({error}): pip install 'lora_sentiment[search]'"
        ) from error
    done = sweeping.sweep(
        recipe,
        assignments,
        sampler=sampler,
        num_trials=trials,
        budget=sweeping.parse_seconds(budget) if budget else None,
        num_seeds=seeds,
        write=write,
        plots=plots,
    )
    if as_json:
        typer.echo(json.dumps(done))
    else:
        show_table(sweeping.make_columns(done), sweeping.make_notes(done), left=sweeping.LEFT)
    if not done["best"]:
        raise TrainingError("no trial is finished, so there is no best one")
    if not as_json:
        typer.echo(done["command"])


@app.command()
def cross_validate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    folds: FoldsOption = 5,
    keep_models: Annotated[
        bool, typer.Option("--keep-models", help="Keep the adapter of each fold.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train once for each fold without its rows, predict them, and score all rows that are not judged.

    Under a launcher: accelerate launch -m lora_sentiment.cli cross-validate RECIPE.
    """
    loaded = Recipe.load(recipe, overrides or ())
    from lora_sentiment.commands.cross_validate import cross_validate as run_folds

    _show_figures(run_folds(loaded, num_folds=folds, keep_models=keep_models), as_json=as_json)


@app.command()
def learning_curve(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Train on 1/8, 1/4, 1/2 and all rows, and score each run on the same validation rows."""
    loaded = Recipe.load(recipe, overrides or ())
    from lora_sentiment.commands.learning_curve import learning_curve as run_curve

    _show_figures(run_curve(loaded), as_json=as_json)


@app.command()
def doctor(
    hub: Annotated[
        bool, typer.Option("--hub/--no-hub", help="Ask whether the Hub can be reached.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Show versions, processor, memory, devices and Hub, with a note for each known problem."""
    from lora_sentiment.commands.doctor import examine

    found = examine(hub=hub)
    typer.echo(json.dumps(found.as_dict()) if as_json else "\n".join(found.to_lines()))


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, with which editors complete and check it."""
    typer.echo(json.dumps(make_schema(), indent=2))


def show_compared(compared: Mapping[str, Any]) -> None:
    """Print the rows that a merge or export was compared on, and the differences."""
    for form, blocks in compared.items():
        for part, facts in blocks.items():
            if not isinstance(facts, dict):
                continue
            if "reason" in facts:
                typer.echo(f"{form:<11} not compared on {part}: {facts['reason']}")
                continue
            difference = "logits that are not finite"
            if facts["max_difference"] is not None:
                difference = f"logits differ by {facts['max_difference']:.2g} at most"
            cells = [difference, f"{facts['flips']:,} other labels"]
            for key, value in facts.items():
                if key.startswith("accuracy"):
                    cells.append(f"{key.replace('_', ' ')} {value:.4f}")
            typer.echo(f"{form:<11} {facts['rows']:,} {part} rows: {', '.join(cells)}")


def _show_figures(figures: Any, *, as_json: bool) -> None:
    """Print a DataFrame of figures, or JSON: heading of the row to heading of the column to figure."""
    if is_main():
        shown = figures.to_string(float_format="{:.4f}".format)
        typer.echo(figures.to_json(orient="index") if as_json else shown)


def _show_scores(scores: Mapping[str, Any]) -> None:
    """Print metrics with their intervals."""
    from lora_sentiment.evaluation.statistics import show_interval

    names = {metric: one_line(metric, limit=60) for metric in scores}
    width = max(map(len, names.values()))
    for metric, interval in scores.items():
        typer.echo(f"  {names[metric]:<{width}} {show_interval(interval)}")


def _explain(
    classifier: "Classifier",
    texts: Iterable[str],
    *,
    html: Path | None,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Print the effect of each word of some texts, and write it as a page.

    Raises:
        DataError: If a text cannot be explained, after all others, or the page cannot be written.
    """
    from lora_sentiment.classifier import EMPTY_TEXT
    from lora_sentiment.commands.explain import explain, to_html, to_rich
    from lora_sentiment.commands.predict import Answer, find_error, parse_line, show_answer

    if html and html.exists() and not overwrite:
        raise DataError(f"{html}: exists already; give another name, or --overwrite")
    explanations = []
    num_faults = 0
    for line in texts:
        text = parse_line(line, reads_pairs=classifier.encoder.reads_pairs)
        fault = find_error(text, clean=classifier.clean)
        if fault is None and classifier.is_empty(text):
            fault = EMPTY_TEXT
        if fault:
            answer = Answer(text, None, fault)
            typer.echo(show_answer(answer, classifier.task, all_scores=False, as_json=as_json))
            continue
        try:
            explanation = explain(classifier, text, **options)
        except DataError as error:
            num_faults += 1
            typer.echo(f"error: {error}", err=True)
            continue
        explanations.append(explanation)
        if as_json:
            typer.echo(json.dumps(explanation.as_dict()))
        else:
            show_rich(to_rich(explanation))
    if html:
        try:
            with write_file_aside(html) as aside:
                aside.write_text(to_html(explanations), encoding="utf-8")
        except OSError as error:
            raise DataError(f"{html}: cannot be written: {error.strerror or error}") from error
    if num_faults:
        num_texts = len(explanations) + num_faults
        raise DataError(f"{num_faults} of {num_texts} texts could not be explained")


def _refuse_ignored_options(context: typer.Context) -> None:
    """Refuse options of `predict` that would be ignored.

    Raises:
        RecipeError: Naming them.
    """
    given = set()
    for name in context.params:
        source = context.get_parameter_source(name)
        if source and source.name == "COMMANDLINE":
            given.add(name)
    if ("input" in given) != ("output" in given):
        raise RecipeError("predict: --input and --output go together")
    if {"texts", "input"} <= given:
        raise RecipeError("predict: found both texts and --input; give one of them")
    if {"input", "explain"} <= given:
        raise RecipeError("predict: --explain is for texts and standard input, not for --input")
    if "html" in given and "explain" not in given:
        raise RecipeError("predict: --html writes explanations; add --explain")
    if {"explain", "coverage"} <= given:
        raise RecipeError("predict: --explain gives no label sets; leave out --coverage")
    if {"explain", "all_scores"} <= given:
        raise RecipeError(
            "predict: --explain shows the likeliest label's score; leave out --all-scores"
        )
    if "input" in given:
        return
    of_tables = ["text_column", "text_pair_column", "encoding", "prefix", "rows_per_part", "resume"]
    if "html" not in given:
        of_tables.append("overwrite")
    ignored = [f"--{name.replace('_', '-')}" for name in of_tables if name in given]
    if ignored:
        raise RecipeError(
            f"predict: {', '.join(ignored)}: only with --input and --output; name both, or leave "
            "it out"
        )


def _tell(error: LoraSentimentError, arguments: list[str] | None) -> str:
    """Return an error's message, which names settings as the verb at hand takes them."""
    verb = (sys.argv[1:] if arguments is None else arguments)[0]
    command = typer.main.get_group(app).commands[verb]
    taken = {parameter.name for parameter in command.params}
    if "recipe" in taken:
        return str(error)
    return error.tell(
        {key: f"--{name.replace('_', '-')}" for key, name in OPTIONS.items() if name in taken}
    )


def _prepare_streams() -> None:
    """Accept any byte, and end lines at newlines alone, so that lines and answers can be paired."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape", newline="\n")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line. An error of this package becomes a message without a traceback."""
    main_process = is_main()
    _prepare_streams()
    # An exception, so that unfinished files are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # Deprecations within transformers do not concern a user of this package.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # Not the root logger: the Hub's client shows its own lines, which would appear twice.
    handler = LogHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%X"))
    log = logging.getLogger("lora_sentiment")
    log.handlers = [handler]
    log.setLevel(logging.INFO if main_process else logging.WARNING)
    try:
        app(arguments, prog_name="lora-sentiment")
    except StoppedError as error:
        if main_process:
            typer.echo(str(error), err=True)
        sys.exit(EXIT_STOPPED)
    except LoraSentimentError as error:
        who = "" if main_process else f" (process {os.environ['RANK']})"
        typer.echo(f"error{who}: {_tell(error, arguments)}", err=True)
        sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    main()
