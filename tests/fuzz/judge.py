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
from dataclasses import replace
from typing import Any

import torch
from fuzz.problem import WORDS, Problem, compute_dtype, storage_of, widened
from torch import Tensor

import vaekernels as vk
from vaekernels import _native

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

    With x the log standard deviation, a = (mu - mp) e^(-xp), t = x - xp and eps the formula's relative error:
    x is off by dx = eps |x|, and where the tensor holds the standard deviation by eps (1 + |x|). So a^2 is
    off by eps a^2 (1 + |xp|), e^(2t) - 1 - 2t by eps of itself and |e^(2t) - 1| (dx + dxp + eps |t|).
    """

    def __init__(self, exact: Problem, z: Tensor | None, dtype: torch.dtype) -> None:
        self.exact, self.dtype = exact, compute_dtype(dtype)
        self.limit = torch.finfo(self.dtype).max / 4
        self.eps = FORMULA[self.dtype]
        # One rounding: what a variable's own error is made of.
        self.unit = 4 * torch.finfo(self.dtype).eps
        self.tiny = 2 * torch.finfo(self.dtype).tiny
        posterior = exact.tensors[:2] if exact.packed is None else exact.tensors[0].chunk(2, exact.packed)
        prior = exact.tensors[2:] if exact.packed is None else exact.tensors[1:]
        self.mu, second = posterior
        bounds = exact.options.get("logvar_bounds")
        self.x, self.sd, self.slope, self.dx = self._scale(second, bounds)
        self.prior_mu = prior[0] if prior else torch.zeros_like(self.mu)
        if prior:
            self.xp, _, self.prior_slope, self.dxp = self._scale(prior[1], None)
        else:
            self.xp = self.dxp = self.prior_slope = torch.zeros_like(self.mu)
        self.has_prior = bool(prior)
        root = torch.exp(-self.xp)
        self.root = root
        self.a = (self.mu - self.prior_mu) * root
        t = self.x - self.xp
        self.growth = torch.expm1(2 * t)
        self.steep = torch.exp(2 * t)
        # of t, doubled as it stands in the exponent
        self.dt = 2 * (self.dx + self.dxp + self.unit * t.abs())
        # below the smallest normal number e^x may be 0
        self.da = self.eps * self.a.abs() * (1 + self.dxp / self.unit) + self.tiny * (self.mu - self.prior_mu).abs()
        excess = torch.where(t.abs() < 0.1, 2 * t * t, self.growth - 2 * t).abs()
        kl = 0.5 * (self.a**2 + excess)
        self.kl = 2 * self.a.abs() * self.da + self.da**2 + self.eps * kl + self.growth.abs() * self.dt
        self.kl = self.kl + self.dt**2 + self.tiny
        # The normals; their bound where the values have lost them.
        self.normals = torch.zeros_like(self.mu)
        if z is not None:
            self.normals = ((z - self.mu) / self.sd).nan_to_num(7.0, 7.0, 7.0).abs().clamp(max=7)
        # The largest of what is on the way to a result.
        terms = (self.a**2, self.root, self.a * self.root, self.steep, self.sd, self.mu - self.prior_mu)
        self.peak = torch.stack([term.abs() for term in terms]).amax(0)

    def _scale(self, second: Tensor, bounds: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, sd, |dx/ds| and the error of x."""
        kind = self.exact.options["parameterization"]
        if kind == "logvar":
            x, slope = second / 2, torch.full_like(second, 0.5)
        elif kind == "log_std":
            x, slope = second, torch.ones_like(second)
        elif kind == "std":
            x, slope = torch.log(second), 1 / second
        else:
            sd = torch.nn.functional.softplus(second, threshold=40)
            x = torch.where(second < -30, second, torch.log(sd))
            slope = torch.where(second < -30, 1.0, torch.sigmoid(second) / sd)
        holds_sd = kind in ("std", "softplus")
        if bounds is not None:
            x = torch.clamp(x, bounds[0] / 2, bounds[1] / 2)
        return x, torch.exp(x), slope.abs(), self.unit * (x.abs() + holds_sd)

    def z(self, z: Tensor) -> Tensor:
        relative = self.unit * (1 + self.dx / self.unit)
        of_sd = self.normals * (self.sd * relative + self.tiny) + NORMALS[self.dtype] * self.sd
        return of_sd + self.unit * (z.abs() + self.mu.abs())

    def total_peak(self) -> Tensor:
        """The largest number on the way to a sum over all elements."""
        weight = self.exact.options.get("weight")
        most = 1.0 if weight is None or weight.numel() == 0 else max(1.0, float(weight.max()))
        return self.peak.sum() * most

    def shares(self, weights: dict[str, Tensor]) -> Tensor:
        """|d loss / d KL| of every element, without the clamp."""
        # KL = mu^2 / 2 has the derivative mu, which is 1 here.
        mu = torch.ones(self.mu.shape, dtype=torch.float64, requires_grad=True)
        options = self._plain()
        kl, rate = vk.gaussian_kl(mu, torch.zeros_like(mu), return_per_group=True, **options)
        used = [(o, weights[n].abs()) for n, o in (("kl", kl), ("kl_per_group", rate)) if n in weights]
        if not used:
            return torch.zeros_like(mu)
        return torch.autograd.grad([o for o, _ in used], mu, [w for _, w in used])[0]

    def _plain(self) -> dict[str, Any]:
        names = ("batch_dims", "group_dims", "reduction", "weight")
        return {name: self.exact.options[name] for name in names if name in self.exact.options}

    def _groups(self) -> tuple[int, list[int]]:
        ndim, batch = self.mu.dim(), self.exact.options["batch_dims"]
        given = self.exact.options.get("group_dims")
        if given is None:
            return batch, list(range(batch, ndim))
        return batch, sorted(d % ndim for d in ([given] if isinstance(given, int) else given))

    def in_groups(self, of_each: Tensor) -> Tensor:
        """What is given for each group, for each element."""
        batch, groups = self._groups()
        shape = [n if d in groups else 1 for d, n in enumerate(self.mu.shape)]
        return of_each.reshape(shape).expand(self.mu.shape)

    def objective(self, exact_rate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The errors of kl and of kl_per_group; where a clamp may decide the other way, per element."""
        options = self.exact.options
        batch, groups = self._groups()
        summed = [d for d in range(batch, self.mu.dim()) if d not in groups]
        cells = self.kl.sum(summed, keepdim=True) if summed else self.kl
        kl = vk.gaussian_kl(*self.exact.tensors, **self._only_values()) if self.exact.packed is None else None
        if kl is None:
            kl = vk.gaussian_kl_packed(
                self.exact.tensors[0], self.exact.packed, *self.exact.tensors[1:], **self._only_values()
            )
        in_cells = kl.sum(summed, keepdim=True) if summed else kl
        cells = cells + self.unit * in_cells.abs()
        weight = options.get("weight")
        w = torch.ones((), dtype=torch.float64) if weight is None else weight.to(torch.float64)
        w = w.expand(self.mu.shape[:batch])
        total = w.sum()
        spread = w.reshape(list(w.shape) + [1] * (self.mu.dim() - batch))
        over_rows = (spread * cells).sum(list(range(batch)), keepdim=True) if batch else spread * cells
        rate = over_rows / total
        d_rate = rate.reshape(exact_rate.shape) + self.unit * exact_rate.abs()
        reduction = options["reduction"]
        if reduction == "elementwise":
            return self.kl, d_rate, torch.zeros(self.mu.shape, dtype=torch.bool)
        threshold = options.get("free_bits")
        undecided = torch.zeros(in_cells.shape, dtype=torch.bool)
        in_groups = [1] * batch + [self.mu.shape[d] if d in groups else 1 for d in range(batch, self.mu.dim())]
        rows, of_rows = cells, in_cells
        if threshold is not None:
            lam = torch.as_tensor(threshold).to(self.dtype).to(torch.float64)
            lam = lam.expand(exact_rate.shape).reshape(in_groups)
            if options.get("clamp", "batch") == "batch":
                x, dx = exact_rate.reshape(in_groups), d_rate.reshape(in_groups)
            else:
                x, dx = in_cells, cells
            limit = torch.finfo(self.dtype).max / 8
            near = ~((x - lam).abs() > dx + 2 * self.unit * lam) & ~x.isnan() | (x > limit)
            jump = near & (options.get("penalty") == "mask")
            grown = dx + self.unit * (x.abs() + lam) + torch.where(jump, x.abs() + lam, 0.0)
            undecided = near.expand(in_cells.shape)
            if options.get("clamp", "batch") == "batch":
                total_error = grown.sum()
                if reduction == "sum":
                    total_error = total_error * total
                elif reduction == "mean":
                    total_error = total_error / math.prod(self.mu.shape[batch:])
                return total_error, d_rate, undecided.expand(self.mu.shape)
            rows, of_rows = grown, torch.maximum(in_cells.abs(), lam.expand(in_cells.shape))
        per_row = (rows + self.unit * of_rows.abs()).flatten(batch).sum(-1) if groups or summed else rows
        per_row = per_row.reshape(w.shape)
        if reduction == "none":
            return per_row, d_rate, undecided.expand(self.mu.shape)
        loss = (w * per_row).sum()
        if reduction != "sum":
            loss = loss / total
        if reduction == "mean":
            loss = loss / math.prod(self.mu.shape[batch:])
        return loss, d_rate, undecided.expand(self.mu.shape)

    def _only_values(self) -> dict[str, Any]:
        names = ("batch_dims", "parameterization", "logvar_bounds")
        given = {name: self.exact.options[name] for name in names if name in self.exact.options}
        return given | {"reduction": "elementwise"}

    def gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """Of mu, the second tensor, prior_mu and the prior's second tensor: the errors of the gradients, and the
        largest number on the way to each."""
        weights = self.exact.cotangents
        c = self.shares(weights) if self.exact.op != "reparameterize" else torch.zeros_like(self.mu)
        self.share = c
        grad_z = noise = torch.zeros_like(self.mu)
        if "z" in weights:
            grad_z = weights["z"].abs()
            noise = grad_z * self.normals
            if grad_z.dim() > self.mu.dim():
                grad_z, noise = grad_z.sum(0), noise.sum(0)
        relative = self.eps * (1 + self.dxp / self.unit)
        distance = (self.mu - self.prior_mu).abs()
        pull = (self.a * self.root).abs()
        d_mu = self.unit * grad_z + c * (4 * relative * pull + self.tiny * (self.root + distance + 1))
        d_growth = self.eps * self.growth.abs() + self.steep * self.dt
        if self.exact.options["parameterization"] in ("std", "softplus"):
            d_growth = d_growth + self.eps * (1 + self.steep)
        of_sample = (NORMALS[self.dtype] * grad_z + self.eps * noise) * self.sd * (1 + self.dx / self.unit)
        of_sample = of_sample + self.tiny * (noise + grad_z)
        d_x = of_sample + c * (d_growth + self.tiny)
        d_prior = c * (2 * self.a.abs() * self.da + self.da**2 + self.eps * self.a**2 + d_growth + self.tiny)
        size = noise * self.sd + c * self.growth.abs()
        prior_size = c * (self.growth.abs() + self.a**2)
        errors = [
            d_mu + self.eps * (grad_z + c * pull),
            self.slope * (d_x + self.eps * size),
            d_mu + self.eps * c * pull,
            self.prior_slope * (d_prior + self.eps * prior_size),
        ]
        peak = torch.stack([self.peak, c, grad_z, noise, noise * self.sd]).amax(0)
        of_second = torch.stack([peak, self.slope, self.slope * self.peak, self.slope * size]).amax(0)
        slope = self.prior_slope
        of_prior = torch.stack([peak, slope, slope * self.peak, slope * prior_size]).amax(0)
        return errors, [peak, of_second, peak, of_prior]


# --- comparing ----------------------------------------------------------------------------------------------


def same_bits(a: Tensor, b: Tensor) -> bool:
    word = WORDS[a.dtype.itemsize]
    return a.dtype == b.dtype and torch.equal(a.view(word), b.view(word))


def compare(
    what: str,
    ours: Tensor,
    exact: Tensor,
    single: Tensor,
    bound: Tensor,
    peak: Tensor,
    skip: Tensor | None = None,
    weightless: Tensor | None = None,
) -> None:
    """`single`: what the reference gives in the kernels' arithmetic. `bound`: of the error. `peak`: the largest
    number on the way to the result. `skip`: where the clamp may decide either way. `weightless`: what is multiplied
    by a weight of 0."""
    if ours.shape != exact.shape:
        raise Finding(f"{what}: shape {list(ours.shape)}, the reference has {list(exact.shape)}")
    info, arithmetic = torch.finfo(ours.dtype), torch.finfo(compute_dtype(ours.dtype))
    got, single = ours.double(), single.to(ours.dtype).double()
    bound = bound + exact.abs() * info.eps + info.tiny * info.eps
    close = (got - exact).abs() <= bound
    # The bound is no number where its own terms overflow.
    close |= got.isfinite() & exact.isfinite() & ~bound.isfinite()
    same = (got == exact) | (got.isnan() & exact.isnan())
    limit = min(arithmetic.max / 4, info.max * (1 - info.eps))
    out_of_range = (exact.abs() + bound >= limit) | ~(peak < arithmetic.max / 4)
    beyond = got.isinf() & (got.sign() == exact.sign()) & out_of_range
    # What leaves the range on the way.
    alike = ~got.isfinite() & ((got == single) | (got.isnan() & single.isnan())) & ~exact.isnan()
    # What is infinite on the way makes inf or NaN of the same derivative, as the order of its factors has it.
    infinite = ~got.isfinite() & ~exact.isfinite() & ~peak.isfinite()
    fine = close | same | beyond | alike | (infinite if what.startswith("gradient") else False)
    if skip is not None:
        fine |= skip & ~exact.isnan()
    if weightless is not None:
        fine |= weightless & got.isnan() & ~(peak < arithmetic.max / 4)
    if bool(fine.all()):
        return
    at = tuple(int(i) for i in (~fine).nonzero()[0])
    raise Finding(
        f"{what}{list(at)}: got {float(got[at])!r}, float64 says {float(exact[at])!r} "
        f"and the reference in {arithmetic.dtype} {float(single[at])!r}; "
        f"the bound is {float(bound.expand_as(exact)[at]):.3g}, peak {float(peak.expand_as(exact)[at]):.3g}"
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


def _compare_all(problem: Problem, exact_problem: Problem, ours: Outcome, exact: Outcome, single: Outcome) -> None:
    dtype = problem.mu.dtype
    errors = Errors(exact_problem, _one_sample(exact.outputs.get("z"), problem), dtype)
    undecided = torch.zeros(problem.mu.shape, dtype=torch.bool)
    bounds: dict[str, Tensor] = {}
    if "z" in ours.outputs:
        z = ours.outputs["z"]
        bounds["z"] = errors.z(exact.outputs["z"])
        one = torch.empty_like(problem.mu)
        strides = one.stride() if "num_samples" not in problem.options else (one.numel(), *one.stride())
        if z.stride() != strides or z.dtype != dtype:
            raise Finding(f"z has the strides {z.stride()}, torch.empty_like(mu) {strides}; {z.dtype}")
    if "kl" in ours.outputs:
        bounds["kl"], bounds["kl_per_group"], undecided = errors.objective(exact.outputs["kl_per_group"])
        for name in ("kl", "kl_per_group"):
            if ours.outputs[name].dtype != compute_dtype(dtype):
                raise Finding(f"{name} is {ours.outputs[name].dtype}")
    for name, t in ours.outputs.items():
        peak = errors.peak if name == "z" or t.shape == errors.peak.shape else errors.total_peak()
        compare(name, t, exact.outputs[name], single.outputs[name], bounds[name], peak)
    if not any(g is not None for g in exact.gradients):
        return
    bound, peaks = errors.gradients()
    undecided = undecided | errors.in_groups(~ours.outputs["kl_per_group"].isfinite()) if "kl" in bounds else undecided
    skips, weightless = [undecided] * 4, [errors.share == 0] * 4
    if problem.packed is not None:
        bound, peaks, skips, weightless = (
            [torch.cat(of_each[:2], problem.packed), *of_each[2:]]
            for of_each in (bound, peaks, skips, weightless)
        )
    for i, got in enumerate(ours.gradients):
        what = f"gradient of tensor {i} "
        want, usual = exact.gradients[i], single.gradients[i]
        if got is not None and problem.options.get("num_samples") == 0 and problem.op == "reparameterize":
            want = usual = torch.zeros_like(got)  # of an empty z, where the reference has 0 * inf at times
        if got is None or want is None or usual is None:
            # What has no path to an output has no gradient, or zeros.
            for t in (got, want):
                if t is not None and bool((t != 0).any()):
                    raise Finding(f"{what}: one side has none, the other has {t}")
            continue
        if got.dtype != problem.tensors[i].dtype:
            raise Finding(f"{what} is {got.dtype}")
        compare(what, got, want, usual, bound[i], peaks[i], skips[i], weightless[i])
