"""`CollapseMonitor` as a callback of PyTorch Lightning::

    Trainer(callbacks=[CollapseMonitor()]).fit(module, train_loader, validation_loader)

It needs ``lightning`` or ``pytorch_lightning``.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

import torch

from vaekernels.collapse import monitor
from vaekernels.collapse.examples import Examples

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    # `lightning` has a Callback and `pytorch_lightning` another: the one whose trainer is in use.
    _names = ["lightning.pytorch", "pytorch_lightning"]
    if _names[1] in sys.modules and _names[0] not in sys.modules:
        _names.reverse()
    try:
        Callback = importlib.import_module(_names[0]).Callback
    except ModuleNotFoundError:
        Callback = importlib.import_module(_names[1]).Callback

__all__ = ["CollapseMonitor"]


class CollapseMonitor(Callback):
    """Measures the latent every n training steps, logs it, and warns once when collapse starts.

    Logged to every logger of the trainer, in nats, each under `prefix`: rate, rate/0 ... (one per dimension),
    active_units, mi_lower, mi_upper and shuffle_gap (see `vaekernels.collapse.Reading`). A reading that is
    NaN or inf somewhere is not logged. The warning is a `vaekernels.collapse.CollapseWarning`. Steps are
    those of the optimizer. Under several processes rank 0 measures, on the module itself, so nothing waits
    for another rank. Where the trainer's precision is a dtype (bf16-true, 16-true, 64-true), examples go to
    the functions in that dtype, as batches do; under mixed precision they are evaluated in float32.

    Args:
        heldout: examples that are not trained on, as in `vaekernels.collapse.CollapseMonitor`. None: the
            first `n` of the trainer's validation batches; of a batch that is a tuple or a list the first
            entry.
        encode, log_likelihood: functions, or names of methods of the module: x -> (mu, logvar), [B, D] each,
            and (x, z) -> log p(x|z), [B]. A module without `log_likelihood` has no shuffled-z gap.
        every_n_steps, n, patience, grace_steps, seed: as in `vaekernels.collapse.CollapseMonitor`.
        prefix: of the names in the log, and of the key under which a checkpoint keeps the readings: several
            monitors of one trainer each need their own.

    `monitor` is the `vaekernels.collapse.CollapseMonitor`, from the start of `fit` on. Its readings are in
    the trainer's checkpoints.
    """

    def __init__(
        self,
        heldout: Any = None,
        *,
        encode: Any = "encode",
        log_likelihood: Any = "log_likelihood",
        every_n_steps: int = 100,
        n: int = 512,
        patience: int = 3,
        grace_steps: int = 200,
        seed: int = 0,
        prefix: str = "latent/",
    ) -> None:
        super().__init__()
        self.heldout, self.encode, self.log_likelihood = heldout, encode, log_likelihood
        self.options = {
            "every_n_steps": every_n_steps,
            "n": n,
            "patience": patience,
            "grace_steps": grace_steps,
            "seed": seed,
        }
        self.prefix = prefix
        self.monitor: monitor.CollapseMonitor | None = None
        self._loaded: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        key: str = self._generate_state_key(prefix=self.prefix)
        return key

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        encode = _function(pl_module, "encode", self.encode)
        if encode is None:
            raise AttributeError(
                f"{type(pl_module).__name__} has no method {self.encode!r}; give CollapseMonitor encode=, a "
                "function x -> (mu, logvar) or the name of such a method"
            )
        if self.heldout is None and trainer.val_dataloaders is None and trainer.enable_validation:
            # Lightning makes the loaders just before the first validation, which may be epochs away. Every
            # rank has to take part.
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
            trainer.training = True
        if not trainer.is_global_zero:
            return
        heldout = _validation(trainer, self.options["n"]) if self.heldout is None else self.heldout
        log_likelihood = _function(pl_module, "log_likelihood", self.log_likelihood)
        self.monitor = monitor.CollapseMonitor(
            _in_precision(trainer, encode),
            heldout,
            None if log_likelihood is None else _in_precision(trainer, log_likelihood),
            modules=[pl_module],
            device=pl_module.device,
            **self.options,
        )
        self.monitor.steps = trainer.global_step
        if self._loaded is not None:
            self.monitor.load_state_dict(self._loaded)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # With accumulated gradients several batches make one step.
        if self.monitor is None or trainer.global_step <= self.monitor.steps:
            return
        self.monitor.steps = trainer.global_step
        if trainer.global_step % self.monitor.every_n_steps == 0:
            reading = self.monitor.read(trainer.global_step)
            if reading is None:
                return
            values = {self.prefix + name: value for name, value in reading.metrics().items()}
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.monitor is None else self.monitor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict or None


def _function(module: LightningModule, name: str, given: Any) -> Any:
    """The function, or the module's method of that name; None where it has none of the default name."""
    if not isinstance(given, str):
        return given
    found = getattr(module, given, None)
    if found is None and given != name:
        raise AttributeError(f"{name} must be a function or the name of a method, got {given!r}")
    return found


def _in_precision(trainer: Trainer, function: Any) -> Any:
    """The function, given floating tensors in the trainer's dtype, where its precision is one."""
    precision = trainer.precision_plugin

    def converted(*arguments: Any) -> Any:
        with precision.tensor_init_context():
            return function(*precision.convert_input(arguments))

    return converted


def _validation(trainer: Trainer, n: int) -> Examples:
    """The first `n` examples that the validation loader gives."""
    loaders = trainer.val_dataloaders
    if isinstance(loaders, (list, tuple)):
        loaders = loaders[0] if loaders else None
    if loaders is None:
        raise ValueError(
            "heldout must be given where the trainer has no validation data: "
            "CollapseMonitor(heldout=examples that are not trained on)"
        )
    parts: list[torch.Tensor] = []
    with torch.random.fork_rng(devices=[]):  # to begin on a loader takes a number from the default generator
        batches = iter(loaders)
    for batch in batches:
        x = batch[0] if isinstance(batch, (list, tuple)) else batch
        if not isinstance(x, torch.Tensor):
            raise TypeError(
                f"heldout must be given where validation batches hold no tensor first, got {type(x).__name__}"
            )
        parts.append(x.detach().cpu())
        if sum(map(len, parts)) >= n:
            break
    return torch.cat(parts)[:n]
