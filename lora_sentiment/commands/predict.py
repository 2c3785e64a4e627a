"""Label the texts of a table or of standard input, however many there are.

A table is read and answered in numbered parts. The answers of each part are kept in a file,
`<output>.parts/part-00000.parquet`, so memory does not grow with the rows, and a killed run goes on
after its last whole part. At the end the rows and their answers become the output. Several
processes share the parts of one table. This module imports no torch.
"""

import json
import logging
import os
import re
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import Timeout

from lora_sentiment.classifier import Classifier, Prediction
from lora_sentiment.console import make_bar
from lora_sentiment.data.batches import TOKENISE_ROWS
from lora_sentiment.data.lines import ColumnBatch, find_column
from lora_sentiment.data.tables import (
    TableWriter,
    describe_delimiter,
    read_table,
    table_columns,
    table_types,
)
from lora_sentiment.errors import DataError, did_you_mean, one_line, show_names
from lora_sentiment.files import hash_file, lock_file, write_json
from lora_sentiment.tasks import Task

log = logging.getLogger("lora_sentiment")
LINES_PER_WINDOW = 1000
PARTS = ("text", "text_pair")
"""Names of the two texts of a pair, in answers."""
SHOWN_LABELS = 20
"""Labels that the line about a table counts; of more, the most frequent."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class Answer:
    """The answer for one text.

    Attributes:
        text: The text as given, or the pair of texts. It is None if it was missing, and of any type
            in a table.
        prediction: The label and scores, or None if the text cannot be answered.
        error: Why the text cannot be answered, or None.
    """

    text: Any
    prediction: Prediction | None
    error: str | None


@dataclass(frozen=True)
class Summary:
    """Counts of an answered table.

    Attributes:
        rows: Rows of the input, and of the output.
        bad_rows: Rows with an error in place of a label.
        labels: Rows of each label, in the classifier's order; empty for a regression.
        parts: Parts that were joined.
        seconds: Wall time of this run, without the parts of an earlier run.
    """

    rows: int
    bad_rows: int
    labels: dict[str, int]
    parts: int
    seconds: float


def predict_lines(
    classifier: Classifier,
    lines: Iterable[str],
    *,
    stride: int | None = None,
    calibrated: bool = False,
    coverage: float | None = None,
) -> Iterator[Answer]:
    """Answer lines one by one, in their order, reading at most 1,000 ahead.

    A line without tokens is answered too, with an error, so that answers and lines can be paired.
    For a model of pairs, a line holds two texts with a tab between them.

    Args:
        classifier: The model.
        lines: Lines with or without their line ends.
        stride: As in `Classifier.predict`.
        calibrated: As in `Classifier.predict`.
        coverage: As in `Classifier.predict`.

    Raises:
        ModelError: If the stride leaves no room, there is no temperature, or there are no label
            sets at the coverage.
    """
    options = {"stride": stride, "calibrated": calibrated, "coverage": coverage}
    reads_pairs = classifier.encoder.reads_pairs
    texts = (parse_line(line, reads_pairs=reads_pairs) for line in lines)
    while window := list(islice(texts, LINES_PER_WINDOW)):
        yield from _answer(classifier, window, options)


def parse_line(line: str, *, reads_pairs: bool) -> Any:
    """Return the text of a line, or the parts between its tabs, which are two if it is a pair."""
    text = line.rstrip("\r\n")
    return tuple(text.split("\t")) if reads_pairs else text


def show_answer(answer: Answer, task: Task, *, all_scores: bool, as_json: bool) -> str:
    """Return the line that the command line prints for an answer."""
    prediction = answer.prediction
    if as_json:
        values: dict[str, Any] = {"error": answer.error}
        if prediction:
            values = task.get_answer(prediction)
            if prediction.label_set is not None:
                values["label_set"] = prediction.label_set
                values["is_certain"] = prediction.is_certain
            if all_scores:
                values["scores"] = prediction.scores
        texts = dict(zip(PARTS, _split(answer.text), strict=False))
        return json.dumps({**texts, **values}, ensure_ascii=False)
    cells = ["-", str(answer.error)]
    if prediction:
        cells = [task.show_answer(task.get_answer(prediction))]
        if prediction.label_set is not None:
            cells.append(f"{{{', '.join(map(one_line, prediction.label_set))}}}")
        if all_scores:
            scores = prediction.scores.items()
            cells.append(" ".join(f"{one_line(name)}={score:.4f}" for name, score in scores))
    return "\t".join([*cells, *map(one_line, _split(answer.text))])


def show_summary(summary: Summary, output: Path) -> str:
    """Return the line that the command line prints for a table."""
    found = list(summary.labels.items())
    if len(found) > SHOWN_LABELS:
        found.sort(key=lambda item: -item[1])
    counts = ", ".join(
        f"{one_line(name, limit=40)} {count:,}" for name, count in found[:SHOWN_LABELS]
    )
    if len(found) > SHOWN_LABELS:
        others = sum(count for _, count in found[SHOWN_LABELS:])
        counts += f", {len(found) - SHOWN_LABELS:,} other labels {others:,}"
    if summary.bad_rows:
        counts += f"; {summary.bad_rows:,} with an error instead"
    counts = f" ({counts.removeprefix('; ')})" if counts else ""
    return f"{output}: {summary.rows:,} rows{counts} in {summary.seconds:,.1f} s"


def predict_file(
    classifier: Classifier,
    *,
    input: Path,
    output: Path,
    text_column: str = "text",
    text_pair_column: str | None = None,
    encoding: str = "utf-8",
    all_scores: bool = False,
    stride: int | None = None,
    calibrated: bool = False,
    coverage: float | None = None,
    prefix: str = "",
    rows_per_part: int = 10_000,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Summary:
    """Write a table's columns, with `label` and `score` beside them, to another table.

    The whole input is read once before a row is answered, so that a fault of the file, or a value
    that the output's format cannot hold, costs no work. A row whose text is missing, empty or no
    string gets a reason in the column `error`, which exists only if some row has one. In a launch
    of several processes all of them call this. Part i is the work of process i modulo their number.

    Args:
        classifier: The model.
        input: A csv, tsv, jsonl or parquet file, also with gzip.
        output: Another such file, in the format of its name. From parquet to parquet, columns keep
            their Arrow types.
        text_column: The column that is answered.
        text_pair_column: For a model of pairs, the column of the second texts.
        encoding: Encoding of a text file. The output is UTF-8.
        all_scores: Write the probability of every label too, in columns `score_<label>`.
        stride: As in `Classifier.predict`.
        calibrated: As in `Classifier.predict`.
        coverage: As in `Classifier.predict`. The columns `label_set`, a JSON list, and
            `is_certain`, whether it has exactly one label, are written too.
        prefix: Start of the name of every new column.
        rows_per_part: Rows in memory at once, and the most that a killed run loses.
        resume: Go on with the parts of an earlier run, of the same input, model and options.
        overwrite: Replace an existing output.
        progress: Show a bar.

    Raises:
        DataError: If the input is damaged or lacks the column, a new column's name is taken, the
            output exists or cannot be written or hold a value, or another run is writing it or left
            parts that this one cannot use.
        ModelError: As `predict_lines`.
    """
    start = time.perf_counter()
    if rows_per_part < 1:
        raise DataError(f"rows_per_part: found {rows_per_part}; it must be at least 1")
    # Refuse options that do not fit the model before there is work to lose.
    options = {"stride": stride, "calibrated": calibrated, "coverage": coverage}
    _answer(classifier, [], options)
    text_columns = _choose_columns(classifier, text_column, text_pair_column)
    with _file_faults(output):
        if output.is_symlink():
            output = Path(os.path.realpath(output))  # the link stays, its target is replaced
    has_sets = coverage is not None
    new = _new_columns(classifier, prefix=prefix, all_scores=all_scores, has_sets=has_sets)
    folder = output.with_name(f"{output.name}.parts")
    rank, num_processes = _join_processes()
    locked = ExitStack()

    @_file_faults(output)
    def prepare() -> tuple[dict[str, pa.DataType], int, str]:
        if not output.parent.is_dir():
            raise DataError(f"{output.parent}: no such folder; make it, or give another name")
        try:
            locked.enter_context(lock_file(Path(f"{output}.parts.lock")))
        except Timeout as error:
            raise DataError(f"another run is writing {output}; wait until it ends") from error
        _check_paths(input, output, resume=resume, overwrite=overwrite)
        types = _plan_columns(input, output, encoding, text_columns, new)
        cells = classifier.task.list_cells(classifier.labels)
        if has_sets:
            cells.append(json.dumps(list(classifier.labels), ensure_ascii=False))
        num_rows = _try_output(input, output, encoding, text_columns, types, new, cells)
        sha256 = hash_file(input)
        facts = {
            "input": input.name.encode(errors="backslashreplace").decode(),
            "input_sha256": sha256,
            "encoding": encoding,
            "rows_per_part": rows_per_part,
            "text_column": text_column,
            "all_scores": all_scores,
            **options,
            "prefix": prefix,
            "model_sha256": classifier.sha256,
            "labels": list(classifier.labels),
        }
        if text_pair_column is not None:
            facts["text_pair_column"] = text_pair_column
        _start_parts(folder, facts, resume=resume)
        return types, num_rows, sha256

    def read_batches() -> Iterator[tuple[Path, ColumnBatch]]:
        batches = read_table(
            input, encoding=encoding, rows_per_batch=rows_per_part, needed=text_columns
        )
        for number, batch in enumerate(batches):
            if num_rows:
                yield folder / f"part-{number:05d}.parquet", batch

    @_file_faults(output)
    def join() -> tuple[dict[str, int], int]:
        if hash_file(input) != sha256:
            raise DataError(f"{input}: changed while it was read; remove {folder}, and begin again")
        task = classifier.task
        *_, error = new
        counts: Counter[str] = Counter()
        num_bad = 0
        for path in folder.glob("part-*.parquet"):
            part = pq.read_table(path)
            num_bad += len(part) - part[error].null_count
            found = {name: part[f"{prefix}{name}"].to_pylist() for name in task.answer_columns}
            counts.update(task.count_answers(found, classifier.labels))
        columns = [name for name in types if name != error or num_bad]
        whole = folder / output.name
        with TableWriter(whole, columns=columns, types=types) as writer:
            for path, batch in read_batches():
                filled = batch | pq.read_table(path).to_pydict()
                writer.write({name: filled[name] for name in columns})
        whole.replace(output)
        shutil.rmtree(folder)
        return dict(counts), num_bad

    with locked, _file_faults(output):
        types, num_rows, sha256 = _run_on_main(prepare, num_processes)
        num_parts = 0
        show = progress and rank == 0
        with make_bar(num_rows, desc="predicting", unit="rows", show=show) as bar:
            for path, batch in read_batches():
                cells = [batch[find_column(list(batch), name) or name] for name in text_columns]
                texts = list(zip(*cells, strict=True)) if text_pair_column else cells[0]
                is_own = num_parts % num_processes == rank
                num_parts += 1
                if not is_own or path.is_file():
                    bar.update(len(texts))
                    continue
                answers: ColumnBatch = {name: [] for name in new}
                for first in range(0, len(texts), TOKENISE_ROWS):
                    few = texts[first : first + TOKENISE_ROWS]
                    for answer in _answer(classifier, few, options):
                        _append(answer, answers, classifier.task, all_scores=all_scores)
                    bar.update(len(few))
                with TableWriter(path, columns=list(new), types=new) as writer:
                    writer.write(answers)
        counts, num_bad = _run_on_main(join, num_processes)
    return Summary(num_rows, num_bad, counts, num_parts, time.perf_counter() - start)


def _start_parts(folder: Path, facts: dict[str, Any], *, resume: bool) -> None:
    """Record what makes the parts. Refuse parts of an earlier run that this run cannot use."""
    path = folder / "parts.json"
    folder.mkdir(exist_ok=True)
    if any(folder.iterdir()):
        _check_parts(path, facts, resume=resume)
    aside = folder / f".{secrets.token_hex(8)}.tmp"
    write_json(aside, facts)
    aside.replace(path)


def _check_parts(path: Path, facts: dict[str, Any], *, resume: bool) -> None:
    """Refuse a folder that is not of parts, and parts that this run does not continue."""
    folder = path.parent
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(earlier, dict) or "model_sha256" not in earlier:
            raise ValueError("it names no model")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}), so the files beside it may be anything; move that "
            "folder away"
        ) from error
    num_parts = len(list(folder.glob("part-*")))
    if not num_parts:
        return
    if not resume:
        raise DataError(
            f"{folder}: holds {num_parts} part(s) of an earlier run; --resume goes on after them; "
            "or remove the folder"
        )
    changes = [
        f"{name} was {earlier.get(name)!r} and is {value!r}"
        for name, value in facts.items()
        if name not in earlier or earlier[name] != value
    ]
    if changes:
        raise DataError(
            f"{folder}: holds parts of another run: {'; '.join(changes)}; give what it was given, "
            "or remove the folder"
        )
    log.info("%s: going on after %d parts", folder, num_parts)


def _new_columns(
    classifier: Classifier, *, prefix: str, all_scores: bool, has_sets: bool
) -> dict[str, pa.DataType]:
    """Return the new columns with their types: those of the answer first, the error last."""
    kinds = {str: pa.string(), float: pa.float64()}
    types = {name: kinds[kind] for name, kind in classifier.task.answer_columns.items()}
    if has_sets:
        types |= {"label_set": pa.string(), "is_certain": pa.bool_()}
    if all_scores:
        types |= {f"score_{label}": pa.float64() for label in classifier.labels}
    types["error"] = pa.string()
    return {f"{prefix}{name}": kind for name, kind in types.items()}


def _append(answer: Answer, columns: ColumnBatch, task: Task, *, all_scores: bool) -> None:
    """Append an answer to the new columns."""
    prediction = answer.prediction
    values: list[Any] = [None] * (len(columns) - 1)
    if prediction is not None:
        values = task.to_columns(task.get_answer(prediction))
        if prediction.label_set is not None:
            label_set = json.dumps(prediction.label_set, ensure_ascii=False)
            values += [label_set, prediction.is_certain]
        if all_scores:
            values += prediction.scores.values()
    for column, value in zip(columns.values(), [*values, answer.error], strict=True):
        column.append(value)


def _join_processes() -> tuple[int, int]:
    """Return this process's number and the number of processes. One process needs no torch."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return 0, 1
    from lora_sentiment.training.processes import join_launch

    state = join_launch()
    return state.process_index, state.num_processes


def _run_on_main(function: Callable[[], _T], num_processes: int) -> _T:
    """Wait for all processes, then call a function on the main one; all get its result or error."""
    if num_processes == 1:
        return function()
    from accelerate import PartialState

    from lora_sentiment.training.processes import run_on_main

    PartialState().wait_for_everyone()
    return run_on_main(function)


@contextmanager
def _file_faults(output: Path) -> Iterator[None]:
    """Turn an `OSError` into a `DataError`."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{output}: cannot be written: {error.strerror or error}; check its name, folder and "
            "disk"
        ) from error


def _choose_columns(
    classifier: Classifier, text_column: str, text_pair_column: str | None
) -> list[str]:
    """Return the columns that a model reads.

    Raises:
        DataError: The second column of a pair is missing or the first one, or the model reads no
            pairs.
    """
    if text_column == text_pair_column:
        raise DataError(
            f"--text-column and --text-pair-column are both {text_column!r}; name the column of each"
        )
    if classifier.encoder.reads_pairs == (text_pair_column is not None):
        return [text_column] if text_pair_column is None else [text_column, text_pair_column]
    if text_pair_column is None:
        raise DataError(
            "this model reads pairs of texts; name the column of the second texts with "
            "--text-pair-column"
        )
    raise DataError(
        f"--text-pair-column: found {text_pair_column!r}, but this model reads single texts; leave "
        "it out"
    )


def _check_paths(input: Path, output: Path, *, resume: bool, overwrite: bool) -> None:
    if not output.exists():
        return
    if input.exists() and output.samefile(input):
        raise DataError(f"{output}: is the input too; give the output another name")
    if output.is_dir():
        raise DataError(f"{output}: is a folder; name a file in it")
    if overwrite:
        return
    if resume and not output.with_name(f"{output.name}.parts").exists():
        raise DataError(f"{output}: is finished already; --overwrite to do it again")
    raise DataError(f"{output}: exists already; give another name, or --overwrite")


def _plan_columns(
    input: Path,
    output: Path,
    encoding: str,
    text_columns: Sequence[str],
    new: Mapping[str, pa.DataType],
) -> dict[str, pa.DataType]:
    """Return the output's columns with their types, which only parquet has.

    Raises:
        DataError: If the input has no text column, or has a new column's name.
    """
    columns = table_columns(input, encoding=encoding, needed=text_columns)
    for option, name in zip(("--text-column", "--text-pair-column"), text_columns, strict=False):
        if find_column(columns, name) is None:
            hint = did_you_mean(name, columns)
            raise DataError(
                f"{input}: has no column {name!r}; the columns are {show_names(columns)}{hint}; "
                f"give {option}"
            )
    note = describe_delimiter(input, encoding=encoding, needed=text_columns)
    if note:
        log.info("%s: %s", input, note)
    taken = [repr(name) for name in new if name in columns]
    if taken:
        raise DataError(
            f"{input}: already has {', '.join(taken)}, the name of a new column; give --prefix, "
            "such as predicted_, for the new ones"
        )
    if output.name.lower().endswith(".parquet"):
        return {**table_types(input, encoding=encoding, needed=text_columns), **new}
    return {**dict.fromkeys(columns, pa.string()), **new}


def _try_output(
    input: Path,
    output: Path,
    encoding: str,
    text_columns: Sequence[str],
    types: Mapping[str, pa.DataType],
    new: Mapping[str, pa.DataType],
    labels: Sequence[str],
) -> int:
    """Return the number of rows. Refuse names and values that the output cannot hold."""
    sample: ColumnBatch = {name: [0.5] * len(labels) for name in new}
    # The widest values that a row may get, because the length of a line is limited.
    widest: ColumnBatch = {name: [1 / 3e-300] for name in new}
    for name, kind in new.items():
        if kind == pa.bool_():
            sample[name] = [False] * len(labels)
            widest[name] = [False]
        if kind == pa.string():
            sample[name] = list(labels)
            widest[name] = [max(*labels, "-" * 64, key=len)]
    with TableWriter(output, columns=list(new), types=new, dry=True) as trial:
        try:
            trial.write(sample)
        except DataError as error:
            fault = "a label's name, or --prefix, does not fit the output"
            raise DataError(f"{fault} {error}") from error
    num_rows = 0
    with TableWriter(output, columns=list(types), types=types, dry=True) as trial:
        for batch in read_table(input, encoding=encoding, needed=text_columns):
            count = len(next(iter(batch.values())))
            num_rows += count
            filled = {name: values * count for name, values in widest.items()}
            try:
                trial.write(batch | filled)
            except DataError as error:
                raise DataError(f"{input}: does not fit the output {error}") from error
    return num_rows


def _answer(
    classifier: Classifier, texts: Sequence[Any], options: Mapping[str, Any]
) -> list[Answer]:
    """Answer texts, in their order. A text that cannot be answered gets an error.

    Args:
        classifier: The model.
        texts: The texts.
        options: Arguments of `Classifier.predict`.
    """
    errors = [find_error(text, clean=classifier.clean) for text in texts]
    good = [text for text, error in zip(texts, errors, strict=True) if error is None]
    predictions = iter(classifier.predict(good, **options))
    answers = []
    for text, error in zip(texts, errors, strict=True):
        if error is not None:
            answers.append(Answer(text, None, error))
            continue
        prediction = next(predictions)
        error = prediction.error
        answers.append(Answer(text, None if error else prediction, error))
    return answers


def _split(text: Any) -> tuple[Any, ...]:
    """Return the parts of a text, which are two for a pair."""
    return text if isinstance(text, tuple) else (text,)


def find_error(text: Any, *, clean: bool) -> str | None:
    """Return why a text or a pair cannot be tokenised, or None."""
    if isinstance(text, tuple) and len(text) != len(PARTS):
        return "the model reads pairs: give two texts with a tab between them"
    for name, part in zip(PARTS, _split(text), strict=False):
        if part is None:
            return f"{name} is missing"
        if not isinstance(part, str):
            return f"{name} is {type(part).__name__}, not a string"
        # Python decodes bytes of standard input that are not UTF-8 to these. No tokenizer takes
        # them, and cleaning removes them.
        if not clean and re.search("[\ud800-\udfff]", part):
            return f"{name} is no Unicode"
    return None
