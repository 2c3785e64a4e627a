"""Read labelled rows: map labels, drop or refuse bad rows, carve out splits, sample."""

import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from sys import intern
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_sentiment.cleaning import clean_text, find_similar, strip_blanks
from lora_sentiment.data.sources import (
    Columns,
    Source,
    check_files,
    find_source,
    is_on_hub,
    read_columns,
)
from lora_sentiment.data.texts import (
    Text,
    Texts,
    encode_text,
    hash_texts,
    store_texts,
)
from lora_sentiment.errors import DataError, show
from lora_sentiment.recipe.data import DataConfig
from lora_sentiment.tasks import Task, find_task
from lora_sentiment.tasks.label_values import Fault, list_names

SHOWN_FAULTS = 5
"""Kinds of faults that a message names."""


@dataclass(frozen=True)
class Rows:
    """Labelled texts of one split.

    Attributes:
        texts: The cleaned text of each row, or its pair of texts.
        labels: Label of each row, as its task has them: for `single_label` its index, shape
            (num_rows,).
        numbers: Position of each row in its source, counted from 1, shape (num_rows,).
    """

    texts: Sequence[Text]
    labels: NDArray[Any]
    numbers: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, index: NDArray[np.int64]) -> "Rows":
        """Return the rows at these positions, in this order."""
        if isinstance(self.texts, Texts):
            texts: Sequence[Text] = self.texts.take(index)
        else:
            texts = [self.texts[i] for i in index]
        return Rows(texts, self.labels[index], self.numbers[index])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of labels and texts in order."""
        return hash_texts(hashlib.sha256(self.labels.tobytes()), self.texts)

    @cached_property
    def digests(self) -> NDArray[np.uint64]:
        """The `digest_text` of each text, shape (num_rows,)."""
        return np.fromiter(map(digest_text, self.texts), dtype=np.uint64, count=len(self))

    def find_first_equal(self) -> NDArray[np.int64]:
        """Return for each row the position of the first row with the same text: (num_rows,)."""
        _, first, group = np.unique(self.digests, return_index=True, return_inverse=True)
        return np.asarray(first[group], dtype=np.int64)


def digest_text(text: Text) -> int:
    """Return 64 bits of BLAKE2b. Among a million texts the chance of a collision is 3e-8."""
    digest = hashlib.blake2b(digest_size=8)
    if isinstance(text, str):
        digest.update(encode_text(text))
    else:
        hash_texts(digest, [text])
    return int.from_bytes(digest.digest())


@dataclass
class Counts:
    """Counts of one split while it was read, without any text.

    Attributes:
        read: Rows in the source.
        kept: Rows that are used.
        cleaned: Number of texts that each cleaning rule changed.
        dropped: Kind of fault to the numbers of the rows dropped for it, counted from 1.
        unlabelled: Rows of a split whose labels are all -1, as in the test splits of GLUE. Such a
            split is not evaluated.
        own_names: Label names that the source declares, as ClassLabel features of the Hub do.
    """

    read: int = 0
    kept: int = 0
    cleaned: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, list[int]] = field(default_factory=dict)
    unlabelled: int = 0
    own_names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Data:
    """The rows that training uses. `load_judged` reads the others after training.

    Attributes:
        config: The recipe's `data` section. Its `labels` are the names in the order of the
            recipe or of the Hub data set. None means that the names were only sorted.
        labels: Label names. The index of a name is its label.
        train: Rows to train on.
        validation: Rows to choose the best checkpoint on.
        judged: Roles of the source that are evaluated at the end.
        carved_test: Rows carved out of train for test, if the recipe says so and the source has no
            role to evaluate.
        counts: Counts of each split that was read.
        source: Where the rows are.
        calibration: Rows carved out of train to calibrate label sets, if the recipe says so.
    """

    config: DataConfig
    labels: tuple[str, ...]
    train: Rows
    validation: Rows
    judged: tuple[str, ...]
    carved_test: Rows | None
    counts: dict[str, Counts]
    source: Source
    calibration: Rows | None = None

    @cached_property
    def seen(self) -> dict[str, Rows]:
        """The rows that training uses, by role."""
        seen = {"train": self.train, "validation": self.validation}
        if self.calibration is not None:
            seen["calibration"] = self.calibration
        return seen

    @cached_property
    def seen_texts(self) -> NDArray[np.uint64]:
        """Digests of the texts that training uses."""
        return np.concatenate([rows.digests for rows in self.seen.values()])


def load_data(
    config: DataConfig,
    *,
    labels: tuple[str, ...] | None = None,
    source: Source | None = None,
) -> Data:
    """Read train and validation, or carve validation out of train.

    A carved split is stratified, and equal texts stay on one side.

    Args:
        config: The recipe's `data` section.
        labels: Label names as an earlier training used them. None takes those of the recipe, of the
            source, or of the training rows, in this order.
        source: Where the rows are. None finds those of `config`.

    Raises:
        DataError: A source, column, label or row cannot be used.
    """
    task = find_task(config.task)
    source = source or find_source(config)
    check_files(config, source)
    train, names, counts = _load_split(
        config,
        source,
        "train",
        labels=labels or _declared_names(config),
        max_rows=config.max_train_rows,
        for_training=True,
    )
    if counts.own_names == names and config.labels is None:
        config = config.model_copy(update={"labels": names})
    all_counts = {"train": counts}
    fault = task.check_train(train.labels, names, config)
    if fault:
        raise DataError(f"{source.where('train')}: {fault}")
    carved_test = None
    is_test_carved = bool(config.test_fraction) and not source.judged
    carved_roles = ["validation"] if "validation" not in source.roles else []
    if is_test_carved:
        carved_roles.append("test")
    _refuse_rare_labels(train, names, task, config, source, carved_roles)
    if is_test_carved:
        train, carved_test = carve(
            train,
            names,
            task,
            fraction=config.test_fraction,
            seed=config.split_seed + 1,
            key="data.test_fraction",
        )
        carved_test = sample(
            carved_test, task, num_rows=config.max_test_rows, seed=config.split_seed
        )
    if "validation" in source.roles:
        validation, _, all_counts["validation"] = _load_split(
            config, source, "validation", labels=names
        )
    else:
        train, validation = carve(
            train,
            names,
            task,
            fraction=config.validation_fraction,
            seed=config.split_seed,
            key="data.validation_fraction",
        )
    calibration = None
    if config.calibration_fraction:
        # Last, so that test and validation are the rows that they are without it.
        train, calibration = carve(
            train,
            names,
            task,
            fraction=config.calibration_fraction,
            seed=config.split_seed + 2,
            key="data.calibration_fraction",
        )
    fault = task.check_train(train.labels, names, config)
    if fault:
        raise DataError(f"{source.where('train')}, after rows were carved out of it: {fault}")
    return Data(
        config,
        names,
        train,
        validation,
        source.judged,
        carved_test,
        all_counts,
        source,
        calibration,
    )


def load_judged(
    config: DataConfig, *, role: str, labels: tuple[str, ...], source: Source | None = None
) -> tuple[Rows | None, Counts]:
    """Read the rows of a role that is evaluated at the end, or None if all its labels are hidden.

    Args:
        config: The recipe's `data` section.
        role: One of `Data.judged`.
        labels: Label names as training used them.
        source: Where the rows are. None finds those of `config`.

    Raises:
        DataError: As `load_data`.
    """
    source = source or find_source(config)
    check_files(config, source)
    rows, _, counts = _load_split(
        config, source, role, labels=labels, max_rows=config.max_test_rows, may_be_hidden=True
    )
    return (None if counts.unlabelled else rows), counts


@dataclass(frozen=True)
class Judged:
    """The rows that are evaluated at the end, by role.

    Attributes:
        rows: Rows with labels. Those of test may be carved out of train.
        counts: Counts of the roles that were read.
        unlabelled: Number of rows of each role whose labels are hidden.
        faults: The error of each role whose rows cannot be used.
    """

    rows: dict[str, Rows] = field(default_factory=dict)
    counts: dict[str, Counts] = field(default_factory=dict)
    unlabelled: dict[str, int] = field(default_factory=dict)
    faults: dict[str, DataError] = field(default_factory=dict)


def load_all_judged(config: DataConfig, data: Data) -> Judged:
    """Read every role that is evaluated at the end. An error concerns only its own role."""
    judged = Judged()
    if data.carved_test:
        judged.rows["test"] = data.carved_test
    for role in data.judged:
        try:
            rows, counts = load_judged(config, role=role, labels=data.labels, source=data.source)
        except DataError as error:
            judged.faults[role] = error
            continue
        if rows is None:
            judged.unlabelled[role] = counts.read
        else:
            judged.rows[role] = rows
            judged.counts[role] = counts
    return judged


def load_rows(
    config: DataConfig, *, split: str, labels: tuple[str, ...], source: Source | None = None
) -> tuple[Rows, Counts]:
    """Read all rows of one split of a Hub data set by its own name, of files, or of a table.

    Args:
        config: The recipe's `data` section; its source is text.
        split: Name of a split of the Hub data set, or a role of the bundled reviews. Not used for
            other files, which have one role.
        labels: Label names as training used them.
        source: Tables in memory that hold the split. None finds the source of `config`.

    Raises:
        DataError: As `load_data`, and if the data set has no such split.
    """
    if source is None:
        splits = {split: split} if is_on_hub(config.source) else None
        source = find_source(config.model_copy(update={"splits": splits}))
    role = source.roles[0] if len(source.roles) == 1 and not source.tables else split
    if role not in source.roles:
        held = "data" if source.tables else repr(config.source)
        raise DataError(f"split: found {show(split)}; {held} has {', '.join(source.roles)}")
    check_files(config, source)
    rows, _, counts = _load_split(config, source, role, labels=labels)
    return rows, counts


def load_raw_texts(config: DataConfig, rows: Rows, *, role: str) -> list[Text]:
    """Return the texts of rows as they stand in their source, before cleaning.

    Args:
        config: The recipe's `data` section.
        rows: Rows of one role.
        role: The role in the source. That of rows carved out of train is train.
    """
    columns, _ = read_columns(config, find_source(config), role)
    wanted = set(rows.numbers.tolist())
    raw = {}
    number = 0
    for texts, _ in columns:
        for text in texts:
            number += 1
            if number in wanted:
                raw[number] = text
    return [raw[number] for number in rows.numbers.tolist()]


def carve(
    rows: Rows, names: Sequence[str], task: Task, *, fraction: float, seed: int, key: str
) -> tuple[Rows, Rows]:
    """Split rows in two, stratified by label. Equal texts stay on one side.

    Args:
        rows: The rows to split.
        names: Label names, for messages.
        task: The task of the labels.
        fraction: Share of each label's rows that goes to the second part.
        seed: Decides which rows.
        key: Recipe key of the fraction, for messages.

    Returns:
        (the rest, the carved part), each in the order of `rows`.

    Raises:
        DataError: One part would hold no row, or none of some label.
    """
    first = rows.find_first_equal()
    num_equal = np.bincount(first, minlength=len(rows))
    distinct = np.flatnonzero(num_equal)
    is_chosen = np.zeros(len(rows), dtype=bool)
    # A text that occurs under two labels counts for the label of its first row.
    is_chosen[distinct] = task.choose_texts(
        rows.labels[distinct],
        num_equal[distinct],
        fraction=fraction,
        generator=np.random.default_rng(seed),
    )
    is_carved = is_chosen[first]
    places, labels = task.find_occurrences(rows.labels)
    emptied = np.setdiff1d(labels, labels[~is_carved[places]])
    if len(emptied):
        fault = _explain_rare_labels(labels, names, emptied, fraction)
        advice = {key: ", or lower {}"}
        texts = [np.unique(first[places[labels == label]]) for label in emptied]
        if key.startswith("data.") and min(map(len, texts)) == 1:
            advice = {}  # one text cannot be in two parts, whatever the fraction
        raise DataError(f"{fault}\nadd rows with these labels", advice=advice)
    if is_carved.all() or not is_carved.any():
        raise DataError(
            f"found {len(rows):,} rows, too few to carve {100 * fraction:g}% out of them\nadd rows"
        )
    return rows.take(np.flatnonzero(~is_carved)), rows.take(np.flatnonzero(is_carved))


def _refuse_rare_labels(
    rows: Rows,
    names: Sequence[str],
    task: Task,
    config: DataConfig,
    source: Source,
    roles: list[str],
) -> None:
    """Refuse labels with too few distinct texts for train and each role that is carved out of it.

    Raises:
        DataError: There are such labels. The message counts all of them.
    """
    if not roles:
        return
    places, labels = task.find_occurrences(rows.labels)
    first = rows.find_first_equal()[places]
    pairs = np.unique(np.stack([labels, first]), axis=1)
    present, num_texts = np.unique(pairs[0], return_counts=True)
    # A text that stands earlier under another label is carved with that label, or stays.
    codes = places * len(names) + labels
    shared = labels[~np.isin(first * len(names) + labels, codes)]
    rare = np.setdiff1d(present[num_texts <= len(roles)], shared)
    if not len(rare):
        return
    fractions = {"validation": config.validation_fraction, "test": config.test_fraction}
    fraction = sum(fractions[role] for role in roles)
    fault = _explain_rare_labels(labels, names, rare, fraction)
    key = "data.splits" if source.hub else "data.source"
    named = ", ".join(f"{role}: .." for role in ("train", *roles))
    advice = {}
    if config.max_train_rows:
        advice["data.max_train_rows"] = ", or set {} higher"
    advice[key] = (
        f", or name rows for {' and '.join(roles)}, which need not hold every label: "
        f"{{}}={{{named}}}"
    )
    others = np.setdiff1d(present, rare)
    # Integers that stand for names would stand for other names if one were left out.
    if config.labels is None and config.label_columns is None and len(others) >= 2:
        kept = json.dumps([names[label] for label in others], ensure_ascii=False)
        advice["data.labels"] = f", or leave these labels out: {shlex.quote(f'{{}}={kept}')}"
        advice["data.on_bad_row"] = " {}=drop"
    raise DataError(f"{fault}\nadd rows with these labels", advice=advice)


def _explain_rare_labels(
    labels: NDArray[np.int64], names: Sequence[str], rare: NDArray[np.int64], fraction: float
) -> str:
    """Count the labels of whose rows this fraction cannot be carved out."""
    counted = []
    for label in rare.tolist():
        num_rows = int((labels == label).sum())
        counted.append(f"{show(names[label])} ({num_rows:,})")
    fault = f"too few distinct texts to carve {100 * fraction:g}% out of"
    if len(rare) == 1:
        fault = f"label {show(names[rare[0]])} has {fault} its rows ({num_rows:,})"
    else:
        fault = f"{len(rare)} labels have {fault} their rows: {', '.join(counted)}"
    for similar in find_similar(names):
        if any(names[label] in similar for label in rare):
            shown = ", ".join(map(show, similar))
            fault += (
                f"\nlabels differ only in case, blanks or the form of a character: {shown}; if they "
                "are one label, write it in one way"
            )
    return fault


def sample(rows: Rows, task: Task, *, num_rows: int | None, seed: int) -> Rows:
    """Return a stratified sample of rows in order. Each label keeps its share to within one row.

    All rows are returned if there are no more than `num_rows`, or if it is None.
    """
    if num_rows is None or num_rows >= len(rows):
        return rows
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(rows))
    # Sorted by label, every k-th row is taken, which keeps the shares without rounding.
    by_label = order[np.argsort(task.find_strata(rows.labels)[order], kind="stable")]
    taken = by_label[(np.arange(num_rows) * len(rows)) // num_rows]
    return rows.take(np.sort(taken))


def _load_split(
    config: DataConfig,
    source: Source,
    role: str,
    *,
    labels: tuple[str, ...] | None,
    max_rows: int | None = None,
    may_be_hidden: bool = False,
    for_training: bool = False,
) -> tuple[Rows, tuple[str, ...], Counts]:
    """Read the rows of a role: clean texts, map labels, drop or refuse bad rows, sample.

    Args:
        config: The recipe's `data` section.
        source: Where the rows are.
        role: A role of the source.
        labels: Label names in order. None takes those of the source.
        max_rows: Size of the sample. None takes all rows.
        may_be_hidden: Whether all labels may be -1. Then no row is returned, and
            `Counts.unlabelled` counts them.
        for_training: Whether dropping bad rows must leave a row of each label.
    """
    task = find_task(config.task)
    where = source.where(role)
    columns, own_names = read_columns(config, source, role)
    counts = Counts(own_names=own_names)
    values: list[Any] = []
    faults: dict[int, Fault] = {}
    texts = store_texts(
        _clean_texts(columns, values, faults, counts, config),
        are_pairs=config.reads_pairs,
    )
    counts.read = len(values)
    if not values:
        raise DataError(f"{where}: has no rows; use another file, split or table")
    if may_be_hidden and labels and task.are_hidden(values, labels):
        counts.unlabelled = len(values)
        empty = np.empty(0, dtype=np.int64)
        return Rows([], empty, empty), labels, counts
    read = task.read(
        values,
        config,
        names=labels,
        own_names=own_names,
        where=where,
        num_files=len(source.files.get(role, ())),
    )
    names = read.names
    faults = read.faults | faults
    for position, fault in sorted(faults.items()):
        counts.dropped.setdefault(fault.kind, []).append(position + 1)
    is_good = np.ones(len(values), dtype=bool)
    is_good[list(faults)] = False
    lost = []
    if faults and for_training:
        left = task.count_labels(read.labels[is_good], names)
        lost = [name for name, count in left.items() if not count]
    if faults and config.on_bad_row == "error":
        may_drop = len(faults) < len(values) / 2 and not lost
        raise _bad_rows(where, faults, may_drop=may_drop)
    if len(faults) == len(values):
        raise DataError(
            f"{where}: no usable row among {len(values)}: {', '.join(counts.dropped)}",
            advice={"data.on_bad_row": "; {}=error says which rows and why"},
        )
    if lost:
        raise DataError(
            f"{where}: no row is left for {list_names(lost)} after dropping "
            f"{len(faults):,} rows: {', '.join(counts.dropped)}; correct these rows",
            advice={"data.on_bad_row": "; {}=error says which rows and why"},
        )
    rows = Rows(texts, read.labels, np.arange(1, len(values) + 1))
    if faults:
        rows = rows.take(np.flatnonzero(is_good))
    sampled = sample(rows, task, num_rows=max_rows, seed=config.split_seed)
    counts.kept = len(sampled)
    before = task.find_occurrences(rows.labels)[1]
    unsampled = np.setdiff1d(before, task.find_occurrences(sampled.labels)[1])
    if for_training and len(unsampled):
        raise DataError(
            f"{where}: a sample of {max_rows:,} rows holds no row of "
            f"{list_names([names[i] for i in unsampled])}",
            advice={"data.max_train_rows": "; set {} higher, or to null"},
        )
    return sampled, names, counts


def _clean_texts(
    columns: Columns,
    values: list[Any],
    faults: dict[int, Fault],
    counts: Counts,
    config: DataConfig,
) -> Iterator[str]:
    """Yield cleaned texts, empty where a text has a fault. Of a pair, yield one after the other.

    Args:
        columns: Texts and label values of some rows at a time.
        values: Every label value is added. Equal strings become one object.
        faults: Every fault of a text is added, by position.
        counts: Cleaned texts are counted.
        config: The recipe's `data` section.
    """
    for some_texts, some_values in columns:
        for position, text in enumerate(some_texts, start=len(values)):
            parts = text if config.reads_pairs else (text,)
            for column, part in zip(config.text_cells, parts, strict=True):
                if isinstance(part, str) and config.clean:
                    part = clean_text(part, counts.cleaned)
                fault = _explain_text(part, column if config.reads_pairs else None)
                if fault:
                    faults.setdefault(position, fault)
                    part = ""
                yield part
        values += [intern(value) if isinstance(value, str) else value for value in some_values]


def _declared_names(config: DataConfig) -> tuple[str, ...] | None:
    """Return the label names of the recipe without blanks around them, or None."""
    if config.labels is None:
        return None
    names = tuple(strip_blanks(name) for name in config.labels)
    if len(set(names)) < len(names) or "" in names:
        raise DataError(
            f"found {list(config.labels)}; blanks around a name do not count: each name must "
            "differ from the others in more, and hold another character",
            key="data.labels",
        )
    return names


def _explain_text(text: Any, column: str | None) -> Fault | None:
    """Return the fault of a text, or None. The column is named where there are two of texts."""
    if text is None:
        return Fault("text is missing", "text is missing", column)
    if not isinstance(text, str):
        return Fault("text is no string", f"text is {type(text).__name__}, not a string", column)
    if not text.strip():
        return Fault("text is empty", "text is empty", column)
    return None


def _bad_rows(where: str, faults: dict[int, Fault], *, may_drop: bool) -> DataError:
    numbers: dict[Fault, list[int]] = {}
    for position, fault in sorted(faults.items()):
        numbers.setdefault(fault, []).append(position + 1)
    lines = []
    for fault, rows in list(numbers.items())[:SHOWN_FAULTS]:
        more = f" ({len(rows)} such rows)" if len(rows) > 1 else ""
        column = "" if fault.column is None else f"; column {fault.column!r}"
        lines.append(f"{where}: row {rows[0]}: {fault.message}{more}{column}")
    if len(numbers) > SHOWN_FAULTS:
        lines.append(f"... and {len(numbers) - SHOWN_FAULTS} more kinds")
    lines.append("correct them")
    return DataError(
        "\n".join(lines),
        rows=[rows[0] for rows in numbers.values()],
        advice={"data.on_bad_row": ", or set {}=drop"} if may_drop else {},
    )
