"""Compiles the kernels on the way into a wheel or an editable install; see vaekernels/_build.py.

VAEKERNELS_BUILD: auto (the default: a failed build gives a package that runs on plain PyTorch and says
why), 1 (a failed build is an error), 0 (nothing is compiled, and the wheel is pure Python).
VAEKERNELS_CUDA=0: no CUDA kernels.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, __version__, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

if int(__version__.split(".")[0]) < 77:
    # Of pyproject.toml; installers heed it only where they make an environment for the build themselves.
    raise SystemExit(
        f"vaekernels: setuptools >= 77 is needed, and {sys.executable} has {__version__}: "
        "run `pip install --upgrade setuptools`, or install without --no-build-isolation"
    )

HERE = Path(__file__).resolve().parent
PACKAGE = "vaekernels"
MODE = os.environ.get("VAEKERNELS_BUILD") or "auto"
if MODE not in ("auto", "0", "1"):
    raise SystemExit(f"VAEKERNELS_BUILD must be auto, 0 or 1, got {MODE!r}")

# Loaded by path: importing the package would import torch, which may be absent.
spec = importlib.util.spec_from_file_location("_vaekernels_build", HERE / PACKAGE / "_build.py")
assert spec is not None and spec.loader is not None
rules = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = rules
spec.loader.exec_module(rules)


class BuildPackage(build_py):
    """Puts csrc/ into the package, for `vaekernels build`; an editable install reads it where it is."""

    def run(self) -> None:
        folder = HERE / PACKAGE
        if not self.editable_mode:
            folder = Path(self.build_lib) / PACKAGE
            # What an earlier build left in build/ would go into the wheel.
            shutil.rmtree(folder, ignore_errors=True)
        super().run()
        if not self.editable_mode:
            shutil.copytree(HERE / "csrc", folder / "csrc", dirs_exist_ok=True)
        if MODE == "0":
            rules.clear(folder)
            missing = rules.Library(
                problem="the package was built with VAEKERNELS_BUILD=0", remedy=f"Run `{rules.BUILD_COMMAND}`"
            )
            rules.Record(rules.VERSION, rules.python_tag(), None, None, missing, missing).write(folder)


class BuildKernels(build_ext):
    def run(self) -> None:
        target = HERE / PACKAGE if self.inplace else Path(self.build_lib) / PACKAGE
        record = rules.build(target, Path(self.build_temp).resolve(), lambda line: print(line, flush=True))
        for library in (record.cpu, record.cuda):
            if library.failed:
                print(library.log, flush=True)
        if MODE == "1" and (record.cpu.file is None or record.cuda.failed):
            raise SystemExit("vaekernels: VAEKERNELS_BUILD=1 and the build failed, see above")


setup(
    cmdclass={"build_py": BuildPackage, "build_ext": BuildKernels},
    # Names the wheel after the platform; BuildKernels finds the sources itself.
    ext_modules=[] if MODE == "0" else [Extension(f"{PACKAGE}._C", sources=[])],
)
