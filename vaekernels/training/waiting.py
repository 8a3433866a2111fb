"""Bars with the time left, on a terminal, while something takes long."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["tracked"]

T = TypeVar("T")


def tracked(items: Sequence[T], what: str, console: Console | None = None) -> Iterator[T]:
    """The ``items``, with a bar on standard error that goes when they are through; nothing where that is no
    terminal."""
    shown = console or Console(stderr=True, markup=False, emoji=False, highlight=False)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal) as progress:
        yield from progress.track(items, description=what)
