"""The posterior as an object: `DiagonalGaussian`, in the interface of diffusers' class of that kind::

    posterior = DiagonalGaussian(encoder(x))  # [B, 2 C, H, W]
    loss = nll(decoder(posterior.sample()), x) + posterior.kl().mean()

Right on [B, D], images and video alike.
"""

from __future__ import annotations

import contextlib
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
    - From a generator or a state the numbers go by the order of a contiguous tensor, whatever the moments'
      memory format, so that an image with a generator of its own gets one latent in every batch. Without
      either they go by storage order, as in the ops.
    - `kl` raises for another distribution that is deterministic, from which no divergence is finite (there
      inf or NaN). `nll` does not divide by the variance, and stays finite where that underflows.
    - Log-variances outside [-30, 20] are clamped, as there; on the bounds the gradient is one.
    - `logvar`, `std` and `var` are computed when they are first read, from then on they are kept.

    The attributes `mean`, `logvar`, `std`, `var` and `parameters` may be assigned, and changed in place. As
    there, `sample` goes by `mean` and `std`, `kl` and `nll` go by `mean`, `logvar` and `var`, and none of
    them follows another: an assigned `std` changes no KL. A posterior of which one was changed computes by
    plain PyTorch; so does one of which `std`, `logvar` or `var` was read in inference mode or in compiled
    code, where a change in place cannot be seen.

    Args:
        moments: mean, then log-variance, along `dim`; float32, bfloat16, float16 or float64.
        deterministic: a point mass at the mean: `std` and `var` are zero.
        dim: the axis that holds both halves.

    Raises:
        TypeError, ValueError: no floating tensor, no such axis, or an odd size along it.
    """

    def __init__(self, moments: Tensor, deterministic: bool = False, dim: int = 1) -> None:
        self._shape = _checks.packed_shape(moments, dim)
        self._moments = self.parameters = moments
        self.deterministic = deterministic
        self.dim = _checks.index("dim", dim)
        self._grad = torch.is_grad_enabled()
        # What was read or assigned, and the version of what was computed here (None: it cannot be told).
        self._kept: dict[str, Tensor] = {}
        self._versions: dict[str, int | None] = {}

    def __repr__(self) -> str:
        kind = ", deterministic" if self.deterministic else ""
        return f"{type(self).__name__}(shape={list(self._shape)}, dtype={self._moments.dtype}{kind})"

    @property
    def mean(self) -> Tensor:
        """A view of the first half."""
        return self._read("mean")

    @mean.setter
    def mean(self, value: Tensor) -> None:
        self._assign("mean", value)

    @property
    def logvar(self) -> Tensor:
        """The second half, clamped to [-30, 20]."""
        return self._read("logvar")

    @logvar.setter
    def logvar(self, value: Tensor) -> None:
        self._assign("logvar", value)

    @property
    def std(self) -> Tensor:
        """exp(logvar / 2); zeros where deterministic."""
        return self._read("std")

    @std.setter
    def std(self, value: Tensor) -> None:
        self._assign("std", value)

    @property
    def var(self) -> Tensor:
        """exp(logvar); zeros where deterministic."""
        return self._read("var")

    @var.setter
    def var(self, value: Tensor) -> None:
        self._assign("var", value)

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
        if not self._as_computed("mean", "std"):
            return self.mean + self.std * self._noise(self.mean, generator, rng)
        if self.deterministic:
            return self.mean.clone()
        z = ops.reparameterize_packed(
            self._ordered(generator, rng),
            self.dim,
            logvar_bounds=LOGVAR_BOUNDS,
            **_source(self._moments, generator, rng),
        )
        return self._in_format(z)

    def sample_kl(
        self,
        generator: torch.Generator | None = None,
        *,
        rng: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`sample()` and `kl()` in one pass over the moments, forward and backward."""
        if self.deterministic or not self._as_computed("mean", "logvar", "std", "var"):
            return self.sample(generator, rng=rng), self.kl()
        z, kl, _ = ops.sample_kl_packed(
            self._ordered(generator, rng),
            self.dim,
            reduction="none",
            group_dims=(),
            batch_dims=self._batch_dims,
            logvar_bounds=LOGVAR_BOUNDS,
            **_source(self._moments, generator, rng),
        )
        return self._in_format(z), kl

    def kl(self, other: Moments | None = None, dims: int | Sequence[int] | None = None) -> Tensor:
        """KL(self || other) in nats, against N(0, I) where `other` is None; see `vaekernels.gaussian_kl`.

        Args:
            other: a distribution with `mean` and `logvar`, of as many axes at most; where its shape is the
                larger one, this distribution broadcasts to it.
            dims: the axes of the mean to sum over; None: all but the batch, which gives [B].

        Raises:
            ValueError: `other` is deterministic, or its shape and this one's do not broadcast.
        """
        if self.deterministic:
            return self._zeros()
        shape = self._shape if other is None else self._common_shape(other)
        summed = self._axes(dims)
        if not self._as_computed("mean", "logvar", "var") or (
            isinstance(other, DiagonalGaussian) and not other._as_computed("mean", "logvar", "var")
        ):
            terms = self._kl_of_attributes(other)
            return terms.sum(summed) if summed else terms
        prior: list[Tensor] = []
        if other is not None:
            prior = [part.to(self._moments.dtype).expand(shape) for part in (other.mean, other.logvar)]
        moments = self._moments
        if shape != self._shape:
            moments = torch.cat([half.expand(shape) for half in moments.chunk(2, self.dim)], self.dim)
        kept = [axis for axis in range(len(shape)) if axis not in summed]
        # Sums over all axes behind the kept ones are the kernel's own reduction.
        whole = kept == list(range(len(kept)))
        kl = ops.gaussian_kl_packed(
            moments,
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
        dtype = reference.compute_dtype(self._moments.dtype)
        logvar, distance = self.logvar.to(dtype), sample.to(dtype) - self.mean.to(dtype)
        if self._as_computed("logvar", "var"):
            distance = distance * torch.exp(-0.5 * logvar)
            square = distance * distance
        else:
            square = distance * distance / self.var.to(dtype)
        terms = 0.5 * (LOG_2PI + logvar + square)
        # Counted from the end, so that leading axes of samples stay.
        summed = [axis - len(self._shape) for axis in self._axes(dims)]
        return terms.sum(summed) if summed else terms

    def _read(self, name: str) -> Tensor:
        kept = self._kept.get(name)
        if kept is None:
            # As at construction, when diffusers' class computes them: read for a log, without gradients, they
            # still have theirs in a loss.
            with _outside_inference(self._moments), torch.set_grad_enabled(self._grad):
                kept = self._kept[name] = self._computed(name)
            self._versions[name] = _version(kept)
        return kept

    def _computed(self, name: str) -> Tensor:
        if name == "mean":
            return self._moments.chunk(2, self.dim)[0]
        if name == "logvar":
            return self._moments.chunk(2, self.dim)[1].clamp(*LOGVAR_BOUNDS)
        if self.deterministic:
            return torch.zeros_like(self._computed("mean"))
        logvar = self._computed("logvar")
        return torch.exp(0.5 * logvar) if name == "std" else torch.exp(logvar)

    def _assign(self, name: str, value: Tensor) -> None:
        self._kept[name] = value
        self._versions.pop(name, None)

    def _as_computed(self, *names: str) -> bool:
        """Whether none of these attributes was assigned, or may have been changed in place."""
        for name in names:
            if name not in self._kept:
                continue
            if name not in self._versions:
                return False
            # The mean is a view of the moments, which a change in place reaches.
            if name != "mean":
                version = _version(self._kept[name])
                if version is None or version != self._versions[name]:
                    return False
        return True

    def _ordered(self, generator: torch.Generator | None, rng: Tensor | None) -> Tensor:
        """The moments, contiguous where the order of the random numbers is promised."""
        return self._moments if generator is None and rng is None else self._moments.contiguous()

    def _in_format(self, z: Tensor) -> Tensor:
        """z in the memory format of the mean."""
        if self._moments.is_contiguous():
            return z
        like = torch.empty_like(self._moments.chunk(2, self.dim)[0])
        return z if z.stride() == like.stride() else like.copy_(z)

    @staticmethod
    def _noise(like: Tensor, generator: torch.Generator | None, rng: Tensor | None) -> Tensor:
        """Normals in `like`'s shape, dtype and device."""
        zero = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
        return ops.reparameterize(zero, zero, **_source(zero, generator, rng))

    @property
    def _batch_dims(self) -> int:
        return 0 if self.dim in (0, -self._moments.ndim) else 1

    def _zeros(self) -> Tensor:
        dtype = reference.compute_dtype(self._moments.dtype)
        return torch.zeros(self._shape[: self._batch_dims], dtype=dtype, device=self._moments.device)

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

    def _common_shape(self, other: Moments) -> tuple[int, ...]:
        """The shape to which both broadcast."""
        if other.deterministic:
            raise ValueError(
                "other must not be deterministic: no divergence from a point mass is finite; compare with "
                "nll(other.mean), or build it with deterministic=False"
            )
        theirs = tuple(other.mean.shape)
        try:
            shape = tuple(torch.broadcast_shapes(self._shape, theirs))  # type: ignore[no-untyped-call]
        except RuntimeError:
            shape = ()
        if len(shape) != len(self._shape):
            raise ValueError(
                f"other must broadcast with the shape of this distribution, {list(self._shape)}, and have no "
                f"more axes, got {list(theirs)}"
            )
        return shape

    def _kl_of_attributes(self, other: Moments | None) -> Tensor:
        """The KL of each element, of attributes that may have been changed. Where a variance is that of its
        log-variance, it keeps the digits of the op close to 0."""
        dtype = reference.compute_dtype(self._moments.dtype)

        def scales(of: Moments) -> list[Tensor]:
            by_logvar = torch.exp(of.logvar)
            return [t.to(dtype) for t in (of.logvar, getattr(of, "var", by_logvar), by_logvar)]

        mean, (logvar, var, computed) = self.mean.to(dtype), scales(self)
        prior: list[Tensor] = []
        same, terms = var == computed, mean * mean + var - 1.0 - logvar
        if other is not None:
            their_mean, (their_logvar, their_var, computed) = other.mean.to(dtype), scales(other)
            prior = [their_mean, their_logvar]
            same = same & (their_var == computed)
            terms = ((mean - their_mean).square() + var) / their_var - 1.0 - logvar + their_logvar
        parts = torch.broadcast_tensors(mean, logvar, *prior)  # type: ignore[no-untyped-call]
        kl = ops.gaussian_kl(*parts, batch_dims=min(1, mean.ndim), reduction="elementwise")
        return torch.where(same, kl, 0.5 * terms)

    def _sample_rows(self, generators: Sequence[torch.Generator]) -> Tensor:
        if len(generators) == 1:
            return self.sample(generators[0])
        rows = torch.split(self._moments, 1) if self._batch_dims else (self._moments,)
        if len(generators) != len(rows):
            raise ValueError(
                f"generator must be a torch.Generator or a list with one for each of the {len(rows)} rows, "
                f"got {len(generators)}"
            )
        if not self._as_computed("mean", "std"):
            eps = [self._noise(self.mean[:1], generator, None) for generator in generators]
            return self.mean + self.std * torch.cat(eps)
        parts = [
            DiagonalGaussian(row, self.deterministic, self.dim).sample(generator)
            for row, generator in zip(rows, generators, strict=True)
        ]
        return torch.cat(parts)


def _version(t: Tensor) -> int | None:
    """How often `t` was changed in place; None where torch does not count, or a trace cannot compare it."""
    if torch.compiler.is_compiling() or t.is_inference():
        return None
    return t._version


def _outside_inference(moments: Tensor) -> contextlib.AbstractContextManager[Any]:
    """So that what is computed of ordinary moments is no inference tensor, which backward does not take."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled() or moments.is_inference():
        return contextlib.nullcontext()
    return torch.inference_mode(False)


def _source(like: Tensor, generator: torch.Generator | None, rng: Tensor | None) -> dict[str, Any]:
    """Where the ops take their random numbers from."""
    if generator is not None and rng is None and generator.device.type == "cpu" != like.device.type:
        return {"rng": ops.rng_state(torch.empty(0), generator=generator).to(like.device)}
    return {"generator": generator, "rng": rng}
