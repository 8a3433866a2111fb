"""The training loop: one class whose state is what a checkpoint holds."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from rich.console import Console
from torch import Tensor

from vaekernels.schedules import Constant, Linear, Schedule
from vaekernels.training import checkpoint, display
from vaekernels.training import config as configs
from vaekernels.training.config import Config
from vaekernels.training.data import Batches, Data
from vaekernels.training.errors import CheckpointError, ConfigError, Interrupted, NonFiniteError
from vaekernels.training.evaluate import Evaluation, evaluate
from vaekernels.training.models import ELBO, VAE, build

__all__ = ["CHECKPOINT", "CONFIG", "LOG", "METRICS", "Trainer"]

_EPOCH_LINES = 20  # at most, on the terminal; the log has every epoch

CHECKPOINT, CONFIG, LOG, METRICS = "checkpoint.pt", "config.json", "log.jsonl", "metrics.json"


@dataclass
class Progress:
    """How far the run is. ``batch`` is the next batch of ``epoch``; the sums are over the epoch so far."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    seconds: float = 0.0
    sums: dict[str, float] = field(
        default_factory=lambda: {"examples": 0.0, "nll": 0.0, "rate": 0.0, "kl": 0.0}
    )

    def mean(self, name: str) -> float:
        return self.sums[name] / max(self.sums["examples"], 1.0)

    def next_epoch(self) -> None:
        self.epoch, self.batch = self.epoch + 1, 0
        self.sums = dict.fromkeys(self.sums, 0.0)


class Trainer:
    """Trains one model on one data set and keeps everything of the run in ``run_dir``:

    ``config.json``, ``log.jsonl`` (a line per epoch), ``checkpoint.pt`` (after every epoch and when
    interrupted), ``metrics.json`` (the held-out evaluation, at the end).

    A run that is interrupted and resumed takes the same steps as one that is not, bit for bit on the CPU with
    the same number of threads.
    """

    def __init__(
        self, config: Config, data: Data, run_dir: Path, console: Console, *, resume: bool = False
    ) -> None:
        self.config = config
        self.data = data
        self.run_dir = run_dir
        self.console = console
        self.progress = Progress()
        self._stop = False

        self.fabric = _fabric(config)
        torch.manual_seed(config.engine.seed)
        self.model: VAE = build(config.model, data)
        self.elbo = ELBO(self.model, config.objective)
        optimizer = torch.optim.Adam(self.model.parameters(), lr=config.optim.lr)
        self._forward, self.optimizer = self.fabric.setup(self.elbo, optimizer)
        self.noise = torch.Generator(device=self.fabric.device).manual_seed(config.engine.seed)
        self.batches = Batches(data, batch_size=config.optim.batch_size, seed=config.engine.seed)
        self.schedule = self._schedule()
        if resume:
            self._resume()
        else:
            self._start()

    def fit(self) -> Evaluation:
        """Train to the last epoch, evaluate, write ``metrics.json``.

        Interrupted after Ctrl-C, with all saved; NonFiniteError when a loss, a gradient or the evaluation is
        NaN or inf, with the last good checkpoint kept.
        """
        epochs = self.config.optim.epochs
        evaluation: Evaluation | None = None
        steps = epochs * len(self.batches)
        with (
            self._interruptible(),
            display.progress_bar(self.console, epochs=epochs, steps=steps, done=self.progress.step) as bar,
        ):
            while self.progress.epoch < epochs:
                evaluation = self._epoch(bar)
        if evaluation is None:
            evaluation = self._evaluate()
        self._write(METRICS, json.dumps(self._metrics(evaluation), indent=2) + "\n")
        return evaluation

    def request_stop(self) -> None:
        """Save and raise Interrupted after the step that is under way."""
        self._stop = True

    def _epoch(self, bar: display.Bar) -> Evaluation:
        progress = self.progress
        started = time.perf_counter() - progress.seconds
        self.model.train()
        for batch in self.batches.order(progress.epoch)[progress.batch :]:
            self._step(self.batches.take(batch).to(self.fabric.device))
            progress.batch += 1
            progress.step += 1
            progress.seconds = time.perf_counter() - started
            bar.update(
                epoch=progress.epoch,
                step=progress.step,
                rate=progress.mean("rate"),
                nll=progress.mean("nll"),
                weight=self.schedule.value.item(),
            )
            if self._stop:
                self._save()
                raise Interrupted(
                    f"stopped at step {progress.step}, all saved; to go on: "
                    f"vaekernels train --resume {self.run_dir}"
                )
        evaluation = self._evaluate()
        progress.seconds = time.perf_counter() - started
        self._log(evaluation)
        progress.next_epoch()
        self._save()
        return evaluation

    def _step(self, x: Tensor) -> None:
        self.optimizer.zero_grad()
        terms = self._forward(x, self.noise)
        loss = terms.nll + self.schedule.value * terms.kl
        # One synchronisation a step: the price of stopping before a bad step rather than after it.
        values = torch.stack([loss, terms.nll, terms.rate, terms.kl]).detach().tolist()
        names = ("loss", "nll", "rate", "kl")
        self._require_finite(dict(zip(names, values, strict=True)))
        self.fabric.backward(loss)
        norm = self.fabric.clip_gradients(
            self._forward, self.optimizer, max_norm=self.config.optim.clip_norm, error_if_nonfinite=False
        )
        if norm is not None:
            self._require_finite({"gradient norm": norm.item()})
        self.optimizer.step()
        self.schedule.step()
        sums = self.progress.sums
        sums["examples"] += len(x)
        for name, value in zip(names[1:], values[1:], strict=True):
            sums[name] += value * len(x)

    def _require_finite(self, values: dict[str, float]) -> None:
        if all(map(math.isfinite, values.values())):
            return
        progress = self.progress
        listed = ", ".join(f"{name} {value:g}" for name, value in values.items())
        raise NonFiniteError(
            f"step {progress.step + 1} (epoch {progress.epoch + 1}, batch {progress.batch + 1} of "
            f"{len(self.batches)}): {listed}. The step was not taken; {self._last_good()}. "
            f"A lower --lr or a smaller --beta is the usual remedy"
        )

    def _last_good(self) -> str:
        path = self.run_dir / CHECKPOINT
        return (
            f"the last good checkpoint is {path}" if path.exists() else "no checkpoint had been written yet"
        )

    def _evaluate(self) -> Evaluation:
        try:
            return evaluate(self.model, self.data.heldout.to(self.fabric.device))
        except NonFiniteError as error:
            raise NonFiniteError(f"after step {self.progress.step}: {error}; {self._last_good()}") from error

    def _schedule(self) -> Schedule:
        objective, device = self.config.objective, self.fabric.device
        steps = self.anneal_steps
        return (
            Linear(objective.beta, steps, device=device) if steps else Constant(objective.beta, device=device)
        )

    @property
    def anneal_steps(self) -> int:
        """Training steps over which the weight rises."""
        return math.ceil(self.config.objective.anneal_epochs * len(self.batches))

    def _start(self) -> None:
        if (self.run_dir / CHECKPOINT).exists() or (self.run_dir / CONFIG).exists():
            raise CheckpointError(
                f"{self.run_dir} already holds a run; go on with it by --resume {self.run_dir}, or give "
                f"another --run-dir"
            )
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot make {self.run_dir}: {error.strerror}") from error
        self._write(CONFIG, configs.to_json(self.config))
        self._write(LOG, "")

    def _resume(self) -> None:
        path = self.run_dir / CHECKPOINT
        state = checkpoint.load(self.fabric, path)
        trained_on = str(state.get("data"))
        if trained_on != self.data.sha256:
            raise CheckpointError(
                f"{path} was trained on other {self.data.name} data (sha256 {trained_on[:12]}, here "
                f"{self.data.sha256[:12]}): docstrings, for one, differ between versions of Python"
            )
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.progress = Progress(**state["progress"])
            same_noise = checkpoint.restore_random_state(state["random"], self.noise)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} does not fit {self.run_dir / CONFIG}: {error}") from error
        if not same_noise:
            self.noise.manual_seed(self.config.engine.seed + self.progress.step)
            self.console.print(
                "the run began on another kind of device: the noise of z goes on from a new seed"
            )
        self._write(CONFIG, configs.to_json(self.config))
        self._trim_log()

    def _save(self) -> None:
        state = {
            "model": self.model,
            "optimizer": self.optimizer,
            "schedule": self.schedule.state_dict(),
            "progress": {f.name: getattr(self.progress, f.name) for f in fields(self.progress)},
            "random": checkpoint.random_state(self.noise),
            "data": self.data.sha256,
        }
        checkpoint.save(self.fabric, self.run_dir / CHECKPOINT, state)

    def _log(self, evaluation: Evaluation) -> None:
        progress = self.progress
        weight = self.schedule.value.item()
        line = {
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "weight": weight,
            "train": {name: progress.mean(name) for name in ("nll", "rate", "kl")},
            "heldout": evaluation.to_json(),
            "seconds": round(progress.seconds, 3),
        }
        try:
            with open(self.run_dir / LOG, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise CheckpointError(f"cannot write {self.run_dir / LOG}: {error.strerror}") from error
        epoch, epochs = progress.epoch + 1, self.config.optim.epochs
        if epoch == epochs or epoch % math.ceil(epochs / _EPOCH_LINES) == 0:
            self.console.print(display.epoch_line(epoch, epochs, weight, evaluation), highlight=False)

    def _trim_log(self) -> None:
        """Drop lines written after the checkpoint, by a run that was killed between the two."""
        path = self.run_dir / LOG
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept: list[str] = []
        for line in lines:
            try:
                if json.loads(line)["epoch"] <= self.progress.epoch:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue  # the last line of a run that was killed while it wrote
        self._write(LOG, "".join(line + "\n" for line in kept))

    def _metrics(self, evaluation: Evaluation) -> dict[str, Any]:
        objective = self.config.objective
        data = self.data
        return {
            "schema": 1,
            "settings": {
                **asdict(self.config),
                "effective_beta": objective.beta,
                "anneal_steps": self.anneal_steps,
            },
            "data": {
                "name": data.name,
                "sha256": data.sha256,
                "train": len(data.train),
                "heldout": len(data.heldout),
            },
            "heldout": evaluation.to_json(),
            "steps": self.progress.step,
            "seconds": round(self.progress.seconds, 3),
            "torch": torch.__version__,
        }

    def _write(self, name: str, text: str) -> None:
        try:
            checkpoint.write_atomically(self.run_dir / name, text)
        except OSError as error:
            raise CheckpointError(f"cannot write {self.run_dir / name}: {error.strerror}") from error

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Ctrl-C stops after the step under way, so that no state is half changed; a second one stops at
        once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def on_interrupt(signum: int, frame: object) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self.request_stop()

        previous = signal.signal(signal.SIGINT, on_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


def _fabric(config: Config) -> Fabric:
    device = config.engine.device
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device, True):
        raise ConfigError(
            f"--device {device}: torch {torch.__version__} sees no such device here; use cpu or auto"
        )
    return Fabric(accelerator=device, devices=1, precision=config.engine.precision)
