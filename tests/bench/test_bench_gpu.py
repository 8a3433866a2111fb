"""`vaekernels bench --device cuda`, as far as it goes without a GPU."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vaekernels import bench
from vaekernels.bench import gpu, gpu_report, processes
from vaekernels.bench.cases import GPU_CASES, Case, Problem, eager, fused
from vaekernels.bench.report import read_csv, write_csv

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
    assert gpu.calls_of(Case((32768, 512)), "forward", graph) == 2**31 // (12 * 2**24) == 10


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


# ---- what the processes hand over ------------------------------------------------------------------------


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
    monkeypatch.setattr(processes, "makers", lambda case, with_compiled: makers)
    path = tmp_path / "times.jsonl"
    for _ in range(2):
        record = processes.Record.read([path])
        processes.time_cases(cases, CPU, processes.Writer(path), record, float("inf"), 3)
    assert asked == [
        (cases[0], ["eager", "vaekernels"]), (cases[1], ["eager", "vaekernels"]), (cases[1], ["vaekernels"]),
    ]  # fmt: skip
    record = processes.Record.read([path])
    assert record.done == {processes.key(case) for case in cases} and record.crashed() == set()
    assert any("eager: the capture failed: forward, cold graph" in note for note in record.notes)
    assert any("broken: ZeroDivisionError" in note for note in record.notes)


def test_a_case_that_broke_a_process_is_not_tried_again(tmp_path, monkeypatch):
    path = tmp_path / "times.jsonl"
    writer = processes.Writer(path)
    writer.write("started", processes.key(TINY[0]))
    writer.file.write('{"kind": "rows", "val')  # cut off by the end of the process
    writer.file.flush()
    record = processes.Record.read([path])
    assert record.crashed() == {processes.key(TINY[0])}
    asked: list[Case] = []
    monkeypatch.setattr(gpu, "device_rows", lambda case, *a, **k: asked.append(case) or [])
    monkeypatch.setattr(gpu, "wall_rows", lambda *a, **k: [])
    monkeypatch.setattr(processes, "makers", lambda case, with_compiled: {})
    other = processes.Writer(tmp_path / "more.jsonl")
    processes.time_cases(TINY[:2], CPU, other, record, float("inf"), 3)
    assert asked == [TINY[1]]


def test_no_case_begins_after_the_time(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "makers", lambda case, with_compiled: 1 / 0)
    writer = processes.Writer(tmp_path / "times.jsonl")
    processes.time_cases(TINY, CPU, writer, processes.Record(), time.time() - 1, 3)
    assert processes.Record.read([tmp_path / "times.jsonl"]).started == []


def test_the_processes_are_started_again_until_all_is_done_or_the_time_is_over(tmp_path, monkeypatch):
    """Stand-ins for the processes: the first dies at its second case, the next finishes all but the last."""
    cases = TINY[:4]
    keys = [processes.key(case) for case in cases]
    monkeypatch.setattr(processes, "GPU_CASES", cases)
    scripts = iter([
        [("started", keys[0]), ("rows", {"case": keys[0], "rows": []}), ("started", keys[1])],
        [("started", keys[2]), ("rows", {"case": keys[2], "rows": []}), ("note", "triton: no such option")],
        [],
    ])  # fmt: skip

    def start_work(options, log, *arguments, environment=None):
        path = Path(arguments[arguments.index("--write") + 1])
        if arguments[0] == "times":
            writer = processes.Writer(path)
            for kind, value in next(scripts):
                writer.write(kind, value)
        code = 1 if arguments[0] == "facts" else 0
        return subprocess.Popen([sys.executable, "-c", f"exit({code})"], start_new_session=True)

    monkeypatch.setattr(processes, "start_work", start_work)
    monkeypatch.setattr(processes, "WORKERS", 1)
    options = argparse.Namespace(seconds=60.0, largest=2**28, quick=False)
    record, left_out = processes.gather(options, tmp_path)
    assert record.done == {keys[0], keys[2]}
    assert left_out == [
        "process 0 of 1 that counts launches and memory ended with status 1",
        "a process that measures ended before its first case: see bench.log",
        f"{keys[1]}: the process broke down while it ran",
        f"{keys[3]}: not begun, the time was over",
        "triton: no such option",
    ]


def test_a_process_that_runs_on_is_ended():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    assert processes.finish(process, time.time() + 0.5) is None
    assert process.poll() == -signal.SIGKILL


@pytest.fixture
def as_if_on_a_gpu(monkeypatch):
    """The command takes the CPU for a GPU, and measures in this process what its processes would."""
    monkeypatch.setattr(bench, "_device", lambda parser, name: torch.device(name))

    def gather(options, folder):
        common = ["--device", "cpu", "--samples", str(options.rounds), "--largest", str(options.largest)]
        files = [folder / "facts-0.jsonl", folder / "times.jsonl"]
        assert processes.main(["facts", *common, "--write", str(files[0])]) == 0
        assert processes.main(["times", *common, "--write", str(files[1]), "--read", str(files[0])]) == 0
        return processes.Record.read(files), ["nothing"]

    monkeypatch.setattr(processes, "gather", gather)


def made_by(case, with_compiled):
    """Without the compiler, which takes half a minute."""
    return {"vaekernels": lambda: fused(case), "eager": lambda: eager(case)}


def test_one_small_case_from_end_to_end(tmp_path, monkeypatch, capsys, kernels, as_if_on_a_gpu):
    for module in (bench, processes):
        monkeypatch.setattr(module, "GPU_CASES", [TINY[0]])
    monkeypatch.setattr(processes, "makers", made_by)
    csv, markdown = tmp_path / "gpu-bench.csv", tmp_path / "gpu-bench.md"
    given = ["--device", "cuda", "--rounds", "2", "--record", str(tmp_path / "record"), "--csv", str(csv),
             "--markdown", str(markdown), "--plots", str(tmp_path)]  # fmt: skip
    assert bench.main(given) == 0
    record = processes.Record.read(list((tmp_path / "record").iterdir()))
    assert record.done == {processes.key(TINY[0])} and record.machine["torch"] == torch.__version__
    peaks = {row.contender: row.peak_bytes for row in gpu_report.chosen(record.rows, direction="both")}
    assert peaks["vaekernels"] and peaks["eager"] > peaks["vaekernels"]
    rows = read_csv(csv, gpu.GpuRow)
    assert [row.key for row in rows] == [row.key for row in record.rows]
    assert (tmp_path / "gpu-bench.svg").stat().st_size > 1000
    text = markdown.read_text()
    assert "## Wall time of plain calls" in text and text.rstrip().endswith("- nothing")
    assert text in capsys.readouterr().out
    assert bench.main([*given[:6], "--compare", str(csv)]) == 0
    assert "| time over eager's | earlier | now | change |" in capsys.readouterr().out


def test_nothing_measured_is_a_failure(tmp_path, monkeypatch, capsys, as_if_on_a_gpu):
    monkeypatch.setattr(processes, "gather", lambda options, folder: (processes.Record(), ["all of it"]))
    assert bench.main(["--device", "cuda", "--record", str(tmp_path), "--csv", str(tmp_path / "a.csv")]) == 1
    assert "- all of it" in capsys.readouterr().out


def test_options_reach_the_processes(tmp_path, monkeypatch):
    """The processes' own parser takes the command that starts them."""
    commands = []
    monkeypatch.setattr(processes.subprocess, "Popen", lambda command, **more: commands.append(command))
    options = argparse.Namespace(device="cpu", largest=100, rounds=2, quick=True, no_compile=True)
    processes.start_work(options, tmp_path / "log", "times", "--write", str(tmp_path / "times.jsonl"))
    monkeypatch.setattr(processes, "work", lambda given: given)
    given = processes.main(commands[0][3:])
    assert commands[0][1:3] == ["-m", processes.__name__]
    assert (given.work, given.samples, given.quick, given.no_compile) == ("times", 2, True, True)


@pytest.mark.parametrize(
    "given, words",
    [
        (["--device", "cuda", "--threads", "2"], "--threads: not with --device cuda"),
        (["--device", "cpu", "--seconds", "9"], "--seconds: not with --device cpu"),
        (["--record", "x"], "--record: not with --device cpu"),
    ],
)
def test_options_of_the_other_device_are_refused(given, words, capsys, as_if_on_a_gpu):
    with pytest.raises(SystemExit):
        bench.main(given)
    assert words in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")
def test_without_a_gpu_the_command_says_so(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--device", "cuda"])
    assert "error: --device cuda: " in capsys.readouterr().err


def test_the_triton_contender_is_found_in_the_source_tree():
    assert processes.TRITON_FILE.is_file()


def test_every_size_asked_for_is_measured():
    shapes = {(case.shape, case.dtype) for case in GPU_CASES}
    for shape in [(128, 32), (1024, 128), (8192, 512), (64, 4, 64, 64), (8, 16, 128, 128), (32, 4, 128, 128),
                  (16, 64, 512), (256, 64), (2**15, 512), (2**19, 512)]:  # fmt: skip
        assert {(shape, torch.float32), (shape, torch.bfloat16)} <= shapes
    assert len({processes.key(case) for case in GPU_CASES}) == len(GPU_CASES)


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
    for case in GPU_CASES:
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
