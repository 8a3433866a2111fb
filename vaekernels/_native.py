"""Finds the compiled kernels that fit the running torch, and knows why they are absent.

A library is compiled against one torch and crashes or misbehaves under another, so the record beside it is
read before anything is loaded. Looked at: the package itself and what `vaekernels build` put in the user's
cache; of two that fit, the newer one is what the user asked for last. Nothing here compiles, and nothing
makes a CUDA call.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch._ops import _OpNamespace

from vaekernels import _build

PACKAGE_DIR = Path(__file__).resolve().parent
NO_CUDA = "this torch was built without CUDA."


class FallbackWarning(UserWarning):
    """An op ran on plain PyTorch because no compiled kernels fit; the message says why and what mends it."""


@dataclass(frozen=True)
class Found:
    """What was loaded, from where, and the reason for each part that was not."""

    module: ModuleType | None
    folder: Path | None
    reasons: dict[str, str | None]


def _sentence(problem: str | None, remedy: str | None) -> str:
    return f"{problem or 'unknown'}. {remedy or f'Run `{_build.BUILD_COMMAND}`'}."


def mismatch(record: _build.Record) -> str | None:
    """Why libraries with this record must not be loaded here; None where they fit."""
    here = {
        "torch": (record.torch, str(torch.__version__)),
        "CUDA": (record.torch_cuda or "none", torch.version.cuda or "none"),
        "Python": (record.python, _build.python_tag()),
        "vaekernels": (record.package, _build.VERSION),
    }
    for what, (built, running) in here.items():
        if built != running:
            return f"the library was built for {what} {built}, and this is {what} {running}"
    return None


def candidates() -> list[Path]:
    return [PACKAGE_DIR, _build.cache_dir(str(torch.__version__), torch.version.cuda)]


def load(folders: list[Path]) -> Found:
    """Loads the newest libraries that fit; those with CUDA kernels come first where torch has CUDA."""
    reason: str | None = None
    fitting: list[tuple[Path, _build.Record]] = []
    for folder in folders:
        record = _build.Record.read(folder)
        if record is None:
            continue
        if record.cpu.file is None:
            reason = reason or _sentence(record.cpu.problem, record.cpu.remedy)
        elif (problem := mismatch(record)) is not None:
            remedy = f"Run `{_build.BUILD_COMMAND}` to compile it for the torch in use"
            reason = reason or _sentence(problem, remedy)
        else:
            fitting.append((folder, record))
    fitting.sort(key=lambda pair: -(pair[0] / _build.RECORD_NAME).stat().st_mtime_ns)
    if torch.version.cuda is not None:
        fitting.sort(key=lambda pair: pair[1].cuda.file is None)
    for folder, record in fitting:
        try:
            module = _load_module(folder / str(record.cpu.file))
        except (ImportError, OSError) as error:
            reason = reason or _sentence(f"loading {folder / str(record.cpu.file)} failed: {error}", None)
            continue
        return Found(module, folder, {"cpu": None, "cuda": _load_cuda(folder, record.cuda)})
    reason = reason or _sentence(f"no library lies in {' or '.join(map(str, folders))}", None)
    return Found(None, None, {"cpu": reason, "cuda": NO_CUDA if torch.version.cuda is None else reason})


def _load_module(file: Path) -> ModuleType:
    name = f"{__package__}._C"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not an extension module of this Python")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module


def _load_cuda(folder: Path, library: _build.Library) -> str | None:
    if torch.version.cuda is None:
        return NO_CUDA
    if library.file is None:
        return _sentence(library.problem, library.remedy)
    try:
        torch.ops.load_library(str(folder / library.file))  # type: ignore[no-untyped-call]
    except OSError as error:
        return _sentence(f"loading {folder / library.file} failed: {error}", None)
    return None


FOUND = load(candidates())
C: ModuleType | None = FOUND.module
_AVAILABLE = {device: reason is None for device, reason in FOUND.reasons.items()}
_warned: set[str] = set()


def has_kernels(device_type: str) -> bool:
    """True where compiled kernels serve tensors of this device type ("cpu", "cuda")."""
    return _AVAILABLE.get(device_type, False)


def explain(device_type: str = "cpu") -> str | None:
    """Why `device_type` runs on plain PyTorch and what mends it; None where kernels serve it."""
    return FOUND.reasons.get(device_type, f"there are no kernels for the device type {device_type!r}.")


class AbsentOperators(_OpNamespace):
    """`torch.ops.vaekernels` where nothing is compiled: an exported program that looks for an operator in it
    is told what it needs."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError(
            f"an exported program calls torch.ops.vaekernels.{name}, and exported programs need the compiled "
            f"library of vaekernels: {explain('cpu')} `vaekernels doctor` tells more. Without it only code "
            "that calls the functions of vaekernels runs, on plain PyTorch."
        )


def warn_fallback(device_type: str) -> None:
    """Warns with `FallbackWarning`, once for each device type and process."""
    if torch.compiler.is_dynamo_compiling() or device_type in _warned:
        return
    _warned.add(device_type)
    warnings.warn(
        f"vaekernels runs on plain PyTorch for {device_type} tensors: {explain(device_type)} "
        "`vaekernels doctor` tells more.",
        FallbackWarning,
        stacklevel=_depth_of_caller(),
    )


# What torch.compiler.assume_constant_result sets, without its import of torch._dynamo: dynamo then calls the
# function while it traces, so that users who only ever compile are warned too. A torch without such a mark
# traces into the function instead, and finds nothing to do.
warn_fallback.__dict__["_dynamo_marked_constant"] = True


def _depth_of_caller() -> int:
    """The stacklevel, for `warn_fallback`, of the first frame outside the package."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(str(PACKAGE_DIR) + os.sep):
        depth, frame = depth + 1, frame.f_back
    return depth
