"""The training loop: one class whose state is what a checkpoint holds. Read it from the top: ``fit`` is the
run, ``_epoch`` an epoch of it, ``update`` a step."""

from __future__ import annotations

import json
import math
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from filelock import FileLock
from rich.console import Console
from torch import Tensor

from vaekernels.collapse import CollapseWarning
from vaekernels.training import (
    checkpoint,
    closing,
    display,
    engine,
    models,
    nonfinite,
    objectives,
    strategies,
)
from vaekernels.training import data as datasets
from vaekernels.training.config import Config, combinations, settings
from vaekernels.training.data import Batches, Data
from vaekernels.training.errors import ConfigError, Interrupted, NonFiniteError
from vaekernels.training.evaluate import Evaluation, evaluate, monitor
from vaekernels.training.interrupts import stop_requests
from vaekernels.training.latents import ELBO, Terms
from vaekernels.training.logs import Log
from vaekernels.training.models import VAE
from vaekernels.training.objectives import Objective, Task
from vaekernels.training.progress import Progress, Step
from vaekernels.training.run import RunFolder
from vaekernels.training.seeds import derive, seed_defaults
from vaekernels.training.strategies import Part

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["Trainer"]

_EPOCH_LINES = 20  # at most, on the terminal; the log has every epoch


class Trainer:
    """Trains one model on one data set and keeps everything of the run in ``run_dir``, see
    :class:`vaekernels.training.run.RunFolder`.

    A run that is interrupted and resumed takes the same steps as one that is not, bit for bit on the CPU with
    the same number of threads.
    """

    def __init__(
        self,
        config: Config,
        data: Data,
        run_dir: Path,
        console: Console,
        *,
        resume: bool = False,
        fabric: Fabric | None = None,
    ) -> None:
        combinations.check(config)
        config = replace(config, data=datasets.located(config.data))
        self.config = config = combinations.resolve(config, data)
        self.data = data
        self.folder = RunFolder(run_dir)
        self.progress = Progress()
        self._stop = False
        self._lock: FileLock | None = None  # of the folder, in the first process

        # where it runs, and what is random
        self.fabric = fabric or engine.launch(config.engine)
        self.console = console if self.fabric.is_global_zero else display.console(quiet=True)
        seed, rank, device = config.engine.seed, self.fabric.global_rank, self.fabric.device
        torch.manual_seed(seed)
        self.model: VAE = models.build(config.model, data)
        seed_defaults(derive(seed, "process", rank))
        self.noise = torch.Generator(device=device).manual_seed(derive(seed, "noise", rank))

        # what is minimised, on what, when
        self.batches = Batches(data, batch_size=config.optim.batch_size, seed=seed)
        self.task = replace(
            Task.of(config, data, self.model.latent_dim),
            device=device,
            process_group=engine.process_group(self.fabric),
        )
        # that of the last epoch: a strategy may begin with another one
        self._objective = objectives.build(config.objective, self.task)
        self.strategy = strategies.build(config.strategy, self._objective, seed=seed)
        self.elbo = ELBO(self.model, self._objective.options)
        optimizer = torch.optim.Adam(
            (p for p in self.model.parameters() if p.requires_grad), lr=config.optim.lr
        )
        self._forward, self.optimizer = self.fabric.setup(self.elbo, optimizer)

        # what is measured and written down
        self.monitor = monitor(
            self.model, data.heldout, steps=config.optim.epochs * len(self.batches), device=device
        )
        self._sigmas: list[float] = []  # learned, before and after the last epoch
        self.log = Log(self.folder.log, self.fabric, tensorboard=config.engine.tensorboard)
        try:
            engine.once(self.fabric, self._hold if resume else self._create)
            if resume:
                self._resume()
            else:
                self.log.start()
        except BaseException:
            self._release()
            raise

    @property
    def finished(self) -> bool:
        """Whether all epochs are trained."""
        return self.progress.epoch >= self.config.optim.epochs

    # --- the loop

    def fit(self) -> Evaluation:
        """Train to the last epoch, evaluate, write ``metrics.json``. Then, whatever happened, other processes
        may go on with the run.

        Interrupted after Ctrl-C, with all saved; NonFiniteError when a loss, a gradient or the evaluation is
        NaN or inf, with the last good checkpoint kept; CheckpointError when something cannot be written.
        """
        try:
            return self._fit()
        finally:
            self._release()

    def _fit(self) -> Evaluation:
        epochs = self.config.optim.epochs
        evaluation: Evaluation | None = None
        steps = epochs * len(self.batches)
        with (
            stop_requests(self.request_stop),
            display.progress_bar(self.console, epochs=epochs, steps=steps, done=self.progress.step) as bar,
        ):
            while not self.finished:
                evaluation = self._epoch(bar)
        evaluation = evaluation or self._evaluate()
        self.log.close()
        if self.fabric.is_global_zero:
            text = json.dumps(self._metrics(evaluation), indent=2) + "\n"
            checkpoint.write_text(self.folder.metrics, text)
        return evaluation

    def _epoch(self, bar: display.Bar) -> Evaluation:
        progress, strategy = self.progress, self.strategy
        started = time.perf_counter() - progress.seconds
        self._sigmas = self._sigma()
        self.elbo.train()
        if progress.batch == 0:
            self._say(strategy.start_epoch(progress.epoch, self.model, self.optimizer.optimizer))
        for batch in self.batches.order(progress.epoch)[progress.batch :]:
            strategy.before_step(self.update, self.batches)
            step = self.update(batch, strategy.trained)
            progress.count(step, len(batch))
            progress.seconds = time.perf_counter() - started
            self._after_step(step, bar)
        self._sigmas += self._sigma()
        evaluation = self._evaluate()
        progress.seconds = time.perf_counter() - started
        self._say(strategy.end_epoch(evaluation.mi_lower.value))
        line = self._log_epoch(evaluation)
        progress.next_epoch()
        self._save()
        self._say(line)  # last: a standard output that was closed costs nothing that is not saved
        return evaluation

    def update(self, batch: Tensor, trained: Part) -> Step:
        """One step on the examples ``batch`` (indices) that changes the part ``trained`` of the model.
        Schedules advance in the steps that change the decoder: an encoder's own are part of one of those."""
        objective = self.objective
        # In order: in the parts of the KL an example stands for those that the batch does not have.
        rows = torch.tensor_split(batch, self.fabric.world_size)[self.fabric.global_rank]
        x = self.batches.take(rows).to(self.fabric.device)

        self.optimizer.zero_grad()
        terms: Terms = self._forward(x, len(batch) / self.fabric.world_size, self.noise)
        loss = objective.loss(terms)
        means = self._means(loss, terms)
        *values, stop = means.tolist()
        step = Step._make((*values, stop > 0))
        if not all(map(math.isfinite, values)):
            own = nonfinite.blame_terms(self.model, terms, objective.weight, rows)
            self._refuse(f"loss {step.loss:g}, NLL {step.nll:g}, rate {step.rate:g}", nonfinite.largest(own))

        self.fabric.backward(loss)
        if trained != "all":
            frozen = self.model.decoder if trained == "encoder" else self.model.encoder
            for parameter in frozen.parameters():
                parameter.grad = None  # Adam passes over it, its averages untouched
        norm = self.fabric.clip_gradients(
            self._forward, self.optimizer, max_norm=self.config.optim.clip_norm, error_if_nonfinite=False
        )
        if norm is not None and not bool(norm.isfinite()):
            self._refuse(f"gradient norm {norm.item():g}", nonfinite.blame_gradients(self.model))
        self.optimizer.step()
        if trained != "encoder":
            objective.step(means[1], means[2])
        return step

    @property
    def objective(self) -> Objective:
        """What is minimised now."""
        return self.strategy.objective(self.progress.epoch)

    def _means(self, loss: Tensor, terms: Terms) -> Tensor:
        """loss, NLL, rate, KL, weight and the wish to stop, over all processes: one collective, and one
        synchronisation a step, the price of stopping before a bad step rather than after it."""
        objective = self.objective
        stop = torch.full_like(loss, self._stop)
        values = [loss, terms.nll, terms.rate.sum(), objective.kl(terms), objective.weight, stop]
        means = torch.stack(values).detach()
        if self.fabric.world_size > 1:
            self.fabric.all_reduce(means)  # in place
        return means

    def _after_step(self, step: Step, bar: display.Bar) -> None:
        progress, every = self.progress, self.config.engine
        means = {name: progress.mean(name) for name in ("rate", "nll")}
        bar.update(epoch=progress.epoch, step=progress.step, weight=step.weight, **means)
        if progress.step % every.log_steps == 0:
            values = {"epoch": progress.epoch + 1, **step._asdict()}
            del values["stop"]
            self.log.write("step", progress.step, values)
        if step.stop:
            self._save()
            self.log.close()
            raise Interrupted(
                f"stopped at step {progress.step}, all saved; to go on: "
                f"vaekernels train --resume {self.folder.path}"
            )
        if every.checkpoint_steps and progress.step % every.checkpoint_steps == 0:
            self._save()

    def request_stop(self) -> None:
        """Save and raise Interrupted after the step that is under way, or the next one."""
        self._stop = True

    # --- what is measured and said

    def closing(self) -> list[str]:
        """After :meth:`fit`: the verdict in a line, and what to do now, as commands."""
        return closing.lines(self.monitor.history, self._sigmas, self.config, self.folder.path)

    def _sigma(self) -> list[float]:
        """That of a Gaussian likelihood that learns it."""
        likelihood = getattr(self.model.decoder, "likelihood", None)
        if isinstance(likelihood, models.Gaussian) and likelihood.fixed is None:
            return [likelihood.log_sigma.exp().item()]
        return []

    def _evaluate(self) -> Evaluation:
        step = self.progress.step
        try:
            evaluation, reading = evaluate(self.model, self.monitor, step)
        except NonFiniteError as error:
            raise NonFiniteError(f"after step {step}: {error}; {self._last_good()}") from error
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", CollapseWarning)
            self.monitor.record(reading)
        for warning in caught:
            self._say(f"warning: {warning.message}", style="yellow")
        return evaluation

    def _log_epoch(self, evaluation: Evaluation) -> str | None:
        """What to print of the epoch, if this is one to print."""
        progress = self.progress
        epoch, epochs = progress.epoch + 1, self.config.optim.epochs
        weight = self.objective.weight.item()
        values = {
            "epoch": epoch,
            "weight": weight,
            "train": {name: progress.mean(name) for name in ("nll", "rate", "kl")},
            "heldout": evaluation.to_json(),
            "seconds": round(progress.seconds, 3),
            "mi_seconds": round(self.monitor.mi_seconds, 6),
        }
        self.log.write("epoch", progress.step, values)
        if epoch == epochs or epoch % math.ceil(epochs / _EPOCH_LINES) == 0:
            return display.epoch_line(epoch, epochs, weight, evaluation)
        return None

    def _metrics(self, evaluation: Evaluation) -> dict[str, Any]:
        data = self.data
        return {
            "schema": 2,
            "settings": asdict(self.config),
            "effective_beta": self.objective.weight.item(),
            "data": {
                "name": data.name,
                "sha256": data.sha256,
                "train": len(data.train),
                "heldout": len(data.heldout),
            },
            "heldout": evaluation.to_json(),
            "steps": self.progress.step,
            "seconds": round(self.progress.seconds, 3),
            "mi_seconds": round(self.monitor.mi_seconds, 6),
            "torch": torch.__version__,
        }

    def _say(self, text: str | None, style: str | None = None) -> None:
        if text is not None:
            self.console.print(text, style=style, highlight=False)

    def _refuse(self, seen: str, offender: nonfinite.Offender) -> NoReturn:
        progress = self.progress
        raise NonFiniteError(
            f"step {progress.step + 1} (epoch {progress.epoch + 1}, batch {progress.batch + 1} of "
            f"{len(self.batches)}): {seen}; largest offender: {offender.text}. The step was not taken; "
            f"{self._last_good()}. A lower --lr or a smaller --beta is the usual remedy"
        )

    def _last_good(self) -> str:
        path = self.folder.checkpoint
        return (
            f"the last good checkpoint is {path}" if path.exists() else "no checkpoint had been written yet"
        )

    # --- what is kept

    def _save(self) -> None:
        state = {
            "model": self.model,
            "latents": self.elbo.latents.state_dict(),
            "optimizer": self.optimizer,
            "schedules": self._objective.state_dict(),
            "strategy": self.strategy.state_dict(),
            "monitor": self.monitor.state_dict(),
            "progress": self.progress.state_dict(),
            "random": checkpoint.random_states(self.fabric, self.noise),
            "data": self.data.sha256,
            "meaning": self.data.meaning(),
            "config": settings.to_toml(self.config),
        }
        checkpoint.save(self.fabric, self.folder.checkpoint, state)

    def _resume(self) -> None:
        path = self.folder.checkpoint
        state = checkpoint.load(path)
        checkpoint.require_same_data(state, path, self.data)
        try:
            self.folder.require_same(settings.from_toml(state["config"]), self.config)
            self.model.load_state_dict(state["model"])
            self.elbo.latents.load_state_dict(state["latents"])
            self.optimizer.load_state_dict(state["optimizer"])
            self._objective.load_state_dict(state["schedules"])
            self.strategy.load_state_dict(state["strategy"])
            self.monitor.load_state_dict(state["monitor"])
            self.progress = Progress.of(state["progress"])
            same_noise = checkpoint.restore_random_states(self.fabric, state["random"], self.noise)
        except ConfigError:
            raise
        except Exception as error:  # a dozen types, for what is not of the type that it should be
            raise checkpoint.misfit(path, self.folder.config, error) from error
        if self.progress.epoch > self.config.optim.epochs:
            raise ConfigError(
                f"the run in {self.folder.path} has trained {self.progress.epoch} epochs, epochs is "
                f"{self.config.optim.epochs}: a trained epoch cannot be taken back, so start a new run"
            )
        if not same_noise:
            seed, rank = self.config.engine.seed, self.fabric.global_rank
            self.noise.manual_seed(derive(seed, "noise", rank, path.name, self.progress.step))
            self.console.print(
                "the run began on another kind of device or with another number of processes: the noise of z "
                "goes on from new seeds"
            )
        if self.fabric.is_global_zero:
            self.folder.write_config(self.config)
        self.log.resume(self.progress.step, self.progress.epoch)

    def _create(self) -> None:
        self._lock = self.folder.create()
        self.folder.write_config(self.config)

    def _hold(self) -> None:
        self._lock = self.folder.hold()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
