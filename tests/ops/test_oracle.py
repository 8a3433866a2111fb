"""The judge of values and gradients: documented errors of the formulas pass, larger ones do not."""

from __future__ import annotations

import itertools
from dataclasses import fields
from typing import Any

import oracle
import pytest
import torch
from cases import (
    FACTORS,
    LAYOUTS,
    Problem,
    check_gradients,
    check_values,
    compute_dtype,
    dense,
    problem_of,
    valid,
)
from designs import name_of, pairwise
from torch import Tensor

GPU = oracle.ACCURACY["cuda", torch.float32]
PLAIN = [name for name, layout in LAYOUTS.items() if layout.mu is dense and layout.chunked is None]
CASES = pairwise(FACTORS | {"dtype": [torch.float32], "layout": PLAIN, "packed": [None]}, valid)
DIRECTIONS = list(itertools.product((1, -1), repeat=3))


class Scaled(torch.autograd.Function):
    """value * a, whose derivative is that of value * b."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, a: float, b: float) -> Tensor:
        ctx.b = b
        return value * a

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.b, None, None


class Off(Problem):
    """A problem whose results come from formulas with the relative errors `exp`, `growth` and `excess`."""

    exp: float
    growth: float
    excess: float

    def run(self, leaves: list[Tensor]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        def kl_elements(mu: Tensor, lv: Tensor, mp: Tensor | None, lp: Tensor | None, usual: bool) -> Tensor:
            if mp is None or lp is None:
                mp = lp = torch.zeros_like(mu)
            x = lv - lp
            a = (mu - mp) * torch.exp(-lp / 2) * (1 + self.exp)
            return 0.5 * (a**2 + Scaled.apply(torch.expm1(x) - x, 1 + self.excess, 1 + self.growth))

        def sample(mu: Tensor, second: Tensor, eps: Tensor, parameterization: str, bounds: Any) -> Tensor:
            return mu + (exact(mu, second, eps, parameterization, bounds) - mu) * (1 + self.exp)

        exact, eps = oracle.sample, self.eps()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(oracle, "kl_elements", kl_elements)
            patched.setattr(oracle, "sample", sample)
            z, kl, rate = self.formula(
                [t.double() for t in leaves], None if eps is None else eps.double(), False
            )
        dtype = leaves[0].dtype
        if self.op == "reparameterize":
            return z.to(dtype), None, None
        return None if z is None else z.to(dtype), kl.to(compute_dtype(dtype)), rate.to(compute_dtype(dtype))


def off(case: Any, exp: float, growth: float, excess: float) -> Off:
    problem = problem_of(case)
    found = Off(**{f.name: getattr(problem, f.name) for f in fields(Problem)})
    found.exp, found.growth, found.excess = exp, growth, excess
    return found


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_documented_errors_of_the_gpu_pass(case, monkeypatch):
    monkeypatch.setitem(oracle.ACCURACY, ("cpu", torch.float32), GPU)
    for exp, growth, excess in DIRECTIONS:
        problem = off(case, exp * GPU.exp, growth * GPU.growth, excess * GPU.excess)
        check_values(problem)
        check_gradients(problem)


@pytest.mark.parametrize("error", ["exp", "growth", "excess"])
@pytest.mark.parametrize("accuracy", ["cpu", "cuda"])
def test_an_error_of_1e_4_does_not_pass(accuracy, error, monkeypatch):
    monkeypatch.setitem(oracle.ACCURACY, ("cpu", torch.float32), oracle.ACCURACY[accuracy, torch.float32])
    kinds = {"exp": 0.0, "growth": 0.0, "excess": 0.0} | {error: 1e-4}
    op = "reparameterize" if error == "exp" else "gaussian_kl"
    for case in CASES:
        if case["op"] == op:
            judge = check_gradients if error == "growth" else check_values
            with pytest.raises(AssertionError, match=r"error .* allowed"):
                judge(off(case, **kinds))
