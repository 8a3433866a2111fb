"""Everything that a GPU can tell about the kernels, in one command: `make gpu-check PYTHON=python3`.

    python3 benchmarks/gpu_check.py [--only PART ...] [--out FOLDER] [--seconds N]

Uses the interpreter that runs it, with its torch, and downloads nothing. Every part runs in a process of its
own and passes, fails, or is not possible here, with the reason. Exit status 1 if any part failed. Writes
gpu-check.json and the parts' logs to FOLDER, and with a GPU also benchmarks/results/gpu-check.json. COMMIT in
the environment names the commit where the folder is a copy without git.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gpu_build
from gpu_parts import FAIL, NOT_POSSIBLE, PASS, Clock, Judge, Outcome, Part, judge_tests, run, run_part, table

ROOT = gpu_build.ROOT
RESULTS = ROOT / "benchmarks" / "results" / "gpu-check.json"
SECONDS = 530.0  # for all parts

# Asked in a process of its own, so that this one never holds the GPU.
PROBE = """
import json, platform
import torch
gpus = []
for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
    p = torch.cuda.get_device_properties(i)
    gpus.append({"name": p.name, "capability": f"{p.major}.{p.minor}",
                 "GiB": round(p.total_memory / 2**30, 1)})
print(json.dumps({"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
                  "gpus": gpus}))
"""
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
TAKES_DEVICE = re.compile(r"^def test_\w+\([^)]*\bdevice\b", re.MULTILINE)
ON_DEFAULT_DEVICE = ("test_conventions", "test_known_bugs")  # as in tests/conftest.py
SUITE_NEEDS = ("pytest", "numpy", "scipy", "hypothesis")


def probe() -> dict[str, Any]:
    """What this machine is; `reason` says why nothing can run on a GPU, where that is so."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    facts: dict[str, Any] = {"python": "", "torch": "", "cuda": None, "gpus": []}
    reason = ""
    if done.returncode == 0:
        facts |= json.loads(done.stdout.strip().splitlines()[-1])
        if facts["cuda"] is None:
            reason = f"torch has no CUDA: {facts['torch']}"
        elif not facts["gpus"]:
            words = done.stderr.strip().splitlines()
            reason = "torch sees no GPU" + (f": {words[0].strip()}" if words else "")
    else:
        words = done.stderr.strip().splitlines()
        reason = f"torch cannot be imported: {words[-1] if words else sys.executable}"
    smi = shutil.which("nvidia-smi")
    query = [str(smi), "--query-gpu=driver_version", "--format=csv,noheader"]
    facts["driver"] = _first_line(query) if smi else ""
    head = _first_line(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"])
    facts["commit"] = os.environ.get("COMMIT") or head or "unknown"
    return facts | {"reason": reason}


def _first_line(command: Sequence[str]) -> str:
    try:
        lines = subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines()
    except OSError:
        return ""
    return lines[0] if lines else ""


def missing(*modules: str) -> str:
    """Which of these modules this interpreter lacks, as the reason of a part; empty where it has them all."""
    lacking = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"this Python has no {', no '.join(lacking)}" if lacking else ""


def find_sanitizer() -> str | None:
    """compute-sanitizer on PATH, or where toolkits keep it."""
    nvcc = gpu_build.build_rules().find_nvcc()
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", str(Path(nvcc).parents[1]) if nvcc else None]
    places = [f"{home}/{folder}/compute-sanitizer" for home in homes if home
              for folder in ("bin", "compute-sanitizer")]  # fmt: skip
    return next(filter(None, map(shutil.which, ("compute-sanitizer", *places))), None)


# What it says of /bin/true as well where it does not work.
NOT_STARTED = "Target application terminated before first instrumented API call"


def judge_sanitizer(report: Path) -> Judge:
    """By the tool's summary, then by the tests that ran under it."""
    tests = judge_tests(report)

    def judge(returncode: int, output: str) -> tuple[str, str]:
        refusal = re.search(r"^=+ .*(not supported|Unable to|Failed to initialize).*$", output, re.MULTILINE)
        summary = re.search(r"ERROR SUMMARY: (\d+) error", output)
        hazards = re.search(
            r"RACECHECK SUMMARY: (\d+) hazards? displayed \((\d+) errors?, (\d+) warnings?\)", output
        )
        status, detail = tests(returncode, output)
        if summary is None and hazards is None:
            if not report.exists() and NOT_STARTED in output:
                return NOT_POSSIBLE, "compute-sanitizer starts no program here"
            if refusal is not None:
                return NOT_POSSIBLE, refusal.group(0).strip("= ")
            return (status, detail) if status != PASS else (FAIL, "the tool printed no summary")
        found = int(summary.group(1)) if summary else int(hazards.group(1)) if hazards else 0
        if found:
            named = re.search(r"^=+ (?:Invalid|Error|Warning|Uninit|Barrier|Race|Divergent|Program).*$",
                              output, re.MULTILINE)  # fmt: skip
            first = named.group(0).strip("= ") if named else "see the log"
            return FAIL, f"{found} found: {first}"
        return status, detail if status != PASS else f"nothing found; {detail}"

    return judge


def tests_part(
    name: str,
    files: Sequence[str],
    folder: Path,
    limit: float,
    *,
    lane: str = "main",
    before: Sequence[str] = (),
    options: Sequence[str] = (),
    environment: dict[str, str] | None = None,
    refused: str = "",
    tool: bool = False,
) -> Part:
    """Tests under pytest, with a report of its own; `before` is put before the interpreter."""
    report = folder / f"{name.replace(' ', '-')}.xml"
    report.unlink(missing_ok=True)  # an earlier run's must not be taken for this one's
    command = [*before, sys.executable, "-m", "pytest", *files, "-q", "-rfEs", "-p", "no:cacheprovider",
               "--color=no", f"--rootdir={ROOT}", f"--junitxml={report}",
               # A kernel that never ends shows where.
               "-o", f"faulthandler_timeout={max(20, limit // 3):.0f}", *options]  # fmt: skip
    judge = judge_sanitizer(report) if tool else judge_tests(report)
    env = gpu_build.environment() | (environment or {})
    return Part(name, command, limit, judge, lane, env, refused or missing("pytest", "numpy"))


def suite() -> list[str]:
    """The modules with tests that take a device; others need packages that a GPU machine may lack."""
    found = [
        path
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        if path.stem in ON_DEFAULT_DEVICE or TAKES_DEVICE.search(path.read_text(encoding="utf-8"))
    ]
    return [f"tests/{path.name}" for path in found]


def parts(folder: Path, refused: str = "") -> list[Part]:
    """All parts but the build. `refused` is the reason why none can run."""

    def gpu(name: str, limit: float, file: str, needs: str = "", **more: Any) -> Part:
        reason = refused or (missing(needs) if needs else "")
        return tests_part(name, [f"tests/gpu/{file}"], folder, limit, refused=reason, **more)

    workers = ["-n", str(min(8, os.cpu_count() or 1))] if not missing("xdist") else []
    sanitizer = find_sanitizer()
    listed = [
        tests_part(
            "test suite", suite(), folder, 420, lane="suite",
            options=["--device=cuda", *workers],
            # Eight processes that compile need no compile workers of their own.
            environment={"TORCHINDUCTOR_COMPILE_THREADS": "1"},
            refused=refused or missing(*SUITE_NEEDS),
        ),
        gpu("equality", 60, "test_equality.py"),
        gpu("launches", 60, "test_launches.py"),
        gpu("graphs", 90, "test_graphs.py"),
        gpu("aborted capture", 60, "test_aborted_capture.py"),
        gpu("side streams", 60, "test_streams.py"),
        gpu("second device", 60, "test_second_device.py"),
        gpu("large tensor", 120, "test_large.py"),
        gpu("ddp", 90, "test_ddp.py"),
        gpu("triton", 120, "test_triton.py", needs="triton"),
    ]  # fmt: skip
    for tool in TOOLS:
        reason = refused or (
            "" if sanitizer else "compute-sanitizer was not found on PATH or under CUDA_HOME"
        )
        # Every tensor its own allocation, so that a step past its end is one; not where only the
        # order of accesses matters, which leaves a part that may capture graphs.
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool in ("memcheck", "initcheck") else {}
        before = [str(sanitizer), "--tool", tool, "--error-exitcode", "66", "--print-limit", "20"]
        if tool == "memcheck":
            before += ["--report-api-errors", "no"]  # torch probes with calls that may fail
        listed.append(
            gpu(tool, 110, "test_reduced.py", lane="sanitizers", before=before, environment=alone, tool=True)
            if not reason
            else Part(tool, [], 0, lane="sanitizers", refused=reason)
        )
    return listed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Checks the CUDA kernels on the GPU of this machine.")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts alone, after the build")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder of logs and results")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"for all parts (default {SECONDS:.0f})"
    )
    options = parser.parse_args(arguments)
    clock = Clock(options.seconds)
    logs = options.out.resolve() / "check"
    logs.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)

    facts = probe()
    print(", ".join(f"{key} {value}" for key, value in facts.items() if value), flush=True)
    outcomes = [build(facts["reason"], logs, clock)]
    refused = facts["reason"]
    if not refused and outcomes[0].status != PASS:
        refused = f"there are no kernels: {outcomes[0].detail}"
    listed = parts(logs, refused)
    if options.only is not None:
        unknown = sorted(set(options.only) - {part.name for part in listed})
        if unknown:
            parser.error(
                f"--only: no part {', '.join(unknown)}; they are {', '.join(p.name for p in listed)}"
            )
        listed = [part for part in listed if part.name in options.only]
    outcomes += run(listed, logs, clock, _say)

    report(outcomes, facts, time.monotonic() - clock.start, options.out.resolve())
    return int(any(outcome.status == FAIL for outcome in outcomes))


def build(refused: str, logs: Path, clock: Clock) -> Outcome:
    """The kernels, built even without a GPU where TORCH_CUDA_ARCH_LIST says for which."""
    if refused and not (refused.startswith("torch sees no GPU") and os.environ.get("TORCH_CUDA_ARCH_LIST")):
        outcome = Outcome("build", NOT_POSSIBLE, refused)
    else:
        part = Part("build", [sys.executable, str(ROOT / "benchmarks" / "gpu_build.py")], 240)
        outcome = run_part(part, logs, clock)
    _say(f"build: {outcome.status} ({outcome.seconds:.0f} s) {outcome.detail}")
    return outcome


def report(outcomes: Sequence[Outcome], facts: dict[str, Any], seconds: float, out: Path) -> None:
    for outcome in outcomes:
        if outcome.log:
            print(f"\n---- {outcome.part}: the end of its log\n{outcome.log}")
    print(f"\n{table(outcomes)}\n")
    counts = {s: sum(o.status == s for o in outcomes) for s in (PASS, FAIL, NOT_POSSIBLE)}
    print(", ".join(f"{n} {status}" for status, n in counts.items() if n) + f"; {seconds:.0f} s", flush=True)
    document = {
        "machine": facts,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "seconds": round(seconds),
        "parts": [asdict(o) | {"seconds": round(o.seconds, 1), "log": o.log.splitlines()} for o in outcomes],
    }
    # The file is meant to be kept: where the tree lies on this machine is nobody's business.
    text = json.dumps(document, indent=1, ensure_ascii=False).replace(str(ROOT), ".") + "\n"
    text = text.replace(str(Path.home()), "~")
    (out / "gpu-check.json").write_text(text, encoding="utf-8")
    if facts["gpus"]:
        RESULTS.write_text(text, encoding="utf-8")


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
