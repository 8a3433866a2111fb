"""gpu_check and gpu_bench, as far as they go without a GPU."""

from __future__ import annotations

import inspect
import json
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import gpu_bench
import gpu_build
import gpu_check
import gpu_parts
import gpu_report
import pytest
import shim_build
import torch
from conftest import ON_DEFAULT_DEVICE, require_kernels
from gpu_parts import FAIL, NOT_POSSIBLE, PASS, Clock, Part

import vaekernels as vk
from vaekernels import bench
from vaekernels.bench import gpu
from vaekernels.bench.cases import Case, Problem, eager, fused
from vaekernels.bench.report import read_csv, write_csv

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
import gpu_problems

# ---- parts in processes ----------------------------------------------------------------------------------


def python(code: str, name: str = "part", limit: float = 30, **more: object) -> Part:
    return Part(name, [sys.executable, "-c", code], limit, **more)


@pytest.mark.parametrize(
    "code, status, detail",
    [
        ("print('a'); print('four passed')", PASS, "four passed"),
        ("print('no nvcc'); raise SystemExit(77)", NOT_POSSIBLE, "no nvcc"),
        ("print('error: x'); raise SystemExit(3)", FAIL, "exit status 3: error: x"),
        ("import os; os.abort()", FAIL, "killed by SIGABRT: "),
    ],
)
def test_a_part_is_judged_by_its_exit(code, status, detail, tmp_path):
    outcome = gpu_parts.run_part(python(code), tmp_path, Clock(60))
    assert (outcome.status, outcome.detail) == (status, detail)
    assert bool(outcome.log) == (status == FAIL and "x" in detail)


def test_what_runs_past_its_limit_is_ended_with_its_children(tmp_path):
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    code = (
        f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    )
    start = time.monotonic()
    outcome = gpu_parts.run_part(python(code, limit=1.5), tmp_path, Clock(60))
    assert outcome.status == FAIL and outcome.detail == "ended after its limit of 2 s"
    assert time.monotonic() - start < 30
    time.sleep(3.5)
    assert not (tmp_path / "late").exists()


def test_lanes_run_side_by_side_and_outcomes_keep_their_order(tmp_path):
    """The second lane's only part waits for a file that the first lane's last part makes."""
    file = tmp_path / "made"
    wait = f"import pathlib, time\nwhile not pathlib.Path({str(file)!r}).exists(): time.sleep(0.05)"
    parts = [
        python(wait, "waits", lane="other"),
        python("pass", "first"),
        python(f"import pathlib; pathlib.Path({str(file)!r}).touch()", "makes"),
        Part("refused", [], 0, refused="no GPU"),
    ]
    said: list[str] = []
    outcomes = gpu_parts.run(parts, tmp_path, Clock(60), said.append)
    assert [(o.part, o.status) for o in outcomes] == [
        ("waits", PASS), ("first", PASS), ("makes", PASS), ("refused", NOT_POSSIBLE),
    ]  # fmt: skip
    assert sorted(line.partition(":")[0] for line in said) == ["first", "makes", "refused", "waits"]


def test_parts_that_the_time_does_not_suffice_for_are_failures(tmp_path):
    outcome = gpu_parts.run_part(python("pass"), tmp_path, Clock(0))
    assert outcome.status == FAIL and outcome.detail.startswith("not run")


def test_environment_reaches_the_part(tmp_path):
    part = python("import os; print(os.environ['ASKED'])", environment={"ASKED": "yes"})
    assert gpu_parts.run_part(part, tmp_path, Clock(60)).detail == "yes"


CASE = '<testcase classname="tests.gpu.test_x" name="{}">{}</testcase>'
SKIPPED = '<skipped type="pytest.skip" message="{}">where</skipped>'
FAILED = '<failure message="m">text</failure>'


def report(tmp_path: Path, *cases: tuple[str, str]) -> Path:
    path = tmp_path / "report.xml"
    body = "".join(CASE.format(name, inside) for name, inside in cases)
    path.write_text(f'<?xml version="1.0"?><testsuites><testsuite>{body}</testsuite></testsuites>')
    return path


@pytest.mark.parametrize(
    "cases, returncode, status, detail",
    [
        ([("a", ""), ("b", "")], 0, PASS, "2 passed"),
        ([("a", ""), ("b", SKIPPED.format("one GPU"))], 0, PASS, "1 passed, 1 skipped: one GPU"),
        ([("a", SKIPPED.format("x")), ("b", SKIPPED.format("x"))], 0, NOT_POSSIBLE, "x"),
        ([("a", FAILED), ("b", "")], 1, FAIL, "1 of 2 failed: test_x::a"),
        ([("a", "<error/>"), ("b", SKIPPED.format("x"))], 1, FAIL, "1 of 2 failed: test_x::a"),
        (
            [(c, FAILED) for c in "abcde"],
            1,
            FAIL,
            "5 of 5 failed: test_x::a, test_x::b, test_x::c and 2 more",
        ),
        # None were collected, and a crash after the tests.
        ([], 5, FAIL, "exit status 5: the last line"),
        ([("a", "")], -signal.SIGSEGV, FAIL, "killed by SIGSEGV: the last line"),
    ],
)
def test_tests_are_judged_by_their_report(cases, returncode, status, detail, tmp_path):
    judge = gpu_parts.judge_tests(report(tmp_path, *cases))
    assert judge(returncode, "some\nthe last line\n") == (status, detail)


def test_a_crash_that_leaves_no_report_is_a_failure(tmp_path):
    judge = gpu_parts.judge_tests(tmp_path / "none.xml")
    assert judge(-11, "boom") == (FAIL, "killed by SIGSEGV: boom")
    assert judge(0, "boom")[0] == FAIL
    (tmp_path / "cut.xml").write_text("<testsuites><testsuite>")
    assert gpu_parts.judge_tests(tmp_path / "cut.xml")(0, "")[0] == FAIL


def test_pytest_writes_the_report_that_is_read(tmp_path):
    """The real thing, with the command that gpu_check builds."""
    tests = tmp_path / "test_three.py"
    tests.write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): pytest.skip('no GPU')\n"
        "@pytest.mark.parametrize('x', [1])\ndef test_c(x): assert x == 2\n"
    )
    part = gpu_check.tests_part("three tests", [str(tests)], tmp_path, 60)
    outcome = gpu_parts.run_part(part, tmp_path, Clock(60))
    assert outcome.status == FAIL and outcome.detail.startswith("1 of 3 failed: ")
    assert outcome.detail.endswith("::test_c[1]")
    assert "assert 1 == 2" in outcome.log
    tests.write_text("import pytest\ndef test_b(): pytest.skip('no GPU')\n")
    outcome = gpu_parts.run_part(part, tmp_path, Clock(60))
    assert (outcome.status, outcome.detail) == (NOT_POSSIBLE, "no GPU")


def test_the_table_has_a_line_for_each_part():
    outcomes = [
        gpu_parts.Outcome("build", PASS, "a | b", 12.4),
        gpu_parts.Outcome("ddp", FAIL, "2\nlines", 3),
    ]
    assert gpu_parts.table(outcomes).splitlines()[2:] == [
        "| build | pass | 12 | a \\| b |",
        "| ddp | fail | 3 | 2 lines |",
    ]


# ---- gpu_check -------------------------------------------------------------------------------------------

CLEAN = "========= COMPUTE-SANITIZER\n1 passed\n========= ERROR SUMMARY: 0 errors\n"
OUTSIDE = (
    "========= COMPUTE-SANITIZER\n========= Invalid __global__ read of size 4 bytes\n"
    "=========     at vk::cuda::forward_kernel+0x10\n========= ERROR SUMMARY: 12 errors\n"
)
NO_HAZARD = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
HAZARD = (
    "========= Error: Race reported between Write access at a+0x10\n"
    "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
)
REFUSED = "========= COMPUTE-SANITIZER\n========= Error: Device not supported. Please refer to the manual\n"


@pytest.mark.parametrize(
    "output, returncode, status, detail",
    [
        (CLEAN, 0, PASS, "nothing found; 1 passed"),
        (NO_HAZARD, 0, PASS, "nothing found; 1 passed"),
        (OUTSIDE, 66, FAIL, "12 found: Invalid __global__ read of size 4 bytes"),
        (HAZARD, 66, FAIL, "1 found: Error: Race reported between Write access at a+0x10"),
        (REFUSED, 1, NOT_POSSIBLE, "Error: Device not supported. Please refer to the manual"),
        ("nothing of the kind\n", 0, FAIL, "the tool printed no summary"),
        ("nothing of the kind\n", -9, FAIL, "killed by SIGKILL: nothing of the kind"),
    ],
)
def test_sanitizers_are_judged_by_their_summary(output, returncode, status, detail, tmp_path):
    judge = gpu_check.judge_sanitizer(report(tmp_path, ("a", "")))
    assert judge(returncode, output) == (status, detail)


def test_a_sanitizer_that_starts_no_program_is_not_possible(tmp_path):
    output = (
        "========= COMPUTE-SANITIZER\n========= Error: process didn't terminate successfully\n"
        "========= Error: Target application terminated before first instrumented API call\n"
    )
    status, detail = gpu_check.judge_sanitizer(tmp_path / "none.xml")(255, output)
    assert (status, detail) == (NOT_POSSIBLE, "compute-sanitizer starts no program here")
    # Where the tests ran, it is their result that counts.
    assert gpu_check.judge_sanitizer(report(tmp_path, ("a", FAILED)))(255, output)[0] == FAIL


def test_a_wrong_result_under_a_silent_sanitizer_is_a_failure(tmp_path):
    judge = gpu_check.judge_sanitizer(report(tmp_path, ("a", FAILED)))
    assert judge(1, CLEAN) == (FAIL, "1 of 1 failed: test_x::a")


def test_every_part_says_why_it_is_not_possible_without_a_gpu(tmp_path, monkeypatch, capsys):
    reason = "torch has no CUDA: 2.13.0+cpu"
    facts = {"torch": "2.13.0+cpu", "cuda": None, "gpus": [], "commit": "abc", "driver": "", "reason": reason}
    monkeypatch.setattr(gpu_check, "probe", lambda: facts)
    assert gpu_check.main(["--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "gpu-check.json").read_text())
    assert {part["status"] for part in document["parts"]} == {NOT_POSSIBLE}
    assert {part["detail"] for part in document["parts"]} == {reason}
    names = [part["part"] for part in document["parts"]]
    assert names[:2] == ["build", "test suite"] and set(gpu_check.TOOLS) <= set(names)
    assert f"{len(names)} not possible here" in capsys.readouterr().out


def test_a_failed_part_fails_the_whole_and_names_no_place_of_this_machine(tmp_path, monkeypatch, capsys):
    facts = {"torch": "2", "cuda": "13.0", "gpus": [{"name": "X"}], "commit": "abc", "reason": ""}
    wrong = python(
        f"print({str(gpu_check.ROOT / 'csrc' / 'a.cu')!r}, 'failed'); raise SystemExit(1)", "wrong"
    )
    results = tmp_path / "results.json"
    monkeypatch.setattr(gpu_check, "probe", lambda: facts)
    monkeypatch.setattr(gpu_check, "RESULTS", results)
    monkeypatch.setattr(gpu_check, "build", lambda *a: gpu_parts.Outcome("build", PASS, "built"))
    monkeypatch.setattr(gpu_check, "parts", lambda folder, refused: [wrong, python("pass", "right")])
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    assert str(gpu_check.ROOT) not in results.read_text()
    assert json.loads(results.read_text())["parts"][1]["detail"] == "exit status 1: ./csrc/a.cu failed"
    assert "---- wrong: the end of its log" in capsys.readouterr().out
    assert gpu_check.main(["--out", str(tmp_path), "--only", "right"]) == 0
    with pytest.raises(SystemExit):
        gpu_check.main(["--out", str(tmp_path), "--only", "nothing"])


def test_without_kernels_no_part_is_tried(tmp_path, monkeypatch):
    facts = {"torch": "2", "cuda": "13.0", "gpus": [{"name": "X"}], "commit": "abc", "reason": ""}
    monkeypatch.setattr(gpu_check, "probe", lambda: facts)
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(gpu_check, "build", lambda *a: gpu_parts.Outcome("build", FAIL, "nvcc failed"))
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    parts = json.loads((tmp_path / "gpu-check.json").read_text())["parts"]
    assert {p["detail"] for p in parts[1:]} == {"there are no kernels: nvcc failed"}


def test_the_probe_describes_this_machine():
    facts = gpu_check.probe()
    assert facts["torch"] == torch.__version__ and facts["cuda"] == torch.version.cuda
    assert bool(facts["gpus"]) == torch.cuda.is_available() == (facts["reason"] == "")


def test_what_this_python_lacks_is_named():
    assert gpu_check.missing("pytest", "torch") == ""
    assert gpu_check.missing("torch", "no_such_module") == "this Python has no no_such_module"


def test_the_suite_is_the_modules_with_tests_that_take_a_device():
    found = {Path(name).stem for name in gpu_check.suite()}
    assert set(gpu_check.ON_DEFAULT_DEVICE) == set(ON_DEFAULT_DEVICE)
    assert {"test_values", "test_gradients", "test_random", "test_compile", *ON_DEFAULT_DEVICE} <= found
    # These need packages that the ops do not.
    assert not {"test_training", "test_report", "test_demo", "test_gpu_tools"} & found


def test_every_file_of_a_part_exists(tmp_path):
    for part in gpu_check.parts(tmp_path):
        for word in part.command:
            if word.startswith("tests"):
                assert (gpu_check.ROOT / word).exists(), word
        assert part.limit <= gpu_check.SECONDS


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_the_build_says_that_torch_has_no_cuda(capsys):
    assert gpu_build.main() == gpu_build.NOT_POSSIBLE == gpu_parts.STATUS_NOT_POSSIBLE
    assert capsys.readouterr().out.strip() == f"torch {torch.__version__} was built without CUDA"


def test_torch_has_what_the_tools_use():
    """So that an upgrade of torch shows here, and not on a GPU."""
    assert {"pool", "stream"} <= set(inspect.signature(torch.cuda.graph.__init__).parameters)
    assert {"device", "priority"} <= set(inspect.signature(torch.cuda.Stream.__new__).parameters)
    assert "enable_timing" in inspect.signature(torch.cuda.Event.__new__).parameters
    for name in ("CUDAGraph", "make_graphed_callables", "set_stream", "default_stream", "current_stream",
                 "set_sync_debug_mode", "mem_get_info", "is_current_stream_capturing",
                 "get_device_properties", "empty_cache", "_sleep"):  # fmt: skip
        assert callable(getattr(torch.cuda, name)), name
    for name in ("replay", "pool"):
        assert callable(getattr(torch.cuda.CUDAGraph, name))
    assert callable(torch.Generator.get_offset)
    assert issubclass(torch.AcceleratorError, RuntimeError)
    assert "max-autotune-no-cudagraphs" in torch._inductor.list_mode_options()


# ---- the problems of tests/gpu ---------------------------------------------------------------------------

RNG = torch.tensor([-77, 16])


@pytest.fixture
def shim():
    require_kernels("cpu")
    shim_build.require()
    return shim_build.library()


@pytest.mark.parametrize("name", gpu_problems.LATENTS)
def test_the_shim_gives_what_the_cpu_gives(name, shim):
    """The comparison that gpu_check makes between the GPU and the CPU, on the CUDA kernels of the shim."""
    latent = gpu_problems.LATENTS[name]
    for dtype in gpu_problems.DTYPES:
        expected = gpu_problems.run(latent, dtype, "cpu", RNG)
        with shim.used():
            gpu_problems.assert_same(gpu_problems.run(latent, dtype, "cpu", RNG), expected, dtype)


@pytest.mark.parametrize("name", gpu_problems.LATENTS)
def test_each_problem_is_one_launch_each_way(name, shim):
    """What test_launches.py asks torch's profiler on a GPU."""
    latent = gpu_problems.LATENTS[name]
    for dtype in (torch.float32, torch.bfloat16):
        inputs = gpu_problems.tensors(latent, dtype, "cpu")
        with shim.used():
            before = shim.launches()
            outputs = gpu_problems.call(latent, inputs)
            assert shim.launches() == before + 1
            torch.autograd.grad(outputs, inputs, gpu_problems.cotangents(outputs))
            assert shim.launches() == before + 2
            with torch.no_grad(), shim.capturing():
                gpu_problems.call(latent, inputs, rng=RNG)
            assert shim.launches() <= before + 2 + 3


def test_a_wrong_gradient_would_be_seen():
    latent = gpu_problems.LATENTS["columns"]
    expected = gpu_problems.run(latent, torch.float32, "cpu", RNG)
    for i in range(len(expected)):
        wrong = [t.clone() for t in expected]
        wrong[i].view(-1)[-1] += 1e-3 * max(1.0, float(wrong[i].abs().max()))
        with pytest.raises(AssertionError):
            gpu_problems.assert_same(wrong, expected, torch.float32)


@pytest.mark.parametrize("name", ["columns", "rows", "cells", "row_sets", "weighted", "whole"])
def test_an_aborted_capture_leaves_no_counter(name, shim):
    latent = gpu_problems.LATENTS[name]
    inputs = [t.detach() for t in gpu_problems.tensors(latent, torch.float32, "cpu")]
    with shim.used():
        expected = gpu_problems.call(latent, inputs, rng=RNG)
        with pytest.raises(KeyError), shim.capturing():
            gpu_problems.call(latent, inputs, rng=RNG)
            raise KeyError
        assert shim.dirty_counters() == 0
        for _ in range(3):
            result = gpu_problems.call(latent, inputs, rng=RNG)
            assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_offsets_in_a_capture_follow_each_other(shim):
    """A replay adds the generator's offset to that of the call within the graph, 4 for each call before."""
    zero = torch.zeros(64, 8)
    with shim.used():
        with shim.capturing():
            states = [vk.rng_state(zero), vk.rng_state(zero)]
            z = vk.sample_kl(zero, zero).z
        seed, first = states[0].tolist()
        assert states[1].tolist() == [seed, first + 4]
        assert torch.equal(z, vk.reparameterize(zero, zero, rng=torch.tensor([seed, first + 8])))


# ---- gpu_bench -------------------------------------------------------------------------------------------

CPU = torch.device("cpu")
TINY = [
    Case((6, 5)),
    Case((6, 3, 4, 2), group_dims=1),
    Case((6, 4, 3, 3), torch.bfloat16, packed=True, free_bits=None),
    Case((3, 4, 8), batch_dims=2, mask=True),
    Case((5, 6), num_samples=3),
    Case((7, 9), op="reparameterize"),
    Case((7, 9), op="gaussian_kl"),
]


@pytest.mark.parametrize("case", [c for c in TINY if c.has_kl], ids=lambda case: case.name)
def test_contenders_agree_on_the_loss(case):
    problem = Problem.of(case, CPU)
    found = {}
    for name, layer in bench.contenders(case, compiled=False).items():
        loss = layer(problem.inputs)[-1]
        found[name] = [loss, *torch.autograd.grad(loss, [t for t in problem.inputs if t.requires_grad])]
    # bfloat16 rounds every step of eager code.
    tolerance = 1e-5 if case.dtype == torch.float32 else 3e-2
    for name, results in found.items():
        for a, b in zip(results, found["vaekernels"], strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=tolerance, atol=tolerance, msg=name)


def failing(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    raise RuntimeError("no kernel image is available\nmore")


@pytest.mark.parametrize("case", TINY, ids=lambda case: f"{case.op} {case.name}")
def test_every_way_direction_and_contender_gets_a_row(case):
    notes: list[str] = []
    layers = {"vaekernels": fused(case), "eager": eager(case), "broken": failing}
    known = {"vaekernels": gpu.Facts(1, 1, 100, 16), "eager": gpu.Facts(9, None, None, None)}
    options = {"directions": ("both", "forward", "backward"), "known": known, "say": notes.append}
    rows = gpu.device_rows(case, layers, gpu.Stopwatch(CPU), samples=3, **options)
    rows += gpu.wall_rows(case, layers, CPU, rounds=2, **options)
    ways = [(way.clock, way.cache) for way in gpu.WAYS] + [("wall", "hot")]
    keys = [(row.clock, row.cache, row.direction, row.contender) for row in rows]
    assert len(set(keys)) == len(keys)
    assert set(keys) == {
        (*way, direction, name)
        for way in ways for direction in options["directions"] for name in ("copy", "vaekernels", "eager")
    }  # fmt: skip
    assert notes == [
        f"{case.op} {case.name}, first call: broken: RuntimeError: no kernel image is available",
        f"{case.op} {case.name}, wall: broken: RuntimeError: no kernel image is available",
    ]
    size = case.dtype.itemsize
    for row in rows:
        halves = {"forward": [False], "backward": [True], "both": [False, True]}[row.direction]
        assert row.bytes_moved == size * sum(case.elements_moved(half) for half in halves)
        assert 0 < row.p20 <= row.median <= row.p80 and row.gb_per_s > 0
        expected = {"copy": 1, "eager": {"forward": 9}.get(row.direction)}
        assert row.launches == expected.get(row.contender, len(halves))
        assert row.copy_percent == pytest.approx(100) or row.contender != "copy"


def test_times_are_those_of_one_call():
    """A layer that sleeps: the row says how long, whatever the number of calls in a recording."""
    case = Case((6, 5))

    def sleeping(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        time.sleep(2e-3)
        return fused(case)(inputs)

    options = {"directions": ("forward", "backward"), "known": {}, "say": print}
    rows = gpu.device_rows(case, {"sleeping": sleeping}, gpu.Stopwatch(CPU), samples=3, **options)
    for row in gpu_report.chosen(rows, contender="sleeping", direction="forward"):
        assert row.median >= 2000
    # Forward is not part of what is timed as backward.
    for row in gpu_report.chosen(rows, contender="sleeping", direction="backward", cache="cold"):
        assert row.p20 < 2000


def test_a_large_case_is_measured_one_contender_after_the_other(monkeypatch):
    """And holds one recording at a time."""
    case = Case((6, 5))
    monkeypatch.setattr(gpu, "LARGEST_TOGETHER", 1)
    held: list[int] = []
    seconds = gpu.Stopwatch.seconds
    monkeypatch.setattr(
        gpu.Stopwatch, "seconds", lambda self, r, *rest: held.append(len(r)) or seconds(self, r, *rest)
    )
    options = {"directions": ("forward",), "known": {}, "say": print}
    layers = {"vaekernels": fused(case), "eager": eager(case)}
    rows = gpu.device_rows(case, layers, gpu.Stopwatch(CPU), samples=2, **options)
    assert set(held) == {1} and len(rows) == 3 * len(gpu.WAYS)
    assert all(row.copy_percent is not None for row in rows)


def test_recordings_hold_as_many_calls_as_a_clock_needs():
    graph, queue = gpu.WAYS[0], gpu.WAYS[2]
    assert (graph.clock, queue.clock) == ("graph", "queue")
    assert gpu.calls_of(Case((128, 32)), "both", graph) == gpu.MOST_CALLS
    assert gpu.calls_of(Case((128, 32)), "both", queue) * 40 < 1000
    assert gpu.calls_of(Case((2**19, 512)), "forward", graph) == 1
    case = Case((1024, 128))
    assert gpu.calls_of(case, "forward", graph) == 2**26 // (12 * 2**17)


def test_launches_add_up_over_directions():
    facts = gpu.Facts(3, 2, None, None)
    assert [facts.launches(d) for d in ("forward", "backward", "both")] == [3, 2, 5]
    assert gpu.Facts(3, None, None, None).launches("both") is None


def test_launches_are_read_from_a_trace():
    events = [
        {"ph": "X", "cat": "kernel", "name": "a"}, {"ph": "X", "cat": "Kernel", "name": "b"},
        {"ph": "X", "cat": "gpu_memset", "name": "Memset (Device)"}, {"ph": "X", "cat": "cuda_runtime"},
        {"ph": "X", "cat": "gpu_user_annotation", "name": "range"}, {"ph": "M", "name": "process_name"},
    ]  # fmt: skip
    assert gpu.launches_in({"traceEvents": events}) == {"kernel": 2, "gpu_memset": 1}


def test_the_trace_of_torch_has_the_field_that_is_read(tmp_path):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        torch.ones(3).add(1)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert "cpu_op" in {event.get("cat") for event in trace["traceEvents"]}
    assert gpu.launches_in(trace) == {}


# ---- what the processes of gpu_bench hand over ------------------------------------------------------------


def test_a_capture_that_fails_ends_the_process_and_bars_the_contender(tmp_path, monkeypatch):
    cases, asked = TINY[:2], []

    def device_rows(case, layers, watch, **options):
        asked.append((case, sorted(layers)))
        if case is cases[1] and "eager" in layers:
            with gpu._tolerant(case, "forward, cold graph", "eager", print):
                raise gpu.CaptureFailed("", "operation not permitted")
        return []

    makers = {"vaekernels": lambda: None, "eager": lambda: None, "broken": lambda: 1 / 0}
    monkeypatch.setattr(gpu, "device_rows", device_rows)
    monkeypatch.setattr(gpu, "wall_rows", lambda *a, **k: [])
    monkeypatch.setattr(gpu_bench, "makers", lambda case: makers)
    path = tmp_path / "times.jsonl"
    for _ in range(2):
        record = gpu_bench.Record.read([path])
        gpu_bench.time_cases(cases, CPU, gpu_bench.Writer(path), record, float("inf"), 3)
    assert asked == [
        (cases[0], ["eager", "vaekernels"]), (cases[1], ["eager", "vaekernels"]), (cases[1], ["vaekernels"]),
    ]  # fmt: skip
    record = gpu_bench.Record.read([path])
    assert record.done == {gpu_bench.key(case) for case in cases} and record.crashed() == set()
    assert any("eager: the capture failed: forward, cold graph" in note for note in record.notes)
    assert any("broken: ZeroDivisionError" in note for note in record.notes)


def test_a_case_that_broke_a_process_is_not_tried_again(tmp_path, monkeypatch):
    path = tmp_path / "times.jsonl"
    writer = gpu_bench.Writer(path)
    writer.write("started", gpu_bench.key(TINY[0]))
    writer.file.write('{"kind": "rows", "val')  # cut off by the end of the process
    writer.file.flush()
    record = gpu_bench.Record.read([path])
    assert record.crashed() == {gpu_bench.key(TINY[0])}
    asked: list[Case] = []
    monkeypatch.setattr(gpu, "device_rows", lambda case, *a, **k: asked.append(case) or [])
    monkeypatch.setattr(gpu, "wall_rows", lambda *a, **k: [])
    monkeypatch.setattr(gpu_bench, "makers", lambda case: {})
    other = gpu_bench.Writer(tmp_path / "more.jsonl")
    gpu_bench.time_cases(TINY[:2], CPU, other, record, float("inf"), 3)
    assert asked == [TINY[1]]


def test_no_case_begins_after_the_time(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_bench, "makers", lambda case: 1 / 0)
    writer = gpu_bench.Writer(tmp_path / "times.jsonl")
    gpu_bench.time_cases(TINY, CPU, writer, gpu_bench.Record(), time.time() - 1, 3)
    assert gpu_bench.Record.read([tmp_path / "times.jsonl"]).started == []


def test_the_processes_are_started_again_until_all_is_done_or_the_time_is_over(tmp_path, monkeypatch):
    """Stand-ins for the processes: the first dies at its second case, the next finishes all but the last."""
    cases = TINY[:4]
    keys = [gpu_bench.key(case) for case in cases]
    monkeypatch.setattr(gpu_bench, "CASES", cases)
    scripts = iter([
        [("started", keys[0]), ("rows", {"case": keys[0], "rows": []}), ("started", keys[1])],
        [("started", keys[2]), ("rows", {"case": keys[2], "rows": []}), ("note", "triton: no such option")],
        [],
    ])  # fmt: skip

    def start_work(options, log, *arguments, environment=None):
        path = Path(arguments[arguments.index("--write") + 1])
        if arguments[1] == "times":
            writer = gpu_bench.Writer(path)
            for kind, value in next(scripts):
                writer.write(kind, value)
        code = 1 if arguments[1] == "facts" else 0
        return gpu_bench.subprocess.Popen([sys.executable, "-c", f"exit({code})"], start_new_session=True)

    monkeypatch.setattr(gpu_bench, "start_work", start_work)
    monkeypatch.setattr(gpu_bench, "WORKERS", 1)
    options = gpu_bench.argparse.Namespace(seconds=60.0, largest=2**28)
    record, left_out = gpu_bench.gather(options, tmp_path)
    assert record.done == {keys[0], keys[2]}
    assert left_out == [
        "process 0 of 1 that counts launches and memory ended with status 1",
        "a process that measures ended before its first case: see bench.log",
        f"{keys[1]}: the process broke down while it ran",
        f"{keys[3]}: not begun, the time was over",
        "triton: no such option",
    ]


def test_a_process_that_runs_on_is_ended():
    process = gpu_bench.subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True
    )
    assert gpu_bench.finish(process, time.time() + 0.5) is None
    assert process.poll() == -signal.SIGKILL


def test_one_small_case_from_end_to_end(tmp_path, monkeypatch, kernels):
    """The processes' own work, without the compiler, which takes half a minute."""
    case = TINY[0]
    monkeypatch.setattr(gpu_bench, "CASES", [case])
    monkeypatch.setattr(
        gpu_bench, "makers", lambda case: {"vaekernels": lambda: fused(case), "eager": lambda: eager(case)}
    )
    files = [tmp_path / "facts.jsonl", tmp_path / "times.jsonl"]
    common = ["--device", "cpu", "--samples", "2"]
    assert gpu_bench.main([*common, "--work", "facts", "--write", str(files[0])]) == 0
    assert (
        gpu_bench.main([*common, "--work", "times", "--write", str(files[1]), "--read", str(files[0])]) == 0
    )
    record = gpu_bench.Record.read(files)
    assert record.done == {gpu_bench.key(case)} and record.machine["torch"] == torch.__version__
    peaks = {row.contender: row.peak_bytes for row in gpu_report.chosen(record.rows, direction="both")}
    assert peaks["vaekernels"] and peaks["eager"] > peaks["vaekernels"]
    gpu_bench.write(record, ["nothing"], tmp_path)
    again = read_csv(tmp_path / "gpu-bench.csv", gpu.GpuRow)
    assert [row.key for row in again] == [row.key for row in record.rows]
    assert (tmp_path / "gpu-bench.svg").stat().st_size > 1000
    text = (tmp_path / "gpu-bench.md").read_text()
    assert "## Wall time of plain calls" in text and text.rstrip().endswith("- nothing")


def test_without_a_gpu_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_bench.main([]) == 1
    assert capsys.readouterr().out.startswith("gpu-bench: not possible here: ")


def test_every_size_asked_for_is_measured():
    shapes = {(case.shape, case.dtype) for case in gpu_bench.CASES}
    for shape in [(128, 32), (1024, 128), (8192, 512), (64, 4, 64, 64), (8, 16, 128, 128), (32, 4, 128, 128),
                  (16, 64, 512), (256, 64), (2**15, 512), (2**19, 512)]:  # fmt: skip
        assert {(shape, torch.float32), (shape, torch.bfloat16)} <= shapes
    assert len({gpu_bench.key(case) for case in gpu_bench.CASES}) == len(gpu_bench.CASES)


# ---- the report ------------------------------------------------------------------------------------------


def made_up(case: Case, contender: str, direction: str, median: float, **fields: object) -> gpu.GpuRow:
    row = gpu.GpuRow(
        op=case.op, case=case.name, model="", numel=case.numel, dtype=str(case.dtype)[6:],
        direction=direction,
        contender=contender, threads=1, rounds=21, p20=0.9 * median, median=median, p80=1.1 * median,
        cache="cold",
        bytes_moved=gpu.bytes_moved(case, direction), launches=1,
    )  # fmt: skip
    return replace(row, **fields)


def rows_of(times: dict[str, float], case: Case, **fields: object) -> list[gpu.GpuRow]:
    return [made_up(case, name, "both", time, **fields) for name, time in times.items()]


def test_the_table_shows_losing_cases_in_bold():
    rows = rows_of({"vaekernels": 2.25, "eager": 45.0, "triton": 2.0, "copy": 1.8}, Case((128, 32)))
    rows[0] = replace(rows[0], copy_percent=80.0)
    rows += rows_of({"vaekernels": 150.4, "eager": 1500.0}, Case((8192, 512)))
    assert gpu_report.table(rows, "both", "graph", "cold").splitlines() == [
        "| forward + backward | vaekernels (µs) | eager (µs) | triton (µs) | copy (µs) |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| 128x32 float32 | 2.2 (80 % of copy) | 45.0 (20.0x) | **2.0 (0.9x)** | 1.8 |",
        "| 8192x512 float32 | 150 | 1,500 (10.0x) |  |  |",
    ]


def test_goals_name_the_worst_case():
    small, large = Case((128, 32)), Case((2**15, 512))
    rows = rows_of({"vaekernels": 10, "eager": 35, "torch.compile": 5}, small)
    rows += rows_of(
        {"vaekernels": 100, "eager": 290, "torch.compile": 170, "torch.compile max-autotune": 150}, large
    )
    rows += [
        made_up(large, "vaekernels", d, 50, clock="queue", copy_percent=share, launches=n)
        for d, share, n in (("forward", 95.0, 1), ("backward", 93.5, 2))
    ]
    rows += [made_up(small, name, "forward", t, clock="wall", cache="hot", launches=1)
             for name, t in (("vaekernels", 10.0), ("eager", 25.0))]  # fmt: skip
    assert [(g.found, g.met) for g in gpu_report.goals(rows)] == [
        ("93.50 % at 32768x512 float32, backward", True),
        ("1.50x at 32768x512 float32", False),
        ("2.90x at 32768x512 float32", False),
        ("2.50x at 128x32 float32, forward", True),
        ("2 at 32768x512 float32, backward", False),
    ]
    assert {g.met for g in gpu_report.goals([])} == {None}


def test_pages_and_pictures_of_whatever_was_measured(tmp_path):
    everything = []
    for case in gpu_bench.CASES:
        for clock, cache in gpu_report.CLOCKS:
            for direction in gpu_report.HEADINGS:
                base = 2 + gpu.bytes_moved(case, direction) / 4e6
                factors = [1, 12, 2.2, 1.9, 1.3, 0.93] if case.numel > 10**5 else [1, 14, 3.5, 3.2, 1.6, 0.6]
                for name, factor in zip(gpu_report.CONTENDERS, factors, strict=True):
                    share = 100 * factors[-1] / factor
                    everything.append(made_up(case, name, direction, base * factor, clock=clock, cache=cache,
                                              copy_percent=share, peak_bytes=10**6))  # fmt: skip
    described = {"device": "made up", "torch": "2.11"}
    for rows in (everything, everything[:1], [r for r in everything if r.contender == "eager"], []):
        text = gpu_report.page(rows, described, ["a case"])
        assert text.startswith("device made up, torch 2.11")
        if len(rows) == 1 or rows is everything:
            gpu_report.plot(rows, tmp_path / "p.svg", described)
            assert (tmp_path / "p.svg").stat().st_size > 1000
    assert "| 128x32 float32 | 1 + 1; 1.0 |" in gpu_report.page(everything, described, [])


def test_rows_of_a_gpu_come_back_from_csv(tmp_path):
    rows = [
        made_up(Case((128, 32)), "vaekernels", "both", 2.25, copy_percent=None, launches=None),
        made_up(Case((128, 32)), "eager", "both", 30.5, copy_percent=7.25, peak_bytes=12),
    ]
    path = tmp_path / "rows.csv"
    write_csv(path, rows, {"device": "made up"})
    again = read_csv(path, gpu.GpuRow)
    assert [replace(row, p20=row.p20, p80=row.p80) for row in again] == [
        replace(row, p20=round(row.p20, 2), p80=round(row.p80, 2)) for row in rows
    ]
    path.write_text(path.read_text().replace("30.5", "thirty"))
    with pytest.raises(ValueError, match="line 3"):
        read_csv(path, gpu.GpuRow)


# ---- the clock of the device, with a stand-in for CUDA's graphs and events --------------------------------


class Machine:
    """Notes what a GPU would be asked to do. A replay runs no Python, as a graph's does not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.did: list[str] = []
        self.broken = False
        machine = self

        class Graph:
            def pool(self) -> tuple[int, int]:
                return (id(self), 0)

            def replay(self) -> None:
                machine.did.append("replay")

        class Capture:
            def __init__(self, graph, pool=None, stream=None) -> None:
                machine.did.append("capture" if pool is None else "capture into the pool before")

            def __enter__(self) -> None: ...

            def __exit__(self, *exception) -> None: ...

        class Event:
            def __init__(self, enable_timing) -> None: ...

            def record(self) -> None:
                machine.did.append("event")

            def elapsed_time(self, other) -> float:
                return 3.0

        class OtherBytes:
            def sum(self) -> None:
                machine.did.append("flush")

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", Capture)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: gpu.nullcontext())
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.did.append("sleep"))
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: self.did.append("stream put back"))
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device: None)
        self.watch = gpu.Stopwatch(CPU)
        self.watch.graphs, self.watch.stream, self.watch.other_bytes = True, None, OtherBytes()


@pytest.fixture
def stand_in(monkeypatch) -> Machine:
    return Machine(monkeypatch)


def test_a_cold_replay_is_timed_between_two_events_behind_a_flush_and_a_wait(stand_in):
    recording = stand_in.watch.record(lambda: None, True)
    stand_in.did.clear()
    found = stand_in.watch.seconds({"a": recording, "b": recording}, 2, cold=True)
    assert found == {"a": [3e-3, 3e-3], "b": [3e-3, 3e-3]}
    once = ["flush", "sleep", "event", "replay", "event"]
    assert stand_in.did == ["replay"] * 4 + once * 4  # two replays of each tell how long a launch takes
    stand_in.did.clear()
    stand_in.watch.seconds({"a": recording}, 1, cold=False)
    assert stand_in.did == ["replay"] * 2 + once[1:]


@pytest.mark.parametrize("way", gpu.WAYS, ids=lambda way: f"{way.cache} {way.clock}")
@pytest.mark.parametrize("case", TINY[:4], ids=lambda case: case.name)
def test_backward_is_captured_behind_its_forward_and_replayed_with_it(case, way, stand_in):
    problems = [Problem.of(case, CPU) for _ in range(3)]
    calls = {"forward": 0}
    layer = fused(case)

    def counted(inputs):
        calls["forward"] += 1
        return layer(inputs)

    ones = gpu.warm_up(problems[0], counted)
    calls["forward"] = 0
    recording = gpu.record_layer(stand_in.watch, problems, counted, ones, "backward", 3, way)
    # Plain calls are tried when they are recorded, the forward alone and with its backward.
    assert calls["forward"] == (3 if way.clock == "graph" else 6)
    if way.clock == "graph":
        assert stand_in.did == ["capture", "capture into the pool before"]
    stand_in.watch.seconds({"ours": recording}, 2, way.cold)
    # A graph's replay is no Python; plain calls are made anew: two to time the launch, and two samples.
    assert calls["forward"] == (3 if way.clock == "graph" else 6 + 3 * 4)
    assert stand_in.did.count("event") == 4


def test_all_directions_by_graphs(stand_in):
    options = {"directions": ("both", "forward", "backward"), "known": {}, "say": print}
    case = TINY[0]
    layers = {"vaekernels": fused(case), "eager": eager(case)}
    rows = gpu.device_rows(case, layers, stand_in.watch, samples=2, **options)
    assert len(rows) == 3 * 3 * 3
    for row in rows:
        way = next(w for w in gpu.WAYS if (w.clock, w.cache) == (row.clock, row.cache))
        assert row.median == pytest.approx(3000 / gpu.calls_of(case, row.direction, way))


@pytest.mark.parametrize("poisoned", [False, True])
def test_a_capture_that_breaks_off(poisoned, stand_in, monkeypatch):
    def broken():
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    def randn(*shape, device):
        if poisoned:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    monkeypatch.setattr(torch, "randn", randn)
    with pytest.raises(gpu.CaptureFailed if poisoned else RuntimeError, match="not permitted"):
        stand_in.watch.record(broken, True)
    assert stand_in.did[-1] == "stream put back"
