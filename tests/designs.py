"""Covering designs: few cases in which every pair of factor levels occurs together."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

Case = dict[str, Any]
Factors = dict[str, list[Any]]


def cartesian(factors: Factors, valid: Callable[[Case], bool]) -> Iterator[Case]:
    for levels in itertools.product(*factors.values()):
        case = dict(zip(factors, levels, strict=True))
        if valid(case):
            yield case


def _pairs(case: Case) -> set[tuple[Any, ...]]:
    return {(a, case[a], b, case[b]) for a, b in itertools.combinations(case, 2)}


def _random_case(
    factors: Factors, valid: Callable[[Case], bool], fixed: Case, draw: random.Random
) -> Case | None:
    """A valid case that agrees with `fixed`, by rejection: None where 400 tries found none."""
    for _ in range(400):
        case = {
            name: fixed[name] if name in fixed else draw.choice(levels) for name, levels in factors.items()
        }
        if valid(case):
            return case
    return None


def pairwise(factors: Factors, valid: Callable[[Case], bool], seed: int = 0, tries: int = 6) -> list[Case]:
    """Cases that together hold every pair of levels that some valid case holds (greedy, deterministic)."""
    draw = random.Random(seed)
    open_pairs = [
        (a, x, b, y) for a, b in itertools.combinations(factors, 2) for x in factors[a] for y in factors[b]
    ]
    draw.shuffle(open_pairs)
    missing = dict.fromkeys(open_pairs)
    cases: list[Case] = []
    while missing:
        a, x, b, y = next(iter(missing))
        first = _random_case(factors, valid, {a: x, b: y}, draw)
        if first is None:  # no valid case holds this pair
            del missing[(a, x, b, y)]
            continue
        more = (_random_case(factors, valid, {a: x, b: y}, draw) for _ in range(tries))
        best = max(
            [first, *filter(None, more)], key=lambda case: sum(pair in missing for pair in _pairs(case))
        )
        for pair in _pairs(best):
            missing.pop(pair, None)
        cases.append(best)
    return cases


def name_of(case: Case) -> str:
    return "-".join(str(level).removeprefix("torch.") for level in case.values())
