"""CollapseMonitor in PyTorch Lightning: what it logs, when it warns, what it leaves alone."""

from __future__ import annotations

import warnings

import pytest
import torch
from libraries import need, run_example

need("lightning.pytorch")

from digits_vae import LATENT, DigitsVAE, digits
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from vaekernels.collapse import CollapseWarning
from vaekernels.integrations.lightning import CollapseMonitor

EPOCH = 88  # batches of 16 from 1397 digits


class Module(LightningModule):
    def __init__(self, beta: float) -> None:
        super().__init__()
        self.vae = DigitsVAE(beta)
        self.dropout = torch.nn.Dropout(0.1)

    def encode(self, x):
        return self.vae.encode(self.dropout(x))

    def log_likelihood(self, x, z):
        return self.vae.log_likelihood(x, z)

    def training_step(self, batch, index):
        return self.vae.loss(batch[0])

    def validation_step(self, batch, index):
        return self.vae.loss(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def fit(beta, monitor, *, seed=0, epochs=3, logger=False, module=None, ckpt=None, **options):
    train, heldout = digits()
    torch.manual_seed(seed)
    module = module or Module(beta)
    loaders = (
        DataLoader(TensorDataset(train), 16, shuffle=True, generator=torch.Generator().manual_seed(seed)),
        DataLoader(TensorDataset(heldout), 64),
    )
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=monitor,
        accelerator="cpu",
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False} | options,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*num_workers.*|.*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
        trainer.fit(module, *loaders, ckpt_path=ckpt)
    return trainer, module


@pytest.mark.parametrize("seed", range(3))
def test_a_collapsing_run_is_flagged_before_epoch_three_once(seed):
    monitor = CollapseMonitor(every_n_steps=10, grace_steps=100, n=256)
    with pytest.warns(CollapseWarning, match="no information since step") as caught:
        fit(8.0, monitor, seed=seed)
    assert len([w for w in caught if w.category is CollapseWarning]) == 1
    assert monitor.monitor.collapsed_at <= 2 * EPOCH
    assert len(monitor.monitor.history) == 3 * EPOCH // 10


@pytest.mark.parametrize("seed", range(3))
def test_a_healthy_run_is_not(seed):
    monitor = CollapseMonitor(every_n_steps=10, grace_steps=100, n=256)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CollapseWarning)
        fit(1.0, monitor, seed=seed)
    last = monitor.monitor.history[-1]
    assert monitor.monitor.collapsed_at is None and last.mi_lower.low > 0.5 and last.shuffle_gap.low > 1.0


def test_what_is_logged(tmp_path):
    monitor = CollapseMonitor(every_n_steps=20, grace_steps=1000)
    fit(1.0, monitor, epochs=1, logger=CSVLogger(tmp_path), log_every_n_steps=7)
    rows = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    names = set(rows[0].split(","))
    expected = {"rate", "active_units", "mi_lower", "mi_upper", "shuffle_gap"}
    expected |= {f"rate/{d}" for d in range(LATENT)}
    assert {f"latent/{name}" for name in expected} <= names
    steps = [int(row.split(",")[rows[0].split(",").index("step")]) for row in rows[1:]]
    assert {20, 40, 60, 80} <= set(steps)


def test_the_training_is_the_same_with_it_and_without():
    weights = []
    for callbacks in ([], [CollapseMonitor(every_n_steps=5, grace_steps=1000, n=64)]):
        _, module = fit(1.0, callbacks, epochs=1, limit_train_batches=20)
        weights.append([p.detach().clone() for p in module.parameters()])
    for a, b in zip(*weights, strict=True):
        assert torch.equal(a, b)
    assert module.training and module.dropout.training


def test_accumulated_gradients_count_as_one_step():
    monitor = CollapseMonitor(every_n_steps=5, grace_steps=1000, n=64)
    fit(1.0, monitor, epochs=1, accumulate_grad_batches=4)
    assert [reading.step for reading in monitor.monitor.history] == [5, 10, 15, 20]


def test_a_checkpoint_carries_the_history_on(tmp_path):
    monitor = CollapseMonitor(every_n_steps=10, grace_steps=50, n=64)
    with pytest.warns(CollapseWarning):
        trainer, _ = fit(8.0, monitor, epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = CollapseMonitor(every_n_steps=10, grace_steps=50, n=64)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CollapseWarning)
        fit(8.0, resumed, epochs=2, ckpt=tmp_path / "a.ckpt")
    assert resumed.monitor.history[: len(monitor.monitor.history)] == monitor.monitor.history
    assert resumed.monitor.collapsed_at == monitor.monitor.collapsed_at
    assert [reading.step for reading in resumed.monitor.history] == list(range(10, 2 * EPOCH, 10))


def test_two_monitors_each_have_their_readings_in_a_checkpoint(tmp_path):
    def monitors():
        return [
            CollapseMonitor(every_n_steps=20, grace_steps=1000, n=64, prefix="top/"),
            CollapseMonitor(every_n_steps=40, grace_steps=1000, n=64, prefix="bottom/"),
        ]

    first, again = monitors(), monitors()
    trainer, _ = fit(1.0, first, epochs=1, limit_train_batches=40)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    fit(1.0, again, epochs=2, limit_train_batches=40, ckpt=tmp_path / "a.ckpt")
    for monitor, resumed, steps in zip(first, again, ([20, 40, 60, 80], [40, 80]), strict=True):
        assert [reading.step for reading in resumed.monitor.history] == steps
        assert resumed.monitor.history[: len(steps) // 2] == monitor.monitor.history


@pytest.mark.parametrize("sanity", [0, 2])
def test_the_first_validation_may_be_later_than_the_first_epoch(sanity):
    monitor = CollapseMonitor(every_n_steps=10, grace_steps=1000, n=64)
    fit(
        1.0,
        monitor,
        epochs=2,
        limit_train_batches=10,
        num_sanity_val_steps=sanity,
        check_val_every_n_epoch=2,
    )
    assert [reading.step for reading in monitor.monitor.history] == [10, 20]


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true", "bf16-mixed", "32-true"])
def test_every_precision_of_the_trainer(precision):
    dtypes = set()

    class Watched(Module):
        def encode(self, x):
            dtypes.add((x.dtype, torch.zeros(()).dtype))
            return super().encode(x)

        def configure_optimizers(self):  # Adam's epsilon is 0 in float16
            return torch.optim.SGD(self.parameters(), lr=1e-5)

    monitor = CollapseMonitor(every_n_steps=5, grace_steps=1000, n=64)
    fit(1.0, monitor, epochs=1, limit_train_batches=5, module=Watched(1.0), precision=precision)
    (reading,) = monitor.monitor.history
    assert reading.shuffle_gap is not None and monitor.monitor.ignored == 0
    of = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
    assert dtypes == {(of.get(precision, torch.float32),) * 2}
    assert torch.get_default_dtype() is torch.float32


def test_modules_that_do_not_fit():
    class Bare(Module):
        encode = None

    with pytest.raises(AttributeError, match="Bare has no method 'encode'; give CollapseMonitor encode="):
        fit(1.0, CollapseMonitor(), module=Bare(1.0))
    with pytest.raises(AttributeError, match="log_likelihood must be a function or the name of a method"):
        fit(1.0, CollapseMonitor(log_likelihood="typo"))
    with pytest.raises(ValueError, match="every_n_steps must be an int of at least 1, got 0"):
        fit(1.0, CollapseMonitor(every_n_steps=0))
    assert issubclass(CollapseMonitor, Callback)


def test_without_a_likelihood_or_validation_data():
    train, heldout = digits()
    monitor = CollapseMonitor(heldout, log_likelihood=None, encode="encode", every_n_steps=10, n=64)
    fit(1.0, monitor, epochs=1, limit_val_batches=0)
    assert monitor.monitor.history and monitor.monitor.history[0].shuffle_gap is None
    with pytest.raises(ValueError, match="heldout must be given where the trainer has no validation data"):
        trainer = Trainer(callbacks=[CollapseMonitor()], accelerator="cpu", logger=False, max_steps=1)
        trainer.fit(Module(1.0), DataLoader(TensorDataset(train), 16))


def test_the_example():
    assert "collapsed at step" in run_example("lightning_monitor.py")
