"""From a source to labelled rows: find the splits, clean the text, map the labels, carve validation."""

import hashlib
import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_sentiment.data.config import SPLITS, DataConfig
from lora_sentiment.data.tables import FORMATS, read_table, table_columns
from lora_sentiment.errors import DataError
from lora_sentiment.section import did_you_mean


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
        return Rows([self.texts[i] for i in index], self.labels[index], self.numbers[index])

    def fingerprint(self) -> str:
        """Return the SHA-256 over texts and labels in order."""
        digest = hashlib.sha256(self.labels.tobytes())
        for text in self.texts:
            digest.update(f"{len(text)}:{text}".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


@dataclass
class Counts:
    """What was done to one split while it was read: numbers only, never text.

    Attributes:
        read: Rows in the source.
        kept: Rows that are used.
        cleaned: How many rows each cleaning rule changed.
        dropped: Reason to the row numbers dropped for it, counted from 1 in the source.
        duplicates: Rows whose text stood earlier in the split.
        labels: Label name to number of rows kept.
    """

    read: int = 0
    kept: int = 0
    cleaned: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, list[int]] = field(default_factory=dict)
    duplicates: int = 0
    labels: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the counts as report.json holds them."""
        return {**vars(self), "cleaned": {rule: count for rule, count in self.cleaned.items() if count}}

    def __str__(self) -> str:
        balance = ", ".join(f"{name} {count:,}" for name, count in self.labels.items())
        notes = [f"{count:,} had {rule}" for rule, count in self.cleaned.items() if count]
        notes += [f"{len(rows):,} DROPPED: {reason} (first at row {rows[0]})" for reason, rows in self.dropped.items()]
        notes += [f"{self.duplicates:,} duplicate texts"] if self.duplicates else []
        return f"{self.kept:,} rows ({balance})" + (f"; {'; '.join(notes)}" if notes else "")


@dataclass(frozen=True)
class Data:
    """What training needs: the test split is not among it, it is read at the end by `load_test`.

    Attributes:
        labels: Label names; the index of a name is its label.
        train: Rows to train on.
        validation: Rows to choose on.
        carved_test: Rows carved from train for test, where the recipe asks for that.
        counts: Split to what was done while reading it.
    """

    labels: tuple[str, ...]
    train: Rows
    validation: Rows
    carved_test: Rows | None
    counts: dict[str, Counts]


def load_data(config: DataConfig) -> Data:
    """Read train and validation; carve what is missing out of train, stratified, duplicates kept on one side.

    Raises:
        DataError: For a source, column, label or row that cannot be used.
    """
    source = _find(config)
    _check_files(config, source)
    rows, names, train_counts = _load_split(config, source, "train", config.labels, config.max_train_rows)
    if len(set(rows.labels.tolist())) < 2:
        raise DataError(
            f"{source.where('train')}: every row has the label {names[rows.labels[0]]!r}; a classifier needs two"
        )
    counts = {"train": train_counts}
    carved_test = None
    if config.test_fraction and "test" not in source.splits:
        rows, carved_test = carve(rows, fraction=config.test_fraction, seed=config.split_seed + 1)
    if "validation" in source.splits:
        validation, _, counts["validation"] = _load_split(config, source, "validation", names, None)
    else:
        rows, validation = carve(rows, fraction=config.validation_fraction, seed=config.split_seed)
    return Data(labels=names, train=rows, validation=validation, carved_test=carved_test, counts=counts)


def load_test(config: DataConfig, *, labels: tuple[str, ...]) -> tuple[Rows, Counts] | None:
    """Read the test split, or return None where the source has none.

    Args:
        config: The recipe's `data` section.
        labels: Label names as training used them.

    Raises:
        DataError: As `load_data`.
    """
    source = _find(config)
    if "test" not in source.splits:
        return None
    rows, _, counts = _load_split(config, source, "test", labels, config.max_test_rows)
    return rows, counts


def load_rows(config: DataConfig, *, split: str, labels: tuple[str, ...]) -> tuple[Rows, Counts]:
    """Read all rows of one split, or of a lone file whatever it is called.

    Raises:
        DataError: As `load_data`, and if the source has no such split.
    """
    source = _find(config)
    _check_files(config, source)
    if not source.hub and isinstance(config.source, str):
        split = "train"
    if split not in source.splits:
        raise DataError(f"data.source {config.source!r} has no {split!r} split; it has {', '.join(source.splits)}")
    rows, _, counts = _load_split(config, source, split, labels, None)
    return rows, counts


def carve(rows: Rows, *, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Split rows in two, stratified by label; equal texts land on the same side.

    Args:
        rows: What to split.
        fraction: Share of each label's rows that goes to the second part.
        seed: Decides which.

    Returns:
        (the rest, the carved part), each in the order of `rows`.

    Raises:
        DataError: If one side would hold no row of some label.
    """
    generator = np.random.default_rng(seed)
    groups: dict[str, list[int]] = {}
    for position, text in enumerate(rows.texts):
        groups.setdefault(text, []).append(position)
    by_label: dict[int, list[list[int]]] = {}
    for group in groups.values():
        # A text that stands under two labels goes with the label of its first row.
        by_label.setdefault(int(rows.labels[group[0]]), []).append(group)
    carved = np.zeros(len(rows), dtype=bool)
    for _, own in sorted(by_label.items()):
        wanted = max(1, round(sum(map(len, own)) * fraction))
        taken = 0
        for i in generator.permutation(len(own)):
            if taken >= wanted:
                break
            carved[own[i]] = True
            taken += len(own[i])
    for label in np.unique(rows.labels):
        if carved[rows.labels == label].all():
            raise DataError(
                f"label {label} has too few distinct texts to split ({int((rows.labels == label).sum())} rows); "
                "give more rows of it, or name a validation split in data.source"
            )
    return rows.take(np.flatnonzero(~carved)), rows.take(np.flatnonzero(carved))


_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u200e\u200f\u2060\ufeff\ufffe\uffff\ud800-\udfff]")

_RULES: dict[str, Callable[[str], str]] = {
    "html line breaks": lambda text: re.sub(r"<br\s*/?>", " ", text, flags=re.IGNORECASE),
    "html entities": html.unescape,
    "control characters": lambda text: _CONTROL.sub("", text),
    "decomposed characters": lambda text: unicodedata.normalize("NFC", text),
    "repeated blanks": lambda text: re.sub(r"\s+", " ", text).strip(),
}


def clean_text(text: str, counts: Counter[str]) -> str:
    """Clean one text and count the rules that changed it.

    HTML line breaks become blanks, HTML entities their characters, control and zero-width characters go, the rest is
    normalised to NFC, and runs of blanks become one.
    """
    for name, rule in _RULES.items():
        before, text = text, rule(text)
        counts[name] += text != before
    return text


@dataclass(frozen=True)
class _Source:
    """Where each split's columns come from: files, or one Hub data set."""

    splits: dict[str, list[Path]]
    hub: str | None = None

    def where(self, split: str) -> str:
        return f"{self.hub} [{split}]" if self.hub else ", ".join(map(str, self.splits[split]))


def _find(config: DataConfig) -> _Source:
    """Resolve `data.source` to splits without reading a row."""
    if isinstance(config.source, dict):
        return _Source({split: _files(config.source[split]) for split in SPLITS if split in config.source})
    if _looks_like_files(config.source):
        return _Source({"train": _files(config.source)})
    return _Source({split: [] for split in _hub_splits(config)}, hub=config.source)


def _looks_like_files(source: str) -> bool:
    hub_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) and not source.endswith(tuple(FORMATS))
    return not hub_name or Path(source).exists()


def _files(pattern: str) -> list[Path]:
    # Not Path.glob, which refuses absolute patterns.
    paths = [Path(p) for p in sorted(glob(pattern, recursive=True))]  # noqa: PTH207
    if not paths and not has_magic(pattern):
        paths = [Path(pattern)]
    if not paths:
        raise DataError(f"data.source {pattern!r} matches no file")
    return paths


def _check_files(config: DataConfig, source: _Source) -> None:
    """Look at the header of every file, test included: a missing column must not show after an hour of training."""
    for path in [path for paths in source.splits.values() for path in paths]:
        _check_columns(config, table_columns(path, encoding=config.encoding), str(path))


def _hub_splits(config: DataConfig) -> list[str]:
    from datasets import get_dataset_split_names

    with _ExplainHub(config):
        found = get_dataset_split_names(config.source, config.config, revision=config.revision)
    if "train" not in found:
        raise DataError(
            f"data.source {config.source!r} has the splits {', '.join(map(str, found))}; training needs 'train'"
        )
    return [split for split in SPLITS if split in found]


class _ExplainHub:
    """Turn what the Hub client and `datasets` raise for a data set into one line."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        from datasets.exceptions import DatasetsError
        from huggingface_hub.errors import HfHubHTTPError

        if isinstance(error, (OSError, ValueError, HfHubHTTPError, DatasetsError)) and not isinstance(error, DataError):
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise DataError(
                f"data.source {self.config.source!r} is no file here and could not be had from the Hub: {reason}"
            ) from error


def _load_split(
    config: DataConfig, source: _Source, split: str, labels: tuple[str, ...] | None, max_rows: int | None
) -> tuple[Rows, tuple[str, ...], Counts]:
    """Read one split whole: clean it, map its labels, drop or refuse bad rows, sample."""
    texts, values, own_names = _read_columns(config, source, split)
    where = source.where(split)
    names, index = _map_labels(values, labels or own_names, where)
    counts = Counts(read=len(texts))
    kept: list[int] = []
    for position, (text, label) in enumerate(zip(texts, index, strict=True)):
        if isinstance(text, str) and config.clean:
            texts[position] = text = clean_text(text, counts.cleaned)
        if reason := _fault(text, label, values[position], names):
            counts.dropped.setdefault(reason, []).append(position + 1)
        else:
            kept.append(position)
    if counts.dropped and config.on_bad_row == "error":
        raise DataError(_bad_rows(where, counts.dropped))
    if not kept:
        raise DataError(f"{where}: no usable row among {len(texts)}")
    positions = np.array(kept, dtype=np.int64)
    rows = Rows([texts[i] for i in kept], np.array([index[i] for i in kept], dtype=np.int64), positions + 1)
    if max_rows is not None and max_rows < len(rows):
        rows = sample(rows, num_rows=max_rows, seed=config.split_seed)
    counts.kept = len(rows)
    counts.duplicates = len(rows) - len(set(rows.texts))
    counts.labels = {name: int((rows.labels == i).sum()) for i, name in enumerate(names)}
    return rows, names, counts


def sample(rows: Rows, *, num_rows: int, seed: int) -> Rows:
    """Return a stratified sample of rows in their order: each label keeps its share to within one row."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(rows))
    # Sorted by label, every k-th row: the shares follow without rounding rules.
    by_label = order[np.argsort(rows.labels[order], kind="stable")]
    taken = by_label[(np.arange(num_rows) * len(rows)) // num_rows]
    return rows.take(np.sort(taken))


def _read_columns(
    config: DataConfig, source: _Source, split: str
) -> tuple[list[Any], list[Any], tuple[str, ...] | None]:
    """Return the text and label columns of a split, and the label names that the source itself states."""
    texts: list[Any] = []
    values: list[Any] = []
    if source.hub:
        return _read_hub(config, split)
    for path in source.splits[split]:
        for batch in read_table(path, encoding=config.encoding):
            texts += batch[config.text_column]
            values += batch[config.label_column]
    if not texts:
        raise DataError(f"{source.where(split)}: has no rows")
    return texts, values, None


def _read_hub(config: DataConfig, split: str) -> tuple[list[Any], list[Any], tuple[str, ...] | None]:
    from datasets import ClassLabel, load_dataset

    with _ExplainHub(config):
        table = load_dataset(config.source, config.config, split=split, revision=config.revision)
    _check_columns(config, table.column_names, f"{config.source} [{split}]")
    feature = table.features[config.label_column]
    names = tuple(feature.names) if isinstance(feature, ClassLabel) else None
    columns = table.select_columns([config.text_column, config.label_column]).with_format("arrow")[:]
    return columns[config.text_column].to_pylist(), columns[config.label_column].to_pylist(), names


def _check_columns(config: DataConfig, columns: Sequence[str], where: str) -> None:
    for key in ("text_column", "label_column"):
        wanted = getattr(config, key)
        if wanted not in columns:
            hint = did_you_mean(wanted, list(columns))
            raise DataError(
                f"{where}: no column {wanted!r}; the columns are {', '.join(columns)}{hint}; set data.{key}"
            )


def _map_labels(
    values: list[Any], names: tuple[str, ...] | None, where: str
) -> tuple[tuple[str, ...], list[int | None]]:
    """Return the label names, and each value's index or None where it has none."""
    present = {
        value for value in values if isinstance(value, (str, int)) and not isinstance(value, bool) and value != ""
    }
    if names is None:
        names = tuple(str(value) for value in sorted(present, key=_label_order))
        if not names:
            raise DataError(
                f"{where}: the label column holds neither text nor integers; its first value is {values[0]!r}"
            )
        if len(names) > max(100, len(values) // 2):
            raise DataError(
                f"{where}: the label column holds {len(names)} different values in {len(values)} rows; is it one?"
            )
    index: dict[Any, int] = {name: i for i, name in enumerate(names)}
    numbers = {str(value) for value in present}
    if all(re.fullmatch(r"-?\d+", text) for text in numbers) and not numbers <= set(names):
        # Integers against names given in order: 0 is the first name, 1 the second.
        index = {text: i for i in range(len(names)) for text in (str(i), i)}
    return names, [
        index.get(v, index.get(str(v))) if isinstance(v, (str, int)) and not isinstance(v, bool) else None
        for v in values
    ]


def _label_order(value: Any) -> tuple[int, int, str]:
    text = str(value)
    return (0, int(text), text) if re.fullmatch(r"-?\d+", text) else (1, 0, text)


def _fault(text: Any, label: int | None, value: Any, names: tuple[str, ...]) -> str | None:
    """Return what is wrong with a row, or None."""
    if not isinstance(text, str):
        return "text is missing" if text is None else f"text is {type(text).__name__}, not a string"
    if not text.strip():
        return "text is empty"
    if value is None or value == "":
        return "label is missing"
    if label is None:
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        return f"label {value!r} is none of {shown}"
    return None


def _bad_rows(where: str, dropped: dict[str, list[int]]) -> str:
    lines = [
        f"{where}: row {rows[0]}: {reason}" + (f" ({len(rows)} such rows)" if len(rows) > 1 else "")
        for reason, rows in list(dropped.items())[:5]
    ]
    more = len(dropped) - len(lines)
    return "\n".join(
        [*lines, *([f"... and {more} more kinds"] if more else []), "mend them, or set data.on_bad_row=drop"]
    )
