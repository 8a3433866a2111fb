"""The posterior as an object: `DiagonalGaussian`, in the interface of diffusers' class of that kind::

    posterior = DiagonalGaussian(encoder(x))  # [B, 2 C, H, W]
    loss = nll(decoder(posterior.sample()), x) + posterior.kl().mean()

Right on [B, D], images and video alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from vaekernels import _checks, ops, reference

__all__ = ["DiagonalGaussian", "Moments"]

LOGVAR_BOUNDS = (-30.0, 20.0)
"""What the log-variance is clamped to, as in latent-diffusion (Rombach et al. 2022) and diffusers."""

LOG_2PI = math.log(2.0 * math.pi)


class Moments(Protocol):
    """What `DiagonalGaussian.kl` needs of the other distribution; diffusers' own class has it too."""

    @property
    def mean(self) -> Tensor: ...

    @property
    def logvar(self) -> Tensor: ...

    @property
    def deterministic(self) -> bool: ...


class DiagonalGaussian:
    """N(mean, diag var), from one tensor that holds the mean and then the log-variance along `dim`.

    Axis 0 is the batch and every other one latent, however many: [B, D], [B, C, T], [B, C, H, W] and [B, C,
    T, H, W] alike, with `dim` = -1 [B, T, D] too. Where axis 0 itself is split there is no batch axis.

    The interface is that of diffusers' `DiagonalGaussianDistribution`, the attribute `parameters` included.
    What differs:

    - `kl` and `nll` sum over all axes but the batch. There `dims` is fixed to [1, 2, 3]: an error on [B, D]
      and [B, C, T], and on video [B, C, T, H, W] a sum per column, [B, W].
    - They are in float32 where the moments are of half precision (there in the moments' dtype), and exact
      where the posterior is close to the prior.
    - Where `deterministic`, they are zeros of shape [B] on the moments' device (there a tensor [0.] on the
      CPU), the sample is the mean and no random number is drawn.
    - Random numbers come from Philox (`vaekernels.rng_state`): the same generator gives other numbers than
      there. `sample` takes a state too, and `sample_kl` gives sample and KL in one pass.
    - `kl` raises for another distribution that is deterministic, from which no divergence is finite (there
      inf or NaN). `nll` does not divide by the variance, and stays finite where that underflows.
    - Log-variances outside [-30, 20] are clamped, as there; on the bounds the gradient is one.
    - `logvar`, `std` and `var` are computed when they are asked for, and not kept.

    Args:
        moments: mean, then log-variance, along `dim`; float32, bfloat16, float16 or float64.
        deterministic: a point mass at the mean: `std` and `var` are zero.
        dim: the axis that holds both halves.

    Raises:
        TypeError, ValueError: no floating tensor, no such axis, or an odd size along it.
    """

    def __init__(self, moments: Tensor, deterministic: bool = False, dim: int = 1) -> None:
        self._shape = _checks.packed_shape(moments, dim)
        self.parameters = moments
        self.deterministic = deterministic
        self.dim = _checks.index("dim", dim)

    def __repr__(self) -> str:
        kind = ", deterministic" if self.deterministic else ""
        return f"{type(self).__name__}(shape={list(self._shape)}, dtype={self.parameters.dtype}{kind})"

    @property
    def mean(self) -> Tensor:
        """A view of the first half."""
        return self.parameters.chunk(2, self.dim)[0]

    @property
    def logvar(self) -> Tensor:
        """The second half, clamped to [-30, 20]."""
        return self.parameters.chunk(2, self.dim)[1].clamp(*LOGVAR_BOUNDS)

    @property
    def std(self) -> Tensor:
        """exp(logvar / 2); zeros where deterministic."""
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        """exp(logvar); zeros where deterministic."""
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(self.logvar)

    def mode(self) -> Tensor:
        """The mean."""
        return self.mean

    def sample(
        self,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        *,
        rng: Tensor | None = None,
    ) -> Tensor:
        """z = mean + std * eps, reparameterized, in the moments' dtype.

        Args:
            generator: a torch.Generator. One on the CPU serves moments on any device, and gives the same
                numbers on each. A list has one generator for each row of the batch. Not while compiling.
            rng: a state from `vaekernels.rng_state` in place of a generator.
        """
        if isinstance(generator, Sequence):
            if rng is not None:
                raise ValueError("rng and generator must not be given together; drop one of them")
            return self._sample_rows(generator)
        if self.deterministic:
            return self.mean.clone()
        return ops.reparameterize_packed(
            self.parameters, self.dim, logvar_bounds=LOGVAR_BOUNDS, **self._source(generator, rng)
        )

    def sample_kl(
        self,
        generator: torch.Generator | None = None,
        *,
        rng: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`sample()` and `kl()` in one pass over the moments, forward and backward."""
        if self.deterministic:
            return self.mean.clone(), self._zeros()
        z, kl, _ = ops.sample_kl_packed(
            self.parameters,
            self.dim,
            reduction="none",
            group_dims=(),
            batch_dims=self._batch_dims,
            logvar_bounds=LOGVAR_BOUNDS,
            **self._source(generator, rng),
        )
        return z, kl

    def kl(self, other: Moments | None = None, dims: int | Sequence[int] | None = None) -> Tensor:
        """KL(self || other) in nats, against N(0, I) where `other` is None; see `vaekernels.gaussian_kl`.

        Args:
            other: a distribution with `mean` and `logvar`, which broadcast to the shape of this one's.
            dims: the axes of the mean to sum over; None: all but the batch, which gives [B].

        Raises:
            ValueError: `other` is deterministic, or its shape does not broadcast to this one's.
        """
        if self.deterministic:
            return self._zeros()
        prior = () if other is None else self._prior(other)
        summed = self._axes(dims)
        kept = [axis for axis in range(len(self._shape)) if axis not in summed]
        # Sums over all axes behind the kept ones are the kernel's own reduction.
        whole = kept == list(range(len(kept)))
        kl = ops.gaussian_kl_packed(
            self.parameters,
            self.dim,
            *prior,
            reduction="none" if whole else "elementwise",
            group_dims=(),
            batch_dims=len(kept) if whole else self._batch_dims,
            logvar_bounds=LOGVAR_BOUNDS,
        )
        return kl if whole else kl.sum(summed)

    def nll(self, sample: Tensor, dims: int | Sequence[int] | None = None) -> Tensor:
        """-log N(sample; mean, var) = 1/2 (log 2 pi + logvar + (sample - mean)^2 / var) in nats, summed over
        `dims`, axes of the mean (None: all but the batch, which gives [B]). Several samples may lead: [K, B,
        ...] gives [K, B]."""
        if self.deterministic:
            return self._zeros()
        dtype = reference.compute_dtype(self.parameters.dtype)
        logvar = self.logvar.to(dtype)
        distance = (sample.to(dtype) - self.mean.to(dtype)) * torch.exp(-0.5 * logvar)
        terms = 0.5 * (LOG_2PI + logvar + distance * distance)
        # Counted from the end, so that leading axes of samples stay.
        summed = [axis - len(self._shape) for axis in self._axes(dims)]
        return terms.sum(summed) if summed else terms

    @property
    def _batch_dims(self) -> int:
        return 0 if self.dim in (0, -self.parameters.ndim) else 1

    def _zeros(self) -> Tensor:
        dtype = reference.compute_dtype(self.parameters.dtype)
        return torch.zeros(self._shape[: self._batch_dims], dtype=dtype, device=self.parameters.device)

    def _axes(self, dims: int | Sequence[int] | None) -> list[int]:
        """The axes to sum over, from 0 on; none for ()."""
        ndim = len(self._shape)
        if dims is None:
            return list(range(self._batch_dims, ndim))
        axes = list(dims) if isinstance(dims, Sequence) else [dims]
        for axis in axes:
            if not hasattr(axis, "__index__") or not -ndim <= axis < ndim:
                raise ValueError(
                    f"dims must be axes of the mean, which has shape {list(self._shape)}, got {axis} in "
                    f"{dims!r}"
                )
        return sorted({axis % ndim for axis in axes})

    def _prior(self, other: Moments) -> tuple[Tensor, Tensor]:
        if other.deterministic:
            raise ValueError(
                "other must not be deterministic: no divergence from a point mass is finite; compare with "
                "nll(other.mean), or build it with deterministic=False"
            )
        parts = other.mean, other.logvar
        try:
            mean, logvar = (part.to(self.parameters.dtype).expand(self._shape) for part in parts)
        except RuntimeError as error:
            raise ValueError(
                f"other must broadcast to the shape of this distribution, {list(self._shape)}, got "
                f"{list(other.mean.shape)}"
            ) from error
        return mean, logvar

    def _source(self, generator: torch.Generator | None, rng: Tensor | None) -> dict[str, Any]:
        """Where the ops take their random numbers from."""
        here = self.parameters.device
        if generator is not None and rng is None and generator.device.type == "cpu" != here.type:
            return {"rng": ops.rng_state(torch.empty(0), generator=generator).to(here)}
        return {"generator": generator, "rng": rng}

    def _sample_rows(self, generators: Sequence[torch.Generator]) -> Tensor:
        if len(generators) == 1:
            return self.sample(generators[0])
        rows = torch.split(self.parameters, 1) if self._batch_dims else (self.parameters,)
        if len(generators) != len(rows):
            raise ValueError(
                f"generator must be a torch.Generator or a list with one for each of the {len(rows)} rows, "
                f"got {len(generators)}"
            )
        parts = [
            DiagonalGaussian(row, self.deterministic, self.dim).sample(generator)
            for row, generator in zip(rows, generators, strict=True)
        ]
        return torch.cat(parts)
