"""A run: its folder, how it begins and goes on there, and a trained one opened to look at its model."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from vaekernels.training import checkpoint, engine
from vaekernels.training import data as datasets
from vaekernels.training.config import Config, differences, settings
from vaekernels.training.data import Data
from vaekernels.training.errors import CheckpointError, ConfigError, DataError
from vaekernels.training.models import VAE, build

__all__ = [
    "CHECKPOINT",
    "CONFIG",
    "LOCK",
    "LOG",
    "METRICS",
    "RUNS",
    "Run",
    "RunFolder",
    "new_folder",
    "new_run_folder",
    "newest_run",
    "open_run",
]

CHECKPOINT, CONFIG, LOG, METRICS = "checkpoint.pt", "config.toml", "log.jsonl", "metrics.json"
LOCK = "run.lock"
RUNS = Path("runs")
"""Where runs are that were given no folder."""

# May differ between a run and its resumption: they do not change which run it is.
_RESUMABLE = (
    "data.name",  # files may have been moved; that the data are the same tells their hash
    "optim.epochs",
    "engine.device",
    "engine.devices",
    "engine.threads",
    "engine.checkpoint_steps",
    "engine.tensorboard",
)


@dataclass(frozen=True)
class RunFolder:
    """``config.toml``, ``log.jsonl``, ``checkpoint.pt``, ``metrics.json``, ``tensorboard/`` and ``run.lock``,
    which may stay behind: the lock itself is the operating system's, and ends with the process."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / CONFIG

    @property
    def log(self) -> Path:
        return self.path / LOG

    @property
    def checkpoint(self) -> Path:
        return self.path / CHECKPOINT

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    def create(self) -> FileLock:
        """Make the folder and :meth:`hold` it. CheckpointError if it holds a run or cannot be made or written
        into."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot make {self.path}: {error.strerror}") from error
        lock = self.hold()
        if self.checkpoint.exists() or self.config.exists():
            lock.release()
            raise CheckpointError(
                f"{self.path} already holds a run; go on with it by --resume {self.path}, or give another "
                f"--run-dir"
            )
        return lock

    def hold(self) -> FileLock:
        """The lock by which one process alone trains in the folder, held until its ``release()`` or the end
        of this process, even by a crash. CheckpointError if another process holds it.

        Reading needs no lock: every file is whole at every moment, but for a last line of the log.
        """
        path = self.path / LOCK
        holder = _first_line(path)
        lock = FileLock(path, timeout=0, thread_local=False)
        try:
            lock.acquire()
            # Where a file system has no locks, filelock warns and keeps a file that says this itself.
            if _first_line(path) != str(os.getpid()):
                path.write_text(f"{os.getpid()}\n")
        except Timeout:
            # Who has only just taken the lock may not have written its number yet; what is there is that of
            # the one before.
            deadline = time.monotonic() + 1
            while (now := _first_line(path)) in ("", holder) and time.monotonic() < deadline:
                time.sleep(0.01)
            who = f"process {now or holder}" if now or holder else "another process"
            raise CheckpointError(
                f"{who} trains in {self.path}; wait for it or stop it, or give another --run-dir"
            ) from None
        except OSError as error:
            lock.release()
            raise CheckpointError(f"cannot lock {path}: {error.strerror or error}") from error
        return lock

    def settings(self) -> Config:
        """The settings of the run in this folder. CheckpointError if there is none."""
        try:
            there = self.config.is_file()
        except OSError as error:
            raise CheckpointError(f"cannot read {self.config}: {error.strerror}") from error
        if not there:
            raise CheckpointError(f"no run in {self.path} (it has no {CONFIG})")
        return settings.load(self.config)

    def load_data(self, config: Config, say: Callable[[str], None]) -> Data:
        """The data of the run in this folder. DataError if they cannot be read, and what to do where they are
        no longer there."""
        try:
            return datasets.load(config.data, say)
        except DataError as error:
            path = datasets.path_of(config.data.name)
            if path is None or os.path.lexists(path):
                raise
            kind = config.data.name.partition(":")[0]
            raise DataError(
                f"the data of {self.path} are no longer at {path}; if they were moved, write the new place, "
                f"name = '{kind}:PATH', into {self.config}"
            ) from error

    def require_same(self, saved: Config, given: Config) -> None:
        """ConfigError if ``given`` is another run than ``saved``."""
        changed = {key: values for key, values in differences(saved, given).items() if key not in _RESUMABLE}
        if changed:
            listed = ", ".join(f"{key} = {old!r}, not {new!r}" for key, (old, new) in changed.items())
            raise ConfigError(
                f"the run in {self.path} has {listed}; a resumed run keeps its settings, so start a new one"
            )

    def write_config(self, config: Config) -> None:
        checkpoint.write_text(self.config, settings.to_toml(config))


@dataclass(frozen=True)
class Run:
    """``model`` is in eval mode, on ``device``; ``step``: how far it was trained. ``missing``: why ``data``
    have no examples, None where they have."""

    folder: RunFolder
    config: Config
    data: Data
    model: VAE
    device: torch.device
    step: int
    missing: str | None = None

    def require_examples(self) -> None:
        """DataError if the data of the run could not be read."""
        if self.missing is not None:
            raise DataError(f"this takes the data that {self.folder.path} was trained on: {self.missing}")


def open_run(path: Path | str, say: Callable[[str], None] = print, *, device: str | None = None) -> Run:
    """The run in the folder ``path`` as its last checkpoint has it. ``say`` is told, in a sentence, what
    takes long in loading its data. ``device``: None for that of the run.

    The model can be used without the data of the run: where they cannot be read or are others, ``say`` is
    told, and ``data`` are without examples. CheckpointError if there is no run.
    """
    folder = RunFolder(Path(path))
    config = folder.settings()
    state = checkpoint.load(folder.checkpoint)
    missing: str | None = None
    try:
        data = folder.load_data(config, say)
        checkpoint.require_same_data(state, folder.checkpoint, data)
    except (DataError, CheckpointError) as error:
        missing = str(error)
        try:
            data = datasets.without_examples(config.data.name, state["meaning"], str(state["data"]))
        except Exception as damaged:
            raise checkpoint.misfit(folder.checkpoint, folder.config, damaged) from error
        say(f"without the data of the run ({missing})")
    model = build(config.model, data)
    try:
        model.load_state_dict(state["model"])
        step = int(state["progress"]["step"])
    except Exception as error:  # a dozen types, for what is not of the type that it should be
        raise checkpoint.misfit(folder.checkpoint, folder.config, error) from error
    where = engine.single_device(device or config.engine.device)
    return Run(folder, config, data, model.to(where).eval(), where, step, missing)


def new_run_folder(name: str) -> Path:
    """A folder of its own for a run that was given none, runs/NAME-TIME: two runs may begin in one second."""
    plain = "".join(c if c.isalnum() or c in "-_." else "-" for c in name.rstrip("/").rpartition("/")[2])
    return new_folder(RUNS / f"{plain}-{time.strftime('%Y%m%d-%H%M%S')}")


def newest_run() -> Path:
    """The run below ``runs/`` of which a checkpoint was written last. CheckpointError if there is none."""
    saved = [path for path in RUNS.rglob(CHECKPOINT) if path.is_file()]
    if not saved:
        raise CheckpointError(f"no run below {RUNS}/ in this folder; name the folder of one")
    return max(saved, key=lambda path: path.stat().st_mtime_ns).parent


def new_folder(path: Path) -> Path:
    """``path``, made now, or where that is there already the first of ``path-2``, ``path-3``, ... that is
    not: no two callers get the same. CheckpointError if it cannot be made."""
    for number in count(1):
        made = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            made.mkdir(parents=True)
        except FileExistsError:
            if not made.parent.is_dir():
                raise CheckpointError(f"cannot make {made}: {made.parent} is no folder") from None
        except OSError as error:
            raise CheckpointError(f"cannot make {made}: {error.strerror}") from error
        else:
            return made
    raise AssertionError


def _first_line(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").partition("\n")[0][:20]
    except OSError:
        return ""
