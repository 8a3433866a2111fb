"""Gradients: against the oracle over the covering design, gradcheck, gradgradcheck, and the corners."""

from __future__ import annotations

import itertools
import math

import oracle
import pytest
import torch
from cases import BOUNDS, COVERING, DTYPES, FACTORS, LAYOUTS, check_gradients, combinations, problem_of, valid
from conftest import require_kernels
from designs import name_of, pairwise
from torch.autograd import gradcheck, gradgradcheck

import vaekernels as vk

pytestmark = pytest.mark.shim

# gradcheck takes no leaves whose elements share memory; balance scales the gradient and not the value, which
# finite differences cannot see
DIFFERENCED = FACTORS | {
    "dtype": [torch.float64],
    "layout": [name for name, layout in LAYOUTS.items() if "expanded" not in name and layout.chunked is None],
    "prior": [None, "given"],
    "weight": [None, torch.float64],
    "samples": [None, 2],
}
GRADCHECKED = pairwise(DIFFERENCED, valid, tries=4)


@pytest.mark.parametrize("case", COVERING, ids=name_of)
def test_covering_design(case, device, backend):
    check_gradients(problem_of(case, device))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", FACTORS["op"])
def test_every_combination(op, dtype, device, backend):
    wrong = []
    for case in combinations(op, dtype, backend):
        try:
            check_gradients(problem_of(case, device))
        except AssertionError as error:
            wrong.append(f"{name_of(case)}: {error}")
    assert not wrong, f"{len(wrong)} combinations, the first ones:\n" + "\n".join(wrong[:10])


def _function(problem):
    return lambda *leaves: tuple(o for o in problem.run(list(leaves)) if o is not None)


@pytest.mark.parametrize("case", GRADCHECKED, ids=name_of)
def test_gradcheck(case, device, backend):
    problem = problem_of(case, device)
    leaves = [leaf.detach().requires_grad_() for leaf in problem.leaves]
    assert gradcheck(_function(problem), leaves, fast_mode=True, atol=1e-6)


SECOND_ORDER = {
    "plain": {},
    "batch": {"free_bits": 0.4},
    "batch_hinge_sum": {"free_bits": 0.4, "penalty": "hinge", "reduction": "sum"},
    "sample": {"free_bits": 0.4, "clamp": "sample", "reduction": "mean"},
    "sample_mask_rows": {"free_bits": 0.4, "clamp": "sample", "penalty": "mask", "reduction": "none"},
    "elementwise": {"reduction": "elementwise"},
    "weighted": {"weight": torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64), "free_bits": 0.3},
    "bounded": {"logvar_bounds": BOUNDS},
    "log_std": {"parameterization": "log_std"},
    "std": {"parameterization": "std"},
    "softplus": {"parameterization": "softplus", "free_bits": 0.4},
}


@pytest.mark.parametrize("prior", [False, True], ids=["standard", "learned"])
@pytest.mark.parametrize("options", SECOND_ORDER.values(), ids=SECOND_ORDER)
def test_gradgradcheck(options, prior, device, backend):
    draw = torch.Generator().manual_seed(3)
    leaves = [torch.rand(3, 4, generator=draw, dtype=torch.float64) + 0.2 for _ in range(4 if prior else 2)]
    leaves = [leaf.to(device).requires_grad_() for leaf in leaves]
    rng = torch.tensor([9, 16], device=device)
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}

    def function(*leaves):
        return tuple(vk.sample_kl(*leaves, rng=rng, **options))

    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


@pytest.mark.parametrize("balance", [0.0, 0.3, 1.0])
def test_second_derivative_of_a_balanced_kl(balance, device, backend):
    """The first gradients are those of the KL times their shares; the second ones derive that."""
    draw = torch.Generator().manual_seed(3)
    leaves = [torch.randn(3, 4, generator=draw, dtype=torch.float64).to(device) for _ in range(4)]

    def second(function, shares):
        mine = [leaf.clone().requires_grad_() for leaf in leaves]
        first = torch.autograd.grad(function(*mine), mine, create_graph=True)
        return torch.autograd.grad(
            sum(((s * g) ** 2).sum() for s, g in zip(shares, first, strict=True)), mine
        )

    ours = second(lambda *t: vk.gaussian_kl(*t, balance=balance), [1] * 4)
    exact = second(lambda *t: oracle.objective(*t).kl, [1 - balance] * 2 + [balance] * 2)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dim", [1, -1])
def test_gradcheck_of_packed_moments(dim, device, backend):
    moments = (torch.rand(2, 4, 3, 2, dtype=torch.float64, device=device) + 0.2).requires_grad_()
    rng = torch.tensor([9, 16], device=device)
    options = {"free_bits": 0.5, "group_dims": 1}
    assert gradcheck(lambda m: tuple(vk.sample_kl_packed(m, dim, rng=rng, **options)), [moments])
    assert gradgradcheck(lambda m: tuple(vk.sample_kl_packed(m, dim, rng=rng, **options)), [moments])
    assert gradcheck(lambda m: vk.reparameterize_packed(m, dim, rng=rng), [moments])
    assert gradcheck(lambda m: vk.gaussian_kl_packed(m, dim, **options), [moments])
    assert gradgradcheck(lambda m: vk.gaussian_kl_packed(m, dim, **options), [moments])


# --- undefined gradients ------------------------------------------------------------------------------------

OUTPUTS = ["z", "kl", "kl_per_group"]


@pytest.mark.parametrize("packed", [False, True], ids=["two", "packed"])
@pytest.mark.parametrize("options", [{}, {"free_bits": 0.4}, {"free_bits": 0.4, "clamp": "sample"}])
@pytest.mark.parametrize(
    "used", [c for n in (1, 2) for c in itertools.combinations(OUTPUTS, n)], ids="+".join
)
def test_outputs_that_nobody_differentiates(used, options, packed, device, backend):
    """Only z used, only kl used, only the rate used, and pairs: the gradient is the sum of the parts."""
    draw = torch.Generator().manual_seed(1)
    rng = torch.tensor([9, 16], device=device)
    base = [torch.randn(5, 3, generator=draw, dtype=torch.float64).to(device) for _ in range(2)]

    def gradients(function, names):
        mine = [leaf.clone().requires_grad_() for leaf in base]
        outputs = function(*mine)._asdict()
        total = sum(
            (outputs[n] * torch.arange(1.0, outputs[n].numel() + 1).view(outputs[n].shape).to(device)).sum()
            for n in names
        )
        return torch.autograd.grad(total, mine, allow_unused=True, materialize_grads=True)

    def ours(mu, logvar):
        if packed:
            return vk.sample_kl_packed(torch.cat([mu, logvar], 1), 1, rng=rng, **options)
        return vk.sample_kl(mu, logvar, rng=rng, **options)

    def exact(mu, logvar):
        z, kl, rate = oracle.objective(
            mu, logvar, eps=oracle.normals_like(base[0], rng.cpu()).to(device), **options
        )
        return vk.SampleKL(z, kl, rate)

    for a, b in zip(gradients(ours, used), gradients(exact, used), strict=True):
        torch.testing.assert_close(a, b)


def test_one_input_without_gradient(device, backend):
    rng = torch.tensor([9, 16], device=device)
    base = [torch.randn(5, 3, dtype=torch.float64, device=device) for _ in range(4)]
    full = [t.clone().requires_grad_() for t in base]
    z, kl, _ = vk.sample_kl(*full, rng=rng, free_bits=0.2)
    expected = torch.autograd.grad(z.sum() + kl, full)
    for i in range(4):
        one = [t.clone().requires_grad_(i == j) for j, t in enumerate(base)]
        z, kl, _ = vk.sample_kl(*one, rng=rng, free_bits=0.2)
        (z.sum() + kl).backward()
        torch.testing.assert_close(one[i].grad, expected[i])
        assert all(t.grad is None for j, t in enumerate(one) if j != i)
    z, kl, _ = vk.sample_kl(*base[:2], *full[2:], rng=rng)
    assert not z.requires_grad and kl.requires_grad


def test_no_grad_and_inference_mode_record_nothing(device, backend):
    mu = torch.randn(5, 3, device=device, requires_grad=True)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            z, kl, rate = vk.sample_kl(mu, mu, free_bits=0.1)
            assert not (z.requires_grad or kl.requires_grad or rate.requires_grad)


def test_backward_twice_needs_retain_graph_and_then_repeats(device, backend):
    mu = torch.randn(5, 3, device=device, requires_grad=True)
    z, kl, _ = vk.sample_kl(mu, mu, free_bits=0.1)
    first = torch.autograd.grad(z.sum() + kl, mu, retain_graph=True)[0]
    second = torch.autograd.grad(z.sum() + kl, mu)[0]
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(z.sum() + kl, mu)


def test_inputs_changed_after_the_forward_are_noticed(device, backend):
    mu = torch.randn(5, 3, device=device, requires_grad=True)
    logvar = torch.zeros(5, 3, device=device)
    kl = vk.gaussian_kl(mu * 1, logvar.requires_grad_() * 1)
    kl.backward()
    hidden = mu * 1
    kl = vk.gaussian_kl(hidden, logvar * 1)
    hidden.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        kl.backward()


# --- the clamp ----------------------------------------------------------------------------------------------

TIE = {"mu": 2.0, "rate": 2.0}  # KL(N(2, 1) || N(0, 1)) = 2 nats exactly in every dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("penalty", ["floor", "hinge", "mask"])
@pytest.mark.parametrize("clamp", ["batch", "sample"])
@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_gradient_at_the_tie_is_one(tensor, clamp, penalty, dtype, device, backend):
    """x == lambda counts as open, as in torch.clamp; torch.max would give one half."""
    mu = torch.full((4, 3), TIE["mu"], dtype=dtype, device=device, requires_grad=True)
    logvar = torch.zeros(4, 3, dtype=dtype, device=device)
    for free_bits, expected in (
        (TIE["rate"], 0.5),
        (TIE["rate"] * (1 + 2e-7), 0.0),
        (TIE["rate"] - 1e-6, 0.5),
    ):
        lam = torch.full((3,), free_bits, device=device) if tensor else free_bits
        kl = vk.gaussian_kl(mu, logvar, free_bits=lam, clamp=clamp, penalty=penalty)
        (grad,) = torch.autograd.grad(kl, mu)
        assert torch.equal(grad, torch.full_like(grad, expected)), free_bits
    reference = torch.full((), TIE["rate"], requires_grad=True)
    assert torch.autograd.grad(reference.clamp(min=TIE["rate"]), reference)[0] == 1.0


@pytest.mark.parametrize("width", [5, 13, 30, 50, 250, 500])
def test_each_element_has_its_own_gate(width, device, backend):
    """Widths whose rows, tiles and bytes of eight gates begin in different places."""
    mu = torch.randn(203, width, device=device, requires_grad=True)
    kl = vk.gaussian_kl(mu, torch.zeros_like(mu), free_bits=0.2, clamp="sample", reduction="sum")
    (grad,) = torch.autograd.grad(kl, mu)
    gate_is_open = mu.detach().double().square() / 2 >= 0.2
    assert torch.equal(grad, torch.where(gate_is_open, mu, 0.0).detach())


def test_backward_never_decides_again(device, backend):
    """The forward's decision is saved: free_bits that change in place after it do not move the gate."""
    for clamp in ("batch", "sample"):
        mu = torch.full((4, 3), 2.0, device=device, requires_grad=True)
        lam = torch.tensor([1.0, 2.0, 3.0], device=device)
        kl = vk.gaussian_kl(mu, torch.zeros_like(mu), free_bits=lam, clamp=clamp)
        lam.fill_(100.0)
        kl.backward()
        assert torch.equal(mu.grad, torch.tensor([[0.5, 0.5, 0.0]], device=device).expand(4, 3)), clamp


def test_finite_elements_of_a_nan_group_get_no_gradient_from_the_clamp(device, backend):
    mu = torch.ones(3, 2, device=device)
    mu[0, 0] = float("nan")
    mu.requires_grad_()
    kl = vk.gaussian_kl(mu, torch.zeros_like(mu), free_bits=0.1)
    assert kl.isnan()
    kl.backward()
    assert mu.grad[0, 0].isnan()
    assert mu.grad[1:, 0].tolist() == [0.0, 0.0]
    torch.testing.assert_close(mu.grad[:, 1], torch.full((3,), 1 / 3, device=device))


def test_gradient_is_zero_outside_the_bounds_and_one_on_them(device, backend):
    bounds = (-2.0, 1.5)
    logvar = torch.tensor([[-3.0, -2.0, 0.5, 1.5, 2.0]], device=device, requires_grad=True)
    mu = torch.zeros_like(logvar)
    (grad,) = torch.autograd.grad(vk.gaussian_kl(mu, logvar, logvar_bounds=bounds), logvar)
    expected = (
        torch.expm1(logvar.detach().clamp(*bounds)) / 2 * torch.tensor([0.0, 1, 1, 1, 0], device=device)
    )
    torch.testing.assert_close(grad, expected)
    z = vk.reparameterize(mu, logvar, rng=torch.tensor([1, 0], device=device), logvar_bounds=bounds)
    (grad,) = torch.autograd.grad(z.sum(), logvar)
    assert grad[0, 0] == 0 and grad[0, 4] == 0 and bool((grad[0, 1:4] != 0).all())


# --- balance ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("balance", [0.0, 0.25, 0.8, 1.0])
def test_balance_shares_the_gradient_and_not_the_value(balance, device, backend):
    base = [torch.randn(5, 3, dtype=torch.float64, device=device) for _ in range(4)]
    plain = [t.clone().requires_grad_() for t in base]
    mine = [t.clone().requires_grad_() for t in base]
    rng = torch.tensor([1, 0], device=device)
    z0, kl0, rate0 = vk.sample_kl(*plain, rng=rng)
    z1, kl1, rate1 = vk.sample_kl(*mine, rng=rng, balance=balance)
    assert kl0 == kl1 and torch.equal(rate0, rate1) and torch.equal(z0, z1)
    share = [1 - balance] * 2 + [balance] * 2
    for a, b, s in zip(
        torch.autograd.grad(kl1, mine, retain_graph=True),
        torch.autograd.grad(kl0, plain, retain_graph=True),
        share,
        strict=True,
    ):
        torch.testing.assert_close(a, b * s)
    # the rate is scaled too, z is not
    for a, b, s in zip(
        torch.autograd.grad(rate1.sum(), mine, retain_graph=True),
        torch.autograd.grad(rate0.sum(), plain, retain_graph=True),
        share,
        strict=True,
    ):
        torch.testing.assert_close(a, b * s)
    for a, b in zip(
        torch.autograd.grad(z1.sum(), mine[:2]), torch.autograd.grad(z0.sum(), plain[:2]), strict=True
    ):
        assert torch.equal(a, b)


# --- inputs that share memory -------------------------------------------------------------------------------


def test_gradient_of_expanded_leaves_is_summed(device, backend):
    """A prior of one row for the whole batch, and a mean shared by all rows."""
    mu, logvar = torch.randn(6, 4, device=device), torch.randn(6, 4, device=device)
    prior = [torch.randn(1, 4, device=device, requires_grad=True) for _ in range(2)]
    vk.gaussian_kl(mu, logvar, *(p.expand(6, 4) for p in prior), free_bits=0.1).backward()
    exact = [p.detach().double().requires_grad_() for p in prior]
    oracle.objective(
        mu.double(), logvar.double(), *(p.expand(6, 4) for p in exact), free_bits=0.1
    ).kl.backward()
    for ours, theirs in zip(prior, exact, strict=True):
        assert ours.grad.shape == (1, 4)
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-6)


def test_one_tensor_as_both_arguments(device, backend):
    t = torch.randn(6, 4, dtype=torch.float64, device=device, requires_grad=True)
    rng = torch.tensor([1, 0], device=device)
    assert gradcheck(lambda x: tuple(vk.sample_kl(x, x, x, x, rng=rng)), [t])


def test_gradient_of_packed_moments_is_one_packed_tensor(device, backend):
    moments = (
        torch.randn(3, 4, 2, 2, device=device).contiguous(memory_format=torch.channels_last).requires_grad_()
    )
    rng = torch.tensor([1, 0], device=device)
    z, kl, _ = vk.sample_kl_packed(moments, rng=rng, free_bits=0.2, group_dims=1)
    (packed,) = torch.autograd.grad(z.sum() + kl, moments)
    halves = [h.detach().requires_grad_() for h in moments.chunk(2, 1)]
    z, kl, _ = vk.sample_kl(*halves, rng=rng, free_bits=0.2, group_dims=1)
    assert torch.equal(packed, torch.cat(torch.autograd.grad(z.sum() + kl, halves), 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_many_samples_is_the_sum_over_samples(dtype, device, backend):
    mu, logvar = (torch.randn(4, 5, device=device).to(dtype).requires_grad_() for _ in range(2))
    rng = torch.tensor([1, 0], device=device)
    z = vk.reparameterize(mu, logvar, num_samples=3, rng=rng)
    cotangent = torch.randn(z.shape, device=device).to(dtype)
    grads = torch.autograd.grad(z, [mu, logvar], cotangent)
    zero = torch.zeros(4, 5, device=device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    eps = vk.reparameterize(zero, zero, num_samples=3, rng=rng).double()
    exact = [cotangent.double().sum(0), (cotangent.double() * eps).sum(0) * (logvar.double() / 2).exp() / 2]
    for a, b in zip(grads, exact, strict=True):
        size = cotangent.double().abs().sum(0) * 4
        assert ((a.double() - b).abs() <= 4 * oracle.ulp(size, dtype)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("samples", "shape"), [(40000, (1, 1)), (9000, (7,)), (131, (2, 256)), (70, (36, 13)), (20, (1, 513))]
)
def test_gradients_of_many_samples_of_few_elements(samples, shape, dtype):
    """Over several chunks, the last one not full, with the KL; the same bits with any number of threads."""
    require_kernels("cpu")
    mu, logvar = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))
    rng = torch.tensor([1, 0])
    cotangent = torch.randn(samples, *shape).to(dtype)
    options = {"num_samples": samples, "rng": rng, "batch_dims": len(shape) - 1}

    def gradients(leaves):
        z, kl, _ = vk.sample_kl(*leaves, **options)
        return torch.autograd.grad((z, kl), leaves, (cotangent.to(z.dtype), torch.ones_like(kl)))

    grads = gradients([mu, logvar])
    m, v = (t.detach().double().requires_grad_() for t in (mu, logvar))
    zero = torch.zeros_like(m)
    z = m + (v / 2).exp() * vk.reparameterize(zero, zero, num_samples=samples, rng=rng)
    kl = (m**2 + v.exp() - 1 - v).sum() / (2 * math.prod(shape[:-1]))
    exact = torch.autograd.grad((z, kl), (m, v), (cotangent.double(), torch.ones_like(kl)))
    # The normals of float32 differ from those of float64 by up to 1e-5.
    error = 2e-5 * cotangent.double().abs().sum(0) * (logvar.detach().double() / 2).exp().clamp(min=1)
    for ours, wanted in zip(grads, exact, strict=True):
        torch.testing.assert_close(
            ours, wanted.to(dtype), rtol=torch.finfo(dtype).eps, atol=error.max().item()
        )
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        for ours, other in zip(grads, gradients([mu, logvar]), strict=True):
            assert torch.equal(ours, other)
    finally:
        torch.set_num_threads(threads)


# --- transforms that C++ autograd functions cannot do -------------------------------------------------------


def test_functorch_and_forward_mode_take_the_reference(device, backend):
    mu, logvar = torch.randn(5, 3, device=device), torch.randn(5, 3, device=device)
    rng = torch.tensor([1, 0], device=device)
    by_func = torch.func.grad(lambda m: vk.gaussian_kl(m, logvar, free_bits=0.2))(mu)
    leaf = mu.clone().requires_grad_()
    vk.gaussian_kl(leaf, logvar, free_bits=0.2).backward()
    torch.testing.assert_close(by_func, leaf.grad)
    per_row = torch.func.vmap(lambda m, v: vk.gaussian_kl(m, v, batch_dims=0))(mu, logvar)
    torch.testing.assert_close(per_row, vk.gaussian_kl(mu, logvar, reduction="none"))
    _, tangent = torch.func.jvp(lambda m: vk.gaussian_kl(m, logvar), (mu,), (torch.ones_like(mu),))
    torch.testing.assert_close(tangent, mu.sum() / 5)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(mu, torch.ones_like(mu))
        z = vk.reparameterize(dual, logvar, rng=rng)
        assert torch.equal(torch.autograd.forward_ad.unpack_dual(z).tangent, torch.ones_like(mu))


def test_a_single_number_without_an_axis(device, backend):
    mu, logvar = (torch.tensor(x, device=device, requires_grad=True) for x in (0.3, -0.5))
    z = vk.reparameterize(mu, logvar)
    z.backward()
    assert mu.grad == 1
    torch.testing.assert_close(logvar.grad, ((z - mu) / 2).detach())
