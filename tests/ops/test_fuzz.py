"""The fuzzer's problems without the fuzzer: bytes at random, what was found, whether the judge sees faults.

`make fuzz` runs the same checks, guided by coverage and under sanitizers; see tests/fuzz.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from fuzz import judge, one_input, operators, problem
from fuzz.problem import Problem, decode, strided

pytestmark = pytest.mark.usefixtures("kernels")


def some_bytes(seed: int) -> bytes:
    draw = random.Random(seed)
    return draw.randbytes(draw.choice((20, 60, 200)))


@pytest.mark.parametrize("part", range(10))
def test_random_problems(part):
    seen = [judge.check(decode(some_bytes(1000 * part + i))) for i in range(120)]
    assert seen.count("values") > 100


@pytest.mark.parametrize("part", range(5))
def test_random_calls_of_the_operators(part):
    seen = {operators.check(some_bytes(1000 * part + i)) for i in range(150)}
    assert seen == {"returned", "raised"}


def test_every_operator_is_called():
    called = {operators.Call(some_bytes(seed)).schema.name for seed in range(300)}
    assert called == {schema.name for schema in operators.schemas()}
    assert {"vaekernels::latent", "vaekernels::latent_backward"} <= called


@pytest.mark.parametrize("seed", range(40))
def test_a_problem_is_written_as_python(seed):
    """What a finding prints makes the problem again, bit for bit."""
    original = decode(some_bytes(seed))
    again = eval(str(original), {"Problem": Problem, "strided": strided, "torch": torch, "math": math})
    assert str(again) == str(original)
    for a, b in zip(original.tensors, again.tensors, strict=True):
        assert a.stride() == b.stride() and judge.same_bits(a, b)


def test_bytes_decide():
    assert one_input.text(b"") == one_input.text(b"")
    assert one_input.check(b"") == one_input.check(bytes(100)) == "values"
    assert str(decode(some_bytes(1))) == str(decode(some_bytes(1))) != str(decode(some_bytes(2)))
    assert one_input.text(b"\3").startswith("torch.ops.vaekernels.")


# --- the judge sees faults ----------------------------------------------------------------------------------

MU, LOGVAR = torch.tensor([[0.5, -1.0], [0.25, 2.0]]), torch.tensor([[0.5, -0.5], [1.0, 0.125]])


def plain(**more: Any) -> Problem:
    options = {"batch_dims": 1, "reduction": "batchmean", "parameterization": "logvar", **more}
    options["rng"] = torch.tensor([3, 4])
    ones = {"z": torch.ones(2, 2), "kl": torch.tensor(1.0), "kl_per_group": torch.ones(2)}
    return Problem("sample_kl", [MU.clone(), LOGVAR.clone()], None, options, cotangents=ones)


def faulty(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """The kernels' outcome is changed, once for each call of a problem."""
    run, calls = judge.run, []

    def changed(problem: Problem) -> judge.Outcome:
        outcome = run(problem)
        if problem.mu.dtype == torch.float32 and judge._native.C is not None:
            calls.append(problem)
            change(outcome, problem, len(calls))
        return outcome

    monkeypatch.setattr(judge, "run", changed)


def test_the_judge_accepts_what_is_right():
    assert judge.check(plain()) == "values"


FAULTS = {
    "a number": (lambda out, p, call: out.outputs["kl"].mul_(1 + 1e-4), r"kl\[\]: got"),
    "a sample": (lambda out, p, call: out.outputs["z"][1, 0].add_(1e-3), r"z\[1, 0\]: got"),
    "a rate": (
        lambda out, p, call: out.outputs["kl_per_group"][0].fill_(math.inf),
        r"kl_per_group\[0\]: got inf",
    ),
    "a gradient": (lambda out, p, call: out.gradients[1][0, 1].mul_(1.001), r"gradient of tensor 1 \[0, 1\]"),
    "a gradient of zero": (lambda out, p, call: out.gradients[0].zero_(), r"gradient of tensor 0 \[0, 0\]"),
    "a gradient of NaN": (lambda out, p, call: out.gradients[0][0].fill_(math.nan), r"got nan"),
    "other bits": (lambda out, p, call: out.outputs["z"].mul_(1 + call * 2.0**-23), "other bits"),
    "an argument": (lambda out, p, call: p.tensors[0].add_(1), "changed a tensor that it was given"),
    "strides": (lambda out, p, call: out.outputs.update(z=out.outputs["z"].T.contiguous().T), "strides"),
    "a dtype": (
        lambda out, p, call: out.outputs.update(kl=out.outputs["kl"].double()),
        "kl is torch.float64",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_judge_sees(fault, monkeypatch):
    change, message = FAULTS[fault]
    faulty(monkeypatch, change)
    with pytest.raises(judge.Finding, match=message):
        judge.check(plain())


@pytest.mark.parametrize("value", [0.0, math.inf])
def test_the_judge_sees_a_nan_that_was_hidden(value, monkeypatch):
    problem = plain(free_bits=0.5)
    problem.tensors[1][0, 0] = math.nan
    assert judge.check(problem) == "values"
    faulty(monkeypatch, lambda out, p, call: out.outputs["kl"].fill_(value))
    with pytest.raises(judge.Finding, match="float64 says nan"):
        judge.check(problem)


def test_the_judge_sees_a_refusal_of_one_side(monkeypatch):
    problem = plain(balance=0.5)
    assert judge.check(problem) == "refused"

    def refuse(*args: Any) -> None:
        raise ValueError("no")

    faulty(monkeypatch, refuse)
    with pytest.raises(judge.Finding, match="refuse"):
        judge.check(plain())


def test_the_judge_sees_memory_that_nobody_wrote(monkeypatch):
    data = next(b for b in map(some_bytes, range(100)) if operators.check(b) == "returned")
    for dtype, word in (
        (torch.float32, torch.int32),
        (torch.float64, torch.int64),
        (torch.bfloat16, torch.int16),
    ):
        t = torch.full((5,), operators.UNWRITTEN[dtype.itemsize], dtype=word).view(dtype)
        monkeypatch.setattr(operators.Call, "run", lambda self, t=t: [t])
        with pytest.raises(judge.Finding, match="nobody wrote"):
            operators.check(data)


# --- what the fuzzer found ----------------------------------------------------------------------------------


def halves(dtype: torch.dtype, logvar: float, grad_z: float, grad_kl: float) -> Problem:
    """Groups that interleave with what is summed: a layout that is copied, where the two halves of a gradient
    come from two launches."""
    shape = (2, 2, 2, 3)
    mu, second = torch.full(shape, 0.75, dtype=dtype), torch.full(shape, logvar, dtype=dtype)
    options = {"batch_dims": 1, "group_dims": [1, 3], "reduction": "sum", "parameterization": "log_std"}
    options["rng"] = torch.tensor([5, 0])
    cotangents = {"z": torch.full(shape, grad_z, dtype=dtype), "kl": torch.tensor(grad_kl)}
    return Problem("sample_kl", [mu, second], None, options, cotangents=cotangents)


FOUND = {
    # Each half overflowed float16 on its own: inf - inf.
    "gradients that cancel in a copied layout": halves(torch.float16, 34.78, 1.0, -1.0),
    # Each half was rounded to bfloat16 before they were added.
    "rounding in a copied layout": halves(torch.bfloat16, 0.01, 1.0, -1.333),
    # The reference's gradient was 0, the kernels' was that of a positive one.
    "gradient of a negative std": Problem(
        "reparameterize",
        [torch.ones(1, 2), torch.tensor([[-1.0, 1.0]])],
        None,
        {"parameterization": "std", "rng": torch.tensor([3, 0])},
        cotangents={"z": torch.full((1, 2), math.inf)},
    ),
    # The random numbers of a backward that is differentiated again were placed by strides of a view.
    "second derivatives of an expanded row": Problem(
        "reparameterize",
        [torch.tensor([1.0, 2.0, 3.0])[:, None, None].permute(1, 2, 0).expand(1, 2, 3), torch.zeros(1, 2, 3)],
        None,
        {"parameterization": "logvar", "rng": torch.tensor([3, 0])},
        cotangents={"z": torch.ones(1, 2, 3)},
        create_graph=True,
    ),
    # The judge had no room for the rounding of sums that hold no elements.
    "a sum of many thresholds": Problem(
        "gaussian_kl",
        [torch.zeros(8, 129, 17, 0, dtype=torch.float64)] * 2,
        None,
        {
            "batch_dims": 0,
            "reduction": "batchmean",
            "parameterization": "logvar",
            "group_dims": [0, 1, 2],
            "clamp": "sample",
            "free_bits": 1e-7,
        },
    ),
    # The rate is NaN in float32 and closes its group, which is open in float64.
    "a gradient that is NaN, and a rate that leaves the range": Problem(
        "gaussian_kl",
        [torch.zeros(2, 1)] * 3 + [torch.tensor([[-100.0], [0.0]])],
        None,
        {"batch_dims": 1, "reduction": "batchmean", "parameterization": "log_std", "free_bits": 0.5},
        cotangents={"kl": torch.tensor(math.nan)},
    ),
    # The judge took the normals from z - mu, where mu had swallowed them.
    "a deviation that vanishes beside the mean": Problem(
        "reparameterize",
        [torch.full((8, 512), 1e4), torch.full((8, 512), -175.45)],
        None,
        {"parameterization": "logvar", "rng": torch.tensor([3, 0])},
        cotangents={"z": torch.full((8, 512), -6.0)},
    ),
    # 0 * inf in the reference where a group is closed: sd^2 leaves the range of float64, its slope does not.
    "a closed group of a large std": Problem(
        "gaussian_kl",
        [torch.ones(1, 2, dtype=torch.float64), torch.tensor([[1e308, -1.0]], dtype=torch.float64)],
        None,
        {
            "batch_dims": 1,
            "group_dims": [],
            "reduction": "batchmean",
            "parameterization": "std",
            "free_bits": 0.5,
        },
        cotangents={"kl": torch.tensor(1.0), "kl_per_group": torch.tensor(0.0)},
    ),
    # The clamp's branch for weights that sum to 0 said 0 without a look at the rows.
    "NaN of a row without weight": Problem(
        "gaussian_kl",
        [torch.tensor([[math.inf, 1.0]]), torch.zeros(1, 2)],
        None,
        {
            "batch_dims": 1,
            "reduction": "sum",
            "parameterization": "logvar",
            "free_bits": 2.0,
            "weight": torch.zeros(1),
        },
    ),
    # The sum of a row is over float32's range, and its weight is 0: 0 * inf, as in PyTorch.
    "a sum out of range without weight": Problem(
        "gaussian_kl",
        [torch.full((1, 65), 1.8e19), torch.zeros(1, 65)],
        None,
        {
            "batch_dims": 1,
            "reduction": "sum",
            "parameterization": "logvar",
            "clamp": "sample",
            "free_bits": 1e30,
            "weight": torch.zeros(1),
        },
    ),
    # The same with a gradient that balance=0 keeps from the prior.
    "a slope out of range that the balance leaves out": Problem(
        "gaussian_kl",
        [torch.full((1, 3), 100.0), torch.ones(1, 3), torch.zeros(1, 3), torch.full((1, 3), 1e-20)],
        None,
        {"batch_dims": 0, "reduction": "elementwise", "parameterization": "std", "balance": 0.0},
        cotangents={"kl": torch.ones(1, 3)},
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found(name):
    assert judge.check(FOUND[name]) == "values"


def test_problems_have_every_kind_of_argument():
    """What `decode` makes of random bytes reaches all options, dtypes and layouts."""
    problems = [decode(some_bytes(seed)) for seed in range(1500)]
    options: dict[str, set[Any]] = {}
    for one in problems:
        for name, value in one.options.items():
            options.setdefault(name, set()).add(type(value) if not isinstance(value, (str, int)) else value)
    assert options["reduction"] == {"batchmean", "sum", "mean", "none", "elementwise"}
    assert options["parameterization"] == {"logvar", "log_std", "std", "softplus"}
    assert options["penalty"] == {"floor", "hinge", "mask"} and options["clamp"] == {"batch", "sample"}
    assert options["free_bits"] >= {float, torch.Tensor}
    assert {0, 1, 2} <= options["num_samples"] and {"weight", "balance", "logvar_bounds", "rng"} <= set(
        options
    )
    assert {one.mu.dtype for one in problems} == set(problem.DTYPES)
    assert {one.mu.dim() for one in problems} == set(range(6))
    tensors = [t for one in problems for t in one.tensors]
    for kind in (
        lambda t: not t.is_contiguous(),
        lambda t: t.numel() == 0,
        lambda t: 0 in t.stride() and t.numel() > 1,
        lambda t: t.dim() == 4 and t.numel() > 1 and t.is_contiguous(memory_format=torch.channels_last),
        lambda t: t.storage_offset() > 0,
        lambda t: t.numel() > 16384,
        lambda t: bool(t.isnan().any()),
        lambda t: bool(t.isinf().any()),
    ):
        assert any(map(kind, tensors))
    assert any(one.packed is not None for one in problems) and any(one.create_graph for one in problems)
    assert {frozenset(one.cotangents) for one in problems} >= {
        frozenset(),
        frozenset({"z"}),
        frozenset({"kl"}),
        frozenset({"z", "kl", "kl_per_group"}),
    }
