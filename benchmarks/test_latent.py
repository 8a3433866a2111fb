"""The cases of `vaekernels.bench` under pytest-benchmark: `python -m pytest benchmarks`.

For runs that are kept and compared with pytest-benchmark's own tools. `vaekernels bench` times the contenders
in turn, which is fairer on a machine whose speed changes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vaekernels import bench
from vaekernels.bench.cases import Problem

LARGEST = 2**22  # above, one round takes seconds; `vaekernels bench` has them
CASES = [case for case in bench.CASES if case.numel <= LARGEST]


def names(case: bench.Case) -> list[str]:
    return list(bench.contenders(case, compiled=True))


@pytest.mark.parametrize(
    "case, contender",
    [(case, name) for case in CASES for name in names(case)],
    ids=lambda value: f"{value.op} {value.name}" if isinstance(value, bench.Case) else value,
)
@pytest.mark.parametrize("direction", ["forward", "both"])
def test_latent_layer(benchmark: Any, case: bench.Case, contender: str, direction: str) -> None:
    problem = Problem.of(case, torch.device("cpu"))
    timer = bench.Timer(problem, bench.contenders(case, compiled=True)[contender])
    benchmark.group = f"{case.op} {case.name} {direction}"
    benchmark(timer.timing(direction), 1)
