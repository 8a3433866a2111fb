"""Runs a problem on the kernels and compares with `vaekernels.reference` in float64.

- NaN and inf are where float64 has them. Where an intermediate leaves the range of the kernels' float32, they
  may instead be what the reference gives in float32, and a value above a quarter of the range may be inf.
- Numbers are within a bound of the error, which follows the formulas term by term (`Errors`).
- A second call gives the same bits, and nothing that was given is changed.
- Arguments that are refused are refused alike on either side.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from fuzz.problem import WORDS, Problem, compute_dtype, storage_of, widened
from torch import Tensor

import vaekernels as vk
from vaekernels import _native, reference

REFUSALS = (TypeError, ValueError)
# Relative errors of one formula, of float32 (DESIGN: KL 1e-5, normals 1e-5) and float64.
FORMULA = {torch.float32: 1e-5, torch.float64: 1e-12}
NORMALS = {torch.float32: 1.2e-5, torch.float64: 1e-12}


class Finding(AssertionError):
    """What a problem showed that must not be."""


@contextlib.contextmanager
def on_reference() -> Iterator[None]:
    """The public functions run on `vaekernels.reference`."""
    kept = _native.has_kernels, _native.C
    _native.has_kernels, _native.C = (lambda device_type: False), None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", vk.FallbackWarning)
            yield
    finally:
        _native.has_kernels, _native.C = kept


# --- running ------------------------------------------------------------------------------------------------


class Outcome:
    """What a call returned, by name: z, kl and kl_per_group, and the gradient of each tensor argument."""

    def __init__(self) -> None:
        self.outputs: dict[str, Tensor] = {}
        self.gradients: list[Tensor | None] = []


def run(problem: Problem) -> Outcome:
    tensors = [t.detach() for t in problem.tensors]
    if problem.cotangents:
        for t, wanted in zip(tensors, problem.wanted or [True] * len(tensors), strict=True):
            t.requires_grad_(wanted)
    options = dict(problem.options)
    if problem.seed is not None:
        options["generator"] = torch.Generator().manual_seed(problem.seed)
    function = getattr(vk, problem.op + ("" if problem.packed is None else "_packed"))
    args: list[Any] = list(tensors)
    if problem.packed is not None:
        args.insert(1, problem.packed)
    if problem.op == "gaussian_kl":
        options["return_per_group"] = True
    returned = function(*args, **options)
    names = {"reparameterize": ["z"], "gaussian_kl": ["kl", "kl_per_group"], "sample_kl": vk.SampleKL._fields}
    returned = [returned] if isinstance(returned, Tensor) else list(returned)
    found = Outcome()
    found.outputs = dict(zip(names[problem.op], returned, strict=True))
    used = [(found.outputs[name], cotangent) for name, cotangent in problem.cotangents.items()]
    leaves = [t for t in tensors if t.requires_grad]
    if used and leaves:
        connected = [(o, c.to(o.dtype)) for o, c in used if o.requires_grad]
        got: list[Tensor | None] = [None] * len(leaves)
        if connected:
            got = list(
                torch.autograd.grad(
                    [o for o, _ in connected],
                    leaves,
                    [c for _, c in connected],
                    create_graph=problem.create_graph,
                    allow_unused=True,
                )
            )
        left = iter(got)
        found.gradients = [next(left) if t.requires_grad else None for t in tensors]
    found.outputs = {name: t.detach() for name, t in found.outputs.items()}
    found.gradients = [None if g is None else g.detach() for g in found.gradients]
    return found


def converted(problem: Problem, dtype: torch.dtype) -> Problem:
    """The same problem in another dtype. What the generator would draw is settled first."""
    options = dict(problem.options)
    if problem.seed is not None:
        options["rng"] = vk.rng_state(problem.mu, generator=torch.Generator().manual_seed(problem.seed))
    return replace(
        problem,
        tensors=[widened(t, dtype) for t in problem.tensors],
        cotangents={name: widened(t, dtype) for name, t in problem.cotangents.items()},
        options=options,
        seed=None,
        create_graph=False,
    )


# --- how far results may be off -----------------------------------------------------------------------------


class Errors:
    """Bounds of the kernels' errors, in float64, from the terms of the formulas.

    With x the log standard deviation, a = (mu - mp) e^(-xp), t = x - xp and eps the formulas' relative error:
    x is off by a rounding, u |x|, and by u (1 + |x|) where the tensor holds the standard deviation; a by
    eps a and the error of xp; e^(2t) - 1 - 2t by eps of itself and |e^(2t) - 1| times the error of 2t.
    """

    def __init__(self, exact: Problem, z: Tensor | None, dtype: torch.dtype) -> None:
        self.exact = exact
        arithmetic = compute_dtype(dtype)
        self.eps, self.normal = FORMULA[arithmetic], NORMALS[arithmetic]
        self.unit, self.tiny = 4 * torch.finfo(arithmetic).eps, 2 * torch.finfo(arithmetic).tiny
        self.limit = torch.finfo(arithmetic).max / 4
        self.smallest = torch.finfo(arithmetic).smallest_normal * torch.finfo(arithmetic).eps
        posterior = exact.tensors[:2] if exact.packed is None else exact.tensors[0].chunk(2, exact.packed)
        prior = exact.tensors[2:] if exact.packed is None else exact.tensors[1:]
        self.holds_sd = exact.options["parameterization"] in ("std", "softplus")
        self.mu = posterior[0].detach()
        x, self.sd, self.slope, self.dx = self._scale(posterior[1], exact.options.get("logvar_bounds"))
        xp = dxp = self.prior_slope = distance = torch.zeros_like(self.mu)
        if prior:
            xp, _, self.prior_slope, dxp = self._scale(prior[1], None)
            distance = prior[0]
        distance = self.mu - distance
        self.root = torch.exp(-xp)
        self.a = distance * self.root
        # e^x below the smallest normal number may be 0, and then makes NaN of a distance that is infinite.
        self.vanishes = bool((distance.isinf() & (self.root < self.tiny)).any())
        self.da = self.a.abs() * (self.eps + dxp) + self.tiny * distance.abs()
        t = x - xp
        self.growth, self.steep = torch.expm1(2 * t), torch.exp(2 * t)
        self.dt = 2 * (self.dx + dxp + self.unit * t.abs())
        self.dxp = dxp
        excess = torch.where(t.abs() < 0.1, 2 * t * t, self.growth - 2 * t).abs()
        self.kl = self.eps * excess + self.growth.abs() * self.dt + self.dt**2 + self._of_square() + self.tiny
        self.normals = torch.zeros_like(self.mu)
        if z is not None:
            # The bound of a normal where z has lost it, or its last digits.
            lost = 4 * torch.finfo(torch.float64).eps * self.mu.abs()
            normals = ((z - self.mu).abs() + lost) / self.sd
            self.normals = normals.nan_to_num(7.0, 7.0, 7.0).clamp(max=7)
        # The largest number on the way to a result.
        terms = (self.a**2, self.root, self.a * self.root, self.steep, self.sd, distance)
        self.peak = torch.stack([term.abs() for term in terms]).amax(0)

    def _scale(self, second: Tensor, bounds: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, sd, |dx / d second| and the error of x."""
        second = second.detach().requires_grad_()
        with torch.enable_grad():
            x, sd = reference._scale(second, self.exact.options["parameterization"], bounds)
        slope = torch.autograd.grad(x.sum(), second)[0].abs()
        return x.detach(), sd.detach(), slope, self.unit * (x.detach().abs() + self.holds_sd)

    def _of_square(self) -> Tensor:
        """The error of a^2."""
        return 2 * self.a.abs() * self.da + self.da**2

    # --- the objective

    def _reduced(self, of_each: Tensor) -> tuple[Tensor, Tensor]:
        """What kl and kl_per_group would be, without a clamp, if the KL of each element were this."""
        names = ("batch_dims", "group_dims", "reduction", "weight")
        options = {name: self.exact.options[name] for name in names if name in self.exact.options}
        # The KL of N(mu, 1) is mu^2 / 2.
        mu = torch.sqrt(2 * of_each)
        kl, rate = vk.gaussian_kl(mu, torch.zeros_like(mu), return_per_group=True, **options)
        return kl, rate

    def _groups(self) -> list[int]:
        ndim, batch, given = (
            self.mu.dim(),
            self.exact.options["batch_dims"],
            self.exact.options.get("group_dims"),
        )
        if given is None:
            return list(range(batch, ndim))
        return sorted(d % ndim for d in ([given] if isinstance(given, int) else given))

    def in_groups(self, of_each: Tensor) -> Tensor:
        """What is given for each group, for each element."""
        groups = self._groups()
        shape = [n if d in groups else 1 for d, n in enumerate(self.mu.shape)]
        return of_each.reshape(shape).expand(self.mu.shape)

    def _cells(self, of_each: Tensor) -> Tensor:
        """The sum over the group and row of each element, for each element."""
        groups, batch = self._groups(), self.exact.options["batch_dims"]
        summed = [d for d in range(batch, self.mu.dim()) if d not in groups]
        return (of_each.sum(summed, keepdim=True) if summed else of_each).expand(self.mu.shape)

    def _elements(self) -> Tensor:
        """The exact KL of each element."""
        names = ("batch_dims", "parameterization", "logvar_bounds")
        options = {name: self.exact.options[name] for name in names if name in self.exact.options}
        options["reduction"] = "elementwise"
        if self.exact.packed is None:
            kl = vk.gaussian_kl(*self.exact.tensors, **options)
        else:
            kl = vk.gaussian_kl_packed(
                self.exact.tensors[0], self.exact.packed, *self.exact.tensors[1:], **options
            )
        return kl.detach()

    def objective(self, rate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The errors of kl and of kl_per_group; whether the clamp of an element may go either way."""
        _, d_rate = self._reduced(self.kl)
        undecided, of_clamp = torch.zeros(self.mu.shape, dtype=torch.bool), torch.zeros_like(self.mu)
        threshold = self.exact.options.get("free_bits")
        if threshold is not None:
            lam = torch.as_tensor(threshold).to(torch.float64).expand(rate.shape)
            lam = self.in_groups(lam)
            if self.exact.options.get("clamp", "batch") == "batch":
                x, dx = self.in_groups(rate), self.in_groups(d_rate)
            else:
                x, dx = self._cells(self._elements()), self._cells(self.kl)
            undecided = ~((x - lam).abs() > dx + self.unit * lam + self.tiny) & ~x.isnan() | (
                x > self.limit / 2
            )
            of_clamp = self.unit * lam
            if self.exact.options.get("penalty") == "mask":
                of_clamp = of_clamp + torch.where(undecided, lam, 0.0)
            of_clamp = of_clamp / self._cells(torch.ones_like(self.mu))
        kl, _ = self._reduced(self.kl + of_clamp)
        return kl, d_rate, undecided

    def weightless(self) -> bool:
        """Whether a row has the weight 0."""
        weight = self.exact.options.get("weight")
        return weight is not None and bool((weight == 0).any())

    def total_peak(self) -> Tensor:
        """The largest number on the way to a sum over all elements."""
        weight = self.exact.options.get("weight")
        most = 1.0 if weight is None or weight.numel() == 0 else max(1.0, float(weight.max()))
        return self.peak.sum() * most

    def shares(self) -> tuple[Tensor, Tensor]:
        """|d loss / d KL| of each element, without the clamp, for the posterior and for the prior; 0 where
        nothing of the KL has a cotangent."""
        weights = self.exact.cotangents
        if self.exact.op == "reparameterize" or not {"kl", "kl_per_group"} & set(weights):
            return torch.zeros_like(self.mu), torch.zeros_like(self.mu)
        of_each = torch.full(self.mu.shape, 0.5, dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            outputs = dict(zip(("kl", "kl_per_group"), self._reduced(of_each), strict=True))
        used = [name for name in outputs if name in weights]
        (share,) = torch.autograd.grad([outputs[n] for n in used], of_each, [weights[n].abs() for n in used])
        balance = self.exact.options.get("balance")
        return (share, share) if balance is None else ((1.0 - balance) * share, balance * share)

    # --- z and the gradients

    def z(self, z: Tensor) -> Tensor:
        of_sd = self.normals * (self.sd * (self.unit + self.dx) + self.tiny) + self.normal * self.sd
        return of_sd + self.unit * (z.abs() + self.mu.abs())

    def gradients(self, share: Tensor, prior_share: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Of mu, the second tensor, prior_mu and the prior's second tensor: the errors of the gradients, and
        the largest number on the way to each."""
        grad_z = noise = torch.zeros_like(self.mu)
        if "z" in self.exact.cotangents:
            grad_z = self.exact.cotangents["z"].abs()
            noise = grad_z * self.normals
            if grad_z.dim() > self.mu.dim():
                grad_z, noise = grad_z.sum(0), noise.sum(0)
        pull = (self.a * self.root).abs()
        d_pull = self.root * self.da + pull * (self.eps + self.dxp) + self.tiny * (self.a.abs() + 1)
        d_growth = self.eps * self.growth.abs() + self.steep * self.dt + self.tiny
        if self.holds_sd:  # which takes (sd - 1) (sd + 1) for it
            d_growth = d_growth + self.eps * (1 + self.steep)
        of_sample = (self.normal * grad_z + noise * (self.eps + self.dx)) * self.sd + self.tiny * (
            noise + grad_z
        )
        size, prior_size = (
            noise * self.sd + share * self.growth.abs(),
            prior_share * (self.growth.abs() + self.a**2),
        )
        # A subnormal share is off by more than a rounding.
        blur = 8 * self.smallest
        d_mu = self.unit * grad_z + share * d_pull + blur * pull
        d_prior_mu = prior_share * d_pull + blur * pull
        d_prior = prior_share * (d_growth + self._of_square()) + blur * (self.growth.abs() + self.a**2)
        errors = [
            d_mu,
            self.slope * (of_sample + share * d_growth + blur * self.growth.abs() + self.eps * size),
            d_prior_mu,
            self.prior_slope * (d_prior + self.eps * prior_size),
        ]
        peak = torch.stack([self.peak, share, grad_z, noise, noise * self.sd]).amax(0)
        of_second = torch.stack([peak, self.slope, self.slope * self.peak, self.slope * size]).amax(0)
        slope = self.prior_slope
        of_prior = torch.stack([peak, slope, slope * self.peak, slope * prior_size]).amax(0)
        return errors, [peak, of_second, peak, of_prior]


# --- comparing ----------------------------------------------------------------------------------------------


def same_bits(a: Tensor, b: Tensor) -> bool:
    word = WORDS[a.dtype.itemsize]
    return a.dtype == b.dtype and torch.equal(a.view(word), b.view(word))


@dataclass
class Allowed:
    """What one result may be, beside what float64 says."""

    bound: Tensor
    """of the error"""
    peak: Tensor
    """the largest number on the way to it"""
    undecided: Tensor | None = None
    """where the clamp may decide either way"""
    lost: Tensor | None = None
    """where inf on the way may turn to NaN or change its sign: times a weight of 0, in a sum over samples"""
    either: bool = False
    """whether inf or NaN depends on the order of the factors, where something is infinite on the way"""


def compare(what: str, ours: Tensor, exact: Tensor, single: Tensor, allowed: Allowed) -> None:
    """`single`: what the reference gives in the kernels' arithmetic."""
    if ours.shape != exact.shape:
        raise Finding(f"{what}: shape {list(ours.shape)}, the reference has {list(exact.shape)}")
    info, arithmetic = torch.finfo(ours.dtype), torch.finfo(compute_dtype(ours.dtype))
    got, single = ours.double(), single.to(ours.dtype).double()
    bound = allowed.bound + exact.abs() * info.eps + info.tiny * info.eps
    close = (got - exact).abs() <= bound
    # The bound is no number where its own terms overflow.
    close |= got.isfinite() & exact.isfinite() & ~bound.isfinite()
    same = (got == exact) | (got.isnan() & exact.isnan())
    out_of_range = ~(allowed.peak < arithmetic.max / 4)
    limit = min(arithmetic.max / 4, info.max * (1 - info.eps))
    beyond = got.isinf() & (got.sign() == exact.sign()) & ((exact.abs() + bound >= limit) | out_of_range)
    # What leaves the range on the way.
    alike = ~got.isfinite() & ((got == single) | (got.isnan() & single.isnan())) & ~exact.isnan()
    fine = close | same | beyond | alike
    if allowed.either:
        fine |= ~got.isfinite() & ~exact.isfinite() & ~allowed.peak.isfinite()
    if allowed.undecided is not None:
        fine |= allowed.undecided & ~(exact.isnan() & single.isnan())
        # 0 times what leaves the range of float64 in the reference alone.
        fine |= allowed.undecided & exact.isnan() & (got == 0) & allowed.peak.isinf()
    if allowed.lost is not None:
        fine |= allowed.lost & ~got.isfinite() & out_of_range
    if bool(fine.all()):
        return
    at = tuple(int(i) for i in (~fine).nonzero()[0])
    raise Finding(
        f"{what}{list(at)}: got {float(got[at])!r}, float64 says {float(exact[at])!r} "
        f"and the reference in {arithmetic.dtype} {float(single[at])!r}; the bound is "
        f"{float(bound.expand_as(exact)[at]):.3g}, the peak {float(allowed.peak.expand_as(exact)[at]):.3g}"
    )


def check(problem: Problem) -> str:
    """Raises `Finding`; returns what was seen: "values" or "refused"."""
    given = [*problem.tensors, *problem.cotangents.values()]
    given += [t for t in problem.options.values() if isinstance(t, Tensor)]
    before = [storage_of(t).clone() for t in given]
    try:
        first = run(problem)
        refused = None
    except REFUSALS as error:
        first, refused = None, error
    exact_problem = converted(problem, torch.float64)
    with on_reference():
        try:
            exact = run(exact_problem)
        except REFUSALS as error:
            if refused is None or (type(refused), str(refused)) != (type(error), str(error)):
                raise Finding(f"the reference refuses with {error!r}, the kernels: {refused!r}") from error
            return "refused"
    if refused is not None or first is None:
        raise Finding(f"the kernels refuse what the reference takes: {refused!r}") from refused

    second = run(problem)
    for t, bits in zip(given, before, strict=True):
        if not torch.equal(storage_of(t), bits):
            raise Finding(f"the call changed a tensor that it was given, of shape {list(t.shape)}")
    _same_again(first, second)
    with on_reference():
        single = run(converted(problem, compute_dtype(problem.mu.dtype)))
        _compare_all(problem, exact_problem, first, exact, single)
    return "values"


def _same_again(first: Outcome, second: Outcome) -> None:
    for name, t in first.outputs.items():
        if not same_bits(t, second.outputs[name]):
            raise Finding(f"{name}: a second call gives other bits")
    for i, (a, b) in enumerate(zip(first.gradients, second.gradients, strict=True)):
        if a is not None and (b is None or not same_bits(a, b)):
            raise Finding(f"gradient of tensor {i}: a second call gives other bits")


def _one_sample(z: Tensor | None, problem: Problem) -> Tensor | None:
    """z, or of several samples, and of each element, the one that is farthest from mu."""
    if z is None or "num_samples" not in problem.options:
        return z
    if z.shape[0] == 0:
        return None
    farthest = (z - problem.mu.double()).abs().nan_to_num(math.inf).argmax(0, keepdim=True)
    return z.gather(0, farthest)[0]


def _compare_all(
    problem: Problem, exact_problem: Problem, ours: Outcome, exact: Outcome, single: Outcome
) -> None:
    dtype = problem.mu.dtype
    errors = Errors(exact_problem, _one_sample(exact.outputs.get("z"), problem), dtype)
    undecided = torch.zeros(problem.mu.shape, dtype=torch.bool)
    allowed: dict[str, Allowed] = {}
    if "z" in ours.outputs:
        allowed["z"] = Allowed(errors.z(exact.outputs["z"]), errors.peak)
        _check_form_of_z(ours.outputs["z"], problem)
    if "kl" in ours.outputs:
        d_kl, d_rate, undecided = errors.objective(exact.outputs["kl_per_group"])
        # A sum of many equal thresholds is rounded the same way every time; it may be one of no elements.
        d_kl = d_kl + errors.eps * exact.outputs["kl"].abs().nan_to_num()
        by_element = problem.options["reduction"] == "elementwise"
        allowed["kl"] = Allowed(
            d_kl,
            errors.peak if by_element else errors.total_peak(),
            lost=torch.tensor(errors.weightless()),
            either=errors.vanishes,
        )
        allowed["kl_per_group"] = Allowed(d_rate, errors.total_peak(), either=errors.vanishes)
        # A rate that left the range of float32 closes its group, or opens it.
        undecided = undecided | errors.in_groups(~ours.outputs["kl_per_group"].isfinite())
        for name in ("kl", "kl_per_group"):
            if ours.outputs[name].dtype != compute_dtype(dtype):
                raise Finding(f"{name} is {ours.outputs[name].dtype}")
    for name, t in ours.outputs.items():
        compare(name, t, exact.outputs[name], single.outputs[name], allowed[name])
    if any(g is not None for g in exact.gradients):
        _compare_gradients(problem, ours, exact, single, errors, undecided)


def _check_form_of_z(z: Tensor, problem: Problem) -> None:
    one = torch.empty_like(problem.mu)
    strides = one.stride() if "num_samples" not in problem.options else (one.numel(), *one.stride())
    if z.stride() != strides or z.dtype != one.dtype:
        raise Finding(
            f"z has the strides {z.stride()}, torch.empty_like(mu) {strides}; its dtype is {z.dtype}"
        )


def _compare_gradients(
    problem: Problem, ours: Outcome, exact: Outcome, single: Outcome, errors: Errors, undecided: Tensor
) -> None:
    share, prior_share = errors.shares()
    bounds, peaks = errors.gradients(share, prior_share)
    of_kl = any(name in problem.cotangents for name in ("kl", "kl_per_group"))
    summed = problem.options.get("num_samples") is not None
    lost = [((of_each == 0) & of_kl) | summed for of_each in (share, share, prior_share, prior_share)]
    each = [Allowed(*three[:2], undecided, three[2], True) for three in zip(bounds, peaks, lost, strict=True)]
    if problem.packed is not None:
        names = ("bound", "peak", "undecided", "lost")
        halves = {name: torch.cat([getattr(one, name) for one in each[:2]], problem.packed) for name in names}
        each = [Allowed(**halves, either=True), *each[2:]]
    for i, got in enumerate(ours.gradients):
        what = f"gradient of tensor {i} "
        want, usual = exact.gradients[i], single.gradients[i]
        if got is None or want is None or usual is None:
            # What has no path to an output has no gradient, or zeros.
            for t in (got, want):
                if t is not None and bool((t != 0).any()):
                    raise Finding(f"{what}: one side has none, the other has {t}")
            continue
        if got.dtype != problem.tensors[i].dtype:
            raise Finding(f"{what} is {got.dtype}")
        if problem.op == "reparameterize" and problem.options.get("num_samples") == 0:
            # Of an empty z; the reference has 0 * inf at times.
            want = usual = torch.zeros_like(got)
        compare(what, got, want, usual, each[i])
