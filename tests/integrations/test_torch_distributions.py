"""torch.distributions on the fused ops: the same loss and gradients given the same noise."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("sklearn", reason="the example needs vaekernels[train]")

from libraries import load_example, noise_of_seed, run_example, same_gradients, within_rounding
from torch.distributions import Independent, kl_divergence

from vaekernels.integrations import torch_distributions
from vaekernels.integrations.torch_distributions import Normal

Torchs = torch.distributions.Normal


@pytest.fixture
def registered() -> Iterator[None]:
    torch_distributions.register()
    yield
    torch_distributions.unregister()


def parameters(*shape: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    loc, raw = (torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(2))
    return [t.to(dtype).requires_grad_() for t in (loc, raw.exp())]


@pytest.mark.parametrize("way", ["the subclass", "register, torch's class"])
def test_loss_and_gradients_of_an_scvi_like_module(way, monkeypatch, backend):
    """The encoder's variance is exp(.) + 1e-4, the prior zeros and ones, a library size has a prior of the
    batch's own mean and spread, broadcast from one number."""
    counts = torch.poisson(torch.rand(16, 30) * 5) + 1.0
    torch.manual_seed(0)
    theirs = load_example("torch_distributions_vae.py").CountsVAE(genes=30, latent=5)
    ours = copy.deepcopy(theirs)
    theirs.normal = Torchs
    torch.manual_seed(4)
    noise = [Normal(torch.zeros(16, n), torch.ones(16, n)).rsample() for n in (1, 5)]

    def given_noise(patch: pytest.MonkeyPatch) -> None:
        draws = iter(noise)
        patch.setattr(torch.distributions.normal, "_standard_normal", lambda *a, **k: next(draws))

    with monkeypatch.context() as patch:
        given_noise(patch)
        expected = theirs.loss(counts)
        expected.backward()
    torch.manual_seed(4)
    if way != "the subclass":
        ours.normal = Torchs
        given_noise(monkeypatch)
        torch_distributions.register()
    try:
        got = ours.loss(counts)
    finally:
        torch_distributions.unregister()
    got.backward()
    within_rounding(got, expected)
    same_gradients(ours, theirs)


def test_the_example():
    assert "negative ELBO" in run_example("torch_distributions_vae.py")


@pytest.mark.parametrize("sample_shape", [(), (3,), (0,), (2, 3), (1, 2, 2)])
@pytest.mark.parametrize("batch_shape", [(), (4,), (4, 5)])
def test_samples(sample_shape, batch_shape, backend):
    loc, scale = parameters(*batch_shape)
    ours = Normal(loc, scale)
    shape = torch.Size(sample_shape + batch_shape)
    eps = noise_of_seed(2, torch.zeros(shape))
    z = ours.rsample(torch.Size(sample_shape))
    assert z.shape == shape and ours.has_rsample
    if shape.numel():
        within_rounding(z, loc + eps * scale)
        exact = torch.autograd.grad((loc + eps * scale).square().sum(), (loc, scale))
        for a, b in zip(torch.autograd.grad(z.square().sum(), (loc, scale)), exact, strict=True):
            within_rounding(a, b)
    torch.manual_seed(2)
    again = ours.sample(sample_shape)
    assert torch.equal(again, z) and not again.requires_grad


def test_broadcast_and_expanded_parameters(backend):
    loc, scale = parameters(4, 5)[0], torch.tensor(0.5, requires_grad=True)
    ours = Normal(loc, scale)
    eps = noise_of_seed(2, loc)
    z = ours.rsample()
    within_rounding(z, loc + 0.5 * eps)
    z.sum().backward()
    within_rounding(scale.grad, eps.sum())
    wide = Normal(torch.zeros(5), torch.ones(5)).expand((4, 5))
    assert type(wide) is Normal and wide.rsample((2,)).shape == (2, 4, 5)
    assert Normal(0.0, 1.0).rsample().shape == ()


KINDS = {
    "both ours": (Normal, Normal),
    "ours and torch's": (Normal, Torchs),
    "torch's and ours": (Torchs, Normal),
    "both torch's": (Torchs, Torchs),
}


@pytest.mark.parametrize("shapes", [((4, 5), (4, 5)), ((4, 5), ()), ((1, 5), (4, 1)), ((), ())], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_kl(kind, shapes, registered, backend):
    p, q = parameters(*shapes[0], dtype=torch.float64), parameters(*shapes[1], dtype=torch.float64)
    q = [(q[0] * 0.3).detach().requires_grad_(), (q[1] * 1.7).detach().requires_grad_()]
    first, second = KINDS[kind]
    ours = kl_divergence(first(*p), second(*q))
    (mp, sp), (mq, sq) = p, q
    exact = 0.5 * ((mp - mq) ** 2 / sq**2 + (sp / sq) ** 2 - 1) - torch.log(sp / sq)
    within_rounding(ours, exact)
    for a, b in zip(
        torch.autograd.grad(ours.sum(), (*p, *q)), torch.autograd.grad(exact.sum(), (*p, *q)), strict=True
    ):
        within_rounding(a, b)


def test_independent_normals(registered, backend):
    p, q = parameters(4, 5), parameters(5)
    fused = kl_divergence(Independent(Normal(*p), 1), Independent(Normal(*q).expand((4, 5)), 1))
    torch_distributions.unregister()
    plain = kl_divergence(Independent(Torchs(*p), 1), Independent(Torchs(*q).expand((4, 5)), 1))
    assert fused.shape == (4,)
    within_rounding(fused, plain)


def test_register_and_unregister_change_the_divergence_of_torchs_class():
    """In bfloat16 torch's is a bfloat16 of 3 digits, ours a float32."""
    ones = torch.ones(1, dtype=torch.bfloat16)
    p, q = Torchs(ones, 1.25 * ones), Torchs(0 * ones, ones)
    exact = 0.5 * (1.25**2 - 1 + 1) - math.log(1.25)
    plain = kl_divergence(p, q)
    for _ in range(2):
        torch_distributions.register()
        assert kl_divergence(p, q).item() == pytest.approx(exact, rel=1e-6)
    for _ in range(2):
        torch_distributions.unregister()
        assert torch.equal(kl_divergence(p, q), plain) and plain.dtype == torch.bfloat16


def test_half_precision_and_mixed_dtypes(backend):
    half = Normal(torch.zeros(3, dtype=torch.bfloat16), torch.full((3,), 1.125, dtype=torch.bfloat16))
    assert half.rsample().dtype == torch.bfloat16
    kl = kl_divergence(half, Normal(0.0, 1.0))
    assert kl.dtype == torch.float32
    assert kl[0].item() == pytest.approx(0.5 * (1.125**2 - 1) - 0.1177830, rel=1e-4)
    assert Normal(torch.zeros(3, dtype=torch.float64), torch.ones(3)).rsample().dtype == torch.float64


def test_what_is_inherited_stays(backend):
    loc, scale = parameters(4)
    ours, theirs = Normal(loc, scale), Torchs(loc, scale)
    x = torch.randn(4)
    for method in ("log_prob", "cdf"):
        assert torch.equal(getattr(ours, method)(x), getattr(theirs, method)(x))
    assert torch.equal(ours.entropy(), theirs.entropy())
    with pytest.raises(ValueError, match="scale"):
        Normal(loc, -scale, validate_args=True)  # torch.compile turns the default off, once it has run


def test_integers_are_an_error():
    with pytest.raises(TypeError, match="parameters of a Normal must be float32"):
        Normal(torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.int64)).rsample()


def test_parameters_may_change_in_place_after_a_sample(backend):
    loc, scale = parameters(3)
    z = Normal(loc, scale).rsample()
    with torch.no_grad():
        eps = (z - loc) / scale
        loc.add_(1.0)
        scale.clamp_(min=5.0)
    z.sum().backward()
    assert torch.equal(loc.grad, torch.ones(3))
    torch.testing.assert_close(scale.grad, eps)


def test_a_negative_scale_without_validation(backend):
    """torch's is loc + scale eps, and its divergence takes the square."""
    scale = torch.tensor([-1.0, 1.0, -0.5], requires_grad=True)
    ours, theirs = (cls(torch.zeros(3), scale, validate_args=False) for cls in (Normal, Torchs))
    eps = noise_of_seed(2, torch.zeros(3))
    assert torch.equal(ours.rsample(), scale * eps)
    prior = Torchs(1.0, 2.0)
    for p, q in ((0, 1), (1, 0)):
        a = kl_divergence(*((ours, prior) if p < q else (prior, ours)))
        b = kl_divergence(*((theirs, prior) if p < q else (prior, theirs)))
        within_rounding(a, b)
        within_rounding(*(torch.autograd.grad(each.sum(), scale)[0] for each in (a, b)))


def test_a_librarys_own_divergence_for_a_subclass_stays_its_own(registered):
    class Mine(Torchs):
        pass

    kept = dict(torch.distributions.kl._KL_REGISTRY)
    try:
        torch.distributions.register_kl(Torchs, Mine)(lambda p, q: torch.tensor(-1.0))
        torch.distributions.register_kl(Mine, Torchs)(lambda p, q: torch.tensor(-2.0))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for cls in (Normal, Torchs):
                assert kl_divergence(cls(0.0, 1.0), Mine(0.0, 1.0)) == -1.0
                assert kl_divergence(Mine(0.0, 1.0), cls(0.0, 1.0)) == -2.0
    finally:
        torch.distributions.kl._KL_REGISTRY.clear()
        torch.distributions.kl._KL_REGISTRY.update(kept)
        torch.distributions.kl._KL_MEMOIZE.clear()


@pytest.mark.parametrize("method", ["rsample", "sample", "kl"])
def test_a_trace_is_torchs_own(method):
    """Without a warning, and with what draws known to TorchScript, which then expects no equal runs."""

    def f(loc, scale):
        p = Normal(loc, scale, validate_args=False)
        return (
            kl_divergence(p, Normal(2.0 * loc, scale, validate_args=False))
            if method == "kl"
            else getattr(p, method)()
        )

    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(f, (torch.zeros(3, 2), torch.ones(3, 2)), check_trace=False)
    assert any(node.isNondeterministic() for node in traced.graph.nodes()) is (method != "kl")
    assert "vaekernels" not in str(traced.graph)
    out = traced(torch.zeros(5, 2), torch.ones(5, 2))
    assert out.shape == (5, 2)


def test_a_sample_has_the_dtype_of_loc(backend):
    for loc, scale in (
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        ours, theirs = (
            cls(torch.zeros(3, dtype=loc), torch.ones(3, dtype=scale)) for cls in (Normal, Torchs)
        )
        for shape in ((), (2,)):
            assert ours.sample(shape).dtype == theirs.sample(shape).dtype == loc
            assert ours.rsample(shape).dtype == theirs.rsample(shape).dtype
    mixed = Normal(torch.zeros(3), torch.ones(3, dtype=torch.float64))
    torch.manual_seed(1)
    z = mixed.rsample()
    torch.manual_seed(1)
    assert torch.equal(mixed.sample(), z.float())
