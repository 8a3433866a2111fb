"""What a model has learned, measured on held-out examples at weight 1 whatever the training objective was."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vaekernels.collapse import CollapseMonitor, Estimate, Reading
from vaekernels.collapse.model import NotFiniteError
from vaekernels.training.errors import NonFiniteError
from vaekernels.training.latents import ELBO, LatentOptions
from vaekernels.training.models import VAE

__all__ = ["Evaluation", "evaluate", "monitor"]

_GRACE = 200  # steps
_SEED = 0  # of all that is drawn: every evaluation of every run uses the same


@dataclass(frozen=True)
class Evaluation:
    """Nats per example. ``nelbo`` = ``nll`` + ``rate``, unclamped and unweighted, under the model's own
    posterior with one sample of z; the rest under :meth:`VAE.encode`, which is the same unless the model has
    several latent layers. ``mi_lower``: a lower bound on I(x; z), from at most 2048 examples."""

    examples: int
    rate: float
    nll: float
    nelbo: float
    mi_lower: Estimate
    active_units: int
    delta_shuffle: Estimate
    rate_per_dim: tuple[float, ...]
    mu_variance_per_dim: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def monitor(
    model: VAE,
    heldout: Tensor,
    *,
    steps: int,
    device: torch.device | None = None,
    batch_size: int = 256,
) -> CollapseMonitor:
    """What measures ``model`` on all of ``heldout`` with one encode and two decodes of each, whenever
    :func:`evaluate` asks. It may warn of collapse after 200 steps, or a quarter of the ``steps`` of the run
    where those are fewer: many runs on own data are over before step 500."""
    return CollapseMonitor(
        model.encode,
        heldout,
        model.log_likelihood,
        n=len(heldout),
        grace_steps=min(_GRACE, steps // 4),
        modules=[model],
        device=device,
        batch_size=batch_size,
        seed=_SEED,
    )


def evaluate(model: VAE, watch: CollapseMonitor, step: int) -> tuple[Evaluation, Reading]:
    """Evaluate ``model``, left in the mode it was in; the reading of ``watch`` that this is made of is not
    yet in its history. Draws from no generator but its own, and advances no schedule. NonFiniteError if the
    result is not finite."""
    try:
        reading = watch.measure(step)
    except NotFiniteError as error:
        raise NonFiniteError(f"on held-out data {error}") from error
    assert reading.nll is not None and reading.shuffle_gap is not None, "the monitor has a log_likelihood"
    nll, rate = reading.nll, sum(reading.rate_per_dim)
    if len(model.latent_layers) > 1:
        nll, rate = _own_posterior(model, watch)
    if not math.isfinite(rate + nll):
        raise NonFiniteError(f"on held-out data the NLL is {nll:g} and the rate {rate:g}")
    evaluation = Evaluation(
        examples=len(watch.heldout),
        rate=rate,
        nll=nll,
        nelbo=nll + rate,
        mi_lower=reading.mi_lower,
        active_units=reading.active_units,
        delta_shuffle=reading.shuffle_gap,
        rate_per_dim=reading.rate_per_dim,
        mu_variance_per_dim=reading.mu_variance_per_dim,
    )
    return evaluation, reading


@torch.no_grad()
def _own_posterior(model: VAE, watch: CollapseMonitor) -> tuple[float, float]:
    """(nll, rate), means over the examples, of a model whose posterior is more than :meth:`VAE.encode`."""
    heldout = watch.heldout
    assert isinstance(heldout, Tensor)
    device = next(model.parameters()).device
    noise = torch.Generator(device=device).manual_seed(_SEED)
    elbo = ELBO(model, LatentOptions()).to(device)
    training = model.training
    elbo.eval()
    nll = rate = 0.0
    try:
        for x in torch.split(heldout, watch.batch_size):
            terms = elbo(x.to(device), len(x), noise)
            nll += float(terms.nll_per_example.double().sum())
            rate += len(x) * float(terms.rate.double().sum())
    finally:
        model.train(training)
    return nll / len(heldout), rate / len(heldout)
