"""Pictures of what a model generates: a grid of images, or lines where the data are vectors; PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.figure import Figure
from torch import Tensor

__all__ = ["grid"]

_CELL = 0.85  # inches
_DPI = 110


def grid(cells: Tensor, rows: Sequence[str], columns: Sequence[str], title: str) -> bytes:
    """``cells``: [rows, columns, C, H, W] images, C 1 or 3 (of others the first channel), in [0, 1], or
    [rows, columns, D] vectors, each row of which is one panel of ``columns`` lines. Empty labels are left
    out."""
    return _images(cells, rows, columns, title) if cells.dim() == 5 else _lines(cells, rows, columns, title)


def _images(cells: Tensor, rows: Sequence[str], columns: Sequence[str], title: str) -> bytes:
    height, width = cells.shape[-2:]
    size = (_CELL * len(columns) + 1.4, _CELL * len(rows) * max(1.0, height / width) + 0.7)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for row, label in enumerate(rows):
        for column, above in enumerate(columns):
            axis = axes[row, column]
            image = cells[row, column] if cells.shape[2] == 3 else cells[row, column, :1]
            axis.imshow(image.movedim(0, -1).tolist(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0 and above:
                axis.set_title(above, fontsize=9)
            if column == 0 and label:
                axis.set_ylabel(label, fontsize=9, rotation=0, ha="right", va="center")
    return _png(figure)


def _lines(cells: Tensor, rows: Sequence[str], columns: Sequence[str], title: str) -> bytes:
    figure = Figure(figsize=(7.5, 1.6 * len(rows) + 0.9), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(len(rows), 1, squeeze=False, sharex=True)[:, 0]
    colours = mpl.colormaps["viridis"]
    for axis, label, lines in zip(axes, rows, cells, strict=True):
        for place, (name, values) in enumerate(zip(columns, lines, strict=True)):
            colour = colours(0.9 * place / max(len(columns) - 1, 1))
            axis.plot(values.tolist(), color=colour, marker=".", linewidth=1, label=name)
        axis.set_ylabel(label, fontsize=9)
    axes[-1].set_xlabel("column of the data")
    if any(columns):
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", fontsize=8)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()
