"""The benchmark computes what it says, reports what it measured, and refuses what it cannot do."""

from __future__ import annotations

import functools
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from vaekernels import bench, cli
from vaekernels.bench import cases, plots, report
from vaekernels.bench.cases import COPY, OURS, Case, Problem
from vaekernels.bench.measure import Row

timing = import_module("vaekernels.bench.measure")  # whose name the package gives to its function

CPU = torch.device("cpu")
TINY = Case((4, 6))


def tiny(case: Case) -> Case:
    """The same layer with a handful of elements."""
    return replace(case, shape=tuple(min(n, 2 + i) for i, n in enumerate(case.shape)))


KINDS = list(dict.fromkeys(replace(tiny(case), model="") for case in bench.CASES))


def row(contender: str, median: float, **changed: Any) -> Row:
    given = Row(
        "sample_kl", "4x6 float32", "", 24, "float32", "both", contender, 1, 3, 0.9, 1.0, 1.1, 480, 64
    )
    return replace(given, median=median, p20=0.9 * median, p80=1.1 * median, **changed)


# ---- cases -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "op, packed",
    [("sample_kl", False), ("sample_kl", True), ("reparameterize", False), ("gaussian_kl", False)],
)
def test_sizes_from_16_by_8_to_2_to_the_26(op: str, packed: bool, dtype: torch.dtype) -> None:
    sizes = [c for c in bench.SIZES if (c.op, c.packed, c.dtype) == (op, packed, dtype)]
    assert [c.shape for c in sizes[:2]] == [(16, 8), (128, 32)]
    assert sizes[-1].numel == 2**26
    assert [c.numel for c in sizes] == sorted(c.numel for c in sizes)


def test_names_tell_cases_apart() -> None:
    names = [(c.op, c.name, c.model) for c in bench.CASES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", KINDS, ids=lambda c: f"{c.op} {c.name}")
def test_contenders_compute_the_same_layer(case: Case) -> None:
    if case.dtype == torch.bfloat16:
        # Eager code rounds every intermediate to 8 bits; what is to be compared here is the formula.
        case = replace(case, dtype=torch.float64)
    problem = Problem.of(case, CPU)
    expected = bench.contenders(case, compiled=False)["eager"](problem.inputs)
    torch.autograd.backward(expected, timing.output_grads(problem, expected))
    if case.op == "gaussian_kl":
        gradients = [t.grad.clone() for t in problem.inputs if t.grad is not None]
    for layer in bench.contenders(case, compiled=False).values():
        for t in problem.inputs:
            t.grad = None
        outputs = layer(problem.inputs)
        assert [(t.shape, t.dtype) for t in outputs] == [(t.shape, t.dtype) for t in expected]
        if case.has_kl:
            # float32 sums of fewer than 3000 terms of order 1: 1e-5 is a hundred roundings.
            torch.testing.assert_close(outputs[-1], expected[-1], rtol=1e-5, atol=1e-5)
        torch.autograd.backward(outputs, timing.output_grads(problem, outputs))
        assert all(t.grad is not None and t.grad.isfinite().all() for t in problem.inputs)
        if case.op == "gaussian_kl":
            found = [t.grad for t in problem.inputs if t.grad is not None]
            torch.testing.assert_close(found, gradients, rtol=1e-4, atol=1e-5)


def test_diffusers_serves_packed_images_without_free_bits() -> None:
    assert {c.model for c in bench.CASES if cases.serves_diffusers(c)} == {
        "latent diffusion",
        "latent diffusion, 16 channels",
    }


def test_diffusers_computes_the_same_kl() -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    case = Case((2, 3, 4, 5), packed=True, free_bits=None)
    problem = Problem.of(case, CPU)
    found = bench.contenders(case, compiled=False)
    torch.testing.assert_close(found["diffusers"](problem.inputs)[1], found[OURS](problem.inputs)[1])


@torch._dynamo.config.patch(recompile_limit=1)
def test_every_case_is_compiled_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for n in (2, 3, 4):
        case = Case((n, 5), op="gaussian_kl")
        layer = bench.contenders(case, compiled=True)["torch.compile"]
        (kl,) = layer(Problem.of(case, CPU).inputs)
        assert kl.isfinite()


@pytest.mark.parametrize(
    "case, forward, backward",
    [
        (Case((1,)), 3, 5),  # mu, logvar -> z; those and z's gradient -> two gradients
        (Case((1,), op="gaussian_kl"), 2, 4),
        (Case((1,), op="reparameterize"), 3, 3),  # logvar and z's gradient, which is mu's too -> logvar's
        (Case((1,), op="reparameterize", packed=True), 3, 4),  # mu's is written, into the packed one
        (Case((1,), op="reparameterize", num_samples=5), 7, 8),
        (Case((1,), num_samples=5), 7, 9),
        (Case((1,), prior=True), 5, 9),
    ],
)
def test_floor_in_elements(case: Case, forward: int, backward: int) -> None:
    assert (case.elements_moved(False), case.elements_moved(True)) == (forward, backward)


# ---- measuring -------------------------------------------------------------------------------------------


def measured(case: Case = TINY, **options: Any) -> list[Row]:
    given: dict[str, Any] = {"rounds": 1, "device": CPU, "compiled": False, "passes": ("both",)}
    return bench.measure(case, **(given | options))


def test_a_row_for_every_contender_and_pass() -> None:
    rows = measured(passes=timing.PASSES, rounds=2)
    assert [(r.direction, r.contender) for r in rows] == [
        (direction, name)
        for direction in ("forward", "backward", "both")
        for name in (OURS, "eager", "torch.distributions", COPY)
    ]
    assert all(0 < r.p20 <= r.median <= r.p80 and r.rounds == 2 for r in rows)
    assert {r.key for r in rows} == {(r.op, r.case, r.direction, r.contender, 1) for r in rows}


def test_long_cases_get_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS_PER_CASE", 0.0)
    monkeypatch.setattr(timing, "SECONDS_PER_TIMING", 1e-5)
    assert {r.rounds for r in measured(rounds=21)} == {timing.LEAST_ROUNDS}
    assert {r.rounds for r in measured(rounds=2)} == {2}


def test_memory(kernels: None) -> None:
    rows = {r.contender: r for r in measured(Case((64, 32)))}
    ours, eager = rows[OURS], rows["eager"]
    # The random state and the rate of every dimension, which decides about its gradient.
    assert ours.saved_bytes == 16 + 4 * 32
    # z and two gradients of float32, and less than one tensor besides.
    assert 3 * 4 * 64 * 32 <= (ours.peak_bytes or 0) < 4 * 4 * 64 * 32
    assert (eager.saved_bytes or 0) >= 3 * 4 * 64 * 32
    assert (eager.peak_bytes or 0) > (ours.peak_bytes or 0)
    assert rows[COPY].peak_bytes is None


def test_peak_is_above_what_was_there() -> None:
    kept = torch.ones(1000)

    def step() -> None:
        first = torch.ones(1000) + kept  # two at once: 8000 bytes
        del first
        torch.ones(500)

    assert timing.peak_bytes(step, CPU) == 8000
    assert timing.peak_bytes(lambda: None, CPU) == 0


# ---- reports ---------------------------------------------------------------------------------------------


def test_csv_and_back(tmp_path: Path) -> None:
    rows = [row(OURS, 1.25), row("eager", 4.0, peak_bytes=None, saved_bytes=None)]
    report.write_csv(tmp_path / "a.csv", rows, report.machine(CPU))
    assert report.read_csv(tmp_path / "a.csv") == [
        replace(r, p20=round(r.p20, 2), p80=round(r.p80, 2)) for r in rows
    ]
    columns = (tmp_path / "a.csv").read_text().splitlines()[0].split(",")
    assert columns == [
        *("op", "case", "model", "numel", "dtype", "direction", "contender", "threads", "rounds"),
        *("p20", "median", "p80", "peak_bytes", "saved_bytes"),
        *("device", "driver", "kernels", "torch", "python", "vaekernels", "commit"),
    ]


def test_csv_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("case,median\nx,1\n")
    with pytest.raises(ValueError, match=r"a\.csv has no column 'op'.*--csv"):
        report.read_csv(path)
    report.write_csv(path, [row(OURS, 1.0)], {})
    path.write_text(path.read_text().replace("1.0,", "fast,"))
    with pytest.raises(ValueError, match=r"a\.csv, line 2: .*fast"):
        report.read_csv(path)


def test_table() -> None:
    rows = [row(OURS, 10.0), row("eager", 35.0), row("torch.compile", 9.0), row(COPY, 1.0)]
    assert report.table(rows).splitlines() == [
        "| forward + backward | vaekernels (µs) | eager (µs) | torch.compile (µs) | copy (µs) |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| 4x6 float32 | 10 | 35 (3.5x) | **9 (0.9x)** | 1 (0.1x) |",
    ]


def test_table_of_memory() -> None:
    rows = [row(OURS, 1.0), row(COPY, 1.0, peak_bytes=None, saved_bytes=None)]
    assert report.memory(rows).splitlines() == [
        "| bytes per element: peak (saved) | vaekernels |",
        "| --- | ---: |",
        "| 4x6 float32 | 20.0 (2.7) |",
    ]


def test_compare_is_of_quotients() -> None:
    earlier = [row(OURS, 10.0), row("eager", 40.0)]
    now = [row(OURS, 40.0), row("eager", 80.0)]  # on a machine of half the speed: twice as slow
    lines = report.compare(now, earlier).splitlines()
    assert lines[2] == "| sample_kl 4x6 float32 both | 0.250 | 0.500 | +100 % |"
    assert lines[3] == "| median of 1 | | | +100 % |"
    assert report.compare([row(OURS, 1.0)], earlier) == "no measurement in common with the earlier file"


def spread(threads: int = 1) -> list[Row]:
    """Rows enough for every picture, of made-up times."""
    names = (OURS, "eager", "torch.compile", "torch.distributions", "diffusers", COPY)
    return [
        row(
            name,
            median=(1 + i) * math.sqrt(c.numel) / threads,
            op=c.op,
            case=c.name,
            model=c.model,
            numel=c.numel,
            dtype=str(c.dtype).removeprefix("torch."),
            threads=threads,
        )
        for c in bench.CASES
        for i, name in enumerate(names)
        if name != "diffusers" or cases.serves_diffusers(c)
    ]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = plots.plot([*spread(1), *spread(2)], folder / "new", {"device": "a machine", "driver": ""})
    return {path.name: path.read_text() for path in paths}


@pytest.mark.parametrize(
    "name, texts",
    [
        (
            "time-against-size.svg",
            ["copy of the same bytes (floor)", "latent elements", "forward + backward (µs)", "bfloat16"],
        ),
        ("speedup.svg", ["latent diffusion, 16 channels", "torch.distributions", "5x"]),
        ("threads.svg", ["speedup over one thread", "linear", "8192x512 float32 (4,194,304 elements)"]),
    ],
)
def test_pictures_say_what_they_show(drawn: dict[str, str], name: str, texts: list[str]) -> None:
    for text in [*texts, "device a machine"]:
        assert f"<!-- {text} -->" in drawn[name], text


def test_pictures_only_of_what_was_measured(tmp_path: Path) -> None:
    paths = plots.plot([row(OURS, 1.0), row("eager", 3.0)], tmp_path, {})
    assert [path.name for path in paths] == ["speedup.svg"]


# ---- the command -----------------------------------------------------------------------------------------


@pytest.fixture
def tiny_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "QUICK", [TINY])
    monkeypatch.setattr(
        bench, "CASES", [TINY, Case((2, 2, 2, 2), model="latent diffusion", packed=True, free_bits=None)]
    )
    monkeypatch.setattr(bench, "THREAD_CASES", [TINY])


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def command(text: str) -> int:
    return cli.main(["bench", *text.split()])


def test_quick(tiny_cases: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.csv"
    quick = f"--quick --no-compile --rounds 1 --threads 1 --csv {path}"
    assert command(f"{quick} --plots {tmp_path}") == 0
    out = capsys.readouterr().out
    assert "| forward + backward | vaekernels (µs) | eager (µs) |" in out
    assert "medians of 1" in out and "peak (saved)" in out and str(tmp_path / "speedup.svg") in out
    assert {r.direction for r in report.read_csv(path)} == {"both"}
    assert command(f"{quick} --compare {path}") == 0
    assert "| median of 1 |" in capsys.readouterr().out


def test_on_a_terminal_the_cases_say_how_long_they_still_take(
    tiny_cases: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--quick --no-compile --rounds 1 --threads 1") == 0
    assert " left" not in capsys.readouterr().err
    monkeypatch.setattr(bench, "QUICK", [TINY, TINY])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert command("--quick --no-compile --rounds 1 --threads 1") == 0
    first, second = [line for line in capsys.readouterr().err.splitlines() if " ..." in line]
    assert first.endswith(" ...") and second.endswith(" s left")


def test_full(
    tiny_cases: None,
    two_threads: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bench, "has_diffusers", lambda: False)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    path = tmp_path / "a.csv"
    assert command(f"--no-compile --rounds 1 --csv {path}") == 0
    captured = capsys.readouterr()
    assert "diffusers is not installed and is left out" in captured.err
    for heading in ("forward + backward", "forward", "backward"):
        assert f"| {heading} | vaekernels (µs) |" in captured.out
    rows = report.read_csv(path)
    assert {(r.case, r.threads, r.direction) for r in rows if r.threads == 1} == {(TINY.name, 1, "both")}
    assert {r.direction for r in rows if r.threads == 2} == {"forward", "backward", "both"}
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--rounds 0", "--rounds: must be at least 1, got 0"),
        ("--threads -2", "--threads: must be at least 1, got -2"),
        ("--rounds many", "--rounds: invalid"),
        ("--largest 1", "--largest 1: the smallest case has 128 latent elements"),
        ("--device abacus", "--device abacus: "),
        ("--device meta", "--device meta: it computes nothing"),
        ("--compare absent.csv", "--compare: .*absent.csv"),
        ("--csv absent/a.csv", "--csv absent/a.csv: there is no folder absent"),
        ("--plots pyproject.toml", "--plots pyproject.toml: it is not a folder"),
        ("--verbose", "unrecognized arguments: --verbose"),
    ],
)
def test_refuses(
    arguments: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(bench, "measure", lambda *a, **k: pytest.fail("it has begun to measure"))
    with pytest.raises(SystemExit) as exit:
        command(arguments)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("usage: vaekernels bench")
    assert re.search(words, error), error


def test_pictures_need_matplotlib(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        command("--plots pictures")
    assert "matplotlib is missing; pip install 'vaekernels[train]'" in capsys.readouterr().err


def test_suite_under_pytest_benchmark() -> None:
    chosen = "16x8 and float32 and not packed and sample_kl and (vaekernels or eager)"
    suite = Path(__file__).parents[2] / "benchmarks" / "test_latent.py"
    given = [sys.executable, "-m", "pytest", str(suite), "-q", "--benchmark-disable", "-k", chosen]
    done = subprocess.run(given, capture_output=True, text=True)
    assert "6 passed" in done.stdout, done.stdout + done.stderr
