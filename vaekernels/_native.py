"""Finds the compiled kernels that fit the running torch, and knows why they are absent.

A library is compiled against one torch and crashes or misbehaves under another, so the record beside it is
read before anything is loaded. Looked at: the package itself and what `vaekernels build` put in the user's
cache; of two that fit, the newer one is what the user asked for last. What others than the user and root
could have put there is not loaded. Nothing here compiles, and nothing makes a CUDA call.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch._ops import _OpNamespace

from vaekernels import _build, _trust

PACKAGE_DIR = Path(__file__).resolve().parent
NO_CUDA = "this torch was built without CUDA."
CLOSE = (
    "Only you and root may be able to change it: fix that with `chmod go-w` or `chown`, or set "
    f"XDG_CACHE_HOME to a folder of your own; then run `{_build.BUILD_COMMAND}`"
)


class FallbackWarning(UserWarning):
    """An op ran on plain PyTorch because no compiled kernels fit; the message says why and what fixes it."""


@dataclass(frozen=True)
class Found:
    """What was loaded, from where, the reason for each part that was not, and what is wrong with the
    libraries that were looked at and not loaded, by their folder."""

    module: ModuleType | None
    folder: Path | None
    reasons: dict[str, str | None]
    passed_over: dict[Path, str] = field(default_factory=dict)


class Unfit(Exception):
    """Why the libraries of a folder are not loaded, and what fixes it."""

    def __init__(self, problem: str, remedy: str | None = None) -> None:
        super().__init__(problem)
        self.problem, self.remedy = problem, remedy


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
    cache = _build.cache_dir(str(torch.__version__), torch.version.cuda)
    return [PACKAGE_DIR] if cache is None else [PACKAGE_DIR, cache]


def read_record(folder: Path) -> tuple[Path, _build.Record] | None:
    """The record in `folder`, and the folder without symbolic links; None where there is none. Raises `Unfit`
    where the record, or the libraries that it names, cannot be relied on."""
    try:
        folder = folder.resolve()
        if not os.path.lexists(folder / _build.RECORD_NAME):
            return None
        if not _trust.KNOWN:
            raise Unfit("this system does not tell who can change a file")
        allowed = frozenset[str]()
        if folder == PACKAGE_DIR:
            # Whoever can change the code beside the libraries needs none of them: that code runs already.
            for place in (folder, folder / Path(__file__).name):
                allowed |= _trust.writers(place, place.stat())
        elif (problem := _trust.problem_of_folder(folder)) is not None:
            raise Unfit(problem, CLOSE)
        record = _trusted_record(folder, allowed)
    except (OSError, RuntimeError, ValueError) as error:
        # RuntimeError: symbolic links in a circle, before Python 3.13. ValueError: no name of a file.
        raise Unfit(f"{folder} cannot be looked at: {error}") from None
    return folder, record


def _trusted_record(folder: Path, allowed: frozenset[str]) -> _build.Record:
    def check(file: Path) -> None:
        if (problem := _trust.problem_of_file(file, allowed)) is not None:
            raise Unfit(problem, CLOSE)

    check(folder / _build.RECORD_NAME)
    record = _build.Record.read(folder)
    if record is None:
        raise Unfit(f"{folder / _build.RECORD_NAME} is not the record of a build")
    for library in (record.cpu, record.cuda):
        if library.file is not None:
            if os.path.basename(library.file) != library.file or library.file in ("", ".", ".."):
                raise Unfit(f"{folder / _build.RECORD_NAME} names {library.file!r}, which is no plain name")
            check(folder / library.file)
    return record


def load(folders: list[Path]) -> Found:
    """Loads the newest libraries that fit; those with CUDA kernels come first where torch has CUDA."""
    fitting: list[tuple[int, Path, _build.Record]] = []
    unfit: dict[Path, Unfit] = {}
    for given in folders:
        try:
            if (read := read_record(given)) is None:
                continue
            folder, record = read
            if record.cpu.file is None:
                raise Unfit(record.cpu.problem or "it was not built", record.cpu.remedy)
            if (problem := mismatch(record)) is not None:
                raise Unfit(problem, f"Run `{_build.BUILD_COMMAND}` to compile it for the torch in use")
            fitting.append(((folder / _build.RECORD_NAME).stat().st_mtime_ns, folder, record))
        except Unfit as found:
            unfit[given] = found
        except OSError as error:  # it went away meanwhile
            unfit[given] = Unfit(f"{given} cannot be looked at: {error}")
    fitting.sort(key=lambda one: -one[0])
    if torch.version.cuda is not None:
        fitting.sort(key=lambda one: one[2].cuda.file is None)
    module, chosen, cuda = None, None, None
    for _, folder, record in fitting:
        try:
            module = _load_module(folder / str(record.cpu.file))
        except Exception as error:  # whatever code it runs on the way
            unfit[folder] = Unfit(f"loading {folder / str(record.cpu.file)} failed: {error}")
            continue
        chosen, cuda = folder, _load_cuda(folder, record.cuda)
        break
    passed_over = {folder: why.problem for folder, why in unfit.items()}
    if module is not None:
        return Found(module, chosen, {"cpu": None, "cuda": cuda}, passed_over)
    # What others can change comes first: a new build does not fix it.
    nowhere = Unfit(f"no library lies in {' or '.join(map(str, folders))}")
    first = min(unfit.values(), key=lambda why: why.remedy != CLOSE, default=nowhere)
    reason = _sentence(first.problem, first.remedy)
    reasons: dict[str, str | None] = {
        "cpu": reason,
        "cuda": NO_CUDA if torch.version.cuda is None else reason,
    }
    return Found(None, None, reasons, passed_over)


def look() -> Found:
    """`load` of all candidates. Where none fits, and an installed package is hidden, that is said first."""
    found = load(candidates())
    if found.module is None and (installed := shadowed()) is not None:
        told = (
            f"the sources in {PACKAGE_DIR} shadow the installed package in {installed}: start Python "
            "in another folder, or install with `pip install -e .`. About the sources: "
        )
        for device, reason in found.reasons.items():
            found.reasons[device] = reason if reason == NO_CUDA else f"{told}{reason}"
    return found


def shadowed() -> Path | None:
    """Another vaekernels that this one hides: that of a later entry of sys.path."""
    for entry in sys.path:
        with contextlib.suppress(OSError):
            other = Path(entry or os.curdir).absolute() / __package__
            if (other / "__init__.py").is_file() and not other.samefile(PACKAGE_DIR):
                return other
    return None


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


FOUND = look()
C: ModuleType | None = FOUND.module
_AVAILABLE = {device: reason is None for device, reason in FOUND.reasons.items()}
_warned: set[str] = set()


def has_kernels(device_type: str) -> bool:
    """True where compiled kernels serve tensors of this device type ("cpu", "cuda")."""
    return _AVAILABLE.get(device_type, False)


def explain(device_type: str = "cpu") -> str | None:
    """Why `device_type` runs on plain PyTorch and what fixes it; None where kernels serve it."""
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
