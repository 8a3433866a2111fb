"""Fresh environments that share what is expensive: one torch for each Python, lent to every cell."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TORCH = "2.13.0"
OTHER_TORCH = "2.12.1"
CHECK = Path(__file__).with_name("first_loss.py")
# Whatever is set where the matrix is started must not decide its cells.
CLEARED = re.compile(
    r"CXX|CC|CXXFLAGS|CFLAGS|LDFLAGS|MAX_JOBS|CUDA_HOME|CUDA_PATH|TORCH_CUDA_ARCH_LIST|VAEKERNELS_\w+"
    r"|PYTHON(?!WARNINGS)\w+|VIRTUAL_ENV|XDG_CACHE_HOME"
)
TRACEBACK = "Traceback (most recent call last)"


class NotPossible(Exception):
    """This machine cannot try the cell; the message says why."""


class Failed(Exception):
    """The cell did not end as it should."""


@dataclass(frozen=True)
class Facts:
    """What a user's first script and the doctor say in an environment."""

    kernels: bool
    cuda: bool
    status: int
    warning: str
    doctor: str
    versions: dict[str, str]


@dataclass(eq=False)
class Matrix:
    """The folder of the run, and what its cells share."""

    folder: Path

    def __post_init__(self) -> None:
        # uv links files out of its cache, which the cells' own XDG_CACHE_HOME must not move.
        self.uv_cache = os.environ.get("UV_CACHE_DIR") or self.run([UV, "cache", "dir"]).strip()

    def run(
        self, command: list[str | Path], cwd: Path | None = None, status: int | None = 0, **variables: str
    ) -> str:
        """The output of a command, both streams; Failed where it shows a traceback or another status."""
        environment = {k: v for k, v in os.environ.items() if CLEARED.fullmatch(k) is None}
        environment |= {"PYTHONUNBUFFERED": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        if hasattr(self, "uv_cache"):
            environment["UV_CACHE_DIR"] = self.uv_cache
        done = subprocess.run(
            [str(part) for part in command],
            cwd=cwd or self.folder,
            env=environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        told = f"$ {' '.join(map(str, command))}\n{done.stdout}"
        if TRACEBACK in done.stdout:
            raise Failed(f"a traceback\n{told}")
        if status is not None and done.returncode != status:
            raise Failed(f"exit status {done.returncode} in place of {status}\n{told}")
        return done.stdout

    @cache  # noqa: B019 (one object for the whole run)
    def source(self) -> Path:
        """A copy of the tree, so that cells share compiled objects and leave no trace in the repository."""
        copy = self.folder / "source"
        # What a kept folder holds of an earlier run, all but the objects, is that run's.
        for old in [*copy.glob("*"), self.folder / "dist"]:
            if old.name != "build":
                shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        ignored = shutil.ignore_patterns(
            ".*", "build", "dist", "runs", "*.egg-info", "*.so", "_build.json", "__pycache__"
        )
        shutil.copytree(REPOSITORY, copy, ignore=ignored, dirs_exist_ok=True)
        return copy

    @cache  # noqa: B019
    def base(self, python: str, torch: str = TORCH) -> Path:
        """The site-packages of an environment with a torch as the index gives it."""
        home = self.folder / f"base-{python}-{torch}"
        if not home.exists():
            self.run([UV, "venv", "-q", "--no-python-downloads", "-p", interpreter(python), home])
            packages = [f"torch=={torch}", "numpy", "setuptools>=77"]
            self.run([UV, "pip", "install", "-q", "-p", home, *packages])
        return next((home / "lib").glob("python*/site-packages"))

    def environment(self, name: str, python: str = "3.11", torch: str | None = TORCH) -> Environment:
        """A fresh environment with pip, which sees the torch of a base (None: no torch)."""
        home = self.folder / "cells" / name
        shutil.rmtree(home, ignore_errors=True)
        self.run([UV, "venv", "-q", "--no-python-downloads", "--seed", "-p", interpreter(python), home])
        made = Environment(self, home)
        if torch is not None:
            made.lend(self.base(python, torch))
        return made


@dataclass(frozen=True)
class Environment:
    """One cell's own."""

    matrix: Matrix
    home: Path

    @property
    def python(self) -> Path:
        return self.home / "bin" / "python"

    def lend(self, site: Path) -> None:
        inside = next((self.home / "lib").glob("python*/site-packages"))
        (inside / "lent.pth").write_text(f"{site}\n")

    def run(self, command: list[str | Path], status: int | None = 0, **variables: str) -> str:
        own = {"XDG_CACHE_HOME": str(self.home / "cache"), "VIRTUAL_ENV": str(self.home)}
        return self.matrix.run(command, self.home, status, **own | variables)

    def pip(self, *arguments: str | Path, status: int | None = 0, **variables: str) -> str:
        return self.run([self.python, "-m", "pip", "install", *arguments], status, **variables)

    def uv(self, *arguments: str | Path, status: int | None = 0, **variables: str) -> str:
        return self.run([UV, "pip", "install", "-p", self.python, *arguments], status, **variables)

    def command(self, *arguments: str, status: int | None = 0, **variables: str) -> str:
        """`vaekernels ...`, as installed."""
        return self.run([self.home / "bin" / "vaekernels", *arguments], status, **variables)

    def facts(self) -> Facts:
        told = self.run([self.python, "-W", "always", CHECK])
        return Facts(**json.loads(told.strip().splitlines()[-1]))


@cache
def interpreter(version: str) -> str:
    """The Python of this version on this machine."""
    # pyenv's own programs hide the versions that are not switched on.
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    for found in sorted(root.glob(f"versions/{version}.*/bin/python")):
        return str(found)
    command = [UV, "python", "find", "--no-python-downloads", "--system", version]
    asked = subprocess.run(command, capture_output=True, text=True)
    if asked.returncode != 0:
        raise NotPossible(f"there is no Python {version} on this machine")
    return asked.stdout.strip()


UV = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}") or "uv"
