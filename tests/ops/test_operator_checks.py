"""Called directly, every operator checks its arguments itself, on the CPU and without memory (meta): with the
messages of the public functions, and never by a crash or by memory that nobody wrote.

What is asked of the operators, and their tensors, are listed in `NAMES`; `call` makes calls of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import vaekernels as vk

NAN = float("nan")
SAMPLE = ["reparameterize", "reparameterize_draw"]
KL = ["gaussian_kl", "sample_kl", "sample_kl_draw"]
BACKWARD = ["latent_backward"]
ALL = SAMPLE + KL + BACKWARD
DRAWN = [name for name in ALL if "reparameterize" in name or "sample" in name]
WITH_STATE = ["reparameterize", "sample_kl"]
NAMES = {
    "reparameterize": ["mu", "logvar", "rng"],
    "reparameterize_draw": ["mu", "logvar"],
    "gaussian_kl": ["mu", "logvar", "prior_mu", "prior_logvar"],
    "sample_kl": ["mu", "logvar", "rng", "prior_mu", "prior_logvar"],
    "sample_kl_draw": ["mu", "logvar", "prior_mu", "prior_logvar"],
    "latent_backward": [
        "grad_z", "grad_kl", "grad_kl_per_group", "mu", "logvar", "rng", "prior_mu", "prior_logvar", "gate",
        "open",
    ],
}  # fmt: skip


def t(device: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


def right(op: str, device: str) -> dict[str, Any]:
    """Arguments of [2, 3] that nothing is wrong with."""
    given: dict[str, Any] = dict.fromkeys(NAMES[op])
    given |= {"mu": t(device, 2, 3), "logvar": t(device, 2, 3)}
    if "rng" in given:
        given["rng"] = torch.zeros(2, dtype=torch.int64, device=device)
    if op in BACKWARD:
        given |= {"grad_z": t(device, 2, 3), "grad_kl": t(device), "grad_kl_per_group": t(device, 3)}
        given |= {"gate": t(device, 1), "open": t(device, 0, dtype=torch.uint8)}
    return given


def call(op: str, given: dict[str, Any], packed: bool = False) -> Any:
    """`op` by the operators: what is wanted of `latent` and `latent_draw`, or `latent_backward`."""
    options = dict(given)
    first = options.pop("moments") if packed else options.pop("mu")
    second, dim = (None, options.pop("dim")) if packed else (options.pop("logvar"), 1)
    if packed:
        options.pop("mu", None), options.pop("logvar", None)
    operators = torch.ops.vaekernels
    if op == "latent_backward":
        grads = [options.pop(name) for name in ("grad_z", "grad_kl", "grad_kl_per_group")]
        names = ("rng", "prior_mu", "prior_logvar", "gate", "open")
        return operators.latent_backward(
            *grads, first, second, dim, *(options.pop(name) for name in names), **options
        )
    noise = options.pop("rng", None)
    prior = options.pop("prior_mu", None), options.pop("prior_logvar", None)
    wanted = {"sample": op != "gaussian_kl", "kl": "reparameterize" not in op}
    operator = operators.latent_draw if op.endswith("_draw") else operators.latent
    return operator(first, second, dim, noise, *prior, **wanted, **options)


# name: (operators, what changes, given the device and another one; the error, the message)
Changes = Callable[[str, str], dict[str, Any]]
BAD: dict[str, tuple[list[str], Changes, type[Exception], str]] = {
    "shapes": (
        ALL,
        lambda d, o: {"logvar": t(d, 2, 4)},
        ValueError,
        r"mu and logvar must have one shape, got \[2, 3\] and \[2, 4\]; expand",
    ),
    "dtypes": (
        ALL,
        lambda d, o: {"logvar": t(d, 2, 3, dtype=torch.float64)},
        TypeError,
        r"mu and logvar must have one dtype, got torch.float32 and torch.float64; convert",
    ),
    "devices": (
        ALL,
        lambda d, o: {"logvar": t(o, 2, 3)},
        ValueError,
        r"mu and logvar must be on one device, got (cpu|meta) and (cpu|meta); move",
    ),
    "integers": (
        ALL,
        lambda d, o: {"mu": t(d, 2, 3, dtype=torch.int64), "logvar": t(d, 2, 3, dtype=torch.int64)},
        TypeError,
        r"mu must be float32, bfloat16, float16 or float64, got torch.int64; convert",
    ),
    "complex_logvar": (
        ALL,
        lambda d, o: {"logvar": t(d, 2, 3, dtype=torch.complex64)},
        TypeError,
        r"logvar must be float32, bfloat16, float16 or float64, got torch.complex64",
    ),
    "parameterization": (
        ALL,
        lambda d, o: {"parameterization": "var"},
        ValueError,
        r"parameterization must be one of 'logvar', 'log_std', 'std', 'softplus', got 'var'",
    ),
    "bounds_of_one": (
        ALL,
        lambda d, o: {"logvar_bounds": [2.0]},
        ValueError,
        r"logvar_bounds must be None or a pair \(lo, hi\) of numbers, got .2.0",
    ),
    "bounds_reversed": (
        ALL,
        lambda d, o: {"logvar_bounds": [2.0, -2.0]},
        ValueError,
        r"logvar_bounds must be \(lo, hi\) with lo <= hi, got .2.0, -2.0",
    ),
    "bounds_nan": (
        ALL,
        lambda d, o: {"logvar_bounds": [NAN, 2.0]},
        ValueError,
        r"logvar_bounds .* got .nan, 2",
    ),
    # the state
    "rng_dtype": (
        WITH_STATE + BACKWARD,
        lambda d, o: {"rng": t(d, 2)},
        ValueError,
        r"rng must be int64 \[2\] \(seed, offset\), got torch.float32 \[2\]; make it",
    ),
    "rng_shape": (
        WITH_STATE + BACKWARD,
        lambda d, o: {"rng": t(d, 3, dtype=torch.int64)},
        ValueError,
        r"rng must be int64 \[2\] \(seed, offset\), got torch.int64 \[3\]; make it",
    ),
    "rng_axes": (
        WITH_STATE + BACKWARD,
        lambda d, o: {"rng": t(d, 2, 1, dtype=torch.int64)},
        ValueError,
        r"rng .*\[2, 1\]",
    ),
    "rng_device": (
        WITH_STATE + BACKWARD,
        lambda d, o: {"rng": t(o, 2, dtype=torch.int64)},
        ValueError,
        r"rng must be on the tensors' device, (cpu|meta), got (cpu|meta); move it there",
    ),
    "num_samples": (
        DRAWN,
        lambda d, o: {"num_samples": -1},
        ValueError,
        r"num_samples must be at least 0, got -1; None gives z the shape of mu",
    ),
    # the prior
    "prior_mu_alone": (
        KL + BACKWARD,
        lambda d, o: {"prior_mu": t(d, 2, 3)},
        ValueError,
        r"prior_logvar must be given with prior_mu, got None; for the prior N\(0, I\) give neither",
    ),
    "prior_logvar_alone": (
        KL + BACKWARD,
        lambda d, o: {"prior_logvar": t(d, 2, 3)},
        ValueError,
        r"prior_mu must be given with prior_logvar, got None",
    ),
    "prior_shapes": (
        KL + BACKWARD,
        lambda d, o: {"prior_mu": t(d, 2, 3), "prior_logvar": t(d, 3)},
        ValueError,
        r"prior_mu and prior_logvar must have one shape, got \[2, 3\] and \[3\]",
    ),
    "prior_shape": (
        KL + BACKWARD,
        lambda d, o: {"prior_mu": t(d, 1, 3), "prior_logvar": t(d, 1, 3)},
        ValueError,
        r"prior_mu must have the shape of mu, \[2, 3\], got \[1, 3\]; expand it: prior_mu.expand",
    ),
    "prior_dtype": (
        KL + BACKWARD,
        lambda d, o: dict.fromkeys(("prior_mu", "prior_logvar"), t(d, 2, 3, dtype=torch.float64)),
        TypeError,
        r"prior_mu and mu must have one dtype, got torch.float64 and torch.float32",
    ),
    "prior_device": (
        KL + BACKWARD,
        lambda d, o: dict.fromkeys(("prior_mu", "prior_logvar"), t(o, 2, 3)),
        ValueError,
        r"prior_mu and mu must be on one device",
    ),
    "prior_logvar_device": (
        KL + BACKWARD,
        lambda d, o: {"prior_mu": t(d, 2, 3), "prior_logvar": t(o, 2, 3)},
        ValueError,
        r"prior_mu and prior_logvar must be on one device",
    ),
    "balance_without_prior": (
        KL + BACKWARD,
        lambda d, o: {"balance": 0.5},
        ValueError,
        r"balance needs a learned prior, got none; give prior_mu and prior_logvar, or drop balance",
    ),
    "balance": (
        KL + BACKWARD,
        lambda d, o: dict.fromkeys(("prior_mu", "prior_logvar"), t(d, 2, 3)) | {"balance": 1.5},
        ValueError,
        r"balance must be between 0 and 1, the prior's share of the gradient, got 1.5",
    ),
    "balance_nan": (
        KL + BACKWARD,
        lambda d, o: dict.fromkeys(("prior_mu", "prior_logvar"), t(d, 2, 3)) | {"balance": NAN},
        ValueError,
        r"balance must be between 0 and 1, .*, got nan",
    ),
    # axes
    "batch_dims": (
        KL + BACKWARD,
        lambda d, o: {"batch_dims": 9},
        ValueError,
        r"batch_dims must be between 0 and 2, the number of mu's axes, got 9",
    ),
    "batch_dims_negative": (
        KL + BACKWARD,
        lambda d, o: {"batch_dims": -1},
        ValueError,
        r"batch_dims .*got -1",
    ),
    "group_dims": (
        KL + BACKWARD,
        lambda d, o: {"group_dims": [7]},
        ValueError,
        r"group_dims must be axes of mu, which has 2, got 7 in .7",
    ),
    "group_dims_negative": (
        KL + BACKWARD,
        lambda d, o: {"group_dims": [-3]},
        ValueError,
        r"group_dims .*got -3",
    ),
    "group_dims_of_the_batch": (
        KL + BACKWARD,
        lambda d, o: {"group_dims": [0]},
        ValueError,
        r"group_dims must be latent axes, got 0 in .*, a batch axis \(batch_dims=1\); leave it out",
    ),
    "group_dims_twice": (
        KL + BACKWARD,
        lambda d, o: {"group_dims": [1, -1]},
        ValueError,
        r"group_dims must name each axis once, got .1, -1.; drop the repeated one",
    ),
    # options
    "clamp": (
        KL + BACKWARD,
        lambda d, o: {"clamp": "row"},
        ValueError,
        r"clamp .*'batch', 'sample', got 'row'",
    ),
    "penalty": (
        KL,
        lambda d, o: {"penalty": "max"},
        ValueError,
        r"penalty .*'floor', 'hinge', 'mask', got 'max'",
    ),
    "reduction": (
        KL + BACKWARD,
        lambda d, o: {"reduction": "avg"},
        ValueError,
        r"reduction .*'batchmean', 'sum', 'mean', 'none', 'elementwise', got 'avg'",
    ),
    "none_with_batch_clamp": (
        KL,
        lambda d, o: {"reduction": "none", "free_bits": 0.5},
        ValueError,
        r"reduction='none' does not fit clamp='batch' with free_bits",
    ),
    "elementwise_with_free_bits": (
        KL,
        lambda d, o: {"reduction": "elementwise", "free_bits": 0.5, "clamp": "sample"},
        ValueError,
        r"reduction='elementwise' takes no free_bits; drop them or choose another reduction",
    ),
    "weight_with_none": (
        KL,
        lambda d, o: {"reduction": "none", "weight": t(d, 2)},
        ValueError,
        r"weight must be None with reduction='none', which averages nothing; apply it yourself",
    ),
    "weight_with_elementwise": (
        KL,
        lambda d, o: {"reduction": "elementwise", "weight": t(d, 2)},
        ValueError,
        r"weight must be None with reduction='elementwise'",
    ),
    # constants
    "weight_shape": (
        KL + BACKWARD,
        lambda d, o: {"weight": t(d, 3)},
        ValueError,
        r"weight must have the batch shape \[2\], got \[3\]; see batch_dims, or expand it",
    ),
    "weight_that_would_broadcast": (
        KL + BACKWARD,
        lambda d, o: {"weight": t(d)},
        ValueError,
        r"weight must have the batch shape \[2\], got \[\]",
    ),
    "weight_device": (
        KL + BACKWARD,
        lambda d, o: {"weight": t(o, 2)},
        ValueError,
        r"weight must be on the tensors' device",
    ),
    "weight_complex": (
        KL + BACKWARD,
        lambda d, o: {"weight": t(d, 2, dtype=torch.complex64)},
        TypeError,
        r"weight must be of a real or bool dtype, got torch.complex64",
    ),
    "weight_requires_grad": (
        KL + BACKWARD,
        lambda d, o: {"weight": t(d, 2).requires_grad_()},
        ValueError,
        r"weight must not require grad, it is a constant of the loss; give weight.detach\(\)",
    ),
    "free_bits": (
        KL,
        lambda d, o: {"free_bits": -0.5},
        ValueError,
        r"free_bits must be non-negative and not NaN, got -0.5; it is a rate in nats, None is no clamp",
    ),
    "free_bits_nan": (
        KL,
        lambda d, o: {"free_bits": NAN},
        ValueError,
        r"free_bits must be non-neg.*, got nan",
    ),
    "free_bits_shape": (
        KL,
        lambda d, o: {"free_bits_per_group": t(d, 7)},
        ValueError,
        r"free_bits must broadcast to the group shape \[3\], got \[7\]; see group_dims",
    ),
    "free_bits_axes": (
        KL,
        lambda d, o: {"free_bits_per_group": t(d, 2, 3)},
        ValueError,
        r"free_bits must broadcast .*\[2, 3\]",
    ),
    "free_bits_device": (
        KL,
        lambda d, o: {"free_bits_per_group": t(o, 3)},
        ValueError,
        r"free_bits must be on the tensors' device",
    ),
    "free_bits_complex": (
        KL,
        lambda d, o: {"free_bits_per_group": t(d, 3, dtype=torch.complex64)},
        TypeError,
        r"free_bits must be of a real dtype, got torch.complex64",
    ),
    "free_bits_bool": (
        KL,
        lambda d, o: {"free_bits_per_group": t(d, 3, dtype=torch.bool)},
        TypeError,
        r"free_bits must be of a real dtype, got torch.bool",
    ),
    "free_bits_requires_grad": (
        KL,
        lambda d, o: {"free_bits_per_group": t(d, 3).requires_grad_()},
        ValueError,
        r"free_bits must not require grad, it is a constant of the loss; give free_bits.detach\(\)",
    ),
    "free_bits_twice": (
        KL,
        lambda d, o: {"free_bits": 0.5, "free_bits_per_group": t(d, 3)},
        ValueError,
        r"free_bits and free_bits_per_group must not be given together",
    ),
    # a single number has no axes: none to wrap around to
    "scalar_group_dims": (
        KL + BACKWARD,
        lambda d, o: {"mu": t(d), "logvar": t(d), "batch_dims": 0, "group_dims": [0]},
        ValueError,
        r"group_dims must be axes of mu, which has 0, got 0 in .0",
    ),
    "scalar_group_dims_negative": (
        KL + BACKWARD,
        lambda d, o: {"mu": t(d), "logvar": t(d), "batch_dims": 0, "group_dims": [-1]},
        ValueError,
        r"group_dims must be axes of mu, which has 0, got -1 in .-1",
    ),
    "scalar_batch_dims": (
        KL + BACKWARD,
        lambda d, o: {"mu": t(d), "logvar": t(d)},
        ValueError,
        r"batch_dims must be between 0 and 0, the number of mu's axes, got 1",
    ),
    # backward
    "prior_grads_without_prior": (
        BACKWARD,
        lambda d, o: {"prior_grads": True},
        ValueError,
        r"prior_grads needs a learned prior, got none; give prior_mu and prior_logvar",
    ),
    "grad_z_shape": (BACKWARD, lambda d, o: {"grad_z": t(d, 2, 4)}, ValueError, r"grad_z must be .*\[2, 4\]"),
    "grad_z_axes": (BACKWARD, lambda d, o: {"grad_z": t(d, 5, 1, 2, 3)}, ValueError, r"grad_z must be .*5"),
    "grad_z_dtype": (
        BACKWARD,
        lambda d, o: {"grad_z": t(d, 2, 3, dtype=torch.float64)},
        TypeError,
        r"grad_z .*torch.float64",
    ),
    "grad_z_device": (BACKWARD, lambda d, o: {"grad_z": t(o, 2, 3)}, ValueError, r"grad_z must be on the"),
    "grad_z_without_rng": (
        BACKWARD,
        lambda d, o: {"rng": None},
        ValueError,
        r"rng must be given with grad_z",
    ),
    "grad_kl_shape": (
        BACKWARD,
        lambda d, o: {"grad_kl": t(d, 2)},
        ValueError,
        r"grad_kl must be .*got \[2\]",
    ),
    "grad_kl_rows": (
        BACKWARD,
        lambda d, o: {"grad_kl": t(d, 3), "reduction": "none"},
        ValueError,
        r"grad_kl must be .*\[3\]",
    ),
    "grad_kl_elements": (
        BACKWARD,
        lambda d, o: {"grad_kl": t(d, 3, 2), "reduction": "elementwise"},
        ValueError,
        r"grad_kl .*\[3, 2\]",
    ),
    "grad_kl_dtype": (
        BACKWARD,
        lambda d, o: {"grad_kl": t(d, dtype=torch.complex64)},
        TypeError,
        r"grad_kl .*torch.complex64",
    ),
    "grad_kl_device": (BACKWARD, lambda d, o: {"grad_kl": t(o)}, ValueError, r"grad_kl must be on the"),
    "grad_rate_shape": (
        BACKWARD,
        lambda d, o: {"grad_kl_per_group": t(d, 2)},
        ValueError,
        r"grad_kl_per_group must be .*\[2\]",
    ),
    "grad_rate_dtype": (
        BACKWARD,
        lambda d, o: {"grad_kl_per_group": t(d, 3, dtype=torch.int64)},
        TypeError,
        r"grad_kl_per_group .*torch.int64",
    ),
    "grad_rate_device": (
        BACKWARD,
        lambda d, o: {"grad_kl_per_group": t(o, 3)},
        ValueError,
        r"grad_kl_per_group must be on the",
    ),
    "no_gate": (
        BACKWARD,
        lambda d, o: {"gate": None},
        ValueError,
        r"gate must be given with a gradient of the KL",
    ),
    "no_open": (
        BACKWARD,
        lambda d, o: {"open": None},
        ValueError,
        r"open must be given with a gradient of the KL",
    ),
    "gate_size": (BACKWARD, lambda d, o: {"gate": t(d, 2)}, ValueError, r"gate must be \[1\] .*got \[2\]"),
    "gate_empty": (BACKWARD, lambda d, o: {"gate": t(d, 0)}, ValueError, r"gate must be \[1\] .*got \[0\]"),
    "gate_axes": (
        BACKWARD,
        lambda d, o: {"gate": t(d, 1, 3)},
        ValueError,
        r"gate must be \[1\] .*got \[1, 3\]",
    ),
    "gate_dtype": (
        BACKWARD,
        lambda d, o: {"gate": t(d, 1, dtype=torch.float64)},
        TypeError,
        r"gate .*torch.float64",
    ),
    "gate_device": (BACKWARD, lambda d, o: {"gate": t(o, 1)}, ValueError, r"gate must be on the"),
    "open_size": (
        BACKWARD,
        lambda d, o: {"open": t(d, 2, dtype=torch.uint8)},
        ValueError,
        r"open must be empty .*got \[2\]",
    ),
    "open_dtype": (BACKWARD, lambda d, o: {"open": t(d, 0)}, TypeError, r"open .*torch.float32"),
    "open_device": (
        BACKWARD,
        lambda d, o: {"open": t(o, 0, dtype=torch.uint8)},
        ValueError,
        r"open must be on the",
    ),
}
CASES = [(name, op) for name, (ops, *_) in BAD.items() for op in ops]
# What the public functions can be asked: they take one free_bits, and nothing of backward's.
PUBLIC = [
    (name, op)
    for name, op in CASES
    if op in ("reparameterize", "gaussian_kl", "sample_kl") and name != "free_bits_twice"
]


def packed_of(given: dict[str, Any]) -> dict[str, Any]:
    """The same with mu and logvar in one tensor."""
    rest = {name: value for name, value in given.items() if name not in ("mu", "logvar")}
    return rest | {
        "mu": None,
        "logvar": None,
        "moments": torch.cat([given["mu"], given["logvar"]], 1),
        "dim": 1,
    }


def without(given: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in names}


@pytest.mark.parametrize("place", ["cpu", "meta"])
@pytest.mark.parametrize("name, op", CASES, ids=map("-".join, CASES))
def test_what_is_wrong_is_named(name, op, place, kernels):
    _, changes, error, message = BAD[name]
    other = "meta" if place == "cpu" else "cpu"
    given = right(op, place) | changes(place, other)
    with pytest.raises(error, match=message):
        call(op, given)
    mu, logvar = given["mu"], given["logvar"]
    alike = mu.dtype == logvar.dtype and mu.device == logvar.device and mu.shape == logvar.shape
    if alike and mu.dim() == 2 and mu.is_floating_point():
        halves = without(packed_of(given), "mu", "logvar") | {"mu": None, "logvar": None}
        with pytest.raises(error, match=message):
            call(op, halves, packed=True)


PACKED = {
    "odd": (
        lambda d: {"moments": t(d, 2, 5), "dim": 1},
        ValueError,
        r"moments must have an even size along dim 1, mu then logvar, got shape \[2, 5\]; choose the axis",
    ),
    "dim": (
        lambda d: {"moments": t(d, 2, 6), "dim": 2},
        ValueError,
        r"dim must be an axis of moments, whose shape is \[2, 6\], got 2",
    ),
    "dim_negative": (lambda d: {"moments": t(d, 2, 6), "dim": -3}, ValueError, r"dim must be .*, got -3"),
    "scalar": (lambda d: {"moments": t(d), "dim": 0}, ValueError, r"dim must be an axis .* is \[\], got 0"),
    "scalar_negative": (lambda d: {"moments": t(d), "dim": -1}, ValueError, r"dim must be an axis .* got -1"),
    "integers": (
        lambda d: {"moments": t(d, 2, 6, dtype=torch.int32), "dim": 1},
        TypeError,
        r"moments must be float32, bfloat16, float16 or float64, got torch.int32",
    ),
}


@pytest.mark.parametrize("place", ["cpu", "meta"])
@pytest.mark.parametrize("op", ALL)
@pytest.mark.parametrize("name", PACKED)
def test_what_is_wrong_with_packed_moments_is_named(name, op, place, kernels):
    changes, error, message = PACKED[name]
    with pytest.raises(error, match=message):
        call(op, right(op, place) | changes(place), packed=True)


@pytest.mark.parametrize("place", ["cpu", "meta"])
@pytest.mark.parametrize("op", WITH_STATE + BACKWARD)
def test_a_state_may_lie_anywhere_and_its_offset_is_looked_at_where_it_can_be(op, place, kernels):
    given = right(op, place)
    call(op, given | {"rng": torch.zeros(4, dtype=torch.int64, device=place)[::2]})
    if place == "cpu":
        apart = torch.tensor([1, 0, 8, 0])[::2]
        assert all(map(same, call(op, given | {"rng": apart}), call(op, given | {"rng": apart.clone()})))
        with pytest.raises(ValueError, match="rng must have an offset that is a multiple of 4, got 6"):
            call(op, given | {"rng": torch.tensor([1, 6])})


def same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


@pytest.mark.parametrize("name, op", PUBLIC, ids=map("-".join, PUBLIC))
def test_the_public_functions_say_the_same(name, op, kernels):
    _, changes, error, _ = BAD[name]
    given = right(op, "cpu") | changes("cpu", "meta")
    with pytest.raises(error) as ours:
        call(op, given)
    options = {("free_bits" if n == "free_bits_per_group" else n): v for n, v in given.items()}
    leaves = [options.pop("mu"), options.pop("logvar")]
    with pytest.raises(error) as public:
        getattr(vk, op)(*leaves, **options)
    texts = (re.sub(r"[\[\]()]|,(?=\))", "", str(raised.value)) for raised in (ours, public))
    one, other = (text.replace(",;", ";").rstrip(",") for text in texts)
    assert one == other


@pytest.mark.parametrize("op", ALL)
def test_nothing_is_wrong_with_the_right_arguments(op, kernels):
    """And the shapes that are foretold without memory are those of the results."""
    for options in [{}] if op in SAMPLE else [{}, {"batch_dims": 0, "group_dims": [1]}]:
        shapes = []
        for device in ("cpu", "meta"):
            given = right(op, device) | options
            out = call(op, given)
            shapes.append([(r.shape, r.dtype) for r in out if r is not None])
            halves = call(op, packed_of(given), packed=True)
            assert all(r.device.type == device for r in (*out, *halves) if r is not None)
        assert all(one == shapes[0] for one in shapes)


def test_one_tensor_without_memory_is_an_error_not_memory_that_nobody_wrote(kernels):
    """Such calls go to the kernels that foretell shapes, whose results were on the CPU."""
    x, rng = torch.randn(3, 4), torch.tensor([1, 0])
    for op in ALL:
        given = right(op, "cpu")
        for name, value in given.items():
            if isinstance(value, Tensor):
                with pytest.raises(ValueError, match="device"):
                    call(op, given | {name: value.to("meta")})
    with pytest.raises(ValueError, match="device"):
        torch.ops.vaekernels.latent(x, x.to("meta"), 1, rng, kl=False)


def test_a_tensor_without_memory_is_an_error_where_it_is_not_used_too(kernels):
    x, away = torch.randn(3, 4), {"device": "meta"}
    rng, state = torch.tensor([1, 0]), torch.zeros(2, dtype=torch.int64, **away)
    weight, bits, gate = torch.ones(3, **away), torch.ones(4, **away), torch.ones(1, **away)
    is_open = torch.zeros(0, dtype=torch.uint8, **away)
    ops = torch.ops.vaekernels
    alone, kl = {"kl": False}, {"sample": False}
    calls = {
        "weight": lambda: ops.latent(x, x, 1, rng, weight=weight, **alone),
        "free_bits_per_group": lambda: ops.latent_draw(x, x, 1, None, free_bits_per_group=bits, **alone),
        "rng": lambda: ops.latent(x, x, 1, state, **kl),
        "gate": lambda: ops.latent_backward(x, None, None, x, x, 1, rng, None, None, gate, None),
        "open": lambda: ops.latent_backward(x, None, None, x, x, 1, rng, None, None, None, is_open),
    }
    for name, call_it in calls.items():
        with pytest.raises(ValueError, match=f"{name} must be on the tensors' device, cpu, got meta"):
            call_it()
    ones = torch.ones(())
    backward = [
        None,
        ones,
        None,
        x,
        x,
        1,
        state,
        None,
        None,
        torch.ones(1),
        torch.zeros(0, dtype=torch.uint8),
    ]
    with pytest.raises(ValueError, match="rng must be on the tensors' device, cpu, got meta"):
        ops.latent_backward(*backward)
    with pytest.raises(ValueError, match="weight must be on the tensors' device, cpu, got meta"):
        ops.latent_backward(x, None, None, x, x, 1, rng, None, None, None, None, weight=weight)


def test_a_backward_that_is_differentiated_checks_too(kernels):
    """It is computed by the reference then, which takes its arguments as checked."""
    for name in (
        "prior_grads_without_prior",
        "gate_size",
        "grad_z_shape",
        "weight_shape",
        "scalar_group_dims",
    ):
        _, changes, error, message = BAD[name]
        given = right("latent_backward", "cpu") | changes("cpu", "meta")
        given["mu"] = given["mu"].requires_grad_()
        with pytest.raises(error, match=message):
            call("latent_backward", given)


def test_words_and_states(kernels):
    for device in ("cpu", "meta"):
        rng = torch.zeros(2, dtype=torch.int64, device=device)
        with pytest.raises(ValueError, match="n must be at least 0, the number of words, got -1"):
            torch.ops.vaekernels._philox_words(rng, -1)
        with pytest.raises(ValueError, match="rng must be int64"):
            torch.ops.vaekernels._philox_words(rng.float(), 3)
        with pytest.raises(ValueError, match="rng must be int64"):
            torch.ops.vaekernels._philox_words(rng[:1], 3)
        assert torch.ops.vaekernels._philox_words(rng, 3).shape == (3,)
        assert math.prod(torch.ops.vaekernels._rng_state(rng).shape) == 2
