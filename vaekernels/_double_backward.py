"""What the compiled backward calls under grad mode: the same gradients, as a differentiable graph.

The formulas are those of the reference forward, whose clamp takes the decisions that the compiled forward
saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vaekernels import _checks, _dispatch, reference


def _standing_in(t: Tensor) -> Tensor:
    # A view, so that the gradient stops at it: the inputs may depend on each other in the user's graph. Not
    # `view_as`, which may change strides of axes of length 1, by which the random numbers are placed.
    return torch.ops.aten.alias(t) if t.requires_grad else t.detach().requires_grad_()


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


def latent_backward_reference(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    grad_kl_per_group: Tensor | None,
    first: Tensor,
    second: Tensor | None,
    dim: int,
    rng: Tensor | None,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    gate: Tensor | None,
    open: Tensor | None,
    *,
    weight: Tensor | None = None,
    prior_grads: bool = False,
    group_sums: bool = False,
    free_bits: float | None = None,  # the decisions of the clamp are in gate and open
    **options: Any,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for (first, second, prior_mu, prior_logvar); None for what is not there or not wanted."""
    kl = grad_kl is not None or grad_kl_per_group is not None
    if grad_z is not None and rng is None:
        raise ValueError("rng must be given with grad_z, got None; give the state of z")
    # What would otherwise fail far from its cause, or not at all, where the operator is called directly.
    want = (_dispatch.KL if kl else 0) | (_dispatch.PACKED if second is None else 0)
    _dispatch.check(want, first, second, dim, prior_mu, prior_logvar, weight, None, None, rng, **options)
    frozen = reference.Frozen(gate, open) if kl and gate is not None and open is not None else None
    with torch.enable_grad():
        inputs = [_standing_in(first)] + ([] if second is None else [_standing_in(second)])
        posterior = len(inputs)
        prior: tuple[Tensor | None, Tensor | None] = prior_mu, prior_logvar
        if prior_grads and prior_mu is not None and prior_logvar is not None:
            inputs += [_standing_in(prior_mu), _standing_in(prior_logvar)]
            prior = inputs[-2], inputs[-1]
        outputs = reference.latent(
            inputs[0],
            None if second is None else inputs[1],
            dim,
            rng,
            *prior,
            sample=grad_z is not None,
            kl=kl,
            num_samples=None if grad_z is None or grad_z.ndim == first.ndim else grad_z.shape[0],
            weight=weight,
            group_sums=group_sums,
            frozen=frozen,
            **options,
        )
        found = _gradients(inputs, outputs, (grad_z, grad_kl, grad_kl_per_group))
    to_prior = (found[-2], found[-1]) if len(found) > posterior else (None, None)
    return found[0], None if second is None else found[1], *to_prior


def aggregate_backward_reference(
    grad_qz: Tensor | None,
    grad_dims: Tensor | None,
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    saved: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for (z, mu, logvar). What the forward saved is computed again, differentiably."""
    _checks.check_aggregate_call(z, mu, logvar, **options)
    with torch.enable_grad():
        inputs = [_standing_in(t) for t in (z, mu, logvar)]
        log_qz, log_qz_dims, _ = reference.aggregate(*inputs, **options)
        grads = _gradients(inputs, (log_qz, log_qz_dims), (grad_qz, grad_dims))
    return grads[0], grads[1], grads[2]


_LIBRARY: list[torch.library.Library] = []


def register() -> None:
    """Gives the operators `*_backward_reference`, declared by the compiled library, their kernels."""
    if _LIBRARY:
        return
    library = torch.library.Library("vaekernels", "IMPL")  # type: ignore[no-untyped-call]
    for kernel in (latent_backward_reference, aggregate_backward_reference):
        library.impl(kernel.__name__, kernel, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
    # The registration lives as long as the library object.
    _LIBRARY.append(library)
