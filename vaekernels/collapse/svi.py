"""Stochastic variational inference (SVI): refines q(z|x) of single examples by gradient, starting at the
encoder's mu and logvar. What that gains tells a lagging encoder from a model that has collapsed."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from vaekernels import ops
from vaekernels.collapse.budget import GRADIENT_COST
from vaekernels.collapse.examples import Examples, count, take
from vaekernels.collapse.model import Model

__all__ = ["NOISES", "STEPS", "Refinement", "evaluations", "refine"]

STEPS = 40
NOISES = 16
LEARNING_RATE = 0.1


class Refinement(NamedTuple):
    """NLL + beta KL per example in nats, float64 [N], each the mean over the same 16 noises."""

    at_posterior: Tensor
    at_prior: Tensor
    after: Tensor
    rate_after: Tensor
    """the rate in ``after``"""
    differentiable: bool
    """whether log_likelihood has a gradient with respect to z"""


def evaluations(n: int) -> int:
    """What :func:`refine` costs on ``n`` examples."""
    return n * (STEPS * GRADIENT_COST + 3 * NOISES)


def refine(
    model: Model,
    x: Examples,
    mu: Tensor,
    logvar: Tensor,
    generator: torch.Generator | None,
    beta: float = 1.0,
) -> Refinement:
    """40 steps of Adam (learning rate 0.1) on every example's own mu and logvar, from those of the encoder,
    on E_q[-log p(x|z)] + beta KL, with one fresh noise a step (the refinement of Kim et al. 2018, without
    its training). The noises that evaluate are the same before and after, and none that the steps saw.

    A likelihood without a path to z in autograd's graph has gradient zero. cuDNN's recurrent nets have no
    backward pass in eval mode; where one refuses, the steps are taken with cuDNN off.
    """
    n, dims = mu.shape
    noises = torch.randn(NOISES, n, dims, generator=generator, dtype=torch.float64)
    gradient_of = _Gradient(model)
    parts: list[tuple[Tensor, ...]] = []
    for a in range(0, n, model.batch_size):
        b = min(a + model.batch_size, n)
        some = _outside_inference(take(x, slice(a, b)))
        before = mu[a:b].cpu().double(), logvar[a:b].cpu().double()
        after = _descend(model, gradient_of, some, *before, generator, beta)
        nothing = torch.zeros_like(before[0]), torch.zeros_like(before[1])
        values = [_cost(model, some, *moments, noises[:, a:b], beta) for moments in (before, nothing, after)]
        # Steps that led to where the likelihood is 0 are not taken.
        lost = values[2] == torch.inf
        values[2] = torch.where(lost, values[0], values[2])
        parts.append((*values, torch.where(lost, _rate(*before), _rate(*after))))
    at_posterior, at_prior, end, rate = (torch.cat(column) for column in zip(*parts, strict=True))
    return Refinement(at_posterior, at_prior, end, rate, gradient_of.found)


def _descend(
    model: Model,
    gradient_of: _Gradient,
    x: Examples,
    mu: Tensor,
    logvar: Tensor,
    generator: torch.Generator | None,
    beta: float,
) -> tuple[Tensor, Tensor]:
    mu, logvar = mu.clone().requires_grad_(), logvar.clone().requires_grad_()
    optimizer = torch.optim.Adam([mu, logvar], lr=LEARNING_RATE)
    for _ in range(STEPS):
        noise = torch.randn(mu.shape, generator=generator, dtype=torch.float64)
        with torch.enable_grad():
            z = mu + torch.exp(0.5 * logvar) * noise
            # The sum over examples: no example's gradient depends on another's.
            rate = ops.gaussian_kl(mu, logvar, reduction="sum")
            loss = beta * rate + (z * gradient_of(x, z.detach())).sum()
            mu.grad, logvar.grad = torch.autograd.grad(loss, [mu, logvar])
        optimizer.step()
        model.counted(count(x) * GRADIENT_COST)
    return mu.detach(), logvar.detach()


class _Gradient:
    """d(-log p(x|z))/dz [B, D], float64 on the CPU; zero where autograd's graph has no path to z. Gradients
    of the model's parameters stay as they are."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.found = False
        self._cudnn = True

    def __call__(self, x: Examples, z: Tensor) -> Tensor:
        try:
            return self._gradient(x, z)
        except RuntimeError as error:
            if not self._cudnn or "cudnn rnn backward" not in str(error).lower():
                raise
        self._cudnn = False
        return self._gradient(x, z)

    def _gradient(self, x: Examples, z: Tensor) -> Tensor:
        with nullcontext() if self._cudnn else torch.backends.cudnn.flags(enabled=False):
            code = z.to(device=self.model.latent_device, dtype=self.model.dtype).requires_grad_()
            loss = -self.model.evaluate(x, code).sum()
            gradient = torch.autograd.grad(loss, code, allow_unused=True)[0] if loss.requires_grad else None
        if gradient is None:
            return torch.zeros_like(z)
        self.found = True
        return gradient.cpu().double().nan_to_num(0.0, 0.0, 0.0)  # likelihood 0: no direction is known


@torch.no_grad()
def _cost(model: Model, x: Examples, mu: Tensor, logvar: Tensor, noises: Tensor, beta: float) -> Tensor:
    sd = torch.exp(0.5 * logvar)
    total = torch.zeros(len(mu), dtype=torch.float64)
    for noise in noises:
        total -= model.evaluate(x, mu + sd * noise).double().cpu()
        model.counted(len(mu))
    return total / len(noises) + beta * _rate(mu, logvar)


def _rate(mu: Tensor, logvar: Tensor) -> Tensor:
    return ops.gaussian_kl(mu, logvar, reduction="none")


def _outside_inference(x: Examples) -> Examples:
    """A copy that autograd may save, where ``x`` was made under inference_mode."""
    with torch.inference_mode(False):
        if isinstance(x, Tensor):
            return x.clone() if x.is_inference() else x
        return tuple(part.clone() if part.is_inference() else part for part in x)
