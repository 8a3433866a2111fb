"""The cases of `vaekernels.bench` under pytest-benchmark: `python -m pytest benchmarks`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vaekernels import bench

LAYERS = bench.contenders(compiled=True)


@pytest.mark.parametrize("contender", LAYERS)
@pytest.mark.parametrize("case", bench.CASES, ids=lambda case: case.name)
def test_forward_backward(benchmark: Any, case: bench.Case, contender: str) -> None:
    tensors = case.tensors(torch.device("cpu"))
    layer = LAYERS[contender]
    bench.step(layer, *tensors)
    benchmark.group = case.name
    benchmark(bench.step, layer, *tensors)
