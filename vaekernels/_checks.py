"""Argument checks of the public ops. Every error names the argument, what it got and what it takes."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
CLAMPS = ("batch", "sample")
PENALTIES = ("floor", "hinge", "mask")
REDUCTIONS = ("batchmean", "sum", "mean", "none", "elementwise")
PARAMETERIZATIONS = ("logvar", "log_std", "std", "softplus")


def _shape(t: Tensor) -> str:
    return str(list(t.shape))


def _not_a_tensor(name: str, value: object) -> NoReturn:
    told = ""
    if isinstance(value, torch.fx.Proxy):
        told = (
            "; for torch.fx call the function as vaekernels.sample_kl and the like, or write "
            "torch.fx.wrap('sample_kl') in the module that imports it by its name"
        )
    raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}{told}")


def _not_floating(name: str, t: Tensor) -> NoReturn:
    raise TypeError(
        f"{name} must be float32, bfloat16, float16 or float64, got {t.dtype}; convert it, e.g. with .float()"
    )


def whole_number(value: Any) -> int | None:
    """The int that `value` is, NumPy's integers included; None for anything else."""
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
        return None
    return operator.index(value)


def index(name: str, value: Any, takes: str = "an int") -> int:
    """The int that `value` is: NumPy's integers are ints, as for torch. A symbolic size stays what it is."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    if (whole := whole_number(value)) is None:
        raise TypeError(f"{name} must be {takes}, got {type(value).__name__}")
    return whole


def is_array(value: Any) -> bool:
    """Whether this is an array of NumPy, or of what has its interface, and no scalar of it."""
    return not isinstance(value, Tensor) and hasattr(value, "__array__") and getattr(value, "ndim", 0) > 0


def _on_one_device(a: Tensor, b: Tensor) -> bool:
    # `is_cpu` costs a fraction of a comparison of devices.
    return (a.is_cpu and b.is_cpu) or a.device == b.device


def autocast_dtype(*tensors: Any) -> torch.dtype | None:
    """Under autocast, the dtype to which tensors of several floating dtypes are promoted, as in torch's own
    arithmetic; None where they need no promotion, or something else is wrong with them."""
    dtypes = {t.dtype for t in tensors if isinstance(t, Tensor)}
    if len(dtypes) < 2 or not dtypes <= FLOATS:
        return None
    if not all(t is None or isinstance(t, Tensor) for t in tensors):
        return None
    device = tensors[0].device.type
    # CPU and CUDA have it: asked of others alone, for torch.compile of torch 2.6 cannot trace the question.
    available = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    if not available or not torch.is_autocast_enabled(device):
        return None
    return functools.reduce(torch.promote_types, dtypes)


def promoted(*tensors: Any) -> tuple[Any, ...]:
    """The tensors, under autocast in one dtype; None stays None."""
    widest = autocast_dtype(*tensors)
    return tensors if widest is None else tuple(t if t is None else t.to(widest) for t in tensors)


def check_pair(name: str, t: Tensor, other_name: str, other: Tensor | None) -> None:
    """Two floating tensors of one dtype, device and shape."""
    if not isinstance(t, Tensor):
        _not_a_tensor(name, t)
    if not isinstance(other, Tensor):
        _not_a_tensor(other_name, other)
    dtype = t.dtype
    if dtype not in FLOATS:
        _not_floating(name, t)
    if dtype is not other.dtype or not _on_one_device(t, other) or t.shape != other.shape:
        _different(name, t, other_name, other)


def _different(name: str, t: Tensor, other_name: str, other: Tensor) -> NoReturn:
    if other.dtype not in FLOATS:
        _not_floating(other_name, other)
    if t.dtype != other.dtype:
        raise TypeError(
            f"{name} and {other_name} must have one dtype, got {t.dtype} and {other.dtype}; "
            f"convert one, e.g. {other_name}.to({name}.dtype)"
        )
    if t.device != other.device:
        raise ValueError(
            f"{name} and {other_name} must be on one device, got {t.device} and {other.device}; "
            f"move one, e.g. {other_name}.to({name}.device)"
        )
    raise ValueError(
        f"{name} and {other_name} must have one shape, got {_shape(t)} and {_shape(other)}; "
        f"expand the smaller one, e.g. {other_name}.expand_as({name})"
    )


def packed_shape(moments: Tensor, dim: int) -> tuple[int, ...]:
    """The shape of either half of `moments` along `dim`."""
    if not isinstance(moments, Tensor):
        _not_a_tensor("moments", moments)
    if moments.dtype not in FLOATS:
        _not_floating("moments", moments)
    dim = index("dim", dim)
    shape = list(moments.shape)
    if not -len(shape) <= dim < len(shape):
        raise ValueError(f"dim must be an axis of moments, whose shape is {shape}, got {dim}")
    if shape[dim] % 2:
        raise ValueError(
            f"moments must have an even size along dim {dim}, mu then logvar, got shape {shape}; "
            "choose the axis that holds both halves"
        )
    shape[dim] //= 2
    return tuple(shape)


def check_aggregate(z: Tensor, mu: Tensor, logvar: Tensor, own: str | None) -> None:
    """Samples [N, D] and posteriors [M, D]. `own`: what needs the posterior of each sample, where something
    does."""
    check_pair("mu", mu, "logvar", logvar)
    if not isinstance(z, Tensor):
        _not_a_tensor("z", z)
    if z.dtype not in FLOATS:
        _not_floating("z", z)
    if z.dtype != mu.dtype:
        raise TypeError(
            f"z and mu must have one dtype, got {z.dtype} and {mu.dtype}; convert one, e.g. z.to(mu.dtype)"
        )
    if not _on_one_device(z, mu):
        raise ValueError(
            f"z and mu must be on one device, got {z.device} and {mu.device}; move one, e.g. z.to(mu.device)"
        )
    if mu.ndim != 2:
        raise ValueError(
            f"mu must be [posteriors, dimensions], got shape {_shape(mu)}; flatten the latent, e.g. "
            "mu.flatten(1)"
        )
    if z.ndim != 2 or z.shape[1] != mu.shape[1]:
        raise ValueError(
            "z must be [samples, dimensions] with the dimensions of mu, whose shape is "
            f"{_shape(mu)}, got {_shape(z)}"
        )
    if own is not None and z.shape[0] != mu.shape[0]:
        raise ValueError(
            f"{own} needs the posterior of each row of z, got {z.shape[0]} samples and {mu.shape[0]} "
            "posteriors; row i of z has to be drawn from row i of mu and logvar"
        )


def check_posteriors(m: int, d: int, examples: int, own: str | None) -> None:
    """Whether there are enough of them, on all ranks together."""
    if m < 1:
        raise ValueError(f"mu must have at least one posterior, got shape {[m, d]}")
    if own is not None and m < 2:
        raise ValueError(f"{own} needs at least two posteriors, got mu of shape {[m, d]}")
    if own == STRATIFIED and m > examples:
        raise ValueError(
            f"log_weight must be of at least as many examples as mu has posteriors, {m}, got {examples}"
        )


STRATIFIED = "log_weight='stratified'"
LOG_WEIGHTS = ("uniform", "minibatch", "stratified")


def check_aggregate_call(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    per_dim: bool = True,
    log_weight: str = "uniform",
    examples: int = 0,
    leave_one_out: bool = False,
    first: int = 0,
    parameterization: str = "logvar",
    logvar_bounds: Sequence[float] | None = None,
) -> None:
    """The arguments of the operator `aggregate`, which may be called directly."""
    check_choice("log_weight", log_weight, LOG_WEIGHTS)
    check_choice("parameterization", parameterization, PARAMETERIZATIONS)
    check_aggregate(z, mu, logvar, None)
    if logvar_bounds is not None:
        check_bounds(logvar_bounds)
    if log_weight != "uniform":
        log_weight_of(examples)
    own = own_posterior(log_weight, leave_one_out)
    check_posteriors(mu.shape[0], mu.shape[1], examples, own)
    if own is not None and (first < 0 or z.shape[0] + first > mu.shape[0]):
        raise ValueError(
            f"{own} needs the posterior of each row of z, got {z.shape[0]} samples from number {first} on "
            f"and {mu.shape[0]} posteriors"
        )


def own_posterior(log_weight: str, leave_one_out: bool) -> str | None:
    """What needs the posterior of each sample, as messages name it. ValueError where both are given."""
    if leave_one_out and log_weight != "uniform":
        raise ValueError(
            "leave_one_out must be False with log_weight, whose weights are of all posteriors; drop one of "
            "them"
        )
    return "leave_one_out" if leave_one_out else STRATIFIED if log_weight == "stratified" else None


def log_weight_of(log_weight: Any) -> tuple[str, int]:
    """The kind of weights and the number of examples: "uniform" (0), "minibatch" or "stratified"."""
    if log_weight is None:
        return "uniform", 0
    kind, examples = "minibatch", log_weight
    if isinstance(log_weight, (tuple, list)) and len(log_weight) == 2 and log_weight[0] == "stratified":
        kind, examples = log_weight
    examples = whole_number(examples)
    if examples is None:
        raise TypeError(
            "log_weight must be None, the number of examples of the data set, or ('stratified', that "
            f"number), got {log_weight!r}"
        )
    if examples < 1:
        raise ValueError(
            f"log_weight must have at least 1 example, got {examples}; give the number of examples of the "
            "data set"
        )
    return kind, examples


def check_prior(
    shape: Sequence[int],
    like_name: str,
    like: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
) -> None:
    """Both or neither, of mu's shape, dtype and device."""
    if prior_mu is None or prior_logvar is None:
        missing, given = ("prior_mu", "prior_logvar") if prior_mu is None else ("prior_logvar", "prior_mu")
        raise ValueError(
            f"{missing} must be given with {given}, got None; for the prior N(0, I) give neither"
        )
    check_pair("prior_mu", prior_mu, "prior_logvar", prior_logvar)
    if prior_mu.dtype != like.dtype:
        raise TypeError(
            f"prior_mu and {like_name} must have one dtype, got {prior_mu.dtype} and {like.dtype}"
        )
    if not _on_one_device(prior_mu, like):
        raise ValueError(
            f"prior_mu and {like_name} must be on one device, got {prior_mu.device} and {like.device}"
        )
    if tuple(prior_mu.shape) != tuple(shape):
        raise ValueError(
            f"prior_mu must have the shape of mu, {list(shape)}, got {_shape(prior_mu)}; expand it: "
            f"prior_mu.expand({list(shape)}) copies nothing"
        )


def check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def check_bounds(bounds: Sequence[float]) -> tuple[float, float]:
    """(lo, hi) as floats."""
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise ValueError(f"logvar_bounds must be None or a pair (lo, hi) of numbers, got {bounds!r}")
    lo, hi = (_number("logvar_bounds", value) for value in bounds)
    if not lo <= hi:
        raise ValueError(
            f"logvar_bounds must be (lo, hi) with lo <= hi, got {bounds!r}; swap or correct them"
        )
    return lo, hi


def _number(name: str, value: Any) -> float:
    if isinstance(value, (bool, str, Tensor)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def check_num_samples(num_samples: Any) -> int:
    count = index("num_samples", num_samples, "None or an int")
    if count < 0:
        raise ValueError(f"num_samples must be at least 0, got {count}; None gives z the shape of mu")
    return count


def check_random(like: Tensor, rng: Tensor | None, generator: torch.Generator | None) -> None:
    """Where the random numbers come from: one source, on `like`'s device."""
    if generator is not None:
        if rng is not None:
            raise ValueError("rng and generator must not be given together; drop one of them")
        if torch.compiler.is_compiling():
            raise ValueError(
                "generator must be None while compiling, got a torch.Generator; "
                "give rng=vaekernels.rng_state(mu, generator=generator), drawn outside the compiled function"
            )
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        if generator.device.type != like.device.type:
            raise ValueError(
                f"generator must be on the tensors' device, {like.device}, got one on {generator.device}; "
                f"make it with torch.Generator({str(like.device)!r})"
            )
    if rng is None:
        return
    if not isinstance(rng, Tensor):
        _not_a_tensor("rng", rng)
    if rng.dtype != torch.int64 or rng.ndim != 1 or rng.shape[0] != 2:
        raise ValueError(
            f"rng must be int64 [2] (seed, offset), got {rng.dtype} {_shape(rng)}; "
            "make it with vaekernels.rng_state"
        )
    if not _on_one_device(rng, like):
        raise ValueError(
            f"rng must be on the tensors' device, {like.device}, got {rng.device}; move it there"
        )
    if _readable(rng) and (offset := rng.tolist()[1]) % 4:
        raise ValueError(
            f"rng must have an offset that is a multiple of 4, got {offset}; see vaekernels.rng_state"
        )


# Inside a transform of torch.func no tensor of torch 2.6 shows its values. From 2.11 on those do that the
# transform does not wrap; between them nobody has looked.
_TRANSFORMS_HIDE = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11)


def _readable(t: Tensor) -> bool:
    # Fake tensors, functorch's wrappers and what is being traced claim the CPU too, yet show no values.
    return (
        t.is_cpu
        and type(t) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._functorch.is_functorch_wrapped_tensor(t)
        and not (_TRANSFORMS_HIDE and torch._C._functorch.peek_interpreter_stack() is not None)
    )


def group_axes(ndim: int, batch_dims: int, group_dims: int | Sequence[int]) -> list[int]:
    """The axes of mu that index groups, in mu's order."""
    given = group_dims if isinstance(group_dims, (tuple, list)) else [group_dims]
    axes: list[int] = []
    for axis in given:
        axis = whole_number(axis)
        if axis is None:
            raise TypeError(f"group_dims must be None, an int or ints, got {group_dims!r}")
        if not -ndim <= axis < ndim:
            raise ValueError(f"group_dims must be axes of mu, which has {ndim}, got {axis} in {group_dims!r}")
        axes.append(axis % ndim)
        if axes[-1] < batch_dims:
            raise ValueError(
                f"group_dims must be latent axes, got {axis} in {group_dims!r}, a batch axis "
                f"(batch_dims={batch_dims}); leave it out or lower batch_dims"
            )
    if len(set(axes)) != len(axes):
        raise ValueError(f"group_dims must name each axis once, got {group_dims!r}; drop the repeated one")
    return sorted(axes)


def check_batch_dims(ndim: int, batch_dims: int) -> int:
    batch_dims = index("batch_dims", batch_dims)
    if not 0 <= batch_dims <= ndim:
        raise ValueError(
            f"batch_dims must be between 0 and {ndim}, the number of mu's axes, got {batch_dims}"
        )
    return batch_dims


def check_reduction(
    reduction: str, clamp: str, free_bits: object, weight: object, process_group: object
) -> None:
    """What "none" and "elementwise" cannot be combined with."""
    if reduction not in ("none", "elementwise"):
        return
    if free_bits is not None and reduction == "elementwise":
        raise ValueError("reduction='elementwise' takes no free_bits; drop them or choose another reduction")
    if free_bits is not None and clamp == "batch":
        raise ValueError(
            "reduction='none' does not fit clamp='batch' with free_bits, which clamps the mean over the batch"
            "; use clamp='sample' or reduction='batchmean'"
        )
    if weight is not None:
        raise ValueError(
            f"weight must be None with reduction={reduction!r}, which averages nothing; apply it yourself"
        )
    if process_group is not None:
        raise ValueError(
            f"process_group must be None with reduction={reduction!r}, which has nothing to reduce; "
            "use 'batchmean', 'sum' or 'mean'"
        )


def check_weight(weight: Tensor, batch_shape: Sequence[int], like: Tensor) -> None:
    if not isinstance(weight, Tensor):
        _not_a_tensor("weight", weight)
    if weight.requires_grad:
        raise ValueError("weight must not require grad, it is a constant of the loss; give weight.detach()")
    if weight.dtype.is_complex:
        raise TypeError(f"weight must be of a real or bool dtype, got {weight.dtype}")
    if tuple(weight.shape) != tuple(batch_shape):
        raise ValueError(
            f"weight must have the batch shape {list(batch_shape)}, got {_shape(weight)}; "
            "see batch_dims, or expand it"
        )
    if not _on_one_device(weight, like):
        raise ValueError(
            f"weight must be on the tensors' device, {like.device}, got {weight.device}; move it there"
        )


def check_balance(balance: Any, has_prior: bool) -> float:
    value = _number("balance", balance)
    if not 0.0 <= value <= 1.0:
        raise ValueError(
            f"balance must be between 0 and 1, the prior's share of the gradient, got {balance!r}"
        )
    if not has_prior:
        raise ValueError(
            "balance needs a learned prior, got none; give prior_mu and prior_logvar, or drop balance"
        )
    return value


def free_bits_number(free_bits: Any) -> float:
    value = free_bits if type(free_bits) is float else _number("free_bits", free_bits)
    if not value >= 0.0:
        raise ValueError(
            f"free_bits must be non-negative and not NaN, got {value}; it is a rate in nats, None is no clamp"
        )
    return value


def free_bits_tensor(free_bits: Tensor, group_shape: Sequence[int], like: Tensor) -> Tensor:
    """The thresholds, expanded to the group shape, in the dtype of the arithmetic."""
    if free_bits.requires_grad:
        raise ValueError(
            "free_bits must not require grad, it is a constant of the loss; give free_bits.detach()"
        )
    if free_bits.dtype.is_complex or free_bits.dtype == torch.bool:
        raise TypeError(f"free_bits must be of a real dtype, got {free_bits.dtype}")
    if not _on_one_device(free_bits, like):
        raise ValueError(
            f"free_bits must be on the tensors' device, {like.device}, got {free_bits.device}; "
            "move it there or give a number"
        )
    shape, target = tuple(free_bits.shape), tuple(group_shape)
    fits = len(shape) <= len(target) and all(
        a == b or a == 1 for a, b in zip(reversed(shape), reversed(target), strict=False)
    )
    if not fits:
        raise ValueError(
            f"free_bits must broadcast to the group shape {list(target)}, got {list(shape)}; see group_dims"
        )
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if shape == target and free_bits.dtype is dtype and free_bits.is_contiguous():
        return free_bits
    return free_bits.to(dtype).expand(target).contiguous()


def check_values(free_bits: Tensor | None, weight: Tensor | None) -> None:
    """The values inside CPU tensors; those on other devices are never waited for."""
    for name, t in (("free_bits", free_bits), ("weight", weight)):
        if t is None or not _readable(t):
            continue
        flat = t.detach().reshape(-1)
        bad = ~(flat >= 0)
        if bool(bad.any()):
            index = int(bad.to(torch.uint8).argmax())
            raise ValueError(
                f"{name} must be non-negative and not NaN, got {flat[index].item()} at index {index}; "
                f"correct it, e.g. with {name}.clamp(min=0)"
            )
