"""The budget of a diagnosis: evaluations and seconds spent by each part, what is left, and a progress bar."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["Budget", "Cost", "OutOfTime", "progress_bar"]

GRADIENT_COST = 3  # a backward pass costs about twice its forward pass


class OutOfTime(Exception):
    """The budget is spent; caught where a part of the diagnosis is begun, and named in `skipped`."""


@dataclass
class Cost:
    """Of one part. ``evaluations`` of log_likelihood count examples, one with its gradient as 3."""

    seconds: float = 0.0
    evaluations: int = 0


class Budget:
    """Counts evaluations and seconds by part, and stops a part that overruns ``budget_s``."""

    def __init__(self, budget_s: float | None, advance: Callable[[str, int], None]) -> None:
        self.costs: dict[str, Cost] = {}
        self._budget = budget_s
        self._advance = advance
        self._start = time.perf_counter()
        self._part = ""

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self._start

    @property
    def left(self) -> float | None:
        return None if self._budget is None else self._budget - self.elapsed

    def count(self, evaluations: int) -> None:
        """``evaluations`` were made. OutOfTime if the budget is spent."""
        self.costs[self._part].evaluations += evaluations
        self._advance(self._part, evaluations)
        if self.left is not None and self.left <= 0:
            raise OutOfTime(f"budget_s = {self._budget:g} ran out")

    def foresee(self, evaluations: int) -> None:
        """OutOfTime if ``evaluations`` more would overrun the budget at the speed measured so far."""
        spent = [cost for cost in self.costs.values() if cost.evaluations]
        left = self.left
        if left is not None and left <= 0:
            raise OutOfTime(f"budget_s = {self._budget:g} ran out")
        if left is None or not spent:
            return
        speed = sum(cost.evaluations for cost in spent) / max(sum(cost.seconds for cost in spent), 1e-9)
        needed = evaluations / speed
        if needed > left:
            raise OutOfTime(
                f"budget_s = {self._budget:g}: {evaluations} evaluations of log_likelihood take about "
                f"{needed:.1f} s, and {max(left, 0.0):.1f} s were left"
            )

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._part = name
        self._advance(name, 0)
        cost = self.costs.setdefault(name, Cost())
        began = time.perf_counter()
        try:
            yield
        finally:
            cost.seconds += time.perf_counter() - began


@contextmanager
def progress_bar(wanted: bool, total: int) -> Iterator[Callable[[str, int], None]]:
    """Gives advance(part, evaluations): a bar on standard error where that is a terminal and rich is
    installed, silence elsewhere."""
    if not wanted or importlib.util.find_spec("rich") is None:
        yield lambda part, evaluations: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, markup=False, emoji=False)
    columns = (
        TextColumn("diagnosis: {task.description}", markup=False),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda part, evaluations: progress.update(task, description=part, advance=evaluations)
