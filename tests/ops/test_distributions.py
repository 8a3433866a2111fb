"""`DiagonalGaussian`: the numbers of its formulas on every shape, and what diffusers' class errs at.

The comparison with the class of the installed diffusers is tests/integrations/test_diffusers.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import vaekernels as vk
from vaekernels.distributions import DiagonalGaussian

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# The moments' shape and the axis that holds both halves.
LAYOUTS = {
    "BD": ((5, 6), 1),
    "BTD": ((3, 4, 6), -1),
    "BCT": ((3, 6, 5), 1),
    "BCHW": ((3, 4, 3, 5), 1),
    "BCTHW": ((2, 6, 2, 3, 2), 1),
    "D, no batch": ((8,), 0),
}


def moments(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    draw = torch.Generator().manual_seed(2)
    return torch.randn(shape, generator=draw).to(device, dtype).requires_grad_()


def halves(t: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """mean and clamped logvar in float64."""
    mean, logvar = t.double().chunk(2, dim)
    return mean, logvar.clamp(-30.0, 20.0)


def close(ours: Tensor, exact: Tensor) -> None:
    """Within a few roundings of the result's own dtype, on the scale of the largest term."""
    scale = max(1.0, exact.abs().max().item())
    error = (ours.double() - exact).abs().max().item()
    assert error <= 32 * torch.finfo(ours.dtype).eps * scale, (error, scale)


def noise(state: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The normals that a state stands for: the sample of N(0, I)."""
    zero = torch.zeros(shape, dtype=torch.float64, device=state.device)
    return vk.reparameterize(zero, zero, rng=state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_quantity_is_that_of_its_formula(name, dtype, device, backend):
    shape, dim = LAYOUTS[name]
    t = moments(shape, dtype, device)
    posterior = DiagonalGaussian(t, dim=dim)
    mean, logvar = halves(t, dim)
    latent = tuple(range(0 if name == "D, no batch" else 1, len(shape)))

    for ours, exact in (
        (posterior.mean, mean),
        (posterior.mode(), mean),
        (posterior.logvar, logvar),
        (posterior.std, torch.exp(logvar / 2)),
        (posterior.var, torch.exp(logvar)),
    ):
        assert ours.dtype == dtype
        close(ours, exact)
    state = vk.rng_state(t)
    z = posterior.sample(rng=state)
    assert z.dtype == dtype and z.shape == mean.shape
    close(z, mean + torch.exp(logvar / 2) * noise(state, mean.shape))

    kl = posterior.kl()
    assert kl.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close(kl, 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(latent))
    sample = torch.ones_like(posterior.mean)
    terms = math.log(2 * math.pi) + logvar + (1 - mean) ** 2 / logvar.exp()
    close(posterior.nll(sample), 0.5 * terms.sum(latent))


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_are_those_of_the_formulas(name, device, backend):
    shape, dim = LAYOUTS[name]
    t = moments(shape, device=device)
    posterior, state = DiagonalGaussian(t, dim=dim), vk.rng_state(t)
    z, kl = posterior.sample_kl(rng=state)
    assert torch.equal(z, posterior.sample(rng=state)) and torch.equal(kl, posterior.kl())
    (ours,) = torch.autograd.grad(z.square().sum() + 0.3 * kl.sum() + posterior.nll(z).sum(), t)

    exact_t = t.detach().double().requires_grad_()
    mean, logvar = halves(exact_t, dim)
    exact_z = mean + torch.exp(logvar / 2) * noise(state, mean.shape)
    exact_kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum()
    nll = 0.5 * (logvar + (exact_z - mean) ** 2 / logvar.exp()).sum()
    (exact,) = torch.autograd.grad(exact_z.square().sum() + 0.3 * exact_kl + nll, exact_t)
    close(ours, exact)


def test_a_table(backend):
    """mean 2 costs 2 nats, mean 1 half a nat, mean 0 nothing, at logvar 0."""
    posterior = DiagonalGaussian(torch.tensor([[2.0, 1.0, 0.0, 0.0], [0.0, -1.0, 0.0, 0.0]]))
    assert posterior.kl().tolist() == [2.5, 0.5]
    assert posterior.kl(dims=0).tolist() == [2.0, 1.0]
    assert posterior.kl(dims=()).tolist() == [[2.0, 0.5], [0.0, 0.5]]
    assert posterior.kl(dims=(0, 1)).item() == 3.0
    log_2pi = math.log(2 * math.pi)
    assert posterior.nll(torch.zeros(2, 2)).tolist() == pytest.approx([log_2pi + 2.5, log_2pi + 0.5])


@pytest.mark.parametrize("dims", [1, -1, (2, 3), (1, 3), (0, 2), (0, 1, 2, 3), (1, -1, -1), ()])
def test_kl_and_nll_sum_over_the_axes_named(dims, backend):
    t = moments((3, 4, 3, 5))
    posterior, (mean, logvar) = DiagonalGaussian(t), halves(t, 1)
    axes = tuple({axis % 4 for axis in (dims if isinstance(dims, tuple) else (dims,))})
    elements = 0.5 * (mean**2 + logvar.exp() - 1 - logvar)
    close(posterior.kl(dims=dims), elements.sum(axes) if axes else elements)
    likelihood = 0.5 * (math.log(2 * math.pi) + logvar + mean**2 / logvar.exp())
    close(posterior.nll(torch.zeros(3, 2, 3, 5), dims), likelihood.sum(axes) if axes else likelihood)


@pytest.mark.parametrize("name", LAYOUTS)
def test_kl_to_another_distribution(name, backend):
    shape, dim = LAYOUTS[name]
    t, other = moments(shape), moments(shape).detach().neg().mul(0.7).requires_grad_()
    kl = DiagonalGaussian(t, dim=dim).kl(DiagonalGaussian(other, dim=dim))
    (m, lv), (mp, lp) = halves(t, dim), halves(other, dim)
    axes = tuple(range(0 if name == "D, no batch" else 1, len(shape)))
    exact = 0.5 * ((m - mp) ** 2 / lp.exp() + (lv - lp).exp() - 1 - (lv - lp)).sum(axes)
    close(kl, exact)
    for ours, theirs in zip(
        torch.autograd.grad(kl.sum(), (t, other)), torch.autograd.grad(exact.sum(), (t, other)), strict=True
    ):
        close(ours, theirs.double())


def test_the_other_distribution_broadcasts(backend):
    posterior, prior = DiagonalGaussian(torch.tensor([[2.0, 0.0], [0.0, 0.0]])), torch.zeros(1, 2)
    assert posterior.kl(DiagonalGaussian(prior)).tolist() == [2.0, 0.0]
    with pytest.raises(ValueError, match=r"broadcast with the shape .* \[2, 1\], and .*, got \[3, 1\]"):
        posterior.kl(DiagonalGaussian(torch.zeros(3, 2)))


def test_several_samples_in_nll(backend):
    t = moments((5, 6))
    posterior = DiagonalGaussian(t)
    z = torch.randn(4, 5, 3)
    together = posterior.nll(z)
    assert together.shape == (4, 5)
    for k in range(4):
        assert torch.equal(together[k], posterior.nll(z[k]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic(dtype, device, backend):
    t = moments((3, 4, 2, 2), dtype, device)
    posterior = DiagonalGaussian(t, deterministic=True)
    before = torch.get_rng_state()
    assert torch.equal(posterior.sample(), posterior.mean)
    z, kl = posterior.sample_kl()
    assert torch.equal(z, posterior.mean)
    assert torch.equal(before, torch.get_rng_state())
    assert not posterior.std.any() and not posterior.var.any()
    for zeros in (kl, posterior.kl(), posterior.nll(z)):
        assert zeros.tolist() == [0.0, 0.0, 0.0] and zeros.device == t.device
    with pytest.raises(ValueError, match="other must not be deterministic"):
        DiagonalGaussian(t).kl(posterior)


def test_logvar_is_clamped_with_gradient_one_on_the_bounds(backend):
    t = torch.tensor([[0.0, 0.0, 0.0, 0.0, -31.0, -30.0, 20.0, 21.0]], requires_grad=True)
    posterior = DiagonalGaussian(t)
    assert posterior.logvar.tolist() == [[-30.0, -30.0, 20.0, 20.0]]
    (gradient,) = torch.autograd.grad(posterior.kl().sum(), t)
    slope = 0.5 * (math.exp(20.0) - 1)
    assert gradient[0, 4:].tolist() == pytest.approx([0.0, -0.5, slope, 0.0], rel=1e-5)
    assert posterior.kl().item() == pytest.approx(
        0.5 * (2 * (30 - 1) + 2 * (math.exp(20) - 1 - 20)), rel=1e-5
    )


def test_close_to_the_prior_the_kl_is_not_zero(backend):
    """In the formula of diffusers' class 1e-4 + 1e-4^2 / 2 - 1e-4 rounds to 0 in float32."""
    posterior = DiagonalGaussian(torch.tensor([[0.0, 1e-4]]))
    assert posterior.kl().item() == pytest.approx(0.25e-8, rel=1e-4)
    assert (posterior.var - 1.0 - posterior.logvar).abs().item() < 1e-7


def test_nll_is_finite_where_the_variance_underflows(backend):
    t = torch.tensor([[1.0, -30.0]], dtype=torch.float16)
    posterior = DiagonalGaussian(t)
    assert posterior.var.item() == 0.0
    assert posterior.nll(posterior.mean).item() == pytest.approx(0.5 * (math.log(2 * math.pi) - 30.0))


def test_generators(backend):
    t = moments((3, 4))
    posterior = DiagonalGaussian(t)

    def seeded(n):
        return torch.Generator().manual_seed(n)

    assert torch.equal(posterior.sample(seeded(1)), posterior.sample(seeded(1)))
    assert not torch.equal(posterior.sample(seeded(1)), posterior.sample(seeded(2)))
    assert torch.equal(posterior.sample([seeded(1)]), posterior.sample(seeded(1)))
    rows = posterior.sample([seeded(n) for n in (1, 2, 1)])
    for n, row, alone in zip((1, 2, 1), rows, t.split(1), strict=True):
        assert torch.equal(row[None], DiagonalGaussian(alone).sample(seeded(n)))
    with pytest.raises(ValueError, match="one for each of the 3 rows, got 2"):
        posterior.sample([seeded(1), seeded(2)])
    for generator in (seeded(1), [seeded(1)] * 3):
        with pytest.raises(ValueError, match="rng and generator must not be given together"):
            posterior.sample(generator, rng=vk.rng_state(t))


def test_the_default_generator_reproduces(backend):
    posterior = DiagonalGaussian(moments((3, 4)))
    torch.manual_seed(4)
    first, second = posterior.sample(), posterior.sample()
    torch.manual_seed(4)
    assert torch.equal(first, posterior.sample()) and not torch.equal(first, second)


def test_strided_moments(backend):
    t = moments((3, 4, 3, 5))
    last = t.detach().contiguous(memory_format=torch.channels_last)
    state = vk.rng_state(t)
    assert torch.allclose(DiagonalGaussian(last).kl(), DiagonalGaussian(t).kl(), rtol=1e-6)
    assert DiagonalGaussian(last).sample(rng=state).is_contiguous(memory_format=torch.channels_last)


def test_it_compiles(backend):
    t, state = moments((3, 4)), torch.tensor([7, 4])

    def layer(t, state):
        posterior = DiagonalGaussian(t)
        return (*posterior.sample_kl(rng=state), posterior.sample(rng=state), posterior.nll(posterior.mean))

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for a, b in zip(layer(t, state), compiled(t, state), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "bad, error, message",
    [
        ((torch.zeros(2, 3),), ValueError, r"even size along dim 1, mu then logvar, got shape \[2, 3\]"),
        ((torch.zeros(4),), ValueError, r"dim must be an axis of moments, whose shape is \[4\], got 1"),
        ((torch.zeros(2, 4, dtype=torch.int64),), TypeError, "moments must be float32"),
        (([1.0, 2.0],), TypeError, "moments must be a torch.Tensor, got list"),
    ],
)
def test_errors_name_what_is_wrong(bad, error, message):
    with pytest.raises(error, match=message):
        DiagonalGaussian(*bad)


def test_dims_beyond_the_mean_are_an_error():
    with pytest.raises(ValueError, match=r"dims must be axes of the mean, .* \[2, 2\], got 2 in \(1, 2\)"):
        DiagonalGaussian(torch.zeros(2, 4)).kl(dims=(1, 2))


def test_repr():
    assert repr(DiagonalGaussian(torch.zeros(2, 4))) == "DiagonalGaussian(shape=[2, 2], dtype=torch.float32)"
    assert "deterministic" in repr(DiagonalGaussian(torch.zeros(2, 4), deterministic=True))


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_an_image_with_a_generator_of_its_own_gets_one_latent_in_every_batch(batch, device, backend):
    """torch's convolutions return channels_last for one batch size and a contiguous tensor for another."""
    t = moments((3, 8, 4, 5), device=device).detach()
    alone = DiagonalGaussian(t[:1].contiguous())
    rows = t[:batch].contiguous(memory_format=torch.channels_last)
    for changed in (False, True):
        together = DiagonalGaussian(rows)
        if changed:
            together.std, alone.std = together.std.clone(), alone.std.clone()
        seeds = [torch.Generator().manual_seed(i) for i in range(batch)]
        z, expected = together.sample(seeds), alone.sample(torch.Generator().manual_seed(0))
        assert torch.equal(z[:1], expected)
        if batch > 1:
            assert not torch.allclose(z[1], z[0])


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_state_and_a_generator_go_by_the_order_of_a_contiguous_tensor(name, device, backend):
    shape, dim = LAYOUTS[name]
    t = moments(shape, device=device).detach()
    reordered = t.mT.contiguous().mT if t.ndim > 1 else t
    a, b = DiagonalGaussian(t, dim=dim), DiagonalGaussian(reordered, dim=dim)
    state, seed = vk.rng_state(t), lambda: torch.Generator(device).manual_seed(1)
    for x, y in (
        (a.sample(rng=state), b.sample(rng=state)),
        (a.sample(seed()), b.sample(seed())),
        (a.sample_kl(rng=state)[0], b.sample_kl(rng=state)[0]),
        (a.sample_kl(seed())[0], b.sample_kl(seed())[0]),
    ):
        assert torch.equal(x, y)
        assert y.stride() == torch.empty_like(b.mean).stride()


ATTRIBUTES = ("mean", "logvar", "std", "var")


def changed(posterior: DiagonalGaussian, name: str, how: str) -> None:
    if how == "assigned":
        setattr(posterior, name, 2.0 * getattr(posterior, name))
    else:
        getattr(posterior, name).mul_(2.0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("how", ["assigned", "in place"])
@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_changed_attribute_counts(name, how, mode, device, backend):
    """`sample` goes by mean and std, `kl` and `nll` by mean, logvar and var, each as it now is."""
    with mode():
        t, other = (moments((3, 4, 2, 2), torch.float64, device).detach() * x for x in (1.0, 0.3))
        posterior, prior = DiagonalGaussian(t), DiagonalGaussian(other)
        state = vk.rng_state(t)
        kept = {each: getattr(DiagonalGaussian(t.clone()), each).double() for each in ATTRIBUTES}
        changed(posterior, name, how)
        kept[name] = 2.0 * kept[name]
        mean, logvar, std, var = (kept[each] for each in ATTRIBUTES)
        z, kl = posterior.sample_kl(rng=state)
        close(z, mean + std * noise(state, mean.shape))
        assert torch.equal(z, posterior.sample(rng=state)) and torch.equal(kl, posterior.kl())
        close(kl, 0.5 * (mean**2 + var - 1 - logvar).sum((1, 2, 3)))
        m, lv = halves(other, 1)
        exact = 0.5 * ((mean - m) ** 2 / lv.exp() + var / lv.exp() - 1 - logvar + lv)
        close(posterior.kl(prior), exact.sum((1, 2, 3)))
        close(posterior.kl(prior, dims=()), exact)
        exact = 0.5 * ((m - mean) ** 2 / var + lv.exp() / var - 1 - lv + logvar)
        close(prior.kl(posterior), exact.sum((1, 2, 3)))
        x = torch.ones_like(mean)
        close(posterior.nll(x, ()), 0.5 * (math.log(2 * math.pi) + logvar + (1 - mean) ** 2 / var))
        assert torch.equal(posterior.mode(), posterior.mean)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attributes_that_were_only_read_change_nothing(dtype, mode, device, backend):
    t = moments((3, 4), dtype, device)
    read, fresh, state = DiagonalGaussian(t), DiagonalGaussian(t), vk.rng_state(t)
    with mode():
        assert [getattr(read, name) is getattr(read, name) for name in ATTRIBUTES] == [True] * 4
        assert not torch.isnan(read.kl()).any()
    # What was read without gradients has them in a loss.
    (gradient,) = torch.autograd.grad((read.mean * read.std * read.var * read.logvar).sum(), t)
    (exact,) = torch.autograd.grad((fresh.mean * fresh.std * fresh.var * fresh.logvar).sum(), t)
    close(gradient, exact.double())  # added up in another order
    assert torch.equal(read.kl(), fresh.kl()) and torch.equal(read.sample(rng=state), fresh.sample(rng=state))
    with torch.inference_mode():
        inside, tiny = DiagonalGaussian(t.clone()), DiagonalGaussian(torch.tensor([[1e-5, 1e-4]]))
        inside.std, tiny.std, tiny.var  # noqa: B018
        close(inside.sample(rng=state), fresh.sample(rng=state).double())
        assert tiny.kl().item() == pytest.approx(0.5 * (1e-10 + 0.5e-8), rel=1e-3)


def test_an_assigned_attribute_has_gradients_of_its_own(backend):
    t, std = moments((3, 8)), torch.rand(3, 4, requires_grad=True)
    posterior, state = DiagonalGaussian(t), vk.rng_state(t)
    posterior.std = std
    z = posterior.sample(rng=state)
    to_t, to_std = torch.autograd.grad(z.sum(), (t, std))
    close(to_std, noise(state, z.shape))
    assert to_t.tolist() == [[1.0] * 4 + [0.0] * 4] * 3


def test_assigned_moments_are_no_part_of_the_results(backend):
    """As in diffusers, whose results come from the other attributes; `parameters` is what was given."""
    t = moments((3, 8)).detach()
    posterior, state = DiagonalGaussian(t), vk.rng_state(t)
    z = posterior.sample(rng=state)
    posterior.parameters = posterior.parameters * 0
    assert torch.equal(posterior.sample(rng=state), z) and not posterior.parameters.any()


def test_a_deterministic_one_with_an_assigned_std_draws(backend):
    t = moments((3, 8)).detach()
    posterior, state = DiagonalGaussian(t, deterministic=True), vk.rng_state(t)
    posterior.std = torch.ones(3, 4)
    close(posterior.sample(rng=state), t[:, :4].double() + noise(state, (3, 4)))


def test_a_larger_other_distribution(backend):
    t, other = moments((1, 4, 2, 2)).detach(), moments((3, 4, 2, 2)).detach() * 0.5
    (m, lv), (mp, lp) = halves(t, 1), halves(other, 1)
    exact = 0.5 * ((m - mp) ** 2 / lp.exp() + (lv - lp).exp() - 1 - (lv - lp)).sum((1, 2, 3))
    close(DiagonalGaussian(t).kl(DiagonalGaussian(other)), exact)
    with pytest.raises(ValueError, match=r"have no more axes, got \[1, 1, 2, 2, 2\]"):
        DiagonalGaussian(t).kl(DiagonalGaussian(torch.zeros(1, 1, 2, 2, 4), dim=-1))
