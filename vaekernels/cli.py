"""The command `vaekernels`: `doctor` and `build` here, everything else from `training.cli`.

The two matter most where something is missing, so they need nothing beyond torch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from vaekernels import _build, _command, _native

TRAIN_MODULES = (
    "lightning_fabric",
    "typer",
    "rich",
    "matplotlib",
    "sklearn",
    "tensorboard",
    "jinja2",
    "numpy",
    "PIL",
    *(() if sys.version_info >= (3, 11) else ("tomli",)),
)
TRAIN_COMMANDS = {
    "train": "train a VAE on a data set every machine has, or on your own",
    "diagnose": "is the latent of a trained run used, and if not, why",
    "demo": "VAEs that collapse, and the same ones cured, side by side",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    return _command.run(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    if given and given[0] == "bench":
        with _command.importing():
            bench: Any = import_module("vaekernels.bench")
        return int(bench.main(given[1:], prog="vaekernels bench"))
    if given and not given[0].startswith("-") and given[0] not in ("doctor", "build"):
        return _train(given)
    chosen = parser.parse_args(given)
    if chosen.command == "doctor":
        return _doctor(as_json=chosen.json)
    if chosen.command == "build":
        return _compile()
    parser.print_help()
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vaekernels", description="The latent layer of a VAE as one operation, for PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"vaekernels {_build.VERSION}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    doctor = commands.add_parser(
        "doctor",
        help="say which kernels run here, and what mends those that do not",
        description="Says which kernels run here and what mends those that do not. Exit status: 0 where the "
        "kernels for this torch are all there, 1 where some are missing.",
    )
    doctor.add_argument("--json", action="store_true", help="the same as one JSON object")
    commands.add_parser(
        "build",
        help="compile the kernels against the torch in use",
        description="Compiles the kernels against the torch in use, into the user's cache "
        "(XDG_CACHE_HOME, else ~/.cache). Heeds CXX, CXXFLAGS, LDFLAGS, MAX_JOBS, CUDA_HOME, "
        "TORCH_CUDA_ARCH_LIST and VAEKERNELS_CUDA=0.",
    )
    commands.add_parser("bench", help="time the latent layer on this machine", add_help=False)
    for name, meaning in TRAIN_COMMANDS.items():
        commands.add_parser(name, help=f"{meaning} (needs vaekernels[train])", add_help=False)
    return parser


def _train(given: list[str]) -> int:
    try:
        with _command.importing():
            app = import_module("vaekernels.training.cli").app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in TRAIN_MODULES:
            raise
        print(
            f"vaekernels {given[0]}: the package {missing} is missing; "
            "install what training needs with: pip install 'vaekernels[train]'",
            file=sys.stderr,
        )
        return 1
    app(args=given, prog_name="vaekernels")
    return 0


def diagnosis() -> dict[str, Any]:
    """What `doctor --json` prints: versions, and for each device type the library or why there is none."""
    found = _native.FOUND
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return {
        "version": _build.VERSION,
        "package": str(_native.PACKAGE_DIR),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": {
            "version": str(torch.__version__),
            "path": os.path.dirname(torch.__file__),
            "cuda": torch.version.cuda,
            "gpus": _gpus(),
        },
        "cpu": _library("cpu"),
        "cuda": _library("cuda"),
        "library_folder": None if found.folder is None else str(found.folder),
        "build_info": None if found.module is None else dict(found.module.build_info()),
        "cache": str(_build.cache_dir(str(torch.__version__), torch.version.cuda)),
        "tools": {"compiler": compiler, "nvcc": _build.find_nvcc()},
        "train": {name: find_spec(name) is not None for name in TRAIN_MODULES},
    }


def _library(device_type: str) -> dict[str, Any]:
    loaded = _native.has_kernels(device_type)
    return {
        "kernels": loaded,
        "architectures": _architectures(device_type) if loaded else None,
        "reason": _native.explain(device_type),
        "log": None if loaded else _log(device_type),
    }


def _architectures(device_type: str) -> str | None:
    """What the loaded library has code for: the GPUs, or the instruction set that this CPU takes of it."""
    module, folder = _native.FOUND.module, _native.FOUND.folder
    if module is None or folder is None:
        return None
    if device_type == "cpu":
        return str(module.build_info()["cpu_isa"])
    record = _build.Record.read(folder)
    return None if record is None else record.cuda.architectures


def _gpus() -> list[dict[str, Any]]:
    """The GPUs, and whether the library has code for each (None: there is no library, or its record does not
    say)."""
    built = _architectures("cuda") if _native.has_kernels("cuda") else None
    found = []
    for i in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(i)
        served = None if built is None else runs_on(capability, built)
        name = torch.cuda.get_device_name(i)
        found.append({"name": name, "capability": "{}.{}".format(*capability), "served": served})
    return found


def runs_on(capability: tuple[int, int], architectures: str) -> bool:
    """Whether a GPU of this compute capability runs one of ``architectures``, such as "sm_80 compute_90".

    Machine code runs on its own major version from its minor one on; PTX on everything from its version on.
    Those of an "a" run on that one version alone, those of an "f" on their own major version.
    """
    for kind, major, minor, suffix in re.findall(r"(sm|compute)_(\d+)(\d)([af]?)", architectures):
        built = (int(major), int(minor))
        if suffix == "a":
            fits = capability == built
        elif kind == "compute" and not suffix:
            fits = capability >= built
        else:
            fits = capability[0] == built[0] and capability >= built
        if fits:
            return True
    return False


def _log(device_type: str) -> str | None:
    """The compiler's words from the last failed build, the user's own before the installation's."""
    for folder in reversed(_native.candidates()):
        record = _build.Record.read(folder)
        if record is not None:
            library: _build.Library = getattr(record, device_type)
            if library.log:
                return library.log
    return None


def _doctor(*, as_json: bool) -> int:
    facts = diagnosis()
    left_out = [gpu for gpu in facts["torch"]["gpus"] if gpu["served"] is False]
    complete = facts["cpu"]["kernels"] and (facts["cuda"]["kernels"] or facts["torch"]["cuda"] is None)
    status = 0 if complete and not left_out else 1
    if as_json:
        print(json.dumps(facts, indent=1))
        return status
    missing = [name for name, there in facts["train"].items() if not there]
    rows = {
        "vaekernels": f"{facts['version']} in {facts['package']}",
        "python": f"{facts['python']} on {facts['platform']}",
        "torch": f"{facts['torch']['version']} (CUDA: {facts['torch']['cuda'] or 'none'}) "
        f"in {facts['torch']['path']}",
        "GPUs": ", ".join(f"{gpu['name']} ({gpu['capability']})" for gpu in facts["torch"]["gpus"]) or "none",
        "CPU kernels": _answer(facts["cpu"]),
        "CUDA kernels": _answer(facts["cuda"]),
        "library": facts["library_folder"] or "none; every op runs on plain PyTorch",
        "built with": ", ".join(f"{k} {v}" for k, v in (facts["build_info"] or {}).items()) or "-",
        "user's build": facts["cache"] + ("" if Path(facts["cache"]).is_dir() else " (none yet)"),
        "C++ compiler": facts["tools"]["compiler"] or "none",
        "nvcc": facts["tools"]["nvcc"] or "none",
        "training": "ready"
        if not missing
        else f"lacks {', '.join(missing)}: pip install 'vaekernels[train]'",
    }
    for name, value in rows.items():
        print(f"{name + ':':14} {value}")
    for gpu in left_out:
        print(
            f"\nThe CUDA kernels have no code for {gpu['name']}, of compute capability {gpu['capability']}. "
            f"Run `TORCH_CUDA_ARCH_LIST={gpu['capability']} {_build.BUILD_COMMAND}`."
        )
    for device_type in ("cpu", "cuda"):
        if facts[device_type]["log"]:
            print(f"\nThe failed build for {device_type} said:\n{facts[device_type]['log']}")
    return status


def _answer(library: dict[str, Any]) -> str:
    if not library["kernels"]:
        return f"no: {library['reason']}"
    return f"yes, for {library['architectures']}" if library["architectures"] else "yes"


def _compile() -> int:
    in_use = _build.torch_in_use()
    goal = _build.cache_dir(in_use.version, in_use.cuda)
    try:
        goal.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"vaekernels build: {error}. Set XDG_CACHE_HOME to a folder you can write to.", file=sys.stderr)
        return 1
    # Built aside and moved into place whole: another process may be loading the old one or building too.
    with tempfile.TemporaryDirectory(dir=goal.parent) as aside:
        made = Path(aside, "made")
        record = _build.build(made, Path(aside, "objects"), print, in_use)
        failed = [library for library in (record.cpu, record.cuda) if library.failed]
        for library in failed:
            print(library.log, file=sys.stderr)
        if record.cpu.file is None and _has_library(goal):
            print(f"vaekernels build: failed; the earlier build in {goal} stays", file=sys.stderr)
            return 1
        if goal.exists():
            goal.rename(Path(aside, "old"))
        made.rename(goal)
    if record.cpu.file is None:
        return 1
    print(f"vaekernels build: built into {goal}")
    check = [sys.executable, "-m", "vaekernels", "doctor"]
    said = subprocess.run(check, capture_output=True, text=True, errors="backslashreplace")
    print(said.stdout, end="")
    return 1 if failed else 0


def _has_library(folder: Path) -> bool:
    record = _build.Record.read(folder)
    return record is not None and record.cpu.file is not None
