"""Tables that a Python program holds: pandas DataFrames, `datasets.Dataset`s and lists of dicts."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset

from lora_sentiment.data.lines import ColumnBatch, check_columns
from lora_sentiment.errors import DataError

ROWS_PER_BATCH = 10_000
"""Rows whose cells are copied at a time."""


def find_table_columns(table: Any, where: str) -> list[str]:
    """Return the column names of a table. Those of a list are the keys of all its dicts.

    Args:
        table: What the caller gave.
        where: The place of the table, for messages.

    Raises:
        DataError: It is no table, has no rows, or a column has no name of its own.
    """
    if isinstance(table, list):
        names = _find_keys(table, where)
    elif isinstance(table, Dataset):
        names = list(table.column_names)
    elif isinstance(table, pd.DataFrame):
        names = list(table.columns)
    else:
        raise DataError(
            f"{where}: found {type(table).__name__}; allowed: a pandas DataFrame, a "
            "datasets.Dataset or a list of dicts"
        )
    for name in names:
        if not isinstance(name, str):
            raise DataError(
                f"{where}: the column name {name!r} is {type(name).__name__}, not a string; "
                "rename the column"
            )
    check_columns(names, where)
    return names


def _find_keys(rows: list[Any], where: str) -> list[Any]:
    keys: dict[Any, None] = {}
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise DataError(
                f"{where}: row {number} is {type(row).__name__}, not a dict; give each row as a "
                "dict from column to value"
            )
        keys |= dict.fromkeys(row)
    if not rows:
        raise DataError(f"{where}: has no rows; give a table with rows")
    return list(keys)


def read_table_columns(table: Any, columns: list[str]) -> Iterator[ColumnBatch]:
    """Yield some columns of a table in batches, as Python values. A missing value is None."""
    if isinstance(table, Dataset):
        selected = table.select_columns(columns).with_format("arrow")
        for batch in selected.iter(ROWS_PER_BATCH):
            yield batch.to_pydict()
    elif isinstance(table, pd.DataFrame):
        for start in range(0, len(table), ROWS_PER_BATCH):
            part = table[columns].iloc[start : start + ROWS_PER_BATCH].astype(object)
            cells = part.where(part.notna(), None)
            yield {name: [_as_python(value) for value in cells[name]] for name in columns}
    else:
        for start in range(0, len(table), ROWS_PER_BATCH):
            rows = table[start : start + ROWS_PER_BATCH]
            yield {name: [_as_python(row.get(name)) for row in rows] for name in columns}


def _as_python(value: Any) -> Any:
    """Return a value of numpy as Python's own, such as an int or a list."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value
