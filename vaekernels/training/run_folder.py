"""The folder of a run: what is in it, and how a run begins and goes on there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vaekernels.training import checkpoint, settings
from vaekernels.training.config import Config, differences
from vaekernels.training.errors import CheckpointError, ConfigError

__all__ = ["CHECKPOINT", "CONFIG", "LOG", "METRICS", "RunFolder"]

CHECKPOINT, CONFIG, LOG, METRICS = "checkpoint.pt", "config.toml", "log.jsonl", "metrics.json"

# May differ between a run and its resumption: they do not change which run it is.
_RESUMABLE = (
    "optim.epochs",
    "engine.device",
    "engine.devices",
    "engine.threads",
    "engine.checkpoint_steps",
    "engine.tensorboard",
)


@dataclass(frozen=True)
class RunFolder:
    """``config.toml``, ``log.jsonl``, ``checkpoint.pt``, ``metrics.json``, and ``tensorboard/``."""

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

    def create(self) -> None:
        """Make the folder. CheckpointError if it holds a run or cannot be made or written into."""
        try:
            if self.checkpoint.exists() or self.config.exists():
                raise CheckpointError(
                    f"{self.path} already holds a run; go on with it by --resume {self.path}, or give "
                    f"another --run-dir"
                )
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot make {self.path}: {error.strerror}") from error

    def settings(self) -> Config:
        """The settings of the run in this folder. CheckpointError if there is none."""
        try:
            there = self.config.is_file()
        except OSError as error:
            raise CheckpointError(f"cannot read {self.config}: {error.strerror}") from error
        if not there:
            raise CheckpointError(f"no run in {self.path} (it has no {CONFIG})")
        return settings.load(self.config)

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
