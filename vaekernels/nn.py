"""The latent layer as a module: `GaussianLatent` for the prior N(0, I), `LearnedPriorLatent` for a learned
one::

    latent = GaussianLatent(16, beta=Linear(1.0, steps=5000), free_bits=0.25)
    z, kl, rate = latent(encoder(x))
    (nll(decoder(z), x) + kl).backward()
    optimizer.step()
    latent.step()

Buffers hold running means of the rates, and the state of the schedules is in `state_dict`. The means leave
out batches with a rate that is NaN or inf, and count them.

Under DistributedDataParallel give `process_group`: then free bits and the running rates are those of the
whole batch, the same on every rank. Without it both are those of the rank's own rows, and DDP copies the
buffers of rank 0 to the others.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, cast

import torch
from torch import Tensor, nn

from vaekernels import _checks, ops
from vaekernels.ops import Clamp, Parameterization, Penalty, Reduction, SampleKL
from vaekernels.schedules._arguments import state_device

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

__all__ = ["GaussianLatent", "LearnedPriorLatent", "Scheduled"]


class Scheduled(Protocol):
    """What the modules need of a schedule; those of `vaekernels.schedules` have it."""

    value: Tensor

    def step(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


class _Number(nn.Module):
    """A constant, or a schedule whose state is kept in `state_dict` as 0-dim tensors (int64 or float64),
    which every checkpoint format takes."""

    def __init__(self, name: str, given: float | Tensor | Scheduled) -> None:
        super().__init__()
        self.schedule: Scheduled | None = None
        self.number: float | None = None
        if _checks.is_array(given):
            given = torch.as_tensor(given, device=state_device(None))
        if isinstance(given, Tensor):
            self.register_buffer("constant", given.detach().clone(), persistent=False)
        elif hasattr(given, "__float__") and not isinstance(given, bool):
            self.number = float(cast(float, given))
        elif isinstance(getattr(given, "value", None), Tensor) and callable(getattr(given, "step", None)):
            if inspect.signature(cast(Scheduled, given).step).parameters:
                raise TypeError(
                    f"{name} must be a number, a tensor or a schedule, got "
                    f"{type(given).__name__}, a controller: "
                    "its step takes a measurement; step it in your loop and multiply the KL by its `value`"
                )
            self.schedule = cast(Scheduled, given)
        else:
            raise TypeError(
                f"{name} must be a number, a tensor or a schedule with `value` and `step`, got "
                f"{type(given).__name__}"
            )

    def on(self, device: torch.device) -> float | Tensor:
        """The value now; a schedule's tensor is copied where it lies on another device."""
        if self.schedule is not None:
            return self.schedule.value.to(device)
        return self.get_buffer("constant") if self.number is None else self.number

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # No checkpoint holds the constant: where `to_empty` gives it other memory, it is written anew.
        kept = self._buffers.get("constant")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if kept is not None and not (moved := self.get_buffer("constant")).is_meta:
            if kept.is_meta:
                raise ValueError(
                    "a tensor of the module was made under torch.device('meta') and has no values; give a "
                    "number, an array or a tensor with device='cpu'"
                )
            moved.copy_(kept)
        return self

    def __repr__(self) -> str:
        if self.schedule is not None:
            return f"{type(self.schedule).__name__}(now {self.schedule.value.item():g})"
        return f"{self.number:g}" if self.number is not None else f"{list(self.get_buffer('constant').shape)}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.schedule is None:
            return
        for key, value in self.schedule.state_dict().items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(
                    f"the state of {type(self.schedule).__name__} must consist of numbers, got "
                    f"{type(value).__name__} for {key!r}"
                )
            dtype = torch.int64 if isinstance(value, int) else torch.float64
            destination[prefix + key] = torch.tensor(value, dtype=dtype, device="cpu")

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        found = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        if self.schedule is None:
            unexpected_keys += [prefix + key for key in found] if strict else []
            return
        known = self.schedule.state_dict()
        if absent := [prefix + key for key in known if key not in found]:
            missing_keys += absent
            return
        unexpected_keys += [prefix + key for key in found if key not in known] if strict else []
        try:
            self.schedule.load_state_dict({key: found[key].item() for key in known})
        except ValueError as error:
            error_msgs.append(f"{prefix[:-1]}: {error}")


class Options(TypedDict, total=False):
    """What `LearnedPriorLatent` has in common with `GaussianLatent`."""

    beta: float | Scheduled | None
    free_bits: float | Tensor | Scheduled | None
    clamp: Clamp
    penalty: Penalty
    batch_dims: int
    group_dims: int | Sequence[int] | None
    reduction: Reduction
    parameterization: Parameterization
    logvar_bounds: tuple[float, float] | None
    process_group: ProcessGroup | None
    deterministic_eval: bool
    momentum: float


class _Latent(nn.Module):
    """What both modules share: options, schedules, running rates."""

    running_rate: Tensor
    num_batches_tracked: Tensor
    num_batches_ignored: Tensor

    def __init__(
        self,
        groups: int | Sequence[int],
        dim: int = 1,
        *,
        beta: float | Scheduled | None = None,
        free_bits: float | Tensor | Scheduled | None = None,
        clamp: Clamp = "batch",
        penalty: Penalty = "floor",
        batch_dims: int = 1,
        group_dims: int | Sequence[int] | None = None,
        reduction: Reduction = "batchmean",
        parameterization: Parameterization = "logvar",
        logvar_bounds: tuple[float, float] | None = None,
        process_group: ProcessGroup | None = None,
        deterministic_eval: bool = False,
        momentum: float = 0.01,
    ) -> None:
        super().__init__()
        shape = tuple(groups) if isinstance(groups, Sequence) else (groups,)
        if not all(hasattr(size, "__index__") and size > 0 for size in shape):
            raise ValueError(f"groups must be a positive int or a shape of them, got {groups!r}")
        if not 0.0 < momentum <= 1.0:
            raise ValueError(f"momentum must be above 0 and at most 1, got {momentum}")
        _checks.check_choice("clamp", clamp, _checks.CLAMPS)
        _checks.check_choice("penalty", penalty, _checks.PENALTIES)
        _checks.check_choice("reduction", reduction, _checks.REDUCTIONS)
        _checks.check_choice("parameterization", parameterization, _checks.PARAMETERIZATIONS)
        self.dim = _checks.index("dim", dim)
        self.batch_dims = _checks.index("batch_dims", batch_dims)
        self.group_dims = group_dims
        self.clamp = clamp
        self.penalty = penalty
        self.reduction = reduction
        self.parameterization = parameterization
        self.logvar_bounds = logvar_bounds
        self.process_group = process_group
        self.deterministic_eval = deterministic_eval
        self.momentum = float(momentum)
        self.beta = None if beta is None else _Number("beta", beta)
        self.free_bits = None if free_bits is None else _Number("free_bits", free_bits)
        self.register_buffer("running_rate", torch.zeros([operator.index(size) for size in shape]))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))
        self.register_buffer("num_batches_ignored", torch.zeros((), dtype=torch.int64))

    def step(self) -> None:
        """Count one training step in every schedule; call it after ``optimizer.step()``, once. A schedule
        that several layers share is stepped once by each that has it: step only one of them, or the schedule
        itself."""
        stepped: list[Scheduled] = []
        for number in (self.beta, self.free_bits):
            schedule = None if number is None else number.schedule
            if schedule is not None and not any(schedule is each for each in stepped):
                schedule.step()
                stepped.append(schedule)

    def reset_running_stats(self) -> None:
        """Forget the running rates."""
        self.running_rate.zero_()
        self.num_batches_tracked.zero_()
        self.num_batches_ignored.zero_()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Half precision would round the steps of the running means away: they move, and stay float32.
        kept = self.running_rate
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.running_rate.dtype != kept.dtype:
            self.running_rate = kept.to(self.running_rate.device)
        return self

    def extra_repr(self) -> str:
        parts = [f"groups={list(self.running_rate.shape)}", f"dim={self.dim}"]
        defaults: dict[str, Any] = {
            "clamp": "batch",
            "penalty": "floor",
            "batch_dims": 1,
            "group_dims": None,
            "reduction": "batchmean",
            "parameterization": "logvar",
            "logvar_bounds": None,
            "deterministic_eval": False,
            "momentum": 0.01,
        }
        for name, default in defaults.items():
            if (value := getattr(self, name)) != default:
                parts.append(f"{name}={value!r}")
        return ", ".join(parts)

    def _run(
        self,
        moments: Tensor,
        prior: tuple[Tensor, ...],
        balance: float | None,
        weight: Tensor | None,
        generator: torch.Generator | None,
        rng: Tensor | None,
    ) -> SampleKL:
        options: dict[str, Any] = {
            "free_bits": None if self.free_bits is None else self.free_bits.on(moments.device),
            "clamp": self.clamp,
            "penalty": self.penalty,
            "batch_dims": self.batch_dims,
            "group_dims": self.group_dims,
            "weight": weight,
            "balance": balance,
            "reduction": self.reduction,
            "parameterization": self.parameterization,
            "logvar_bounds": self.logvar_bounds,
            "process_group": self.process_group,
        }
        if self.deterministic_eval and not self.training:
            kl, rate = ops.gaussian_kl_packed(moments, self.dim, *prior, return_per_group=True, **options)
            z = moments.chunk(2, self.dim)[0].clone()
        else:
            z, kl, rate = ops.sample_kl_packed(
                moments, self.dim, *prior, generator=generator, rng=rng, **options
            )
        self._track(rate.detach())
        return SampleKL(z, kl if self.beta is None else self.beta.on(kl.device) * kl, rate)

    def _track(self, rate: Tensor) -> None:
        if rate.shape != self.running_rate.shape:
            raise ValueError(
                f"groups must be the shape of the rates, {list(rate.shape)} here, got "
                f"{list(self.running_rate.shape)}; see group_dims"
            )
        if not self.training:
            return
        with torch.no_grad():
            rate = rate.to(self.running_rate.dtype)
            # One NaN or inf, of a step that AMP skips, would stay in a running mean for good.
            finite = rate.isfinite().all()
            self.num_batches_tracked += finite
            self.num_batches_ignored += finite.logical_not()
            # A plain mean until 1 / momentum batches are in: the start at zero leaves no trace.
            batches = self.num_batches_tracked.clamp(min=1).to(self.running_rate.dtype)
            share = batches.reciprocal().clamp(min=self.momentum)
            self.running_rate.lerp_(torch.where(finite, rate, self.running_rate), share)


def _forward(
    layer: Any,
    moments: Tensor,
    prior_moments: Tensor | None,
    weight: Tensor | None,
    generator: torch.Generator | None,
    rng: Tensor | None,
) -> SampleKL:
    """The forward pass of `layer`, as one call in a graph of torch.fx."""
    prior, balance = (), None
    if prior_moments is not None:
        prior, balance = layer._prior(moments, prior_moments), layer.balance
    found: SampleKL = layer._run(moments, prior, balance, weight, generator, rng)
    return found


# What torch.fx.symbolic_trace takes as one call. It cannot look inside: shapes and values decide there.
torch.fx.wrap("_forward")


class GaussianLatent(_Latent):
    """moments -> (z, kl, rate) for the posterior N(mu, diag exp(logvar)) and the prior N(0, I), see
    `vaekernels.sample_kl_packed`::

        z    = mu + exp(logvar / 2) * eps
        kl   = beta * sum_g f(rate[g]; free_bits)
        rate = the KL of each group in nats, before free bits and beta: the field `kl_per_group`

    Args:
        groups: the number of groups, or their shape: what one rate each is kept of. By default every latent
            element is a group: 16 for moments [B, 32], (4, 8, 8) for [B, 8, 8, 8]. With `group_dims=1` the
            channels, with `group_dims=()` one group, of shape ().
        dim: the axis of the moments that holds mu, then logvar.
        beta: the weight of the KL: a number or a schedule; None is 1.
        free_bits: the rate of a group below which the loss pushes it no further, in nats: a number, a tensor
            or a schedule.
        clamp, penalty, batch_dims, group_dims, reduction, parameterization, logvar_bounds, process_group: as
            in `vaekernels.gaussian_kl`.
        deterministic_eval: in eval mode z is mu, and no random number is drawn. The KL stays that of the
            posterior.
        momentum: of the running rates: rate <- rate + max(momentum, 1 / batches) (new - rate).

    `running_rate` [groups], `num_batches_tracked` and `num_batches_ignored` are buffers. A batch with a rate
    that is NaN or inf changes the last of them alone. They move in train mode only, and twice
    where activation checkpointing runs the forward pass twice, as those of batch norm do. Schedules move in
    `step()` only, which is called after ``backward()``; in eval mode the same weight applies. A schedule on
    another device is copied at every call; make it on the module's.

    Raises:
        TypeError, ValueError: at construction for unknown strings and values out of range; at the call where
            moments do not fit `groups`, and as the op.
    """

    def forward(
        self,
        moments: Tensor,
        *,
        weight: Tensor | None = None,
        generator: torch.Generator | None = None,
        rng: Tensor | None = None,
    ) -> SampleKL:
        """(z, kl, rate), the rate as the field `kl_per_group`. `weight`: of the rows, a padding mask;
        `generator`, `rng`: where the noise comes from."""
        return _forward(self, moments, None, weight, generator, rng)


class LearnedPriorLatent(_Latent):
    """(posterior moments, prior moments) -> (z, kl, rate) for a learned Gaussian prior, as in recurrent
    state-space models and hierarchical VAEs.

    Args:
        balance: the share of the KL's gradient that goes to the prior (KL balancing, Hafner et al. 2020): 0.8
            moves the prior towards the posterior rather than the reverse. None: the plain gradient of both.

    The others as in `GaussianLatent`. `logvar_bounds` applies to the posterior only; `dim` and
    `parameterization` to both. Gradients reach the prior moments through the KL only.
    """

    def __init__(
        self,
        groups: int | Sequence[int],
        dim: int = 1,
        *,
        balance: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(groups, dim, **options)
        self.balance = None if balance is None else _checks.check_balance(balance, has_prior=True)

    def forward(
        self,
        moments: Tensor,
        prior_moments: Tensor,
        *,
        weight: Tensor | None = None,
        generator: torch.Generator | None = None,
        rng: Tensor | None = None,
    ) -> SampleKL:
        """(z, kl, rate), z from the posterior, the rate as the field `kl_per_group`. Both moments have one
        shape, dtype and device."""
        return _forward(self, moments, prior_moments, weight, generator, rng)

    def sample_prior(
        self,
        prior_moments: Tensor,
        *,
        generator: torch.Generator | None = None,
        rng: Tensor | None = None,
    ) -> Tensor:
        """z from the prior, to generate or to imagine ahead; its mean where the latent is deterministic
        now."""
        if self.deterministic_eval and not self.training:
            return prior_moments.chunk(2, self.dim)[0].clone()
        return ops.reparameterize_packed(
            prior_moments, self.dim, generator=generator, rng=rng, parameterization=self.parameterization
        )

    def extra_repr(self) -> str:
        shown = super().extra_repr()
        return shown if self.balance is None else f"{shown}, balance={self.balance:g}"

    def _prior(self, moments: Tensor, prior_moments: Tensor) -> tuple[Tensor, ...]:
        _checks.packed_shape(moments, self.dim)
        if not isinstance(prior_moments, Tensor) or prior_moments.shape != moments.shape:
            got = (
                list(prior_moments.shape)
                if isinstance(prior_moments, Tensor)
                else type(prior_moments).__name__
            )
            raise ValueError(
                f"prior_moments must have the shape of moments, {list(moments.shape)}, got {got}; expand it: "
                f"prior_moments.expand_as(moments) copies nothing"
            )
        return prior_moments.chunk(2, self.dim)
