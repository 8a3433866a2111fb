"""The cases of `vaekernels.bench` under pytest-benchmark, on the CPU: `python -m pytest benchmarks`.

For runs that are kept and compared with pytest-benchmark's own tools. `vaekernels bench` times the contenders
in turn, which is fairer on a machine whose speed changes, and on other devices too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vaekernels import bench
from vaekernels.bench import cases
from vaekernels.bench.measure import PASSES, memory

LARGEST = 2**22  # above, one round takes seconds; `vaekernels bench` has them
CASES = [case for case in bench.CASES if case.numel <= LARGEST]
THREADS = [2**i for i in range(torch.get_num_threads().bit_length()) if 2**i <= torch.get_num_threads()]


def names(case: bench.Case) -> list[str]:
    """Who could compute it, installed or not."""
    absent = {cases.COPY} if cases.serves_diffusers(case) else {cases.COPY, "diffusers"}
    return [name for name in cases.NAMES if name not in absent]


def identifier(value: object) -> str:
    if isinstance(value, bench.Case):
        return " ".join(filter(None, [value.op, value.name, value.model and f"({value.model})"]))
    return str(value)


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    most = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(most)


def run(benchmark: Any, case: bench.Case, contender: str, direction: str) -> None:
    layers = bench.contenders(case, compiled=contender == "torch.compile")
    if contender not in layers:
        pytest.skip(f"{contender} is not installed")
    timer = bench.Timer(cases.Problem.of(case, torch.device("cpu")), layers[contender])
    if direction == "backward":

        def forward() -> tuple[tuple[list[torch.Tensor]], dict[str, Any]]:
            timer.forget()
            return (timer.layer(timer.problem.inputs),), {}

        benchmark.pedantic(timer.backward, setup=forward, rounds=50, warmup_rounds=3)
    else:
        benchmark(timer.timing(direction), 1)
    if direction == "both":
        peak, saved = memory(timer)
        benchmark.extra_info |= {"peak_bytes": peak, "saved_bytes": saved}


@pytest.mark.parametrize(
    "case, contender", [(case, name) for case in CASES for name in names(case)], ids=identifier
)
@pytest.mark.parametrize("direction", PASSES)
def test_latent_layer(benchmark: Any, case: bench.Case, contender: str, direction: str) -> None:
    benchmark.group = f"{identifier(case)} {direction}"
    run(benchmark, case, contender, direction)


@pytest.mark.parametrize("threads", THREADS, indirect=True)
@pytest.mark.parametrize("contender", ["vaekernels", "eager"])
@pytest.mark.parametrize("case", bench.THREAD_CASES, ids=identifier)
def test_threads(benchmark: Any, case: bench.Case, contender: str, threads: int) -> None:
    benchmark.group = f"{identifier(case)}, threads, {contender}"
    benchmark.extra_info["threads"] = threads
    run(benchmark, case, contender, "both")
