"""The host shim (tests/shim): that it finds planted faults, and what it finds in the CUDA kernels.

The kernels run plain, with ASan and UBSan, and with TSan. Tests marked `shim` run their cases
over it as well.
"""

from __future__ import annotations

import re

import pytest
import shim_build
import torch
from conftest import require_kernels

import vaekernels as vk

DATA_RACE = r"ThreadSanitizer: data race"
POISON = r"AddressSanitizer: (use-after-poison|unknown-crash)"
BESIDE_SHARED = r"bytes beside the block's shared memory were written"
BESIDE_TENSOR = r"bytes beside a tensor were written"
WRONG_NUMBER = r"number \d+ is .*, expected"
DEADLOCK = (
    r"deadlock\n  threads 0-31, 37, 64-95: at __syncthreads, faults.cpp:\d+"
    r"\n  threads 32-36, 38-63: at __shfl_xor_sync\(0xffffffff\), reduce.cuh:\d+\n"
)
RETURNED = r"deadlock\n  threads 0-4, 6-95: at __syncthreads, faults.cpp:\d+\n  threads 5: returned"

# Which build reports which fault of tests/shim/faults.cpp, and how. A build that is not named sees nothing.
FAULTS: dict[str, dict[str, str]] = {
    "barrier": {"plain": WRONG_NUMBER, "asan": WRONG_NUMBER, "tsan": DATA_RACE},
    # x86 orders stores and loads well enough that only TSan misses the fence.
    "fence": {"tsan": DATA_RACE},
    "stale_counter": {
        "plain": "a counter is left at 1",
        "asan": "a counter is left at 1",
        "tsan": f"a counter is left at 1|{DATA_RACE}",
    },
    "skipped_shuffle": dict.fromkeys(shim_build.BUILDS, DEADLOCK),
    "returned_lane": dict.fromkeys(
        shim_build.BUILDS, r"the mask names thread 37 \(lane 5\), which has returned"
    ),
    "other_mask": dict.fromkeys(
        shim_build.BUILDS, r"__shfl_xor_sync\(0x.fffffff\), .*: thread \d+ .* waits at .*\(0x.fffffff\)"
    ),
    "diverged": dict.fromkeys(shim_build.BUILDS, "__syncthreads in diverged code"),
    "early_return": dict.fromkeys(shim_build.BUILDS, RETURNED),
    "short_shared": {"plain": BESIDE_SHARED, "asan": POISON, "tsan": BESIDE_SHARED},
    "short_shared_read": {"asan": POISON},
    "far_past_shared": {
        "plain": r"thread \(\d+,0,0\) of block \(\d+,0,0\) touched memory",
        "asan": r"AddressSanitizer",
        "tsan": r"ThreadSanitizer: SEGV",
    },
    "unwritten_shared": dict.fromkeys(shim_build.BUILDS, WRONG_NUMBER),
    "past_the_end": {"plain": BESIDE_TENSOR, "asan": POISON, "tsan": BESIDE_TENSOR},
    "past_the_end_read": {"asan": POISON},
    "blocks_race": {"tsan": DATA_RACE},
    "misaligned_vector": {"asan": "runtime error: .* misaligned address"},
    "too_many_threads": dict.fromkeys(shim_build.BUILDS, "the launch failed: invalid configuration argument"),
    "too_much_shared": dict.fromkeys(shim_build.BUILDS, "the launch failed: invalid argument"),
}
REPORTS = [(name, build) for name, builds in FAULTS.items() for build in builds]
# Problems of the driver in `make test`, and how many elements they have at most: about a second of each.
FEW = {"plain": (300, 4000), "asan": (60, 3000), "tsan": (15, 1500)}
MANY = {"plain": (6000, 4000), "asan": (1200, 4000), "tsan": (500, 2500)}


def test_every_fault_is_in_the_table():
    shim_build.require()
    assert sorted(shim_build.run("plain", "faults").stdout.split()) == sorted(FAULTS)


@pytest.mark.parametrize("name, build", REPORTS, ids=map("-".join, REPORTS))
def test_a_planted_fault_is_reported(name, build):
    shim_build.require(build)
    result = shim_build.run(build, "faults", name)
    assert re.search(FAULTS[name][build], result.stdout), result.stdout
    assert result.returncode != 0


@pytest.mark.parametrize("build", shim_build.BUILDS)
def test_without_the_fault_nothing_is_reported(build):
    shim_build.require(build)
    result = shim_build.run(build, "faults", "--right")
    assert (result.returncode, result.stdout) == (0, "ok\n"), result.stdout


def solve(build: str, first: int, count: int, most: int) -> None:
    shim_build.require(build)
    arguments = ["--first", str(first), "--count", str(count), "--most", str(most)]
    result = shim_build.run(build, "driver", *arguments, timeout=3600)
    assert result.returncode == 0, result.stdout[-6000:]
    assert re.search(rf"^{count} problems, \d+ launches, 0 failed$", result.stdout, re.MULTILINE)


@pytest.mark.parametrize("build", shim_build.BUILDS)
def test_random_problems(build):
    count, most = FEW[build]
    solve(build, 0, count, most)


@pytest.mark.slow
@pytest.mark.parametrize("build", shim_build.BUILDS)
def test_many_random_problems(build):
    count, most = MANY[build]
    solve(build, 1000, count, most)


@pytest.mark.slow
@pytest.mark.parametrize("build, count", [("plain", 150), ("asan", 20), ("tsan", 5)])
def test_large_random_problems(build, count):
    solve(build, 100_000, count, 300_000)


def test_no_header_of_the_toolkit_is_read():
    """So that the shim compiles where there is no toolkit, even if this machine has one."""
    shim_build.require()
    toolkit = re.compile(
        r"(cuda|cuda_.*|vector_types|vector_functions|driver_types|host_defines|nv.*)\.h(pp)?"
    )
    for source, headers in shim_build.headers().items():
        assert len(headers) > 100
        found = [h for h in headers if toolkit.fullmatch(h.name) and not h.is_relative_to(shim_build.SHIM)]
        assert not found, f"{source} reads {found}"


# ---- the operators over the shim


@pytest.fixture
def shim():
    require_kernels("cpu")
    shim_build.require()
    return shim_build.library()


def states() -> list[torch.Tensor]:
    return [torch.tensor(pair) for pair in ((0, 0), (-1, 4), (2**62 + 3, 2**40), (-(2**63), -4))]


def test_words_are_those_of_the_cpu(shim):
    words = torch.ops.vaekernels._philox_words
    for state in states():
        for first in (0, 7, 2**32 - 3):
            ours = words(state, 4097, first)
            with shim.used():
                assert torch.equal(words(state, 4097, first), ours)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-13)], ids=str)
def test_normals_are_those_of_the_cpu(dtype, tolerance, shim):
    zero = torch.zeros(10_001, dtype=dtype)
    for state in states():
        ours = vk.reparameterize(zero, zero, rng=state)
        with shim.used():
            theirs = vk.reparameterize(zero, zero, rng=state)
        assert (ours - theirs).abs().max() <= tolerance


SHAPES = {
    "columns": ((70, 33), {}),
    "many_tiles": ((3, 2500), {}),
    "rows": ((3, 5, 700), {"group_dims": 1}),
    "cells": ((40, 9), {"free_bits": 0.3, "clamp": "sample"}),
    "row_sets": ((9, 3, 500), {"group_dims": 1, "free_bits": 100.0, "clamp": "sample"}),
    "whole": ((6, 4000), {"group_dims": ()}),
    "weighted": ((600, 20), {"weight": torch.linspace(0, 2, 600), "free_bits": 0.3}),
}


def call(shape, options, **more):
    draw = torch.Generator().manual_seed(1)
    leaves = [torch.randn(shape, generator=draw).requires_grad_() for _ in range(2)]
    out = vk.sample_kl(*leaves, **({"free_bits": 0.3} | options | more))
    return leaves, [*out]


@pytest.mark.parametrize("shape, options", SHAPES.values(), ids=SHAPES)
def test_one_launch_each_way(shape, options, shim):
    """And at most two while a graph is captured, which need no counters."""
    with shim.used():
        before = shim.launches()
        leaves, outputs = call(shape, options)  # draws its state: still one launch
        assert shim.launches() == before + 1
        torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])
        assert shim.launches() == before + 2
        with shim.capturing():
            call(shape, options, rng=torch.tensor([3, 4]))
        assert shim.launches() - (before + 2) <= 2


@pytest.mark.parametrize("shape, options", SHAPES.values(), ids=SHAPES)
def test_bits_depend_neither_on_the_schedule_nor_on_capturing(shape, options, shim):
    rng = torch.tensor([3, 4])
    with shim.used():
        _, first = call(shape, options, rng=rng)
        for seed in range(1, 6):
            shim.set_seed(seed)
            _, other = call(shape, options, rng=rng)
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
        with shim.capturing():
            _, captured = call(shape, options, rng=rng)
        assert all(torch.equal(a, b) for a, b in zip(first, captured, strict=True))


def test_a_captured_call_takes_its_state_from_memory(shim):
    """Each call of a graph its own numbers: the offset in the graph is added where the kernel runs."""
    mu = torch.zeros(6, 8)
    with shim.used():
        with shim.capturing():
            generator = torch.Generator().manual_seed(5)
            draws = [vk.reparameterize(mu, mu, generator=generator) for _ in range(3)]
        seed = torch.empty((), dtype=torch.int64)
        seed.random_(-(2**63), None, generator=torch.Generator().manual_seed(5))
        for i, z in enumerate(draws):
            rng = torch.tensor([int(seed), 4096 + 4 * i])
            assert torch.equal(z, vk.reparameterize(mu, mu, rng=rng))


def test_bad_values_on_the_device_give_nan(shim):
    """Nobody waits for the device to look at them."""
    mu = torch.ones(5, 3)
    with shim.used():
        for clamp in ("batch", "sample"):
            for bad in (-1.0, float("nan")):
                lam = torch.tensor([0.1, bad, 0.1])
                assert vk.gaussian_kl(mu, mu, free_bits=lam, clamp=clamp).isnan()
