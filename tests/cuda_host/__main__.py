"""`make test-cuda-host`: the host code of the CUDA library, under a CUDA build of torch, without a GPU.

Builds the CUDA library for the torch of this interpreter (one architecture, since nothing of it runs) and the
null CUDA runtime (runtime.cpp) into build/cuda-host, and runs pytest on this folder with that runtime loaded
before the real one. More arguments go to pytest.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_build  # noqa: E402

FOLDER = ROOT / "build" / "cuda-host"
# torch links libcudart, Triton and a library of torch's open the driver by this name: the runtime is both.
RUNTIME = FOLDER / "libcuda.so.1"
CUDA_MAJOR = "13"  # whose signatures runtime.cpp has


def stop(message: str) -> None:
    print(f"make test-cuda-host: {message}", file=sys.stderr)
    raise SystemExit(2)


def build_runtime() -> None:
    rules = gpu_build.build_rules()
    source = HERE / "runtime.cpp"
    if RUNTIME.exists() and RUNTIME.stat().st_mtime_ns > source.stat().st_mtime_ns:
        return
    made = RUNTIME.with_suffix(".new")
    # nvcc knows where the toolkit's headers lie; of CUDA nothing is linked.
    command = [rules.find_nvcc(), *rules._host_compiler(), "-std=c++20", "-O1", "-shared", "-cudart", "none",
               "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra", "-Xlinker", f"-soname={RUNTIME.name}",
               str(source), "-o", str(made)]  # fmt: skip
    try:
        rules._run(command, print, source.name)
    except rules.BuildProblem as problem:
        stop(f"{problem}\n{problem.log}")
    made.replace(RUNTIME)


def main(arguments: list[str]) -> None:
    in_use = gpu_build.build_rules().torch_in_use()
    if (in_use.cuda or "none").split(".")[0] != CUDA_MAJOR:
        stop(f"it needs a torch built with CUDA {CUDA_MAJOR}; {in_use.version} has CUDA {in_use.cuda}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    os.environ["TORCH_CUDA_ARCH_LIST"] = "9.0"
    cache = FOLDER / "cache"
    if status := gpu_build.main(cache):
        raise SystemExit(status)
    build_runtime()
    environment = gpu_build.environment(cache) | {
        "LD_PRELOAD": str(RUNTIME),
        "TRITON_LIBCUDA_PATH": str(FOLDER),
        "TRITON_CACHE_DIR": str(FOLDER / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(FOLDER / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *(arguments or [str(HERE)])]
    os.chdir(ROOT)
    os.execve(sys.executable, command, environment)


if __name__ == "__main__":
    main(sys.argv[1:])
