"""Fuzzes the operators for some minutes, guided by coverage, under ASan and UBSan: `make fuzz MINUTES=5`.

Compiles the CPU kernels with GCC's sanitizers and coverage into build/fuzz, beside a copy of the package, and
runs `fuzz.target` on it with atheris (libFuzzer and the sanitizers' runtime). What is found lies in
build/fuzz/findings: the input, and a text that says what is wrong and the Python that makes the problem. Exit
status 1 where anything was found. `--replay FILE` runs single inputs.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from vaekernels import _build  # noqa: E402

FOLDER = ROOT / "build" / "fuzz"
SANITIZE = (
    # vptr looks at type information of torch's classes, which are not compiled here.
    *("-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize=vptr"),
    # Edges alone: a comparison calls into the runtime, and those that choose the instruction set are made
    # while the library is loaded, when it cannot call yet.
    *("-fno-sanitize-recover=all", "-fsanitize-coverage=trace-pc"),
)
SETTINGS = {
    # torch and Python keep memory until they end. Fresh memory is filled, so that what nobody wrote shows
    # (fuzz.operators). What asks for too much memory is refused, as without the sanitizer.
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4000:"
    "max_malloc_fill_size=16777216:malloc_fill_byte=190:quarantine_size_mb=64",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "OMP_NUM_THREADS": "1",
}


def stop(message: str) -> None:
    print(f"make fuzz: {message}", file=sys.stderr)
    raise SystemExit(2)


def runtime() -> Path:
    """libFuzzer and ASan's runtime in one library, which comes with atheris."""
    found = importlib.util.find_spec("atheris")
    if found is None or found.origin is None:
        stop("atheris is missing (it is for Linux and Python 3.11 to 3.13): pip install atheris")
    library = Path(found.origin).parent.parent / "asan_with_fuzzer.so"
    if not library.is_file():
        stop(f"atheris has no {library.name} here; install its wheel: pip install --force-reinstall atheris")
    return library


def compiler() -> str:
    """g++, or $CXX: the kernels that users run are GCC's."""
    name = os.environ.get("CXX") or "g++"
    FOLDER.mkdir(parents=True, exist_ok=True)
    probe = FOLDER / "probe.cpp"
    probe.write_text("int main() { return 0; }\n", encoding="utf-8")
    command = [name, *SANITIZE, "-c", str(probe), "-o", str(probe.with_suffix(".o"))]
    try:
        works = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        works = False
    if not works:
        stop(f"{name} is missing or has no sanitizers: install g++ (Debian, Ubuntu: apt-get install g++)")
    return name


def build() -> Path:
    """The package with instrumented kernels; what did not change is not compiled again."""
    cxx, trace, made = compiler(), FOLDER / "coverage.o", FOLDER / "lib"
    source = ROOT / "tests" / "fuzz" / "coverage.cpp"
    subprocess.run([cxx, "-std=c++20", "-O2", "-fPIC", "-c", str(source), "-o", str(trace)], check=True)
    os.environ |= {
        "CXX": cxx,
        "CXXFLAGS": " ".join(SANITIZE),
        "LDFLAGS": shlex.quote(str(trace)),
        "VAEKERNELS_CUDA": "0",
    }
    shutil.rmtree(made, ignore_errors=True)
    others = shutil.ignore_patterns("_C*", _build.RECORD_NAME, "__pycache__")
    shutil.copytree(ROOT / "vaekernels", made / "vaekernels", ignore=others)
    record = _build.build(made / "vaekernels", FOLDER / "objects", lambda line: print(line, flush=True))
    if record.cpu.file is None:
        stop(
            f"the kernels were not built: {record.cpu.problem}. {record.cpu.remedy}.\n{record.cpu.log or ''}"
        )
    return made


def seeds(corpus: Path) -> None:
    """Something to begin with: bytes at random, which are problems of every kind."""
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in range(200):
        draw = random.Random(seed)
        (corpus / f"seed-{seed}").write_bytes(draw.randbytes(draw.choice((40, 120, 300))))


def fuzz(made: Path, minutes: float, replayed: list[str]) -> int:
    findings, corpus = FOLDER / "findings", FOLDER / "corpus"
    library = runtime()
    environment = os.environ | SETTINGS
    environment |= {
        "LD_PRELOAD": str(library),
        "PYTHONPATH": os.pathsep.join([str(made), str(ROOT / "tests")]),
        # No library of the user's.
        "XDG_CACHE_HOME": str(FOLDER / "cache"),
    }
    command = [sys.executable, str(ROOT / "tests" / "fuzz" / "target.py"), str(made), str(findings)]
    if replayed:
        return subprocess.run([*command, *replayed], env=environment).returncode
    shutil.rmtree(findings, ignore_errors=True)
    findings.mkdir(parents=True)
    seeds(corpus)
    command += [f"-max_total_time={round(60 * minutes)}", f"-artifact_prefix={findings}/", "-max_len=600"]
    # A problem takes milliseconds, on a loaded machine some more.
    command += ["-timeout=120", "-rss_limit_mb=8000", "-malloc_limit_mb=2000000000", "-len_control=0"]
    command += ["-print_final_stats=1", str(corpus)]
    last, executions = "", "0"
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() if re.match(r"#\d+\s.*cov: ", line) else last
            counted = re.match(r"stat::number_of_executed_units:\s*(\d+)", line)
            executions = counted.group(1) if counted else executions
    found = sorted(
        p for p in findings.iterdir() if p.suffix == ".txt" or p.name.startswith(("crash", "timeout", "oom"))
    )
    print(f"make fuzz: {executions} executions in {minutes:g} minutes; {last}")
    for path in found:
        print(f"  finding: {path.relative_to(ROOT)}")
    print(
        f"make fuzz: {len(found)} findings" + ("; run one with `tests/fuzz --replay FILE`" if found else "")
    )
    return int(bool(found) or process.returncode != 0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="how long (default: 5)")
    parser.add_argument("--replay", nargs="+", metavar="FILE", help="run these inputs, and nothing else")
    options = parser.parse_args()
    if sys.platform != "linux":
        stop(f"atheris and these sanitizers are for Linux, and this is {sys.platform}")
    runtime()
    return fuzz(build(), options.minutes, [str(Path(p).resolve()) for p in options.replay or []])


if __name__ == "__main__":
    sys.exit(main())
