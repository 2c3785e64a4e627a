"""From a source to labelled rows: map the labels, count what is dropped, carve validation, sample."""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_sentiment.data.cleaning import clean_text
from lora_sentiment.data.sources import Source, check_files, find_source, is_on_hub, read_columns
from lora_sentiment.data.texts import Texts, TextsWriter
from lora_sentiment.errors import DataError, show
from lora_sentiment.recipe.data import DataConfig


@dataclass(frozen=True)
class Rows:
    """Labelled texts of one split.

    Attributes:
        texts: One cleaned text a row.
        labels: Label index of each row, shape (num_rows,).
        numbers: Where each row stands in its source, counted from 1, shape (num_rows,).
    """

    texts: Sequence[str]
    labels: NDArray[np.int64]
    numbers: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, index: NDArray[np.int64]) -> "Rows":
        """Return the rows at these positions, in this order."""
        texts = (
            self.texts.take(index)
            if isinstance(self.texts, Texts)
            else [self.texts[i] for i in index]
        )
        return Rows(texts, self.labels[index], self.numbers[index])

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 over texts and labels in order."""
        digest = hashlib.sha256(self.labels.tobytes())
        for text in self.texts:
            digest.update(f"{len(text)}:{text}".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    @cached_property
    def digests(self) -> NDArray[np.uint64]:
        """A number for each text, equal where the texts are, shape (num_rows,): a set of texts would fill memory."""
        return np.fromiter(map(digest_text, self.texts), dtype=np.uint64, count=len(self))

    def first_equal(self) -> NDArray[np.int64]:
        """Return for each row the position of the first row with the same text, shape (num_rows,)."""
        _, first, group = np.unique(self.digests, return_index=True, return_inverse=True)
        return np.asarray(first[group], dtype=np.int64)


def digest_text(text: str) -> int:
    """Return 64 bits that stand for a text (BLAKE2b): that any two of a million share them has a chance of 3e-8."""
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    )


@dataclass
class Counts:
    """What was done to one split while it was read: numbers only, never text.

    Attributes:
        read: Rows in the source.
        kept: Rows that are used.
        cleaned: How many rows each cleaning rule changed.
        dropped: Kind of fault to the row numbers dropped for it, counted from 1 in the source.
        unlabelled: Rows of a split whose labels are all -1, as GLUE hides those of its test splits; it is not judged.
    """

    read: int = 0
    kept: int = 0
    cleaned: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, list[int]] = field(default_factory=dict)
    unlabelled: int = 0


@dataclass(frozen=True)
class Data:
    """What training needs: what is judged at the end is not among it, `load_judged` reads it then.

    Attributes:
        labels: Label names; the index of a name is its label.
        train: Rows to train on.
        validation: Rows to choose on.
        judged: The roles of the source that are judged at the end.
        carved_test: Rows carved from train for test, where the recipe asks for that and the source has none to judge.
        counts: Split to what was done while reading it.
    """

    labels: tuple[str, ...]
    train: Rows
    validation: Rows
    judged: tuple[str, ...]
    carved_test: Rows | None
    counts: dict[str, Counts]

    @cached_property
    def seen_texts(self) -> NDArray[np.uint64]:
        """Digests of the texts that training has seen, to train on or to choose on."""
        return np.concatenate([self.train.digests, self.validation.digests])


def load_data(config: DataConfig) -> Data:
    """Read train and validation; carve what is missing out of train, stratified, duplicates kept on one side.

    Raises:
        DataError: For a source, column, label or row that cannot be used.
    """
    source = find_source(config)
    check_files(config, source)
    rows, names, train_counts = _load_split(
        config, source, "train", config.labels, config.max_train_rows
    )
    if len(set(rows.labels.tolist())) < 2:
        raise DataError(
            f"{source.where('train')}: every row has the label {show(names[rows.labels[0]])}; a classifier needs two"
        )
    counts = {"train": train_counts}
    carved_test = None
    if config.test_fraction and not source.judged:
        rows, carved_test = carve(
            rows, names, fraction=config.test_fraction, seed=config.split_seed + 1
        )
        carved_test = sample(carved_test, num_rows=config.max_test_rows, seed=config.split_seed)
    if "validation" in source.roles:
        validation, _, counts["validation"] = _load_split(config, source, "validation", names, None)
    else:
        rows, validation = carve(
            rows, names, fraction=config.validation_fraction, seed=config.split_seed
        )
    return Data(
        names,
        train=rows,
        validation=validation,
        judged=source.judged,
        carved_test=carved_test,
        counts=counts,
    )


def load_judged(
    config: DataConfig, *, role: str, labels: tuple[str, ...]
) -> tuple[Rows | None, Counts]:
    """Read the rows of a role that is judged at the end; None where all their labels are -1, hidden as GLUE does.

    Args:
        config: The recipe's `data` section.
        role: One of `Data.judged`.
        labels: Label names as training used them.

    Raises:
        DataError: As `load_data`.
    """
    source = find_source(config)
    check_files(config, source)
    read = _read(config, source, role)
    if "-1" not in labels and all(value in (-1, "-1") for value in read.values):
        return None, Counts(read=len(read.values), unlabelled=len(read.values))
    rows, _, counts = _make_rows(config, read, source.where(role), labels, config.max_test_rows)
    return rows, counts


@dataclass(frozen=True)
class Judged:
    """The rows that are judged at the end, by role.

    Attributes:
        rows: Rows with labels; they may be carved out of train.
        counts: What reading did to the roles that were read.
        unlabelled: Number of rows of a role whose labels are hidden.
        faults: The error of a role whose rows cannot be used.
    """

    rows: dict[str, Rows] = field(default_factory=dict)
    counts: dict[str, Counts] = field(default_factory=dict)
    unlabelled: dict[str, int] = field(default_factory=dict)
    faults: dict[str, DataError] = field(default_factory=dict)


def load_all_judged(config: DataConfig, data: Data) -> Judged:
    """Read every role that is judged at the end. An error costs its own role alone."""
    judged = Judged()
    if data.carved_test:
        judged.rows["test"] = data.carved_test
    for role in data.judged:
        try:
            rows, counts = load_judged(config, role=role, labels=data.labels)
        except DataError as error:
            judged.faults[role] = error
            continue
        if rows is None:
            judged.unlabelled[role] = counts.read
        else:
            judged.rows[role] = rows
            judged.counts[role] = counts
    return judged


def load_rows(config: DataConfig, *, split: str, labels: tuple[str, ...]) -> tuple[Rows, Counts]:
    """Read all rows of one split of a Hub data set, by its own name, or of files whatever they are called.

    Args:
        config: The recipe's `data` section; its source is text.
        split: Name of a split, or a role of the bundled reviews; of files only a name.
        labels: Label names as training used them.

    Raises:
        DataError: As `load_data`, and if the data set has no such split.
    """
    source = find_source(
        config.model_copy(update={"splits": {split: split} if is_on_hub(config.source) else None})
    )
    # Files named alone have one role, whatever they are.
    role = split if len(source.roles) > 1 else source.roles[0]
    if role not in source.roles:
        raise DataError(
            f"split: found {show(split)}; {config.source!r} has {', '.join(source.roles)}"
        )
    check_files(config, source)
    rows, _, counts = _load_split(config, source, role, labels, None)
    return rows, counts


def carve(rows: Rows, names: Sequence[str], *, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Split rows in two, stratified by label; equal texts land on the same side.

    Args:
        rows: What to split.
        names: Label names, for messages.
        fraction: Share of each label's rows that goes to the second part.
        seed: Decides which.

    Returns:
        (the rest, the carved part), each in the order of `rows`.

    Raises:
        DataError: If one side would hold no row of some label.
    """
    generator = np.random.default_rng(seed)
    first = rows.first_equal()
    sizes = np.bincount(first, minlength=len(rows))
    heads = np.flatnonzero(sizes)
    chosen = np.zeros(len(rows), dtype=bool)
    # A text that stands under two labels goes with the label of its first row.
    for label in np.unique(rows.labels[heads]):
        own = heads[rows.labels[heads] == label]
        wanted = max(1, round(int(sizes[own].sum()) * fraction))
        own = own[generator.permutation(len(own))]
        # The first texts in this order whose rows are as many as wanted.
        chosen[own[: np.searchsorted(sizes[own].cumsum(), wanted) + 1]] = True
    carved = chosen[first]
    for label in np.unique(rows.labels):
        if carved[rows.labels == label].all():
            raise DataError(
                f"label {show(names[label])} has too few distinct texts to carve {fraction:.0%} out of its rows "
                f"({int((rows.labels == label).sum())}); give more rows, carve less, or name a split in data.source"
            )
    return rows.take(np.flatnonzero(~carved)), rows.take(np.flatnonzero(carved))


def _load_split(
    config: DataConfig,
    source: Source,
    role: str,
    labels: tuple[str, ...] | None,
    max_rows: int | None,
) -> tuple[Rows, tuple[str, ...], Counts]:
    return _make_rows(config, _read(config, source, role), source.where(role), labels, max_rows)


@dataclass(frozen=True)
class _Read:
    """A whole split, its texts cleaned and outside memory.

    Attributes:
        texts: One a row; empty where it has a fault.
        faults: Position to what is wrong with a text, as `_text_fault` says it.
        values: Label values, as the source has them; equal ones are one object.
        names: The label names that the source itself states.
        cleaned: How many texts each cleaning rule changed.
    """

    texts: Texts
    faults: dict[int, tuple[str, str]]
    values: list[Any]
    names: tuple[str, ...] | None
    cleaned: Counter[str]


def _read(config: DataConfig, source: Source, role: str) -> _Read:
    columns, names = read_columns(config, source, role)
    texts, faults, cleaned = TextsWriter(), {}, Counter[str]()
    values: list[Any] = []
    one: dict[tuple[type, Any], Any] = {}
    for some_texts, some_values in columns:
        for position, text in enumerate(some_texts, start=len(values)):
            if isinstance(text, str) and config.clean:
                text = clean_text(text, cleaned)
            if fault := _text_fault(text):
                faults[position] = fault
            texts.write("" if fault else text)
        values += [
            one.setdefault((type(v), v), v) if isinstance(v, (str, int)) else v for v in some_values
        ]
    if not values:
        raise DataError(f"{source.where(role)}: has no rows; name another file or split")
    return _Read(texts.finish(), faults, values, names, cleaned)


def _make_rows(
    config: DataConfig,
    read: _Read,
    where: str,
    labels: tuple[str, ...] | None,
    max_rows: int | None,
) -> tuple[Rows, tuple[str, ...], Counts]:
    """Make rows of a whole split: map its labels, drop or refuse bad rows, sample."""
    values = read.values
    if read.names and labels and read.names != labels:
        values = _rename(values, read.names, labels, where)
    names, index = _map_labels(values, labels or read.names, where)
    counts = Counts(read=len(values), cleaned=read.cleaned)
    faults: dict[str, list[int]] = {}
    kept = np.ones(len(values), dtype=bool)
    for position, (label, value) in enumerate(zip(index, values, strict=True)):
        if fault := read.faults.get(position) or _label_fault(label, value, names):
            counts.dropped.setdefault(fault[0], []).append(position + 1)
            faults.setdefault(fault[1], []).append(position + 1)
            kept[position] = False
    if faults and config.on_bad_row == "error":
        first_rows = [numbers[0] for numbers in faults.values()]
        raise DataError(_bad_rows(where, faults), rows=first_rows)
    if not kept.any():
        raise DataError(
            f"{where}: no usable row among {len(values)}: {', '.join(counts.dropped)}; data.on_bad_row=error says "
            "which rows and why"
        )
    found = np.array([-1 if label is None else label for label in index], dtype=np.int64)
    every = Rows(read.texts, found, np.arange(1, len(values) + 1))
    rows = every if kept.all() else every.take(np.flatnonzero(kept))
    rows = sample(rows, num_rows=max_rows, seed=config.split_seed)
    counts.kept = len(rows)
    return rows, names, counts


def sample(rows: Rows, *, num_rows: int | None, seed: int) -> Rows:
    """Return a stratified sample of rows in their order: each label keeps its share to within one row.

    All rows, where there are no more than asked for or `num_rows` is None.
    """
    if num_rows is None or num_rows >= len(rows):
        return rows
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(rows))
    # Sorted by label, every k-th row: the shares follow without rounding rules.
    by_label = order[np.argsort(rows.labels[order], kind="stable")]
    taken = by_label[(np.arange(num_rows) * len(rows)) // num_rows]
    return rows.take(np.sort(taken))


def _rename(
    values: list[Any], own: tuple[str, ...], names: tuple[str, ...], where: str
) -> list[Any]:
    """Turn integers under a data set's own names into ours: by name, or by position where all names are new."""
    if set(own) <= set(names):
        return [own[v] if isinstance(v, int) and 0 <= v < len(own) else v for v in values]
    if set(own) & set(names) or len(own) != len(names):
        raise DataError(
            f"{where}: its labels are {', '.join(own)}, and not {', '.join(names)}; name rows with the labels that "
            "were trained"
        )
    return values


def _map_labels(
    values: list[Any], names: tuple[str, ...] | None, where: str
) -> tuple[tuple[str, ...], list[int | None]]:
    """Return the label names, and each value's index or None where it has none."""
    present = {
        value
        for value in values
        if isinstance(value, (str, int)) and not isinstance(value, bool) and value != ""
    }
    if names is None:
        _refuse_decimals(present, where)
        names = tuple(sorted({str(value) for value in present}, key=_label_order))
        if not names:
            raise DataError(
                f"{where}: the label column holds neither text nor integers; its first value is {show(values[0])}"
            )
        if len(names) > max(100, len(values) // 2):
            raise DataError(
                f"{where}: the label column holds {len(names)} different values in {len(values)} rows; is it one?"
            )
    index: dict[Any, int] = {name: i for i, name in enumerate(names)}
    integer = re.compile(r"-?\d+")
    if not any(map(integer.fullmatch, names)) and all(
        integer.fullmatch(str(value)) for value in present
    ):
        # Integers against names given in order: 0 is the first name, 1 the second.
        index = {text: i for i in range(len(names)) for text in (str(i), i)}
    return names, [
        index.get(v, index.get(str(v)))
        if isinstance(v, (str, int)) and not isinstance(v, bool)
        else None
        for v in values
    ]


def _refuse_decimals(present: set[str | int], where: str) -> None:
    """Refuse scores, and integers that a table program wrote as 1.0: as names they would silently be classes."""
    found = sorted(str(value) for value in present)
    decimals = [
        text for text in found if re.fullmatch(r"[-+]?(\d+\.\d*|\.\d+)([eE][-+]?\d+)?", text)
    ]
    if decimals and all(text in decimals or re.fullmatch(r"-?\d+", text) for text in found):
        raise DataError(
            f"{where}: the labels are decimal numbers, such as {decimals[0]}; a class is an integer or a name: write "
            "integers, or state data.labels with every value in quotes if they are names"
        )


def _label_order(text: str) -> tuple[int, int, str]:
    # More digits are a name: Python refuses to read an integer of more than 4,300, or of 640 where it is told to.
    return (0, int(text), text) if re.fullmatch(r"-?\d{1,640}", text) else (1, 0, text)


def _text_fault(text: Any) -> tuple[str, str] | None:
    """Return what is wrong with a text, or None: the kind of fault, which quotes nothing, and a message."""
    if text is None:
        return ("text is missing",) * 2
    if not isinstance(text, str):
        return "text is no string", f"text is {type(text).__name__}, not a string"
    if not text.strip():
        return ("text is empty",) * 2
    return None


def _label_fault(label: int | None, value: Any, names: tuple[str, ...]) -> tuple[str, str] | None:
    """Return what is wrong with a label, or None: the kind of fault, which quotes nothing, and a message."""
    # A missing number is a NaN in tables that know no other.
    if value is None or value == "" or (isinstance(value, float) and value != value):
        return ("label is missing",) * 2
    if label is None:
        cut = [name if len(name) <= 40 else f"{name[:37]}..." for name in names[:8]]
        shown = ", ".join(cut) + (", ..." if len(names) > 8 else "")
        kind = (
            f"label is {type(value).__name__}"
            if not isinstance(value, (str, int))
            else "label is unknown"
        )
        return kind, f"label {show(value)} is none of {shown}"
    return None


def _bad_rows(where: str, dropped: dict[str, list[int]]) -> str:
    lines = [
        f"{where}: row {rows[0]}: {reason}" + (f" ({len(rows)} such rows)" if len(rows) > 1 else "")
        for reason, rows in list(dropped.items())[:5]
    ]
    more = len(dropped) - len(lines)
    return "\n".join(
        [
            *lines,
            *([f"... and {more} more kinds"] if more else []),
            "mend them, or set data.on_bad_row=drop",
        ]
    )
