"""The budget of a diagnosis: evaluations and seconds spent by each part, what is left, and a progress bar."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Budget", "Cost", "OutOfTime", "Pace", "fitting", "progress_bar"]

GRADIENT_COST = 3  # a backward pass costs about twice its forward pass


_LEAST_N, _LEAST_K = 32, 4
_TO_DECIDE = 0.7
"""Share of the time left that may go to what decides the verdict."""
_DENSITIES = 4e8  # log densities a second on one CPU core


class OutOfTime(Exception):
    """The budget is spent; caught where a part of the diagnosis is begun, and named in `skipped`."""


class Pace(NamedTuple):
    """Seconds an example of the model's two functions."""

    encode: float
    evaluate: float


def fitting(
    n: int, k: int, *, dims: int, splits: int, pace: Pace, left: float, everything: int, use_pairs: int
) -> tuple[int, int]:
    """The n and k, of those asked for or less, with which what decides the verdict takes 0.7 of the time
    ``left``: codes, shuffled codes, contrast codes, single dimensions. As asked, where all ``everything``
    evaluations fit.

    n is halved, not below 32; k is halved where n is no more than 512, 8 at least for more than 128 examples,
    4 for fewer: I_dec of a few codes says whether there is use, an interval of a few examples says nothing.
    """

    def seconds(n: int, k: int) -> float:
        encoding = splits * (n * pace.encode + float(n) * n * dims / _DENSITIES)
        use = max(min(n * dims, use_pairs), min(n, _LEAST_N * 2) * dims)
        return encoding + pace.evaluate * (n * (2 + min(k, n // 2)) + use)

    if seconds(n, k) + pace.evaluate * everything <= left:
        return n, k
    smaller = n
    while True:
        least = min(k, 16 if smaller > 512 else 8 if smaller > 128 else _LEAST_K)
        options = [k]
        while options[-1] // 2 >= least:
            options.append(options[-1] // 2)
        for option in options:
            if seconds(smaller, option) <= _TO_DECIDE * left:
                return smaller, option
        if smaller // 2 < _LEAST_N:
            return smaller, options[-1]
        smaller //= 2


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
        self.pace: Pace | None = None

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
        left = self.left
        if left is not None and left <= 0:
            raise OutOfTime(f"budget_s = {self._budget:g} ran out")
        if left is None:
            return
        needed = evaluations * self._seconds_each()
        if needed > left:
            raise OutOfTime(
                f"budget_s = {self._budget:g}: {evaluations} evaluations of log_likelihood take about "
                f"{needed:.1f} s, and {max(left, 0.0):.1f} s were left"
            )

    def affordable(self, each: int, most: int, least: int, share: float = 0.5) -> int:
        """How many examples may cost ``each`` evaluations with that share of the time left: from ``least``,
        which :meth:`foresee` may refuse, to ``most``."""
        if self.left is None:
            return most
        examples = int(share * max(self.left, 0.0) / max(each * self._seconds_each(), 1e-12))
        return min(most, max(least, examples))

    def _seconds_each(self) -> float:
        spent = [cost for cost in self.costs.values() if cost.evaluations]
        evaluations = sum(cost.evaluations for cost in spent)
        if evaluations:
            return sum(cost.seconds for cost in spent) / evaluations
        return self.pace.evaluate if self.pace is not None else 0.0

    def half_spent(self) -> bool:
        return self._budget is not None and self.elapsed > self._budget / 2

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
