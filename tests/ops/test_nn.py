"""The modules: the numbers of the ops, running rates, schedules, what is in a checkpoint."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

import vaekernels as vk
from vaekernels.nn import GaussianLatent, LearnedPriorLatent
from vaekernels.schedules import FreeBits, Linear, PIController

RNG = torch.tensor([11, 4])
# mean 2 costs 2 nats, mean 1 half a nat, mean 0 nothing, at logvar 0: rates [1, 0.25, 0]
TABLE = torch.tensor([[2.0, 1.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
RATES = [1.0, 0.25, 0.0]


def moments(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).requires_grad_()


def test_a_table(backend):
    z, kl, rate = GaussianLatent(3, beta=2.0, free_bits=0.3)(TABLE)
    assert z.shape == (2, 3)
    assert rate.tolist() == RATES
    assert kl.item() == pytest.approx(2.0 * (1.0 + 0.3 + 0.3))


@pytest.mark.parametrize(
    "shape, groups, options",
    [
        ((4, 6), 3, {}),
        ((4, 6), (), {"group_dims": (), "free_bits": 2.0, "clamp": "sample", "penalty": "hinge"}),
        ((4, 6, 3, 2), 3, {"group_dims": 1, "free_bits": 0.4, "reduction": "mean"}),
        ((4, 5, 6), 3, {"dim": -1, "batch_dims": 2, "free_bits": torch.tensor([0.0, 0.5, 1.0])}),
        ((4, 6), 3, {"parameterization": "softplus", "logvar_bounds": (-2.0, 1.0)}),
    ],
)
def test_the_numbers_and_gradients_are_those_of_the_op(shape, groups, options, backend):
    t = moments(*shape)
    layer = GaussianLatent(groups, beta=0.7, **options)
    theirs = vk.sample_kl_packed(t, **options, rng=RNG) if "dim" in options else None
    theirs = theirs or vk.sample_kl_packed(t, 1, **options, rng=RNG)
    ours = layer(t, rng=RNG)
    for a, b in zip(ours, (theirs.z, 0.7 * theirs.kl, theirs.kl_per_group), strict=True):
        assert torch.equal(a, b)
    gradients = [torch.autograd.grad(o.z.sum() + w * o.kl, t)[0] for o, w in ((ours, 1.0), (theirs, 0.7))]
    torch.testing.assert_close(*gradients)


def test_a_learned_prior(backend):
    q, p = moments(4, 6), moments(4, 6).detach().mul(0.5).requires_grad_()
    layer = LearnedPriorLatent(3, balance=0.8, free_bits=0.1)
    ours = layer(q, p, rng=RNG)
    theirs = vk.sample_kl_packed(q, 1, *p.chunk(2, 1), balance=0.8, free_bits=0.1, rng=RNG)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(*(torch.autograd.grad(o.kl, (q, p)) for o in (ours, theirs)), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(layer.sample_prior(p, rng=RNG), vk.reparameterize_packed(p, 1, rng=RNG))
    with pytest.raises(ValueError, match=r"shape of moments, \[4, 6\], got \[1, 6\]; expand it"):
        layer(q, p[:1])
    with pytest.raises(ValueError, match="balance must be between 0 and 1"):
        LearnedPriorLatent(3, balance=2.0)


def test_running_rates_are_a_mean_that_becomes_a_moving_one(backend):
    layer = GaussianLatent(3, momentum=0.25)
    for scale in (1.0, 2.0, 0.0):
        layer(TABLE * scale)
    # KL is quadratic in the mean here: rates 1, 4 and 0 times the table's, mean 5/3.
    assert layer.running_rate.tolist() == pytest.approx([5 / 3, 5 / 12, 0.0])
    for _ in range(2):
        layer(TABLE)
    expected = ((5 / 3) * 0.75 + 0.25) * 0.75 + 0.25  # shares 1/4 and, 1/5 being less than momentum, 1/4
    assert layer.running_rate[0].item() == pytest.approx(expected)
    assert layer.num_batches_tracked == 5
    layer.eval()(TABLE * 5)
    assert layer.num_batches_tracked == 5 and layer.running_rate[0].item() == pytest.approx(expected)
    layer.reset_running_stats()
    assert not layer.running_rate.any() and layer.num_batches_tracked == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_batch_whose_rates_are_not_finite_is_left_out_of_the_running_ones_and_counted(
    bad, compiled, backend
):
    clean, met = GaussianLatent(3, momentum=0.25), GaussianLatent(3, momentum=0.25)
    run = torch.compile(met, backend="eager") if compiled else met
    spoiled = TABLE.clone()
    spoiled[1, 0] = bad
    for n, scale in enumerate((1.0, 2.0, 0.0, 3.0, 1.0, 2.0)):
        if n in (0, 2, 5):  # the first batch of all, too
            run(spoiled)
        clean(TABLE * scale)
        run(TABLE * scale)
    assert torch.equal(met.running_rate, clean.running_rate)
    assert met.num_batches_tracked == 6 and met.num_batches_ignored == 3
    fresh = GaussianLatent(3)
    fresh.load_state_dict(met.state_dict())
    assert fresh.num_batches_ignored == 3
    met.reset_running_stats()
    assert met.num_batches_ignored == 0


def test_the_running_rate_is_unclamped_and_unweighted_and_detached(backend):
    layer = GaussianLatent(3, beta=100.0, free_bits=7.0)
    layer(TABLE.clone().requires_grad_())
    assert layer.running_rate.tolist() == RATES and not layer.running_rate.requires_grad


def test_a_padding_mask(backend):
    layer = GaussianLatent(3)
    _, kl, rate = layer(TABLE, weight=torch.tensor([True, False]))
    assert rate.tolist() == [2.0, 0.5, 0.0] and kl == 2.5


def test_half_precision_keeps_the_running_rate_in_float32(backend):
    layer = GaussianLatent(3).bfloat16()
    layer(TABLE.bfloat16())
    assert layer.running_rate.dtype == torch.float32 and layer.num_batches_tracked.dtype == torch.int64
    torch.set_default_dtype(torch.float64)
    try:
        layer(TABLE)
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.running_rate.tolist() == RATES


def test_schedules_move_in_step_only(backend):
    layer = GaussianLatent(3, beta=Linear(1.0, steps=2), free_bits=FreeBits(0.25, ramp=10))
    assert [layer(TABLE).kl.item() for _ in range(3)] == [0.0, 0.0, 0.0]
    layer.step()
    assert layer(TABLE).kl.item() == pytest.approx(
        0.5 * sum(max(r, layer.free_bits.on("cpu")) for r in RATES)
    )
    layer.step()
    assert layer.beta.on("cpu") == 1.0


def test_one_schedule_in_both_places_is_stepped_once():
    shared = Linear(1.0, steps=4)
    GaussianLatent(3, beta=shared, free_bits=shared).step()
    assert shared.value == 0.25


def test_a_checkpoint_continues_schedules_and_statistics(backend):
    def make():
        return GaussianLatent(3, beta=Linear(1.0, steps=4), free_bits=0.25)

    layer = make()
    for _ in range(3):
        layer(TABLE)
        layer.step()
    state = layer.state_dict()
    assert set(state) == {"running_rate", "num_batches_tracked", "num_batches_ignored", "beta.steps"}
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    fresh = make()
    fresh.load_state_dict(copy.deepcopy(state))
    assert fresh.beta.on("cpu") == layer.beta.on("cpu") == 0.75
    assert torch.equal(fresh.running_rate, layer.running_rate) and fresh.num_batches_tracked == 3
    with pytest.raises(RuntimeError, match=r"Missing key.*beta\.steps"):
        make().load_state_dict({key: state[key] for key in state if "beta" not in key})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*beta\.steps"):
        GaussianLatent(3, beta=1.0).load_state_dict(state)
    with pytest.raises(RuntimeError, match="a schedule's state is"):
        make().load_state_dict(state | {"beta.steps": torch.tensor(-1)})


def test_deterministic_eval_gives_the_mean_and_draws_nothing(backend):
    layer = GaussianLatent(3, deterministic_eval=True).eval()
    before = torch.get_rng_state()
    z, kl, rate = layer(TABLE)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(z, TABLE[:, :3]) and kl == 1.25 and rate.tolist() == RATES
    assert not torch.equal(layer.train()(TABLE).z, TABLE[:, :3])
    prior = LearnedPriorLatent(3, deterministic_eval=True).eval()
    assert torch.equal(prior.sample_prior(TABLE), TABLE[:, :3])


def test_it_compiles_and_trains(backend):
    torch.manual_seed(0)
    encoder, layer = torch.nn.Linear(8, 6), GaussianLatent(3, beta=Linear(1.0, steps=5))
    model = torch.compile(lambda x, rng: layer(encoder(x), rng=rng), fullgraph=True, backend="aot_eager")
    x = torch.randn(16, 8)
    for _ in range(3):
        z, kl, _ = model(x, RNG)
        (z.square().mean() + kl).backward()
        layer.step()
    eager = copy.deepcopy(layer).eval()(encoder(x), rng=RNG)
    torch.testing.assert_close(eager.z, layer.eval()(encoder(x), rng=RNG).z)
    assert layer.num_batches_tracked == 3


def test_repr_shows_what_is_not_default():
    layer = GaussianLatent((4, 8), group_dims=(1, 2), free_bits=0.25, beta=Linear(2.0, steps=4))
    assert repr(layer) == (
        "GaussianLatent(\n  groups=[4, 8], dim=1, group_dims=(1, 2)\n"
        "  (beta): Linear(now 0)\n  (free_bits): 0.25\n)"
    )
    assert "balance=0.8" in repr(LearnedPriorLatent(3, balance=0.8))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"groups": 0}, ValueError, "groups must be a positive int or a shape of them, got 0"),
        ({"groups": 3, "momentum": 0.0}, ValueError, "momentum must be above 0"),
        ({"groups": 3, "clamp": "rows"}, ValueError, "clamp must be one of 'batch', 'sample', got 'rows'"),
        ({"groups": 3, "beta": "1"}, TypeError, "beta must be a number, a tensor or a schedule"),
        ({"groups": 3, "beta": PIController(4.0)}, TypeError, "a controller: its step takes a measurement"),
    ],
)
def test_errors_at_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        GaussianLatent(**arguments)


def test_groups_that_do_not_fit_are_an_error(backend):
    with pytest.raises(ValueError, match=r"groups must be the shape of the rates, \[3\] here, got \[4\]"):
        GaussianLatent(4)(TABLE)


def layer_with_schedules() -> GaussianLatent:
    return GaussianLatent(3, beta=Linear(1.0, steps=10), free_bits=FreeBits(0.5, ramp=10))


@pytest.mark.parametrize("how", ["to_empty", "assign"])
def test_a_module_built_without_memory_and_filled_from_a_checkpoint(how, backend):
    full = layer_with_schedules()
    for _ in range(5):
        full.step()
    with torch.device("meta"):
        layer = layer_with_schedules()
        layer.step()
        assert layer(torch.zeros(2, 6, device="meta")).kl.is_meta
        saved = layer.state_dict()["beta.steps"]
    assert saved.item() == 1
    if how == "to_empty":
        layer.to_empty(device="cpu").load_state_dict(full.state_dict())
    else:
        layer.load_state_dict(full.state_dict(), assign=True)
    assert torch.equal(layer(TABLE, rng=RNG).kl, full(TABLE, rng=RNG).kl)
    layer.step()
    assert layer.beta.schedule.value.item() == pytest.approx(0.6)


def test_a_controller_built_without_memory_can_be_stepped():
    with torch.device("meta"):
        control = PIController(target=4.0)
        control.step(6.0)
    plain = PIController(target=4.0)
    plain.step(6.0)
    assert control.state_dict() == plain.state_dict() and repr(control) == repr(plain)


def test_constant_free_bits_survive_to_empty(backend):
    floors = np.array([0.3, 0.1, 0.2], dtype=np.float32)
    with torch.device("meta"):
        layer = GaussianLatent(3, free_bits=floors)
    layer.to_empty(device="cpu").load_state_dict(GaussianLatent(3, free_bits=0.0).state_dict())
    assert layer(TABLE).kl.item() == pytest.approx(1.0 + 0.25 + 0.2)
    assert layer.half().free_bits.constant.tolist() == torch.from_numpy(floors).half().tolist()
    with torch.device("meta"):
        without_values = GaussianLatent(3, free_bits=torch.full((3,), 0.1))
    with pytest.raises(ValueError, match=r"under torch.device\('meta'\) and has no values; give a number"):
        without_values.to_empty(device="cpu")
