"""One source, several instruction sets: all results are the same bits on every CPU with FMA."""

from __future__ import annotations

import functools
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import shim_build
import torch
from conftest import require_kernels

import vaekernels as vk
from vaekernels import _build, _native

ROWS, COLS = 67, 241
STATE = (1234567890123, 40)
# What the library's clones are compiled for, by the name that `build_info` gives the CPU.
LEVELS = {"baseline": "x86-64", "avx2": "x86-64-v3", "avx512": "x86-64-v4"}
# The parts of the kernels that a program needs.
PROGRAMS = {"vector_path": ["forward"], "problems": ["forward", "backward"]}


def inputs() -> torch.Tensor:
    mu = torch.randn(ROWS, COLS)
    logvar = 3.0 * torch.randn(ROWS, COLS)
    logvar[:, ::7] *= 1e-3
    return torch.stack([mu, logvar])


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """build(program, level, lanes): the program on kernels compiled for that level alone, with vectors of
    `lanes` quads; or, with None for a level, on kernels that choose at run time, as those of the library."""
    require_kernels("cpu")
    if platform.machine() != "x86_64":
        pytest.skip(f"the levels are those of x86-64, this is {platform.machine()}")
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or shutil.which("c++") or ""]
    if not compiler[0]:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("levels")
    tests, csrc = Path(__file__).parent, _build.source_dir()
    assert csrc is not None

    @functools.cache
    def compiled(source: Path, level: str | None, lanes: int) -> str:
        made = folder / f"{source.stem}-{level}-{lanes}.o"
        flags = [*_build.CXX_FLAGS, f"-I{csrc}"]
        if level is not None:
            flags += [f"-march={LEVELS[level]}", "-DVK_X86_DISPATCH=0", f"-DVK_LANES={lanes}"]
        subprocess.run([*compiler, *flags, "-c", str(source), "-o", str(made)], check=True)
        return str(made)

    @functools.cache
    def build(program: str, level: str | None, lanes: int = 4) -> Path:
        made = folder / f"{program}-{level}-{lanes}"
        sources = [tests / f"{program}.cpp", *(csrc / "cpu" / f"{part}.cpp" for part in PROGRAMS[program])]
        objects = [compiled(source, level, lanes) for source in sources]
        subprocess.run([*compiler, *objects, "-o", str(made)], check=True)
        return made

    return build


@pytest.fixture(scope="module")
def run(build):
    """run(level, tensors, lanes) -> (z, rate)."""

    def call(level: str, tensors: torch.Tensor, lanes: int = 4) -> tuple[np.ndarray, np.ndarray]:
        result = subprocess.run(
            [str(build("vector_path", level, lanes)), str(ROWS), str(COLS)],
            input=tensors.numpy().tobytes(),
            capture_output=True,
            check=True,
        )
        numbers = np.frombuffer(result.stdout, dtype=np.float32)
        return numbers[: ROWS * COLS], numbers[ROWS * COLS :]

    return call


def available(level: str) -> bool:
    order = list(LEVELS)
    here = _native.C.build_info()["cpu_isa"]
    return order.index(level) <= order.index(here)


@pytest.mark.parametrize("lanes", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (8, 16))])
@pytest.mark.parametrize("level", ["avx2", "avx512"])
def test_every_level_with_fma_gives_the_bits_of_the_library(level, lanes, run):
    """The widest vectors too: where the CPU has none, the compiler makes them of narrower ones."""
    if not available(level):
        pytest.skip(f"this CPU has no {level}")
    tensors = inputs()
    z, rate = run(level, tensors, lanes)
    ours = vk.sample_kl(*tensors, free_bits=0.25, rng=torch.tensor(STATE))
    assert np.array_equal(z, ours.z.numpy().ravel())
    assert np.array_equal(rate, ours.kl_per_group.numpy())


@pytest.mark.slow  # compiles the kernels twice
@pytest.mark.parametrize("level", ["avx2", "avx512"])
def test_every_level_with_fma_gives_all_results_of_the_choice_at_run_time(level, build):
    """Forward and backward, every dtype, layout and option. Where a CPU has AVX-512 this compares it, through
    the choice that it makes, with AVX2."""
    if not available(level):
        pytest.skip(f"this CPU has no {level}")
    command = ["0", "3000", "2000"]
    chosen, alone = (
        subprocess.run(
            [str(build("problems", one)), *command], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        for one in (None, level)
    )
    assert len(chosen) == 3000
    assert [pair for pair in zip(chosen, alone, strict=True) if pair[0] != pair[1]] == []


def test_nothing_that_the_language_leaves_open_is_done():
    """The same problems under ASan and UBSan, which stop at the first finding: NaN, inf, -0 and negatives
    in every argument, in memory that is exactly as large as it has to be."""
    shim_build.require("asan")
    done = shim_build.run("asan", "problems", "0", "400", "1000")
    assert done.returncode == 0, done.stdout[-3000:]
    assert len(done.stdout.splitlines()) == 400


def test_without_fma_the_numbers_agree(run):
    tensors = inputs()
    z, rate = run("baseline", tensors)
    ours = vk.sample_kl(*tensors, free_bits=0.25, rng=torch.tensor(STATE))
    # 1e-5 on the normals, which sd scales
    error = np.abs(z - ours.z.numpy().ravel()) / (1.0 + np.exp(0.5 * tensors[1].numpy().ravel()))
    assert error.max() <= 1e-5
    np.testing.assert_allclose(rate, ours.kl_per_group.numpy(), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize(("parameterization", "far"), [("logvar", 88.0), ("log_std", 44.0)])
def test_the_loop_for_near_log_variances_gives_the_bits_of_that_for_all(parameterization, far, prior, dtype):
    """Tiles of 512 elements are computed by the one or by the other: of three tiles, the middle one has a
    log-variance that the first loop leaves to the second."""
    require_kernels("cpu")
    state = torch.tensor(STATE)
    tensors = [torch.randn(24, 64), torch.randn(24, 64)]
    if prior:
        tensors += [torch.randn(24, 64), torch.randn(24, 64)]
    tensors = [t.to(dtype) for t in tensors]
    with_far = [t.clone() for t in tensors]
    with_far[3 if prior else 1][12, 5] = far
    keep = torch.ones(24, 64, dtype=torch.bool)
    keep[12, 5] = False

    def results(given: list[torch.Tensor], bounds: tuple[float, float] | None) -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in given]
        options = {"reduction": "elementwise", "parameterization": parameterization, "logvar_bounds": bounds}
        z, kl, _ = vk.sample_kl(*leaves, rng=state, **options)
        loss = (z.float() * torch.linspace(-1, 1, 64)).sum() + kl[keep].sum()
        return [z, kl, *torch.autograd.grad(loss, leaves)]

    near = results(tensors, None)
    for other in (results(with_far, None), results(tensors, (-500.0, 500.0))):
        for one, two in zip(near, other, strict=True):
            assert torch.equal(one[keep], two[keep])


def both_passes(moments: torch.Tensor, grad_z: torch.Tensor) -> list[torch.Tensor]:
    """z and the gradient of packed moments of z and KL together."""
    leaf = moments.detach().requires_grad_()
    z, kl, _ = vk.sample_kl_packed(leaf, rng=torch.tensor(STATE))
    (grad,) = torch.autograd.grad((z, kl), leaf, (grad_z, torch.tensor(1.0)))
    return [z.detach(), grad]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [3, 10, 32, 50, 128])
def test_half_precision_is_float32_rounded_as_torch_rounds(width, dtype):
    """By the vector and one by one at a row's end: ties, subnormals, overflow and NaN."""
    require_kernels("cpu")
    # Where scales are small z is the mean, a number of the dtype; where they are large it is none.
    mu = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    mu = mu[: len(mu) // width * width].reshape(-1, width)
    logvar = torch.linspace(-24.0, 22.0, mu.numel()).to(dtype).reshape(mu.shape)
    moments, grad_z = torch.cat([mu, logvar], 1), torch.randn(mu.shape).to(dtype)
    exact = both_passes(moments.float(), grad_z.float())
    for ours, wanted in zip(both_passes(moments, grad_z), exact, strict=True):
        assert torch.isnan(wanted).any() and torch.isinf(wanted.to(dtype)).any()
        torch.testing.assert_close(ours, wanted.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("clamp", ["batch", "sample"])
@pytest.mark.parametrize(
    "shape",
    [
        *[(97, 10), (97, 16), (83, 19), (83, 30), (40, 32), (51, 50), (40, 64), (40, 96), (9, 250), (9, 256)],
        *[(5, 500), (5, 511), (5, 512), (3, 640), (70, 2, 4, 8), (70, 2, 5, 5), (70, 2, 3, 10)],
    ],
    ids=str,
)
def test_where_rows_lie_changes_no_bit(shape, clamp, prior, dtype):
    """Rows in place, rows that are copied together, one row over several tiles: slices of wider tensors give
    what tensors of their own give."""
    require_kernels("cpu")
    pieces = [torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(4 if prior else 2)]
    wide = [torch.cat([torch.zeros_like(p[:, :1]), p, torch.zeros_like(p)], 1) for p in pieces]
    grad_z = torch.randn(shape, dtype=torch.float64).to(dtype)

    def results(leaves: list[torch.Tensor], given: list[torch.Tensor]) -> list[torch.Tensor]:
        z, kl, rate = vk.sample_kl(*given, free_bits=0.25, clamp=clamp, rng=torch.tensor(STATE))
        return [z, kl, rate, *torch.autograd.grad((z, kl), leaves, (grad_z, torch.ones_like(kl)))]

    leaves = [p.clone().requires_grad_() for p in pieces]
    sliced = [w[:, 1 : 1 + shape[1]].detach().requires_grad_() for w in wide]
    for one, two in zip(results(leaves, leaves), results(sliced, sliced), strict=True):
        assert torch.equal(one, two)
    leaf = torch.cat(pieces[:2], 1).requires_grad_()
    rest = [p.clone().requires_grad_() for p in pieces[2:]]
    rng = torch.tensor(STATE)
    z, kl, rate = vk.sample_kl_packed(leaf, 1, *rest, free_bits=0.25, clamp=clamp, rng=rng)
    grads = torch.autograd.grad((z, kl), [leaf, *rest], (grad_z, torch.ones_like(kl)))
    packed = [z, kl, rate, *grads[0].chunk(2, 1), *grads[1:]]
    for one, two in zip(results(leaves, leaves), packed, strict=True):
        assert torch.equal(one, two)
