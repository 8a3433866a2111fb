"""Tables in CSV files."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from vaekernels.training.config import DataConfig
from vaekernels.training.data.arrays import as_arrays
from vaekernels.training.data.base import Data, Most, file_size, opened
from vaekernels.training.errors import DataError

__all__ = ["load_csv", "read_csv"]

_MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?"})


def load_csv(config: DataConfig, say: Callable[[str], None]) -> Data:
    """``csv:PATH``: a table of numbers, one example per line, with or without a line of names."""
    path = Path(config.name.partition(":")[2])
    with opened(path) as file:
        Most(config).check(str(path), file_size(file))
        content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, byte {error.start}: not UTF-8") from error
    array, columns = read_csv(text, str(path))
    return as_arrays(config, torch.from_numpy(array), str(path), say, columns)


def read_csv(text: str, where: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """float64 [N, D] and the names of the columns, none where the first line holds numbers alone. Cells are
    separated by semicolons or tabs, where the first line has one (then 1,5 is 1.5), or by commas; an empty
    one, NA, NaN, null or ? is NaN.
    DataError with the line and the column of a cell that is no number."""
    first = text.lstrip("\r\n").partition("\n")[0]
    delimiter = next((each for each in ";\t" if each in first), ",")
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        lines = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise DataError(f"{where}: no table ({error})") from error
    if not lines:
        raise DataError(f"{where}: holds no line")
    names: tuple[str, ...] = ()
    if any(_number(cell, delimiter) is None for cell in lines[0][1]):
        names = tuple(cell.strip() for cell in lines.pop(0)[1])
    width = len(names) or len(lines[0][1])
    table = np.empty((len(lines), width), dtype=np.float64)
    for row, (number, cells) in zip(table, lines, strict=True):
        if len(cells) != width:
            raise DataError(f"{where}, line {number}: {len(cells)} cells, the first line has {width}")
        for column, cell in enumerate(cells):
            value = _number(cell, delimiter)
            if value is None:
                name = repr(names[column]) if names else str(column)
                raise DataError(
                    f"{where}, line {number}, column {name}: {cell!r:.40} is no number; leave the column "
                    f"out, or write a column of 0 and 1 for each of its values"
                )
            row[column] = value
    return table, names


def _number(cell: str, delimiter: str) -> float | None:
    """None if it is none."""
    plain = cell.strip()
    if plain.lower() in _MISSING:
        return float("nan")
    try:
        return float(plain if delimiter == "," else plain.replace(",", "."))
    except ValueError:
        return None
