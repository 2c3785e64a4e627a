"""How figures look on a terminal; the command line's verbs print through it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from lora_sentiment.console import is_main
from lora_sentiment.errors import DataError, RecipeError


def show_compared(compared: Mapping[str, Any]) -> None:
    """Print what a merge or export was compared on, and how far it was apart."""
    for what, blocks in compared.items():
        for rows, found in blocks.items():
            if not isinstance(found, dict):
                continue
            if "reason" in found:
                typer.echo(f"{what:<11} not compared on {rows}: {found['reason']}")
                continue
            accuracies = [
                f"{key.replace('_', ' ')} {found[key]:.4f}"
                for key in found
                if key.startswith("accuracy")
            ]
            difference = found["max_difference"]
            facts = [
                "logits that are not finite"
                if difference is None
                else f"logits differ by {difference:.2g} at most",
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


def answer_table(
    classifier: Any, input: Path, output: Path, *, as_json: bool, **options: Any
) -> None:
    """Label a table and print what was done."""
    from lora_sentiment.commands.predict import predict_file

    summary = predict_file(classifier, input=input, output=output, **options)
    if not is_main():
        return
    if as_json:
        typer.echo(json.dumps(vars(summary)))
        return
    counted = ", ".join(f"{name} {count:,}" for name, count in summary.labels.items())
    bad = f"; {summary.bad_rows:,} with an error instead" if summary.bad_rows else ""
    typer.echo(f"{output}: {summary.rows:,} rows ({counted}{bad}) in {summary.seconds:,.1f} s")


def answer_lines(
    classifier: Any, lines: Any, *, all_scores: bool, as_json: bool, **options: Any
) -> None:
    """Label texts one after another and print each answer."""
    from lora_sentiment.commands.predict import predict_lines

    for answer in predict_lines(classifier, lines, **options):
        found = answer.prediction
        if as_json:
            values = vars(found) if found else {"error": answer.error}
            kept = {key: value for key, value in values.items() if key != "scores" or all_scores}
            typer.echo(json.dumps({"text": answer.text, **kept}, ensure_ascii=False))
            continue
        every = (
            " ".join(f"{name}={score:.4f}" for name, score in found.scores.items())
            if found and all_scores
            else ""
        )
        cells = (
            [found.label, f"{found.score:.4f}", *filter(None, [every])]
            if found
            else ["-", answer.error]
        )
        typer.echo("\t".join([*cells, " ".join(answer.text.split())]))


def explain_lines(
    classifier: Any,
    texts: Any,
    *,
    html: Path | None,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Print, or write as a page, what each word of some texts does to their scores.

    Raises:
        DataError: If a text cannot be explained, after all others, or the page cannot be written.
    """
    from rich.console import Console

    from lora_sentiment.commands.explain import explain, to_html, to_rich

    if html and html.exists() and not overwrite:
        raise DataError(f"{html}: exists already; give another name, or --overwrite")
    found, faults = [], 0
    for text in texts:
        try:
            found.append(explain(classifier, text, **options))
        except DataError as error:
            # The texts after it are answered all the same.
            faults += 1
            typer.echo(f"error: {error}", err=True)
            continue
        if as_json:
            typer.echo(json.dumps(found[-1].as_dict()))
        else:
            Console(highlight=False).print(to_rich(found[-1]))
    if html:
        try:
            html.write_text(to_html(found), encoding="utf-8")
        except OSError as error:
            raise DataError(f"{html}: cannot be written: {error.strerror or error}") from error
    if faults:
        raise DataError(f"{faults} of {len(found) + faults} texts could not be explained")


_OF_TABLES = ("text_column", "encoding", "prefix", "rows_per_part", "resume")
"""Options of `predict` that only a table takes."""


def refuse_combinations(context: typer.Context) -> None:
    """Refuse options of `predict` that would be ignored.

    Raises:
        RecipeError: Naming them.
    """
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}
    if ("input" in given) != ("output" in given):
        raise RecipeError("predict: --input and --output go together")
    if {"texts", "input"} <= given:
        raise RecipeError("predict: found both texts and --input; give one of them")
    if {"input", "explain"} <= given:
        raise RecipeError("predict: --explain is for texts and standard input, not for --input")
    if "html" in given and "explain" not in given:
        raise RecipeError("predict: --html writes explanations; add --explain")
    if {"explain", "all_scores"} <= given:
        raise RecipeError(
            "predict: --explain shows the likeliest label's score; leave out --all-scores"
        )
    ignored = [*_OF_TABLES, *(() if "html" in given else ("overwrite",))]
    if "input" not in given and (
        alone := [f"--{name.replace('_', '-')}" for name in ignored if name in given]
    ):
        raise RecipeError(
            f"predict: {', '.join(alone)}: only with --input and --output; name both, or leave it out"
        )
