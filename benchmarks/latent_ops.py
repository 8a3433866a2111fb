"""Three ways to compute a model's latent layers: fused, in eager code as most code bases have it, and that
code compiled. Models take one of them and do not know which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

import vaekernels as vk

__all__ = ["FUSED", "Call", "LatentOps", "compiled", "eager", "recording"]

Noise = Callable[[Tensor, torch.Generator | None], Tensor]


@dataclass(frozen=True)
class LatentOps:
    """What the models of the benchmark use, each with the arguments of its namesake in `vaekernels`."""

    sample_kl_packed: Callable[..., vk.SampleKL]
    reparameterize: Callable[..., Tensor]
    gaussian_kl: Callable[..., Tensor]


FUSED = LatentOps(vk.sample_kl_packed, vk.reparameterize, vk.gaussian_kl)


def plain_noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn_like(like)


def eager(noise: Noise = plain_noise) -> LatentOps:
    """The usual lines. ``noise``: standard normals in the shape of a tensor."""

    def sample_kl_packed(
        moments: Tensor,
        dim: int = 1,
        prior_mu: Tensor | None = None,
        prior_logvar: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        free_bits: float | None = None,
        group_dims: tuple[()] | None = None,
        **others: Any,
    ) -> vk.SampleKL:
        _only_defaults(others)
        mu, logvar = moments.chunk(2, dim)
        std = torch.exp(0.5 * logvar)
        z = mu + noise(std, generator) * std
        if prior_mu is None or prior_logvar is None:
            kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp())
        else:
            squares = (logvar.exp() + (mu - prior_mu).pow(2)) / prior_logvar.exp()
            kl = 0.5 * (prior_logvar - logvar + squares - 1)
        rate = (kl if group_dims is None else kl.flatten(1).sum(1)).mean(0)
        loss = rate if free_bits is None else rate.clamp(min=free_bits)
        return vk.SampleKL(z, loss.sum(), rate)

    def reparameterize(mu: Tensor, std: Tensor, *, parameterization: str) -> Tensor:
        assert parameterization == "std"
        return mu + noise(std, None) * std

    return LatentOps(sample_kl_packed, reparameterize, _balanced_kl)


def _balanced_kl(
    mu: Tensor,
    std: Tensor,
    prior_mu: Tensor,
    prior_std: Tensor,
    *,
    free_bits: float,
    balance: float,
    **others: Any,
) -> Tensor:
    """KL balancing with free nats on the whole, of [T, B, D] (Hafner et al. 2020): the KL twice, once for the
    gradient of each side."""
    assert others == {"parameterization": "std", "batch_dims": 2, "group_dims": ()}

    def kl(mu: Tensor, std: Tensor, prior_mu: Tensor, prior_std: Tensor) -> Tensor:
        squares = (std / prior_std).pow(2) + ((mu - prior_mu) / prior_std).pow(2)
        each = 0.5 * (squares - 1) - torch.log(std / prior_std)
        return each.sum(-1).mean().clamp(min=free_bits)

    to_prior = kl(mu.detach(), std.detach(), prior_mu, prior_std)
    to_posterior = kl(mu, std, prior_mu.detach(), prior_std.detach())
    return balance * to_prior + (1 - balance) * to_posterior


def _only_defaults(options: dict[str, Any]) -> None:
    """`vaekernels.nn` names every option; what the lines above leave out must be off."""
    defaults = {
        "rng": None,
        "weight": None,
        "batch_dims": 1,
        "parameterization": "logvar",
        "logvar_bounds": None,
        "clamp": "batch",
        "penalty": "floor",
        "balance": None,
        "reduction": "batchmean",
        "process_group": None,
    }
    for name, value in options.items():
        if value != defaults[name]:
            raise ValueError(
                f"{name}={value!r}: the eager layer of this benchmark has {defaults[name]!r} alone"
            )


def compiled() -> LatentOps:
    """The usual lines under `torch.compile`, for one model: the limit on recompilations starts anew."""
    torch.compiler.reset()
    plain = eager()
    sample_kl, reparameterize, gaussian_kl = (
        torch.compile(getattr(plain, f.name), dynamic=False, fullgraph=True) for f in fields(plain)
    )

    def sample_kl_packed(
        *given: Any, generator: torch.Generator | None = None, **options: Any
    ) -> vk.SampleKL:
        out: vk.SampleKL = sample_kl(*given, **options)  # no generator inside a graph
        return out

    return LatentOps(sample_kl_packed, reparameterize, gaussian_kl)


# ---- the layers of one step, by themselves ---------------------------------------------------------------


@dataclass
class Call:
    """A call of one of the ops: detached tensors, which require grad where the model's did."""

    name: str
    given: tuple[Any, ...]
    options: dict[str, Any]
    leaves: list[Tensor] = field(default_factory=list)

    def outputs(self, ops: LatentOps) -> list[Tensor]:
        """z and the loss term, as far as the op has them."""
        out = getattr(ops, self.name)(*self.given, **self.options)
        return [out.z, out.kl] if isinstance(out, vk.SampleKL) else [out]

    @property
    def elements(self) -> int:
        """Of the latent."""
        numel: int = self.given[0].numel()
        return numel // 2 if self.name.endswith("_packed") else numel


def recording(ops: LatentOps, calls: list[Call]) -> LatentOps:
    """``ops``, which also notes every call in ``calls``."""

    def noted(name: str) -> Callable[..., Any]:
        function = getattr(ops, name)

        def call(*given: Any, **options: Any) -> Any:
            kept = tuple(
                t.detach().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t for t in given
            )
            leaves = [t for t in kept if isinstance(t, Tensor) and t.requires_grad]
            calls.append(Call(name, kept, options, leaves))
            return function(*given, **options)

        return call

    return LatentOps(*(noted(f.name) for f in fields(ops)))
