"""torch.func: grad, vmap, jvp, hessian and their compositions go through the reference formulas.

KL(mu, lv) = 1/B sum 1/2 (mu^2 + e^lv - 1 - lv): its derivatives by mu are mu/B and 1/B, those by lv
(e^lv - 1) / 2B and e^lv / 2B. z = mu + e^(lv/2) eps: those by lv are eps e^(lv/2) / 2 and half of that.
"""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import vaekernels as vk
from vaekernels import _dispatch, _native
from vaekernels.distributions import DiagonalGaussian
from vaekernels.nn import GaussianLatent

RNG = torch.tensor([7, 4])
B, D = 5, 3


def inputs(*shape: int, count: int = 2) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(shape or (B, D), generator=draw, dtype=torch.float64) for _ in range(count)]


def eps_of(mu: torch.Tensor) -> torch.Tensor:
    return vk.reparameterize(torch.zeros_like(mu), torch.zeros_like(mu), rng=RNG)


def diagonal(t: torch.Tensor) -> torch.Tensor:
    return torch.diag(t.flatten()).view(t.shape + t.shape)


def test_grad_and_vjp(backend):
    mu, lv = inputs()
    to_mu, to_lv = grad(vk.gaussian_kl, argnums=(0, 1))(mu, lv)
    torch.testing.assert_close(to_mu, mu / B)
    torch.testing.assert_close(to_lv, (lv.exp() - 1) / (2 * B))
    z, back = vjp(lambda m, v: vk.reparameterize(m, v, rng=RNG), mu, lv)
    ones, to_lv = back(torch.ones_like(z))
    assert torch.equal(ones, torch.ones_like(mu))
    torch.testing.assert_close(to_lv, eps_of(mu) * torch.exp(lv / 2) / 2)


def test_jvp_and_forward_mode(backend):
    mu, lv = inputs()
    dm, dv = inputs()[::-1]
    value, tangent = jvp(vk.gaussian_kl, (mu, lv), (dm, dv))
    torch.testing.assert_close(value, vk.gaussian_kl(mu, lv))
    expected = (mu * dm + 0.5 * (lv.exp() - 1) * dv).sum() / B
    torch.testing.assert_close(tangent, expected)
    with forward_ad.dual_level():
        duals = forward_ad.make_dual(mu, dm), forward_ad.make_dual(lv, dv)
        torch.testing.assert_close(forward_ad.unpack_dual(vk.gaussian_kl(*duals)).tangent, expected)
        z = vk.sample_kl(*duals, rng=RNG).z
        torch.testing.assert_close(
            forward_ad.unpack_dual(z).tangent, dm + eps_of(mu) * torch.exp(lv / 2) / 2 * dv
        )


@pytest.mark.parametrize("transform", [hessian, lambda f: jacrev(jacrev(f)), lambda f: jacfwd(jacfwd(f))])
def test_hessian(transform, backend):
    mu, lv = inputs()
    by_mu = transform(lambda m: vk.gaussian_kl(m, lv))(mu)
    torch.testing.assert_close(by_mu, diagonal(torch.full_like(mu, 1 / B)))
    torch.testing.assert_close(transform(lambda v: vk.gaussian_kl(mu, v))(lv), diagonal(lv.exp() / (2 * B)))
    by_lv = transform(lambda v: vk.reparameterize(mu, v, rng=RNG).sum())(lv)
    torch.testing.assert_close(by_lv, diagonal(eps_of(mu) * torch.exp(lv / 2) / 4))


def test_the_hessian_of_a_closed_group_is_zero(backend):
    """free_bits above every rate: a constant; between them: only the open dimensions bend."""
    mu, lv = inputs()
    rate = vk.gaussian_kl(mu, lv, return_per_group=True)[1]
    middle = rate.sort().values[1].item() + 1e-9
    by_mu = hessian(lambda m: vk.gaussian_kl(m, lv, free_bits=middle))(mu)
    torch.testing.assert_close(by_mu, diagonal((rate > middle).double().expand(B, D) / B))
    assert not hessian(lambda m: vk.gaussian_kl(m, lv, free_bits=99.0))(mu).any()


OPTIONS = {
    "plain": {},
    "free bits": {"free_bits": 0.4},
    "free bits, tensor": {"free_bits": torch.tensor([0.1, 0.5, 2.0])},
    "per sample": {"free_bits": 0.4, "clamp": "sample", "penalty": "hinge", "reduction": "none"},
    "one group": {"group_dims": (), "free_bits": 1.0},
    "weights": {"weight": torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5], dtype=torch.float64)},
    "elementwise": {"reduction": "elementwise"},
    "softplus, bounds": {"parameterization": "softplus", "logvar_bounds": (-1.0, 1.0)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_vmap_equals_a_loop(name, backend):
    """Over a stack of batches, value and gradient."""
    mu, lv = inputs(4, B, D)
    for a, b in zip(
        vmap(lambda m, v: vk.gaussian_kl(m, v, return_per_group=True, **OPTIONS[name]))(mu, lv),
        zip(
            *(
                vk.gaussian_kl(m, v, return_per_group=True, **OPTIONS[name])
                for m, v in zip(mu, lv, strict=True)
            ),
            strict=True,
        ),
        strict=True,
    ):
        torch.testing.assert_close(a, torch.stack(list(b)))
    one = grad(lambda m, v: vk.gaussian_kl(m, v, **OPTIONS[name]).sum(), argnums=1)
    together = vmap(one)(mu, lv)
    for i in range(4):
        v = lv[i].clone().requires_grad_()
        (alone,) = torch.autograd.grad(vk.gaussian_kl(mu[i], v, **OPTIONS[name]).sum(), v)
        torch.testing.assert_close(together[i], alone)


def test_vmap_of_a_balanced_kl(backend):
    q, lq, p, lp = inputs(4, B, D, count=4)
    one = grad(lambda *args: vk.gaussian_kl(*args, balance=0.8), argnums=(0, 3))
    together = vmap(one)(q, lq, p, lp)
    (to_q, to_lp) = one(q[2], lq[2], p[2], lp[2])
    torch.testing.assert_close([t[2] for t in together], [to_q, to_lp])
    torch.testing.assert_close(to_q, 0.2 * (q[2] - p[2]) * torch.exp(-lp[2]) / B)


def test_vmap_over_states_draws_what_each_state_draws(backend):
    mu, lv = inputs(4, B, D)
    states = torch.stack([vk.rng_state(mu) for _ in range(4)])
    together = vmap(lambda m, v, state: vk.sample_kl(m, v, rng=state).z)(mu, lv, states)
    for i in range(4):
        torch.testing.assert_close(together[i], vk.reparameterize(mu[i], lv[i], rng=states[i]))


def test_randomness_of_vmap_is_kept(backend):
    mu = torch.zeros(4, 6)
    different = vmap(lambda m: vk.reparameterize(m, m), randomness="different")(mu)
    assert len({tuple(row.tolist()) for row in different}) == 4
    same = vmap(lambda m: vk.reparameterize(m, m), randomness="same")(mu)
    assert len({tuple(row.tolist()) for row in same}) == 1
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda m: vk.reparameterize(m, m))(mu)


def test_gradients_of_each_example(backend):
    """vmap(grad) over the parameters of an encoder, as differential privacy needs them."""
    torch.manual_seed(0)
    encoder = torch.nn.Linear(4, 2 * D)
    parameters = {name: p.detach() for name, p in encoder.named_parameters()}
    x = torch.randn(7, 4)

    def loss(parameters, row):
        z, kl, _ = vk.sample_kl_packed(functional_call(encoder, parameters, (row[None],)), rng=RNG)
        return kl + z.square().sum()

    together = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(7):
        alone = torch.autograd.grad(loss(dict(encoder.named_parameters()), x[i]), list(encoder.parameters()))
        torch.testing.assert_close([together["weight"][i], together["bias"][i]], list(alone))


def test_the_module_and_the_distribution(backend):
    moments = torch.cat(inputs(), 1)
    layer = GaussianLatent(D).eval()
    rows = vmap(grad(lambda m: layer(m[None], rng=RNG).kl))(moments)
    mu, lv = moments.chunk(2, 1)
    expected = torch.cat([mu, 0.5 * (lv.exp() - 1)], 1)
    torch.testing.assert_close(rows, expected)
    torch.testing.assert_close(vmap(grad(lambda m: DiagonalGaussian(m[None]).kl().sum()))(moments), expected)


def test_torch_autograd_functional(backend):
    mu, lv = inputs()
    expected = diagonal(torch.full_like(mu, 1 / B))
    found = torch.autograd.functional.hessian(lambda m: vk.gaussian_kl(m, lv), mu)
    torch.testing.assert_close(found, expected)
    rows = torch.autograd.functional.jacobian(
        lambda m: vk.gaussian_kl(m, lv, reduction="none"), mu, vectorize=True
    )
    torch.testing.assert_close(rows, torch.einsum("bd,bc->bcd", mu, torch.eye(B, dtype=mu.dtype)))


@pytest.mark.parametrize("name", ["grad", "vmap", "hessian"])
def test_compiled_transforms(name, backend):
    mu, lv = inputs()
    function = {
        "grad": lambda m, v: grad(vk.gaussian_kl)(m, v),
        "vmap": lambda m, v: vmap(lambda a, b: vk.gaussian_kl(a, b, batch_dims=0))(m, v),
        "hessian": lambda m, v: hessian(vk.gaussian_kl)(m, v),
    }[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(mu, lv), function(mu, lv))


def test_the_compiled_entry_is_not_taken_under_a_transform(kernels):
    """It does not see through functorch's wrappers."""
    seen = []
    mu, lv = inputs()

    def watched(m):
        seen.append(_dispatch.entry())
        return vk.gaussian_kl(m, lv)

    assert _dispatch.entry() is _native.C.latent
    grad(watched)(mu)
    jvp(watched, (mu,), (mu,))
    with forward_ad.dual_level():
        watched(mu)
    assert seen == [_dispatch.latent] * 3
