"""The ops inside torch: opcheck, torch.compile, export, checkpointing, autocast."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import require_kernels
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import vaekernels as vk

RNG = torch.tensor([12345, 8])


def leaves(
    *shape: int, count: int = 2, grad: bool = True, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(4)
    return [torch.randn(shape, generator=draw).to(dtype).requires_grad_(grad) for _ in range(count)]


# --- opcheck ------------------------------------------------------------------------------------------------

TESTS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
KL_OPTIONS = {
    "plain": {},
    "batch": {"free_bits": 0.5},
    "per_group": {"free_bits_per_group": torch.full((3,), 0.5), "penalty": "hinge", "weight": torch.rand(4)},
    "sample": {"free_bits": 0.5, "clamp": "sample", "penalty": "mask"},
    "none": {"reduction": "none"},
    "elementwise": {"reduction": "elementwise"},
    "one_group_sums": {"group_dims": [], "free_bits": 1.0, "reduction": "sum", "group_sums": True},
    "std_bounded": {"parameterization": "std", "logvar_bounds": [-2.0, 1.0], "reduction": "mean"},
}
SAMPLE_OPTIONS = {"one": {}, "many": {"num_samples": 2}, "log_std": {"parameterization": "log_std"}}
AGGREGATE_OPTIONS = {
    "aggregate": {},
    "aggregate-whole": {"per_dim": False, "log_weight": "minibatch", "examples": 100},
    "aggregate-stratified": {"log_weight": "stratified", "examples": 100},
    "aggregate-left_out": {
        "leave_one_out": True,
        "parameterization": "softplus",
        "logvar_bounds": [-2.0, 1.0],
    },
}


def op_cases():
    mu, logvar, mp, lp = leaves(4, 3, count=4)
    logvar = logvar.detach().abs().add(0.1).requires_grad_()
    lp = lp.detach().abs().add(0.1).requires_grad_()
    moments = torch.cat([mu, logvar], 1).detach().requires_grad_()
    pair, packed = (mu, logvar, 1), (moments, None, 1)
    for form, tensors in (("pair", pair), ("packed", packed)):
        for name, options in SAMPLE_OPTIONS.items():
            yield f"sample-{form}-{name}", "latent", (*tensors, RNG), {"kl": False} | options
            yield f"draw-sample-{form}-{name}", "latent_draw", (*tensors, None), {"kl": False} | options
        for name, options in KL_OPTIONS.items():
            yield f"kl-{form}-{name}", "latent", (*tensors, None), {"sample": False} | options
            yield f"sample_kl-{form}-{name}", "latent", (*tensors, RNG), options
            yield f"draw-{form}-{name}", "latent_draw", (*tensors, None), options
    for name, options in KL_OPTIONS.items():
        yield f"kl-prior-{name}", "latent", (*pair, None, mp, lp), {"sample": False} | options
        yield f"sample_kl-prior-{name}", "latent", (*pair, RNG, mp, lp), options | {"balance": 0.8}
    yield "draw-nothing", "latent_draw", (*pair, None), {"sample": False}
    yield "_rng_state", "_rng_state", (mu,), {}
    yield "_philox_words", "_philox_words", (RNG, 10, 3), {}
    gate, none = torch.tensor([0.25, -0.25, 0.25]), torch.empty(0, dtype=torch.uint8)
    plain = [t.detach() for t in (mu, logvar, mp, lp)]
    z, one = torch.ones(4, 3), torch.tensor(1.0)
    both = (z, one, torch.ones(3), *plain[:2], 1, RNG, *plain[2:], gate, none)
    yield "backward-all", "latent_backward", both, {"prior_grads": True}
    yield "backward-z", "latent_backward", (z, None, None, *plain[:2], 1, RNG, *[None] * 4), {}
    of_kl = (None, one, None, *plain[:2], 1, None, None, None, gate, none)
    yield "backward-kl", "latent_backward", of_kl, {}
    for name, options in AGGREGATE_OPTIONS.items():
        yield name, "aggregate", (mu, mp, lp), options
        saved = torch.ones(2, 4, 4 if options.get("per_dim", True) else 1)
        grads = torch.ones(4), torch.ones(4, 3) if options.get("per_dim", True) else None
        yield f"backward-{name}", "aggregate_backward", (*grads, *plain[:1], *plain[2:], saved), options
    halves = (z, one, None, moments.detach(), None, 1, RNG, None, None, gate, none)
    yield "backward-packed", "latent_backward", halves, {}


OP_CASES = {name: rest for name, *rest in op_cases()}


@pytest.mark.parametrize("name", OP_CASES)
def test_opcheck(name, kernels):
    op, args, options = OP_CASES[name]
    opcheck(getattr(torch.ops.vaekernels, op).default, args, options, test_utils=TESTS)


def test_every_operator_is_checked(kernels):
    names = {
        n.split("::")[1].split(".")[0]
        for n in torch._C._dispatch_get_all_op_names()
        if n.startswith("vaekernels::")
    }
    assert {name for name in names if not name.endswith("_reference")} == {
        op for op, _, _ in OP_CASES.values()
    }


def test_the_drawing_ops_are_tagged_and_the_pure_ones_are_not(kernels):
    for op, _, _ in OP_CASES.values():
        tagged = torch.Tag.nondeterministic_seeded in getattr(torch.ops.vaekernels, op).default.tags
        assert tagged == (op.endswith("_draw") or op == "_rng_state"), op


# --- torch.compile ------------------------------------------------------------------------------------------

COMPILED = {
    "reparameterize": lambda m, v, rng: vk.reparameterize(m, v, rng=rng),
    "samples": lambda m, v, rng: vk.reparameterize(m, v, rng=rng, num_samples=3),
    "kl_batch": lambda m, v, rng: vk.gaussian_kl(m, v, free_bits=0.4),
    "kl_rows": lambda m, v, rng: vk.gaussian_kl(m, v, free_bits=0.4, clamp="sample", reduction="none"),
    "sample_kl": lambda m, v, rng: tuple(vk.sample_kl(m, v, rng=rng, free_bits=0.4)),
    "prior_balance": lambda m, v, rng: tuple(vk.sample_kl(m, v, v, m, rng=rng, balance=0.8)),
    "packed": lambda m, v, rng: tuple(vk.sample_kl_packed(torch.cat([m, v], 1), rng=rng, free_bits=0.4)),
    "aggregate": lambda m, v, rng: vk.log_aggregate_posterior(m * 0.5, m, v, log_weight=("stratified", 99)),
    "decomposition": lambda m, v, rng: tuple(vk.kl_decomposition(m * 0.5, m, v)),
    "weighted": lambda m, v, rng: vk.gaussian_kl(
        m, v, weight=torch.arange(5, device=m.device), free_bits=0.4
    ),
}


def run(function, base, rng):
    mine = [t.detach().clone().requires_grad_() for t in base]
    out = function(*mine, rng)
    out = out if isinstance(out, tuple) else (out,)
    total = sum((o * torch.arange(1.0, o.numel() + 1, device=o.device).view(o.shape)).sum() for o in out)
    return [*out, *torch.autograd.grad(total, mine)]


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_equals_eager(name, device, backend):
    base, rng = [t.to(device) for t in leaves(5, 4)], RNG.to(device)
    compiled = torch.compile(COMPILED[name], fullgraph=True, backend="aot_eager")
    for eager, ours in zip(run(COMPILED[name], base, rng), run(compiled, base, rng), strict=True):
        if backend == "kernels":
            assert torch.equal(ours, eager)
        else:
            torch.testing.assert_close(ours, eager)


def test_inductor_equals_eager_with_dynamic_shapes(device):
    require_kernels(device)
    function = COMPILED["sample_kl"]
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for rows in (5, 9, 1):
        base, rng = [t.to(device) for t in leaves(rows, 4)], RNG.to(device)
        for eager, ours in zip(run(function, base, rng), run(compiled, base, rng), strict=True):
            assert torch.equal(ours, eager)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_inductor_equals_eager(name, device, backend):
    base, rng = [t.to(device) for t in leaves(5, 4)], RNG.to(device)
    compiled = torch.compile(COMPILED[name], fullgraph=True)
    for eager, ours in zip(run(COMPILED[name], base, rng), run(compiled, base, rng), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)


def test_a_compiled_graph_draws_afresh_and_two_draws_in_it_differ(device, backend):
    def two(m, v):
        return vk.reparameterize(m, v), vk.sample_kl(m, v).z

    compiled = torch.compile(two, fullgraph=True, backend="aot_eager")
    base = [t.to(device) for t in leaves(5, 4, grad=False)]
    draws = [*compiled(*base), *compiled(*base)]
    for a, b in itertools.combinations(draws, 2):
        assert not torch.equal(a, b)
    torch.manual_seed(9)
    first = compiled(*base)
    torch.manual_seed(9)
    for a, b in zip(first, compiled(*base), strict=True):
        assert torch.equal(a, b)


def test_compiled_and_eager_draw_the_same_from_one_seed(device):
    require_kernels(device)
    compiled = torch.compile(vk.reparameterize, fullgraph=True, backend="aot_eager")
    base = [t.to(device) for t in leaves(5, 4, grad=False)]
    torch.manual_seed(9)
    eager = vk.reparameterize(*base)
    torch.manual_seed(9)
    assert torch.equal(compiled(*base), eager)


def test_gradients_of_a_compiled_draw_are_those_of_its_own_noise(device, backend):
    def loss(m, v):
        z, kl, _ = vk.sample_kl(m, v, free_bits=0.1)
        return (z**2).sum() + kl, z

    base = [t.to(device).detach().requires_grad_() for t in leaves(5, 4)]
    value, z = torch.compile(loss, fullgraph=True, backend="aot_eager")(*base)
    grads = torch.autograd.grad(value, base)
    mine = [t.detach().clone().requires_grad_() for t in base]
    eps = (z.detach() - mine[0].detach()) / torch.exp(mine[1].detach() / 2)
    by_hand = ((mine[0] + torch.exp(mine[1] / 2) * eps) ** 2).sum() + vk.gaussian_kl(*mine, free_bits=0.1)
    for a, b in zip(grads, torch.autograd.grad(by_hand, mine), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_generator_while_compiling_raises_and_names_the_remedy(device, backend):
    generator = torch.Generator(device=device)
    compiled = torch.compile(
        lambda m: vk.reparameterize(m, m, generator=generator), fullgraph=True, backend="aot_eager"
    )
    # Dynamo of torch 2.6 and 2.8 raises an error of its own, without the words of the one that it traced.
    told = r"generator[\s\S]*rng" if torch.__version__ >= (2, 11) else "Observed exception"
    with pytest.raises(Exception, match=told):
        compiled(torch.zeros(2, 3, device=device))


def test_export(device, backend):
    class Layer(torch.nn.Module):
        def forward(self, mu, logvar, rng):
            z, kl, rate = vk.sample_kl(mu, logvar, rng=rng, free_bits=0.4)
            return z, kl, rate

    base, rng = tuple(t.to(device) for t in leaves(5, 4, grad=False)), RNG.to(device)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(Layer(), (*base, rng), dynamic_shapes=({0: rows}, {0: rows}, None))
    bigger = tuple(t.to(device) for t in leaves(11, 4, grad=False))
    for inputs in (base, bigger):
        for ours, eager in zip(program.module()(*inputs, rng), Layer()(*inputs, rng), strict=True):
            torch.testing.assert_close(ours, eager)


def test_meta_tensors_have_the_right_shapes_dtypes_and_strides(kernels):
    mu = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).bfloat16()
    for options in (
        {},
        {"group_dims": 1, "free_bits": 0.1},
        {"reduction": "none"},
        {"reduction": "elementwise"},
    ):
        real = vk.sample_kl(mu, mu, rng=RNG, num_samples=2, **options)
        fake = vk.sample_kl(mu.to("meta"), mu.to("meta"), rng=RNG.to("meta"), num_samples=2, **options)
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


# --- checkpointing, autocast, modes -------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_is_bit_equal(use_reentrant, device, backend):
    base = [t.to(device) for t in leaves(6, 5)]
    rng = RNG.to(device)

    def drawing(m, v):
        z, kl, _ = vk.sample_kl(m, v, free_bits=0.3)
        return z, kl

    def pure(m, v):
        z, kl, _ = vk.sample_kl(m, v, free_bits=0.3, rng=rng)
        return z, kl

    for function in (drawing, pure):
        results = []
        for wrapped in (function, lambda m, v, f=function: checkpoint(f, m, v, use_reentrant=use_reentrant)):
            torch.manual_seed(3)
            mine = [t.detach().clone().requires_grad_() for t in base]
            z, kl = wrapped(*mine)
            (z.pow(2).sum() + kl).backward()
            results.append([z, kl, *(t.grad for t in mine)])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_does_not_cast(to, dtype, device, backend):
    base = [t.to(device) for t in leaves(6, 5, dtype=dtype)]
    rng = RNG.to(device)
    plain = vk.sample_kl(*base, rng=rng, free_bits=0.3)
    with torch.autocast(torch.device(device).type, dtype=to):
        under = vk.sample_kl(*base, rng=rng, free_bits=0.3)
        under_kl = vk.gaussian_kl(*base, free_bits=0.3)
        under_z = vk.reparameterize(*base, rng=rng)
    for a, b in zip(plain, under, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert torch.equal(under_kl, plain.kl) and torch.equal(under_z, plain.z)
    grads = [torch.autograd.grad(o.kl + o.z.sum(), base) for o in (plain, under)]
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


MIXED = {
    "sample_kl": lambda m, v, mp, lp: vk.sample_kl(m, v, rng=RNG.to(m.device), free_bits=0.3),
    "reparameterize": lambda m, v, mp, lp: [vk.reparameterize(m, v, rng=RNG.to(m.device))],
    "a prior": lambda m, v, mp, lp: vk.gaussian_kl(m, v, mp, lp, return_per_group=True),
    "packed": lambda m, v, mp, lp: [vk.gaussian_kl_packed(m[:, :2], 1, mp[:, 1:2], lp[:, 1:2])],
    "a prior of two dtypes": lambda m, v, mp, lp: [vk.gaussian_kl(v, mp, m, lp)],
    "log_aggregate_posterior": lambda m, v, mp, lp: vk.log_aggregate_posterior(mp, m, v),
    "mutual_information": lambda m, v, mp, lp: [vk.mutual_information(mp, m, v)],
    "kl_decomposition": lambda m, v, mp, lp: vk.kl_decomposition(mp, m, v),
}


@pytest.mark.parametrize("call", MIXED)
@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.float16), (torch.half, torch.float64)]
)
def test_autocast_promotes_what_it_left_in_several_dtypes(dtypes, call, device, backend):
    """A head that autocast runs in float32, a prior held as a float32 parameter."""
    narrow, wide = dtypes
    widest = torch.promote_types(narrow, wide)
    m, v, mp, lp = (t.to(device) for t in leaves(6, 5, count=4, grad=False))
    base = [t.to(d).requires_grad_() for t, d in zip((m, v, mp, lp), (narrow, wide, wide, wide), strict=True)]
    with pytest.raises(TypeError, match="must have one dtype"):
        MIXED[call](*base)
    expected = MIXED[call](*(t.to(widest) for t in base))
    for _ in range(2):
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            got = MIXED[call](*base)
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)
    grads = [
        torch.autograd.grad(sum(o.sum() for o in out), base, allow_unused=True) for out in (got, expected)
    ]
    for a, b, leaf in zip(*grads, base, strict=True):
        assert a is b is None or (torch.equal(a, b) and a.dtype == leaf.dtype)
    with pytest.raises(TypeError, match="must have one dtype"):
        MIXED[call](*base)


def test_autocast_leaves_other_errors():
    m = torch.zeros(2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(TypeError, match="logvar must be float32"):
            vk.sample_kl(m, m.long())
        with pytest.raises(ValueError, match="mu and logvar must have one shape"):
            vk.sample_kl(m, m[:1].bfloat16())
        with pytest.raises(TypeError, match=r"logvar must be a torch\.Tensor, got list"):
            vk.gaussian_kl(m, [0.0], m.bfloat16(), m)


@pytest.mark.skipif(torch.__version__.startswith("2.8."), reason="torch 2.8: an error, see docs/install.md")
def test_autocast_promotes_in_compiled_code():
    m, v = torch.zeros(4, 3, dtype=torch.bfloat16), torch.rand(4, 3)

    def f(m, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z, kl, _ = vk.sample_kl(m, v, rng=RNG)  # torch.compile of torch 2.6 cuts no named tuple
            return z, kl

    for a, b in zip(torch.compile(f, fullgraph=True, backend="aot_eager")(m, v), f(m, v), strict=True):
        assert torch.equal(a, b)


def test_deterministic_algorithms_are_no_obstacle(device, backend):
    base = [t.to(device) for t in leaves(6, 5)]
    torch.use_deterministic_algorithms(True)
    try:
        z, kl, _ = vk.sample_kl(*base, free_bits=0.3)
        (z.sum() + kl).backward()
    finally:
        torch.use_deterministic_algorithms(False)


def test_default_dtype_does_not_matter(device, backend):
    base = [t.to(device) for t in leaves(6, 5, grad=False)]
    rng = RNG.to(device)
    plain = vk.sample_kl(*base, rng=rng, free_bits=0.3)
    torch.set_default_dtype(torch.float64)
    try:
        other = vk.sample_kl(*base, rng=rng, free_bits=0.3)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(plain, other, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_tensor_subclasses_and_parameters_are_tensors(device, backend):
    mu = torch.nn.Parameter(torch.randn(3, 4, device=device))
    vk.sample_kl(mu, mu, free_bits=0.3).kl.backward()
    assert mu.grad is not None


def test_concurrent_calls_from_many_threads(device):
    require_kernels(device)
    from concurrent.futures import ThreadPoolExecutor

    base, rng = [t.to(device) for t in leaves(64, 32, grad=False)], RNG.to(device)
    expected = vk.sample_kl(*base, rng=rng, free_bits=0.3)

    def call(_):
        out = vk.sample_kl(*base, rng=rng, free_bits=0.3)
        state = vk.rng_state(base[0])
        return all(torch.equal(a, b) for a, b in zip(out, expected, strict=True)), tuple(state.tolist())

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(call, range(400)))
    assert all(same for same, _ in results)
    assert len({state for _, state in results}) == 400
