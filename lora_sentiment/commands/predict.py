"""Predict what is in a file: its columns come back with a label and a score, however many rows there are.

Rows are read, judged and written in numbered parts, `<output>.parts/part-00000.csv`, so memory does not grow with rows
and a run that was killed goes on after its last whole part. The parts are joined at the end. Several processes share
the parts of one file. Importing this imports no torch.
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
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import Timeout

from lora_sentiment.classifier import Classifier, Prediction
from lora_sentiment.console import make_bar
from lora_sentiment.data.batches import TOKENISE_ROWS
from lora_sentiment.data.cleaning import clean_text
from lora_sentiment.data.lines import Batch
from lora_sentiment.data.tables import FORMATS, TableWriter, read_table, table_columns, table_types
from lora_sentiment.errors import DataError, did_you_mean
from lora_sentiment.files import hash_file, lock_file, write_json

log = logging.getLogger("lora_sentiment")
LINES_PER_WINDOW = 1000


@dataclass(frozen=True)
class Answer:
    """What one text got.

    Attributes:
        text: As it was given; None where it was missing, anything where it was no string.
        prediction: None where the text cannot be judged.
        error: Why not; None where it was judged.
    """

    text: Any
    prediction: Prediction | None
    error: str | None


@dataclass(frozen=True)
class Summary:
    """What became of a file.

    Attributes:
        rows: Rows of the input, and of the output.
        bad_rows: Those that got an error in place of a label.
        labels: Rows of each label, in the classifier's order.
        parts: Parts that were joined.
        seconds: Wall time of this run; parts that an earlier run had left cost none.
    """

    rows: int
    bad_rows: int
    labels: dict[str, int]
    parts: int
    seconds: float


@dataclass(frozen=True)
class _Judge:
    """A classifier and how it is asked."""

    classifier: Classifier
    text_column: str
    all_scores: bool
    stride: int | None
    calibrated: bool
    prefix: str

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the new columns, but for the rows."""
        own = {name: value for name, value in vars(self).items() if name != "classifier"}
        return own | {
            "model_sha256": self.classifier.sha256,
            "labels": list(self.classifier.labels),
        }

    @property
    def types(self) -> dict[str, pa.DataType]:
        """Names of the new columns, the error's last, and their types."""
        scores = [f"score_{name}" for name in self.classifier.labels] if self.all_scores else []
        types = {
            "label": pa.string(),
            **dict.fromkeys(["score", *scores], pa.float64()),
            "error": pa.string(),
        }
        return {f"{self.prefix}{name}": kind for name, kind in types.items()}

    def columns(self, texts: Sequence[Any], tick: Callable[[int], object]) -> Batch:
        """Return the new columns of texts; `tick` is told of every few rows."""
        rows: list[list[Any]] = []
        for first in range(0, len(texts), TOKENISE_ROWS):
            few = texts[first : first + TOKENISE_ROWS]
            answers = _answer(self.classifier, few, stride=self.stride, calibrated=self.calibrated)
            for found, error in ((answer.prediction, answer.error) for answer in answers):
                scores = found.scores if found else dict.fromkeys(self.classifier.labels)
                every = scores.values() if self.all_scores else ()
                rows.append(
                    [found.label if found else None, found.score if found else None, *every, error]
                )
            tick(len(few))
        return dict(zip(self.types, map(list, zip(*rows, strict=True)), strict=True))


@dataclass(frozen=True)
class _Parts:
    """The numbered parts of an output, and `parts.json`, which says what they are parts of.

    Attributes:
        output: What they are joined to.
        own: The input's columns.
        new: The columns beside them, the label's first, the error's last.
        types: Of parquet's columns.
        run: Tells this run from any other.
    """

    output: Path
    own: tuple[str, ...]
    new: tuple[str, ...]
    types: Mapping[str, pa.DataType]
    run: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def folder(self) -> Path:
        return self.output.with_name(f"{self.output.name}.parts")

    def table(self, stem: str) -> Path:
        """Return the path of a table of the output's format."""
        suffix = next(suffix for suffix in FORMATS if self.output.name.lower().endswith(suffix))
        return self.folder / f"{stem}{suffix}"

    def part(self, number: int) -> Path:
        return self.table(f"part-{number:05d}")

    def check(self, facts: dict[str, Any], *, resume: bool) -> None:
        """Refuse parts of an earlier run that this one does not continue."""
        if not self.folder.exists() or (self.folder.is_dir() and not any(self.folder.iterdir())):
            return
        path = self.folder / "parts.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found, dict) or "model_sha256" not in found:
                raise ValueError("it names no model")
        except (OSError, ValueError) as error:
            fault = f"cannot be read ({error}), so nobody knows what stands beside it; move that folder away"
            raise DataError(f"{path}: {fault}") from error
        num_parts = len(list(self.folder.glob("part-*")))
        if not num_parts:
            return
        if not resume:
            fault = f"holds {num_parts} part(s) of an earlier run; --resume goes on after them; or remove the folder"
            raise DataError(f"{self.folder}: {fault}")
        changed = [
            f"{name} was {found.get(name)!r} and is {value!r}"
            for name, value in facts.items()
            if name not in found or found[name] != value
        ]
        if changed:
            fault = f"holds parts of another run: {'; '.join(changed)}; give what it was given, or remove the folder"
            raise DataError(f"{self.folder}: {fault}")
        log.info("%s: going on after %d parts", self.folder, num_parts)

    def start(self, facts: dict[str, Any]) -> None:
        self.folder.mkdir(exist_ok=True)
        aside = self.folder / f".{secrets.token_hex(8)}.tmp"
        write_json(aside, facts | {"run": self.run})
        aside.replace(self.folder / "parts.json")

    def write(self, number: int, batch: Batch) -> None:
        with TableWriter(
            self.part(number), columns=[*self.own, *self.new], types=self.types
        ) as writer:
            writer.write(batch)

    def read(self, num_parts: int) -> Iterator[Batch]:
        for number in range(num_parts):
            yield from read_table(self.part(number))

    def count(self, num_parts: int) -> Counter[str | None]:
        """Return the rows of each label, and of None those with an error."""
        label, error = self.new[0], self.new[-1]
        return Counter(
            None if fault else name
            for batch in self.read(num_parts)
            for name, fault in zip(batch[label], batch[error], strict=True)
        )

    def join(self, num_parts: int, *, with_errors: bool) -> None:
        """Make the output of the parts, and remove them."""
        if (
            json.loads((self.folder / "parts.json").read_text(encoding="utf-8")).get("run")
            != self.run
        ):
            raise DataError(
                f"{self.folder}: another run took these parts over; end it, remove the folder, begin again"
            )
        columns = [*self.own, *(self.new if with_errors else self.new[:-1])]
        whole = self.table("whole")
        with TableWriter(whole, columns=columns, types=self.types) as writer:
            for batch in self.read(num_parts):
                writer.write({name: batch[name] for name in columns})
        whole.replace(self.output)
        shutil.rmtree(self.folder)


def predict_lines(
    classifier: Classifier,
    lines: Iterable[str],
    *,
    stride: int | None = None,
    calibrated: bool = False,
) -> Iterator[Answer]:
    """Answer lines one by one, in their order, reading at most 1,000 ahead.

    A blank line is answered too, with an error, so that answers and lines can be paired.

    Args:
        classifier: What judges.
        lines: With or without their line ends.
        stride: As in `Classifier.predict`.
        calibrated: As in `Classifier.predict`.

    Raises:
        ModelError: If the stride leaves no room, or there is no temperature.
    """
    texts = (line.rstrip("\r\n") for line in lines)
    while window := list(islice(texts, LINES_PER_WINDOW)):
        yield from _answer(classifier, window, stride=stride, calibrated=calibrated)


def predict_file(
    classifier: Classifier,
    *,
    input: Path,
    output: Path,
    text_column: str = "text",
    encoding: str = "utf-8",
    all_scores: bool = False,
    stride: int | None = None,
    calibrated: bool = False,
    prefix: str = "",
    rows_per_part: int = 10_000,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Summary:
    """Write a table's columns, with `label` and `score` beside them, to another table.

    The whole input is read once before a row is judged, so that a fault of the file, or a value that the output's
    format cannot hold, costs no work. A row whose text
    is missing, empty or no string gets a reason in the column `error`, which is there only if some row has one.
    In a launch of several processes all of them call this, and part i is the work of process i modulo their number.

    Args:
        classifier: What judges.
        input: A csv, tsv, jsonl or parquet file, gzip too.
        output: Another such file; of another format if its name says so. From parquet to parquet, columns keep
            their Arrow types.
        text_column: What is judged.
        encoding: Of a text file that is read; the output is UTF-8.
        all_scores: Write the probability of every label too, in columns `score_<label>`.
        stride: As in `Classifier.predict`.
        calibrated: As in `Classifier.predict`.
        prefix: Begins the name of every new column.
        rows_per_part: Rows that are in memory at once, and that a killed run loses at most.
        resume: Go on with the parts that an earlier run left; they must be of this input, model and options.
        overwrite: Replace an existing output.
        progress: Show a bar.

    Raises:
        DataError: If the input is damaged or lacks the column, a new column's name is taken, the output exists or
            cannot be written or hold a value, or another run is writing it or left parts that this one cannot use.
        ModelError: If the stride leaves no room, or there is no temperature.
    """
    start = time.perf_counter()
    rank, num_processes, wait, share = _join_processes()
    if rows_per_part < 1:
        raise DataError(f"rows_per_part: found {rows_per_part}; it must be at least 1")
    classifier.probabilities(
        [], stride=stride, calibrated=calibrated
    )  # refuses them before there is any work to lose
    judge = _Judge(classifier, text_column, all_scores, stride, calibrated, prefix)
    with _plain_faults(output), _hold(output, rank, share) as output:
        _check_paths(input, output, resume=resume, overwrite=overwrite)
        parts = _plan_parts(judge, input, output, encoding)
        num_rows = _try_rows(judge, parts, input, encoding)
        name = input.name.encode(errors="backslashreplace").decode()
        source = {"input": name, "input_sha256": hash_file(input), "encoding": encoding}
        facts = {**source, "rows_per_part": rows_per_part, **judge.facts}
        parts.check(facts, resume=resume)
        wait()  # all have looked before one writes
        if rank == 0:
            parts.start(facts)
        wait()
        batches = (
            read_table(input, encoding=encoding, rows_per_batch=rows_per_part)
            if num_rows
            else iter(())
        )
        with make_bar(num_rows, desc="predicting", unit="rows", show=progress and rank == 0) as bar:
            num_parts = _fill_parts(judge, parts, batches, rank, num_processes, bar)
        wait()
        labels = parts.count(num_parts)
        wait()  # all have counted before the parts go
        if rank == 0:
            parts.join(num_parts, with_errors=labels[None] > 0)
        wait()
    named = {name: labels[name] for name in classifier.labels}
    return Summary(num_rows, labels[None], named, num_parts, time.perf_counter() - start)


def _fill_parts(
    judge: _Judge, parts: _Parts, batches: Iterator[Batch], rank: int, num_processes: int, bar: Any
) -> int:
    """Write the parts that are this process's and are not there; return the number of all."""
    num_parts = 0
    for batch in batches:
        texts = batch[judge.text_column]
        if num_parts % num_processes == rank and not parts.part(num_parts).is_file():
            parts.write(num_parts, batch | judge.columns(texts, bar.update))
        else:
            bar.update(len(texts))
        num_parts += 1
    return num_parts


def _join_processes() -> tuple[int, int, Callable[[], None], Callable[[str], str]]:
    """Return this process's number, how many there are, what waits for them all, and what gives all the first's."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return 0, 1, lambda: None, lambda text: text
    from accelerate.utils import broadcast_object_list

    from lora_sentiment.training.processes import join_launch

    state = join_launch()
    one, every, wait = state.process_index, state.num_processes, state.wait_for_everyone
    return one, every, wait, lambda text: str(broadcast_object_list([text])[0])


@contextmanager
def _plain_faults(output: Path) -> Iterator[None]:
    """Make a `DataError` of what the disk refuses, and name this command's options where a message names a recipe's."""
    try:
        yield
    except OSError as error:
        fault = f"cannot be used: {error.strerror or error}; check its name, folder and disk"
        raise DataError(f"{error.filename or output}: {fault}") from error
    except DataError as error:
        text = (
            str(error)
            .replace("data.encoding=", "--encoding ")
            .replace("data.encoding", "--encoding")
        )
        raise DataError(text) from error


@contextmanager
def _hold(output: Path, rank: int, share: Callable[[str], str]) -> Iterator[Path]:
    """Let no other run write the output meanwhile, of a link what it points to, which is returned."""
    output = Path(os.path.realpath(output)) if output.is_symlink() else output
    path = Path(f"{output}.parts.lock")
    with ExitStack() as held:
        fault = ""
        if rank == 0:
            try:
                held.enter_context(lock_file(path))
            except Timeout:
                fault = f"another run is writing {output}; wait until it ends"
            except OSError as error:
                fault = f"{output}: cannot be written: {error.strerror}; check its name, folder and disk"
        if fault := share(fault):  # every process raises, so that none waits for another
            raise DataError(fault)
        yield output


def _check_paths(input: Path, output: Path, *, resume: bool, overwrite: bool) -> None:
    if not output.exists():
        return
    if input.exists() and output.samefile(input):
        raise DataError(f"{output}: is the input too; give the output another name")
    if output.is_dir():
        raise DataError(f"{output}: is a folder; name a file in it")
    if not overwrite:
        if resume and not output.with_name(f"{output.name}.parts").exists():
            raise DataError(f"{output}: is finished already; --overwrite to do it again")
        raise DataError(f"{output}: exists already; give another name, or --overwrite")


def _plan_parts(judge: _Judge, input: Path, output: Path, encoding: str) -> _Parts:
    """Name the output's columns, refusing names that are missing or taken."""
    columns = table_columns(input, encoding=encoding)
    if judge.text_column not in columns:
        hint = did_you_mean(judge.text_column, columns)
        raise DataError(
            f"{input}: has no column {judge.text_column!r}; found {columns}{hint or '; name one of them'}"
        )
    if taken := [name for name in judge.types if name in columns]:
        fault = f"already has {', '.join(map(repr, taken))}, the name of a new column"
        raise DataError(f"{input}: {fault}; give --prefix, such as predicted_, for the new ones")
    into_parquet = output.name.lower().endswith(".parquet")
    types = table_types(input, encoding=encoding) | judge.types if into_parquet else {}
    return _Parts(output, tuple(columns), tuple(judge.types), types)


def _try_rows(judge: _Judge, parts: _Parts, input: Path, encoding: str) -> int:
    """Return the number of rows, having refused what the output cannot hold: the input's values, or new ones."""
    labels = judge.classifier.labels
    rows = {
        name: list(labels) if kind == pa.string() else [0.5] * len(labels)
        for name, kind in judge.types.items()
    }
    with TableWriter(parts.output, columns=parts.new, types=parts.types, dry=True) as trial:
        try:
            trial.write(rows)
        except DataError as error:
            raise DataError(
                f"a label's name, or --prefix, does not fit the output {error}"
            ) from error
    num_rows = 0
    # The widest row that may come of one, since a line has a longest length.
    widest = {pa.string(): max(*labels, "-" * 64, key=len), pa.float64(): 1 / 3e-300}
    with TableWriter(
        parts.output, columns=[*parts.own, *parts.new], types=parts.types, dry=True
    ) as trial:
        for batch in read_table(input, encoding=encoding):
            num_rows += (count := len(batch[judge.text_column]))
            try:
                trial.write(
                    batch | {name: [widest[kind]] * count for name, kind in judge.types.items()}
                )
            except DataError as error:
                raise DataError(f"{input}: does not fit the output {error}") from error
    return num_rows


def _answer(
    classifier: Classifier, texts: Sequence[Any], *, stride: int | None, calibrated: bool
) -> list[Answer]:
    faults = [_fault(text, clean=classifier.clean) for text in texts]
    good = [text for text, fault in zip(texts, faults, strict=True) if fault is None]
    found = iter(classifier.predict(good, stride=stride, calibrated=calibrated))
    return [
        Answer(text, next(found) if fault is None else None, fault)
        for text, fault in zip(texts, faults, strict=True)
    ]


def _fault(text: Any, *, clean: bool) -> str | None:
    """Return why a text cannot be judged, or None."""
    if not isinstance(text, str):
        return "text is missing" if text is None else f"text is {type(text).__name__}, not a string"
    read = clean_text(text, Counter()) if clean else text
    if not read.strip():
        return "text is empty"
    # Python reads bytes of standard input that are no UTF-8 so, and no tokenizer takes them.
    return "text is no Unicode" if re.search("[\ud800-\udfff]", read) else None
