"""What the compiled backward calls under grad mode: the same gradients, as a differentiable graph.

The formulas are those of the reference forward, whose clamp takes the decisions that the compiled forward
saved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vaekernels import _checks, reference


def _standing_in(t: Tensor) -> Tensor:
    # A view, so that the gradient stops at it: the inputs may depend on each other in the user's graph.
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()


def _gradients(
    inputs: Sequence[Tensor], outputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> list[Tensor]:
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o is not None and g is not None]
    if not pairs:
        return [torch.zeros_like(t) for t in inputs]
    found = torch.autograd.grad(
        [o for o, _ in pairs],
        inputs,
        [g for _, g in pairs],
        create_graph=True,
        allow_unused=True,
    )
    return [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=True)]


def _check(
    mu: Tensor,
    logvar: Tensor,
    grad_z: Tensor | None,
    rng: Tensor | None,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    batch_dims: int,
    group_dims: Sequence[int] | None,
    weight: Tensor | None,
) -> None:
    """What would otherwise fail far from its cause, or not at all, where the operator is called directly."""
    _checks.check_pair("mu", mu, "logvar", logvar)
    if prior_mu is not None or prior_logvar is not None:
        _checks.check_prior(mu.shape, "mu", mu, prior_mu, prior_logvar)
    _checks.check_batch_dims(mu.ndim, batch_dims)
    if group_dims is not None:
        _checks.group_axes(mu.ndim, batch_dims, group_dims)
    if weight is not None:
        _checks.check_weight(weight, mu.shape[:batch_dims], mu)
    if grad_z is not None:
        if rng is None:
            raise ValueError("rng must be given with grad_z, got None; give the state of z")
        _checks.check_random(mu, rng, None)


def latent_backward_reference(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    grad_kl_per_group: Tensor | None,
    mu: Tensor,
    logvar: Tensor,
    rng: Tensor | None,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    gate: Tensor | None,
    open: Tensor | None,
    *,
    prior_grads: bool = False,
    clamp: str = "batch",
    batch_dims: int = 1,
    group_dims: Sequence[int] | None = None,
    weight: Tensor | None = None,
    balance: float | None = None,
    reduction: str = "batchmean",
    group_sums: bool = False,
    parameterization: str = "logvar",
    logvar_bounds: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients for (mu, logvar, prior_mu, prior_logvar); the last two None without `prior_grads`."""
    _check(mu, logvar, grad_z, rng, prior_mu, prior_logvar, batch_dims, group_dims, weight)
    want_kl = grad_kl is not None or grad_kl_per_group is not None
    frozen = None
    if want_kl and gate is not None and open is not None:
        frozen = reference.Frozen(gate, open)
    with torch.enable_grad():
        inputs = [_standing_in(mu), _standing_in(logvar)]
        prior: tuple[Tensor | None, Tensor | None] = prior_mu, prior_logvar
        if prior_grads and prior_mu is not None and prior_logvar is not None:
            inputs += [_standing_in(prior_mu), _standing_in(prior_logvar)]
            prior = inputs[2], inputs[3]
        outputs = reference.latent(
            inputs[0],
            inputs[1],
            None if grad_z is None else rng,
            *prior,
            want_kl=want_kl,
            num_samples=None if grad_z is None or grad_z.ndim == mu.ndim else grad_z.shape[0],
            frozen=frozen,
            clamp=clamp,
            batch_dims=batch_dims,
            group_dims=group_dims,
            weight=weight,
            balance=balance,
            reduction=reduction,
            group_sums=group_sums,
            parameterization=parameterization,
            logvar_bounds=logvar_bounds,
        )
        found = _gradients(inputs, outputs, (grad_z, grad_kl, grad_kl_per_group))
    return (found[0], found[1], found[2], found[3]) if len(found) == 4 else (found[0], found[1], None, None)


def latent_backward_packed_reference(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    grad_kl_per_group: Tensor | None,
    moments: Tensor,
    dim: int,
    rng: Tensor | None,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    gate: Tensor | None,
    open: Tensor | None,
    *,
    prior_grads: bool = False,
    clamp: str = "batch",
    batch_dims: int = 1,
    group_dims: Sequence[int] | None = None,
    weight: Tensor | None = None,
    balance: float | None = None,
    reduction: str = "batchmean",
    group_sums: bool = False,
    parameterization: str = "logvar",
    logvar_bounds: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients for (moments, prior_mu, prior_logvar)."""
    _checks.packed_shape(moments, dim)
    with torch.enable_grad():
        mu, logvar = moments.chunk(2, dim)
        to_mu, to_logvar, to_prior_mu, to_prior_logvar = latent_backward_reference(
            grad_z,
            grad_kl,
            grad_kl_per_group,
            mu,
            logvar,
            rng,
            prior_mu,
            prior_logvar,
            gate,
            open,
            prior_grads=prior_grads,
            clamp=clamp,
            batch_dims=batch_dims,
            group_dims=group_dims,
            weight=weight,
            balance=balance,
            reduction=reduction,
            group_sums=group_sums,
            parameterization=parameterization,
            logvar_bounds=logvar_bounds,
        )
        return torch.cat((to_mu, to_logvar), dim), to_prior_mu, to_prior_logvar


_LIBRARY: list[torch.library.Library] = []


def register() -> None:
    """Gives the operators `latent_backward*_reference`, declared by the compiled library, their kernels."""
    if _LIBRARY:
        return
    library = torch.library.Library("vaekernels", "IMPL")  # type: ignore[no-untyped-call]
    for kernel in (latent_backward_reference, latent_backward_packed_reference):
        library.impl(kernel.__name__, kernel, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
    # The registration lives as long as the library object.
    _LIBRARY.append(library)
