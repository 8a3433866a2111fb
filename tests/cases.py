"""The cases of test_values.py and test_gradients.py: which exist, their inputs, and their judges."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import oracle
import torch
from designs import Case, Factors, cartesian, pairwise
from torch import Tensor

import vaekernels as vk

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BOUNDS = (-1.03, 0.47)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- layouts ------------------------------------------------------------------------------------------------


def dense(t: Tensor) -> Tensor:
    return t.contiguous()


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def channels_last_3d(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last_3d)


def transposed(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def every_second(t: Tensor) -> Tensor:
    room = t.new_zeros([2 * n for n in t.shape])
    view = room[tuple(slice(None, None, 2) for _ in t.shape)]
    view.copy_(t)
    return view


def expanded(t: Tensor) -> Tensor:
    """Row 0 stands for all rows, with stride 0."""
    return t[:1].contiguous().expand_as(t)


@dataclass(frozen=True)
class Layout:
    shape: tuple[int, ...]
    batch_dims: int = 1
    group_dims: Any = None
    mu: Callable[[Tensor], Tensor] = dense
    second: Callable[[Tensor], Tensor] | None = None  # None: as mu
    prior: Callable[[Tensor], Tensor] = dense
    chunked: int | None = None  # mu and second are the halves of one tensor along this axis


LAYOUTS: dict[str, Layout] = {
    "BD": Layout((7, 13)),
    "BD_one_group": Layout((6, 11), group_dims=()),
    "BD_wide": Layout((3, 130)),
    "B": Layout((9,)),
    "D_no_batch": Layout((19,), batch_dims=0),
    "BTD": Layout((3, 5, 8), batch_dims=2),
    "BTD_one_group": Layout((3, 5, 8), batch_dims=2, group_dims=()),
    "BTD_groups_T": Layout((4, 3, 6), group_dims=1),
    "BCHW_elements": Layout((3, 4, 3, 5)),
    "BCHW_channels": Layout((3, 4, 3, 5), group_dims=1),
    "BCHW_whole": Layout((3, 4, 3, 5), group_dims=()),
    "BCHW_rows_cols": Layout((3, 4, 3, 5), group_dims=(-1, 2)),
    "BCHW_channel_col": Layout((3, 4, 3, 5), group_dims=(1, -1)),
    "NHWC_elements": Layout((3, 4, 3, 5), mu=channels_last, prior=channels_last),
    "NHWC_channels": Layout((3, 4, 3, 5), group_dims=1, mu=channels_last, prior=channels_last),
    "NHWC_whole": Layout((3, 4, 3, 5), group_dims=(), mu=channels_last, prior=channels_last),
    "NHWC_mu_NCHW_second": Layout((3, 4, 3, 5), group_dims=1, mu=channels_last, second=dense),
    "BCTHW_channels": Layout((2, 3, 2, 3, 4), group_dims=1),
    "NDHWC_channels": Layout((2, 3, 2, 3, 4), group_dims=1, mu=channels_last_3d, prior=channels_last_3d),
    "BD_transposed": Layout((7, 13), mu=transposed, prior=transposed),
    "BD_transposed_second": Layout((7, 13), second=transposed),
    "BTD_transposed": Layout((3, 5, 8), group_dims=2, mu=transposed),
    "BCHW_strided": Layout((3, 4, 3, 5), group_dims=1, mu=every_second, prior=every_second),
    "BD_chunks": Layout((7, 13), chunked=1),
    "BCHW_chunks": Layout((3, 4, 3, 5), group_dims=1, chunked=1),
    "BCHW_chunks_last": Layout((3, 4, 3, 5), group_dims=(), chunked=-1),
    "BD_expanded_prior": Layout((7, 13), prior=expanded),
    "BCHW_expanded_prior": Layout((3, 4, 3, 5), group_dims=1, prior=expanded),
    "BD_expanded_mu": Layout((7, 13), mu=expanded, second=dense),
    "BD_expanded_second": Layout((7, 13), mu=dense, second=expanded),
}

# --- the factors --------------------------------------------------------------------------------------------

FACTORS: Factors = {
    "op": ["reparameterize", "gaussian_kl", "sample_kl"],
    "packed": [None, 0, 1, -1],
    "dtype": DTYPES,
    "layout": list(LAYOUTS),
    "clamp": [None, "batch", "sample"],
    "penalty": ["floor", "hinge", "mask"],
    "free_bits": ["number", "tensor"],
    "reduction": ["batchmean", "sum", "mean", "none", "elementwise"],
    "parameterization": ["logvar", "log_std", "std", "softplus"],
    "bounds": [None, BOUNDS],
    "prior": [None, "given", "balance"],
    "weight": [None, torch.float32, torch.bool, torch.int64],
    "samples": [None, 1, 3],
}
PLAIN: Case = {
    "clamp": None,
    "penalty": "floor",
    "free_bits": "number",
    "reduction": "batchmean",
    "prior": None,
    "weight": None,
}


def valid(case: Case) -> bool:
    layout = LAYOUTS[case["layout"]]
    if case["op"] == "reparameterize" and any(case[name] != level for name, level in PLAIN.items()):
        return False
    if case["op"] == "gaussian_kl" and case["samples"] is not None:
        return False
    if case["packed"] is not None:
        if layout.chunked is not None or layout.second is not None:
            return False
        if case["packed"] != 0 and len(layout.shape) < 2:
            return False
        if case["packed"] == -1 and len(layout.shape) == 2:
            return False  # the same as 1
    if case["clamp"] is None and (case["penalty"], case["free_bits"]) != ("floor", "number"):
        return False
    if case["reduction"] == "elementwise" and case["clamp"] is not None:
        return False
    if case["reduction"] == "none" and case["clamp"] == "batch":
        return False
    return not (case["weight"] is not None and case["reduction"] in ("none", "elementwise"))


COVERING = pairwise(FACTORS, valid)
# Every op, dtype, layout, clamp, penalty, reduction, parameterization and prior: minutes.
EVERY = FACTORS | {
    "packed": [None],
    "free_bits": ["number"],
    "bounds": [None],
    "weight": [None],
    "samples": [None],
}


def combinations(op: str, dtype: torch.dtype, backend: str) -> Iterator[Case]:
    """All of `EVERY`; on the shim, which takes a fiber for a thread, every 31st: coprime to the numbers of
    levels, so that no level is left out."""
    found = cartesian(EVERY | {"op": [op], "dtype": [dtype]}, valid)
    return islice(found, 0, None, 31 if backend == "shim" else 1)


# --- inputs -------------------------------------------------------------------------------------------------


@dataclass
class Problem:
    """What one case feeds to the op: leaves in the order of the op's tensor arguments, and the keywords."""

    op: str
    leaves: list[Tensor]
    packed: int | None
    rng: Tensor
    num_samples: int | None
    sampling: dict[str, Any]
    objective: dict[str, Any] = field(default_factory=dict)

    def run(self, leaves: list[Tensor]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """z, kl and the rate as the package gives them."""
        function = getattr(vk, self.op + ("_packed" if self.packed is not None else ""))
        args: list[Any] = list(leaves)
        if self.packed is not None:
            args.insert(1, self.packed)
        if self.op == "reparameterize":
            return function(*args, num_samples=self.num_samples, rng=self.rng, **self.sampling), None, None
        if self.op == "gaussian_kl":
            kl, rate = function(*args, return_per_group=True, **self.sampling, **self.objective)
            return None, kl, rate
        return tuple(
            function(*args, num_samples=self.num_samples, rng=self.rng, **self.sampling, **self.objective)
        )

    def formula(self, leaves: list[Tensor], eps: Tensor | None, usual: bool) -> oracle.Result:
        posterior = leaves[0].chunk(2, self.packed) if self.packed is not None else leaves[:2]
        prior = leaves[1:] if self.packed is not None else leaves[2:]
        return oracle.objective(*posterior, *prior, eps=eps, usual=usual, **self.sampling, **self.objective)

    def eps(self) -> Tensor | None:
        """The op's own normals for this problem, in the compute dtype: z of mu = 0 and logvar = 0."""
        if self.op == "gaussian_kl":
            return None
        mu = self.leaves[0].chunk(2, self.packed)[0] if self.packed is not None else self.leaves[0]
        zero = torch.empty_like(mu, dtype=compute_dtype(mu.dtype)).zero_()
        return vk.reparameterize(zero, torch.zeros_like(zero), rng=self.rng, num_samples=self.num_samples)


def away_from_ties(values: Tensor) -> float:
    """A threshold in the widest gap of the middle half of the values: no rounding can move a decision."""
    ordered = values.double().flatten().sort().values
    if ordered.numel() == 1:
        return float(ordered[0]) * 0.8
    lo, hi = ordered.numel() // 4, max(ordered.numel() // 4 + 1, 3 * ordered.numel() // 4)
    gaps = ordered[lo + 1 : hi + 1] - ordered[lo:hi]
    at = lo + int(gaps.argmax())
    return float(ordered[at] + ordered[at + 1]) / 2


def thresholds(case: Case, problem: Problem, layout: Layout) -> float | Tensor:
    """A free_bits argument that leaves some cells open and some closed."""
    exact = [leaf.detach().double() for leaf in problem.leaves]
    options = {k: v for k, v in problem.objective.items() if k in ("batch_dims", "group_dims", "weight")}
    posterior = exact[0].chunk(2, problem.packed) if problem.packed is not None else exact[:2]
    prior = exact[1:] if problem.packed is not None else exact[2:]
    if case["clamp"] == "batch":
        cells = oracle.objective(*posterior, *prior, **problem.sampling, **options).rate.unsqueeze(0)
    else:
        options.pop("weight", None)
        flat = [t.reshape(-1, *layout.shape[layout.batch_dims :]) for t in (*posterior, *prior)]
        options["batch_dims"] = 0
        one_axis = [d - layout.batch_dims for d in oracle.group_axes(len(layout.shape), *_grouping(layout))]
        options["group_dims"] = one_axis
        rows = zip(*flat, strict=True)
        cells = torch.stack([oracle.objective(*row, **problem.sampling, **options).rate for row in rows])
    if case["free_bits"] == "number":
        return away_from_ties(cells)
    if case["clamp"] == "batch":
        sign = torch.arange(cells.numel(), device=cells.device).reshape(cells.shape[1:]) % 2
        return (cells[0] * torch.where(sign == 0, 0.7, 1.4)).float()
    per_group = cells.reshape(cells.shape[0], -1)
    return (
        torch.tensor([away_from_ties(column) for column in per_group.T])
        .reshape(cells.shape[1:])
        .to(cells.device)
    )


def _grouping(layout: Layout) -> tuple[int, Any]:
    return layout.batch_dims, layout.group_dims


def problem_of(case: Case, device: str = "cpu", seed: int = 0) -> Problem:
    layout = LAYOUTS[case["layout"]]
    draw = torch.Generator().manual_seed(seed)
    parameterization = case["parameterization"]

    def moments(shift: float) -> tuple[Tensor, Tensor]:
        mu = torch.randn(layout.shape, generator=draw, dtype=torch.float64) * 0.8 + shift
        lv = torch.rand(layout.shape, generator=draw, dtype=torch.float64) * 4 - 2.5
        second = oracle.second_of(lv, parameterization)
        return mu.to(device, case["dtype"]), second.to(device, case["dtype"])

    mu, second = moments(0.0)
    if case["packed"] is not None:
        leaves = [layout.mu(torch.cat([mu, second], case["packed"]))]
    elif layout.chunked is not None:
        leaves = list(torch.cat([mu, second], layout.chunked).chunk(2, layout.chunked))
    else:
        leaves = [layout.mu(mu), (layout.second or layout.mu)(second)]
    if case["prior"] is not None:
        leaves += [layout.prior(t) for t in moments(0.3)]

    sampling: dict[str, Any] = {"parameterization": parameterization, "logvar_bounds": case["bounds"]}
    rng = torch.tensor([-(2**62) + 12345 + seed, 8], dtype=torch.int64, device=device)
    problem = Problem(case["op"], leaves, case["packed"], rng, case["samples"], sampling)
    if case["op"] == "reparameterize":
        return problem
    problem.objective = {
        "batch_dims": layout.batch_dims,
        "group_dims": layout.group_dims,
        "reduction": case["reduction"],
        "balance": 0.8 if case["prior"] == "balance" else None,
    }
    if case["weight"] is not None:
        batch_shape = layout.shape[: layout.batch_dims]
        w = torch.rand(batch_shape, generator=draw) * 3
        if math.prod(batch_shape) > 1:
            w.view(-1)[1] = 0
        w.view(-1)[0] = 2
        problem.objective["weight"] = w.to(device, case["weight"])
    if case["clamp"] is not None:
        problem.objective |= {"clamp": case["clamp"], "penalty": case["penalty"]}
        problem.objective["free_bits"] = thresholds(case, problem, layout)
    return problem


# --- judges -------------------------------------------------------------------------------------------------


def errors_of(
    problem: Problem, eps: Tensor | None, cotangents: list[Tensor | None] | None = None
) -> oracle.Errors:
    """How far the results may be off; the gradients in the order of the leaves."""
    leaves, packed = [t.detach().double() for t in problem.leaves], problem.packed
    posterior, prior = (
        (leaves[:2], leaves[2:]) if packed is None else (leaves[0].chunk(2, packed), leaves[1:])
    )
    found = oracle.errors(
        *posterior,
        *prior,
        accuracy=oracle.accuracy(problem.leaves[0].device, problem.leaves[0].dtype),
        eps=None if eps is None else eps.double(),
        cotangents=cotangents or (None, None, None),
        **problem.sampling,
        **problem.objective,
    )
    if packed is None:
        return found
    first = torch.cat(found.gradients[:2], packed)
    return found._replace(gradients=[first, *found.gradients[2:]])


def check_values(problem: Problem) -> None:
    dtype = problem.leaves[0].dtype
    z, kl, rate = problem.run(problem.leaves)
    eps = problem.eps()
    exact = problem.formula(
        [t.double() for t in problem.leaves], None if eps is None else eps.double(), False
    )
    eager = problem.formula([t.to(compute_dtype(dtype)) for t in problem.leaves], eps, True)
    errors = errors_of(problem, eps)
    if z is not None:
        assert exact.z is not None and eager.z is not None and errors.z is not None
        mu = (
            problem.leaves[0].chunk(2, problem.packed)[0] if problem.packed is not None else problem.leaves[0]
        )
        assert z.dtype == dtype
        expected = torch.empty_like(mu).stride()
        assert (z if problem.num_samples is None else z[0]).stride() == expected
        if problem.num_samples is not None:
            assert z.stride(0) == mu.numel() or z.shape[0] == 1
        oracle.assert_accurate(z, exact.z, eager.z, errors.z, what="z")
    if kl is not None and rate is not None:
        assert kl.dtype == rate.dtype == compute_dtype(dtype)
        assert rate.shape == exact.rate.shape
        oracle.assert_accurate(kl, exact.kl, eager.kl, errors.kl, what="kl")
        oracle.assert_accurate(rate, exact.rate, eager.rate, errors.rate, what="kl_per_group")


def check_gradients(problem: Problem, seed: int = 0) -> None:
    """The gradient of every tensor argument for random cotangents of every output."""
    dtype = problem.leaves[0].dtype
    eps = problem.eps()

    def outputs_and_leaves(kind: str) -> tuple[list[Tensor | None], list[Tensor]]:
        if kind == "ours":
            leaves = [t.detach().requires_grad_() for t in problem.leaves]
            return list(problem.run(leaves)), leaves
        to = torch.float64 if kind == "exact" else compute_dtype(dtype)
        leaves = [t.detach().to(to).requires_grad_() for t in problem.leaves]
        outputs = list(problem.formula(leaves, None if eps is None else eps.to(to), kind == "eager"))
        if problem.op == "reparameterize":
            outputs[1:] = [None, None]
        return outputs, leaves

    draw = torch.Generator().manual_seed(seed)
    ours, leaves = outputs_and_leaves("ours")
    cotangents = [
        None if o is None else torch.randn(o.shape, generator=draw, dtype=torch.float64).to(o.device, o.dtype)
        for o in ours
    ]

    def gradients(outputs: list[Tensor | None], leaves: list[Tensor]) -> tuple[Tensor, ...]:
        used = [
            (o, c.to(o.dtype))
            for o, c in zip(outputs, cotangents, strict=True)
            if o is not None and c is not None
        ]
        return torch.autograd.grad([o for o, _ in used], leaves, [c for _, c in used])

    got = gradients(ours, leaves)
    exact = gradients(*outputs_and_leaves("exact"))
    eager = gradients(*outputs_and_leaves("eager"))
    errors = errors_of(problem, eps, [None if c is None else c.double() for c in cotangents])
    for i, (leaf, *results) in enumerate(zip(leaves, got, exact, eager, errors.gradients, strict=True)):
        assert got[i].dtype == leaf.dtype
        oracle.assert_accurate(*results, what=f"gradient of tensor argument {i}")
