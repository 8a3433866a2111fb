"""What a model has learned, measured on held-out examples at weight 1 whatever the training objective was."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vaekernels import collapse
from vaekernels.collapse import Estimate
from vaekernels.collapse.information import mi_bounds
from vaekernels.training.errors import NonFiniteError
from vaekernels.training.latents import KLOptions, Latents
from vaekernels.training.models import VAE

__all__ = ["Evaluation", "evaluate"]

_MI_EXAMPLES = 2048  # whose every pair is looked at
_SEED = 0  # of the noise, the derangement and the bootstrap: every evaluation of every run uses the same


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


@torch.no_grad()
def evaluate(model: VAE, heldout: Tensor, *, batch_size: int = 256) -> Evaluation:
    """Evaluate ``model``, left in the mode it was in. Draws from no generator but its own, and advances no
    schedule. NonFiniteError if the result is not finite."""
    training = model.training
    model.eval()
    try:
        generator = torch.Generator().manual_seed(_SEED)
        nll, rate = _elbo(model, heldout, batch_size)
        mu, logvar = collapse.moments(model.encode, heldout, batch_size=batch_size)
        finite = bool(mu.isfinite().all() and logvar.isfinite().all())
        if not (math.isfinite(rate + nll) and finite):
            raise NonFiniteError(f"on held-out data the NLL is {nll:g} and the rate {rate:g}")
        delta_shuffle = collapse.delta_shuffle(
            model.encode, model.log_likelihood, heldout, generator=generator, batch_size=batch_size
        )
        mi_lower = _information(mu[:_MI_EXAMPLES], logvar[:_MI_EXAMPLES], generator)
    finally:
        model.train(training)
    return Evaluation(
        examples=len(heldout),
        rate=rate,
        nll=nll,
        nelbo=nll + rate,
        mi_lower=mi_lower,
        active_units=int(collapse.active_units(mu).sum()),
        delta_shuffle=delta_shuffle,
        rate_per_dim=tuple(collapse.rate_per_dim(mu.float(), logvar.float()).tolist()),
        mu_variance_per_dim=tuple(mu.cpu().double().var(dim=0, correction=0).tolist()),
    )


def _information(mu: Tensor, logvar: Tensor, generator: torch.Generator) -> Estimate:
    eps = torch.randn(mu.shape, generator=generator).to(mu.device)
    bounds = mi_bounds(mu, logvar, mu + torch.exp(0.5 * logvar) * eps, generator=generator)
    return collapse.bootstrap_mean(bounds.lower, generator=generator)


def _elbo(model: VAE, heldout: Tensor, batch_size: int) -> tuple[float, float]:
    """(nll, rate), means over the examples."""
    noise = torch.Generator(device=heldout.device).manual_seed(_SEED)
    nll = rate = 0.0
    for x in torch.split(heldout, batch_size):
        latents = Latents(KLOptions(), noise)
        nll -= float(model(x, latents).double().sum())
        rate += len(x) * float(torch.stack(latents.rate).double().sum())
    return nll / len(heldout), rate / len(heldout)
