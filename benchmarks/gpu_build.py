"""Compiles the kernels for the GPU of this machine, with the interpreter that runs this script and its torch.

    python benchmarks/gpu_build.py

Downloads and installs nothing. The libraries go to build/gpu/cache, where the package finds them while
XDG_CACHE_HOME names that folder: of libraries for one torch it loads the newest. Exit status: 0, 1 where a
build failed, 77 where this machine has nothing to build for, with the reason in the last line.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build" / "gpu" / "cache"
PACKAGE = ROOT / "vaekernels"
NOT_POSSIBLE = 77  # what automake's test runner takes for "skipped"

# A fresh process that loads what was built.
LOADED = """
from vaekernels import _native
print(_native.FOUND.folder)
for kind in ("cpu", "cuda"):
    reason = _native.explain(kind)
    if reason is not None:
        raise SystemExit(f"no kernels for {kind}: {reason}")
"""


def environment(cache: Path = CACHE) -> dict[str, str]:
    """The variables with which a process uses the package of this tree and the libraries built here."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": path, "VAEKERNELS_REQUIRE_NATIVE": "1"}


def build_rules() -> ModuleType:
    """vaekernels/_build.py by its path: importing the package would load the libraries to be replaced."""
    spec = importlib.util.spec_from_file_location("_vaekernels_build", PACKAGE / "_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def capability() -> str | None:
    """The compute capability of the first GPU, such as "9.0"."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(0)
    return f"{major}.{minor}"


def main(cache: Path = CACHE) -> int:
    start = time.monotonic()
    rules = build_rules()
    try:
        in_use = rules.torch_in_use()
    except ImportError as error:
        print(f"torch cannot be imported by {sys.executable}: {error}")
        return NOT_POSSIBLE
    if in_use.cuda is None:
        print(f"torch {in_use.version} was built without CUDA")
        return NOT_POSSIBLE
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        arch = capability()
        if arch is None:
            print("torch sees no GPU to build for, and TORCH_CUDA_ARCH_LIST names none")
            return NOT_POSSIBLE
        os.environ["TORCH_CUDA_ARCH_LIST"] = arch
    if rules.find_nvcc() is None:
        print(f"nvcc was not found: put it on PATH, or set CUDA_HOME to the CUDA {in_use.cuda} toolkit")
        return NOT_POSSIBLE

    os.environ["XDG_CACHE_HOME"] = str(cache)
    target = rules.cache_dir(in_use.version, in_use.cuda)
    record = rules.build(target, ROOT / "build" / "gpu" / "objects", _say, in_use)
    for library in (record.cpu, record.cuda):
        if library.file is None:
            print(f"{library.log or ''}\n{library.problem}. {library.remedy}.")
            return 1

    found = subprocess.run(
        [sys.executable, "-c", LOADED], env=environment(cache), capture_output=True, text=True
    )
    if found.returncode != 0 or Path(found.stdout.strip()) != target:
        print(f"{found.stdout}{found.stderr}the package does not load what was built into {target}")
        return 1
    archs = os.environ["TORCH_CUDA_ARCH_LIST"]
    seconds = time.monotonic() - start
    print(f"torch {in_use.version}, nvcc {rules.nvcc_version(rules.find_nvcc())}, {archs}: {seconds:.0f} s")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
