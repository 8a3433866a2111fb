"""Watches the latent while a model trains, and says when collapse starts::

    monitor = CollapseMonitor(encode, heldout, log_likelihood, modules=[model])
    for x in loader:
        ...
        optimizer.step()
        if (reading := monitor.step()) is not None:
            writer.add_scalars("latent", reading.metrics(), reading.step)

`vaekernels.integrations.lightning.CollapseMonitor` is this as a callback of PyTorch Lightning.
:func:`vaekernels.collapse.diagnose` measures more, once, on a model that is trained.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vaekernels import _native
from vaekernels._checks import whole_number
from vaekernels.collapse import metrics
from vaekernels.collapse.decoder import Codes
from vaekernels.collapse.estimate import Bootstrap, Estimate, along_cycle
from vaekernels.collapse.examples import Encode, LogLikelihood, select
from vaekernels.collapse.information import mi_bounds
from vaekernels.collapse.model import BATCH, Model, NotFiniteError, require_finite

__all__ = ["CollapseMonitor", "CollapseWarning", "Reading"]

EPSILON = 0.1
"""Nats of information below which z counts as empty, as in the verdicts of `diagnose`."""
_RESAMPLES = 200
_COMPARED = 2048  # examples, every pair of which is looked at for the information
_GROWTH = 1.5  # over `patience` readings; a latent that wakes up grows faster


class CollapseWarning(UserWarning):
    """The latent has stopped carrying information; the message says since when, and what helps."""


@dataclass(frozen=True)
class Reading:
    """What was measured after `step` training steps, in nats."""

    step: int
    rate_per_dim: tuple[float, ...]
    """r_d, the rate of each dimension, which is its unclamped KL to the prior in nats"""
    active_units: int
    """dimensions with Var_x(mu_d) > 0.01 (Burda et al. 2016)"""
    mi_lower: Estimate
    mi_upper: Estimate
    """bounds on I(x; z), see `information.mi_bounds`"""
    shuffle_gap: Estimate | None
    """mean NLL with another example's z, less that with its own; None without `log_likelihood`"""
    nll: float | None
    """mean NLL with the example's own z, one sample; None without `log_likelihood`"""
    mu_variance_per_dim: tuple[float, ...]
    """Var_x(mu_d) of each dimension"""

    @property
    def empty(self) -> bool:
        """Whether z tells nothing of x and the decoder does not use it, by upper ends below 0.1 nat."""
        unused = self.shuffle_gap is None or self.shuffle_gap.high < EPSILON
        return self.mi_upper.high < EPSILON and unused

    def metrics(self) -> dict[str, float]:
        """For a logger: rate, rate/0 ..., active_units, mi_lower, mi_upper, shuffle_gap."""
        values = {"rate": sum(self.rate_per_dim)}
        values |= {f"rate/{d}": rate for d, rate in enumerate(self.rate_per_dim)}
        values |= {
            "active_units": float(self.active_units),
            "mi_lower": self.mi_lower.value,
            "mi_upper": self.mi_upper.value,
        }
        return values if self.shuffle_gap is None else values | {"shuffle_gap": self.shuffle_gap.value}


class CollapseMonitor:
    """Measures the latent every n training steps and warns, once, when collapse starts.

    Collapse starts where `patience` readings in a row, after `grace_steps`, find an empty latent whose
    information does not grow: a model that has just begun is empty too, and a healthy one leaves that state.
    The rate has no part in it: free bits keep the rate of an empty latent up.

    Measuring leaves training as it is: modules are put into eval mode and back, there is no gradient, and
    random numbers come from a generator of its own. One reading of 512 examples and 16 dimensions takes about
    as long as 512 examples in the model and a twentieth of a second.

    Args:
        encode: x -> (mu, logvar), [B, D] each.
        heldout: examples that are not trained on: a tensor, a tuple of tensors or a Dataset, examples along
            the first axis.
        log_likelihood: (x, z) -> log p(x|z), [B], in nats. None: no shuffled-z gap, and the verdict is that
            of the encoder alone.
        every_n_steps: training steps from one reading to the next.
        n: at most so many of the examples, chosen once. The information is that of at most 2048 of them.
        patience: empty readings in a row that make a collapse.
        grace_steps: training steps that every model may take to start using z. With a small learning rate or
            a slow warm-up of it they are more.
        modules: what to put into eval mode meanwhile.
        device: where examples go before they reach the functions; None: where they are.
        seed: of the choice of examples, and of the noise, which is the same in every reading.

    `history` holds all readings, `collapsed_at` the step of the warning or None, `ignored` how many readings
    were NaN or inf somewhere: those are no part of the history, and the first of them gives a RuntimeWarning.
    `mi_seconds` is the time that the bounds on I(x; z) took, in all readings. All four are in `state_dict`.
    """

    def __init__(
        self,
        encode: Encode,
        heldout: Any,
        log_likelihood: LogLikelihood | None = None,
        *,
        every_n_steps: int = 100,
        n: int = 512,
        patience: int = 3,
        grace_steps: int = 200,
        modules: Sequence[nn.Module] = (),
        device: torch.device | str | None = None,
        batch_size: int = BATCH,
        seed: int = 0,
    ) -> None:
        self.every_n_steps = _at_least("every_n_steps", every_n_steps, 1)
        self.patience = _at_least("patience", patience, 2)
        self.grace_steps = _at_least("grace_steps", grace_steps, 0)
        n = _at_least("n", n, 4)
        self.encode, self.log_likelihood = encode, log_likelihood
        self.seed = seed
        self.modules, self.device, self.batch_size = list(modules), device, batch_size
        self.heldout = select("heldout", heldout, n, torch.Generator().manual_seed(seed))
        self.steps = 0
        self.history: list[Reading] = []
        self.collapsed_at: int | None = None
        self.ignored = 0
        self.mi_seconds = 0.0

    def step(self) -> Reading | None:
        """Count one training step; the reading where one was due and is finite. Warns with
        `CollapseWarning`, once."""
        self.steps += 1
        return self.read(self.steps) if self.steps % self.every_n_steps == 0 else None

    def read(self, step: int) -> Reading | None:
        """Measure now, and take the reading into account. None, and one more in `ignored`, where it is not
        finite."""
        try:
            reading = self.measure(step)
        except NotFiniteError as error:
            self.ignored += 1
            if self.ignored == 1:
                warnings.warn(
                    f"the latent was not measured at step {step}: {error}. Such readings are ignored and "
                    "counted in `ignored`; this is said once",
                    RuntimeWarning,
                    stacklevel=_native._depth_of_caller(),
                )
            return None
        self.record(reading)
        return reading

    def measure(self, step: int) -> Reading:
        """Measure now, for a loop that has its own way with what is not finite: no part of the history.
        NotFiniteError, a ValueError, where something is NaN or inf."""
        with torch.no_grad(), _in_eval_mode(self.modules):
            return self._measure(step)

    def record(self, reading: Reading) -> None:
        """Take a reading into the history. Warns with `CollapseWarning`, once."""
        self.history.append(reading)
        if self.collapsed_at is None and self._collapses():
            self.collapsed_at = reading.step
            warnings.warn(self._message(), CollapseWarning, stacklevel=_native._depth_of_caller())

    def state_dict(self) -> dict[str, Any]:
        """Numbers and lists of numbers, for any checkpoint."""
        return {
            "steps": self.steps,
            "collapsed_at": self.collapsed_at,
            "ignored": self.ignored,
            "mi_seconds": self.mi_seconds,
            "history": [_packed(reading) for reading in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.collapsed_at = state["steps"], state["collapsed_at"]
        self.ignored, self.mi_seconds = state["ignored"], state.get("mi_seconds", 0.0)
        self.history = [_unpacked(packed) for packed in state["history"]]

    def _measure(self, step: int) -> Reading:
        generator = torch.Generator().manual_seed(self.seed)
        model = Model(
            self.encode, self.log_likelihood or _absent, device=self.device, batch_size=self.batch_size
        )
        mu, logvar = model.moments(self.heldout)
        require_finite("encode", torch.cat([mu, logvar], dim=1))
        codes = Codes.draw(mu, logvar, generator)
        n = len(codes.mu)
        compared = min(n, _COMPARED)
        own_z = codes.own(0, compared)
        started = time.perf_counter()
        bounds = mi_bounds(mu[:compared], logvar[:compared], own_z, generator=generator)
        self.mi_seconds += time.perf_counter() - started
        bootstrap = Bootstrap(n, resamples=_RESAMPLES, generator=generator)
        of_bounds = bootstrap
        if compared < n:
            of_bounds = Bootstrap(compared, resamples=_RESAMPLES, generator=generator)
        gap = nll = None
        if self.log_likelihood is not None:
            permutation = metrics.derangement(n, generator=generator)
            own = model.nll(self.heldout, codes.own)
            shuffled = model.nll(self.heldout, lambda a, b: codes.shuffled(permutation, a, b))
            nll = own.mean().item()
            gap = bootstrap.estimate(along_cycle(shuffled - own, permutation))
        reading = Reading(
            step=step,
            rate_per_dim=tuple(metrics.rate_per_dim(mu.float(), logvar.float()).tolist()),
            active_units=int(metrics.active_units(mu).sum()),
            mi_lower=of_bounds.estimate(bounds.lower),
            mi_upper=of_bounds.estimate(bounds.upper),
            shuffle_gap=gap,
            nll=nll,
            mu_variance_per_dim=tuple(codes.mu.var(dim=0, correction=0).tolist()),
        )
        for name, value in reading.metrics().items():
            if not math.isfinite(value):
                raise NotFiniteError(f"{name} is {value}")
        return reading

    def _collapses(self) -> bool:
        recent = [reading for reading in self.history[-self.patience :] if reading.step > self.grace_steps]
        if len(recent) < self.patience or not all(reading.empty for reading in recent):
            return False
        return not _grows([r.mi_upper.value for r in recent]) and not _grows(
            [0.0 if r.shuffle_gap is None else r.shuffle_gap.value for r in recent]
        )

    def _message(self) -> str:
        first, last = self.history[-self.patience], self.history[-1]
        used = "" if last.shuffle_gap is None else f", another example's z costs {last.shuffle_gap} nats"
        return (
            f"the latent carries no information since step {first.step}: I(x; z) <= {last.mi_upper} nats"
            f"{used}; rate {sum(last.rate_per_dim):.3g} nats, {last.active_units} active units of "
            f"{len(last.rate_per_dim)} (step {last.step}). Free bits, annealing or a weaker decoder help, "
            "see vaekernels.gaussian_kl and vaekernels.schedules; vaekernels.collapse.diagnose tells more"
        )


def _at_least(name: str, value: Any, least: int) -> int:
    whole = whole_number(value)
    if whole is None or whole < least:
        raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
    return whole


def _absent(x: Any, z: Any) -> Any:
    raise AssertionError("no log_likelihood was given")


def _grows(values: list[float]) -> bool:
    # Noise around 0 does not grow: two hundredths of a nat are the floor.
    return values[-1] > _GROWTH * max(values[0], 0.02)


@contextlib.contextmanager
def _in_eval_mode(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Every module its own mode back: frozen batch norms stay in eval mode."""
    modes = [(each, each.training) for module in modules for each in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for each, training in modes:
            each.training = training


def _packed(reading: Reading) -> dict[str, Any]:
    def ends(e: Estimate | None) -> list[float] | None:
        return None if e is None else [e.value, e.low, e.high]

    return {
        "step": reading.step,
        "rate_per_dim": list(reading.rate_per_dim),
        "active_units": reading.active_units,
        "mi_lower": ends(reading.mi_lower),
        "mi_upper": ends(reading.mi_upper),
        "shuffle_gap": ends(reading.shuffle_gap),
        "nll": reading.nll,
        "mu_variance_per_dim": list(reading.mu_variance_per_dim),
    }


def _unpacked(packed: dict[str, Any]) -> Reading:
    def estimate(ends: list[float] | None) -> Any:
        return None if ends is None else Estimate(ends[0], ends[1], ends[2])

    return Reading(
        step=packed["step"],
        rate_per_dim=tuple(packed["rate_per_dim"]),
        active_units=packed["active_units"],
        mi_lower=estimate(packed["mi_lower"]),
        mi_upper=estimate(packed["mi_upper"]),
        shuffle_gap=estimate(packed["shuffle_gap"]),
        nll=packed["nll"],
        mu_variance_per_dim=tuple(packed["mu_variance_per_dim"]),
    )
