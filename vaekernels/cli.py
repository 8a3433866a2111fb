"""The command `vaekernels`: `doctor` and `build` here, everything else from `training.cli`.

The two matter most where something is missing, so they need nothing beyond torch.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import _vaekernels_command
from vaekernels import _build, _command, _native, _trust
from vaekernels._leftovers import claim, remove_dead

TRAIN_MODULES = (
    "lightning_fabric",
    "typer",
    "rich",
    "matplotlib",
    "sklearn",
    "tensorboard",
    "jinja2",
    "pydantic",
    "tomli_w",
    "numpy",
    "PIL",
    *(() if sys.version_info >= (3, 11) else ("tomli",)),
)
BUILDING = "building-"
"""How the names of the folders of builds in progress begin."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    return _command.run(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if (status := _vaekernels_command.answered(given)) is not None:
        return status
    command, *options = given
    if command == "doctor":
        return _doctor(as_json="--json" in options)
    if command == "build":
        return _compile()
    if command == "bench":
        with _command.importing():
            bench: Any = import_module("vaekernels.bench")
        return int(bench.main(options, prog="vaekernels bench"))
    return _train(given)


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
    cache = _build.cache_dir(str(torch.__version__), torch.version.cuda)
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
        "not_loaded": {str(folder): problem for folder, problem in found.passed_over.items()},
        "shadowed_by": None if (sources := _shadowing()) is None else str(sources),
        "cache": None if cache is None else str(cache),
        "tools": {"compiler": compiler, "nvcc": _build.find_nvcc()},
        "train": {name: find_spec(name) is not None for name in TRAIN_MODULES},
    }


def _shadowing() -> Path | None:
    """Another vaekernels that `python` takes in place of this one when it is started in this folder."""
    with contextlib.suppress(OSError):
        here = Path.cwd() / "vaekernels"
        taken = (here / "__init__.py").is_file() and not getattr(sys.flags, "safe_path", False)
        if taken and not here.samefile(_native.PACKAGE_DIR):
            return here
    return None


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
    record = _record(folder)
    return None if record is None else record.cuda.architectures


def _record(folder: Path) -> _build.Record | None:
    """The record of a build in `folder`, if it is there and can be relied on."""
    try:
        read = _native.read_record(folder)
    except _native.Unfit:
        return None
    return None if read is None else read[1]


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
        record = _record(folder)
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
        "user's build": _cache(facts["cache"]),
        "C++ compiler": facts["tools"]["compiler"] or "none",
        "nvcc": facts["tools"]["nvcc"] or "none",
        "training": "ready"
        if not missing
        else f"lacks {', '.join(missing)}: pip install 'vaekernels[train]'",
    }
    for name, value in rows.items():
        print(f"{name + ':':14} {value}")
    if facts["shadowed_by"]:
        print(
            f"\nThe sources here shadow the installed package: in this folder `python` imports "
            f"{facts['shadowed_by']}, and all of the above is about {facts['package']}. "
            "Start Python in another folder, or install with `pip install -e .`."
        )
    for folder, problem in facts["not_loaded"].items():
        print(f"\nThe library in {folder} is not loaded: {problem}.")
    for gpu in left_out:
        print(
            f"\nThe CUDA kernels have no code for {gpu['name']}, of compute capability {gpu['capability']}. "
            f"Run `TORCH_CUDA_ARCH_LIST={gpu['capability']} {_build.BUILD_COMMAND}`."
        )
    for device_type in ("cpu", "cuda"):
        if facts[device_type]["log"]:
            print(f"\nThe failed build for {device_type} said:\n{facts[device_type]['log']}")
    return status


def _cache(folder: str | None) -> str:
    if folder is None:
        return f"none: {_build.NO_CACHE}. {_build.NO_CACHE_REMEDY}."
    return folder if Path(folder).is_dir() else f"{folder} (none yet)"


def _answer(library: dict[str, Any]) -> str:
    if not library["kernels"]:
        return f"no: {library['reason']}"
    return f"yes, for {library['architectures']}" if library["architectures"] else "yes"


def _compile() -> int:
    in_use = _build.torch_in_use()
    goal = _build.cache_dir(in_use.version, in_use.cuda)
    if goal is None:
        print(f"vaekernels build: {_build.NO_CACHE}. {_build.NO_CACHE_REMEDY}.", file=sys.stderr)
        return 1
    # What others can write is not loaded. The compiler and the linker heed this as well.
    umask = os.umask(0o022)
    os.umask(umask | 0o022)
    try:
        return _compile_into(goal, in_use)
    except OSError as error:
        print(f"vaekernels build: {error}. Set XDG_CACHE_HOME to a folder you can write to.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vaekernels build: stopped", file=sys.stderr)
        return 130
    finally:
        os.umask(umask)


def _compile_into(goal: Path, in_use: _build.Torch) -> int:
    cache = goal.parent
    cache.mkdir(parents=True, exist_ok=True)
    cache = cache.resolve()
    if (problem := _trust.problem_of_folder(cache)) is not None:
        print(f"vaekernels build: {problem}. {_native.CLOSE}.", file=sys.stderr)
        return 1
    remove_dead(
        cache, BUILDING, ".lock", lambda lock: shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
    )
    # Built aside and moved into place whole: another process may be loading the old one or building too.
    held, lock = claim(cache, BUILDING, ".lock")
    aside = lock.with_suffix("")
    try:
        aside.mkdir()
        made = aside / "made"
        record = _build.build(made, aside / "objects", print, in_use)
        failed = [library for library in (record.cpu, record.cuda) if library.failed]
        for library in failed:
            print(library.log, file=sys.stderr)
        if record.cpu.file is None and _has_library(goal):
            print(f"vaekernels build: failed; the earlier build in {goal} stays", file=sys.stderr)
            return 1
        _into_place(made, goal, aside)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        lock.unlink(missing_ok=True)
        os.close(held)
    if record.cpu.file is None:
        return 1
    print(f"vaekernels build: built into {goal}")
    check = [sys.executable, "-m", "vaekernels", "doctor"]
    said = subprocess.run(check, capture_output=True, text=True, errors="backslashreplace")
    print(said.stdout, end="")
    return 1 if failed else 0


def _into_place(made: Path, goal: Path, aside: Path) -> None:
    """Exchanges `goal` for `made`. Of builds that end at the same time, the last one stays."""
    for number in itertools.count():
        with contextlib.suppress(FileNotFoundError):
            goal.rename(aside / f"old{number}")
        try:
            made.rename(goal)
            return
        except OSError as error:
            # Another build has put its result there since.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


def _has_library(folder: Path) -> bool:
    record = _record(folder)
    return record is not None and record.cpu.file is not None
