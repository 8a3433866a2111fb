"""process_group: every rank gets what one rank with all the rows would get, and DDP averages to its gradient.

One set of processes runs all cases (starting a process costs seconds); each case is a test of its own that
looks at what the processes wrote down.
"""

from __future__ import annotations

import itertools
import os
import re
import traceback
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import require_kernels
from designs import pairwise

import vaekernels as vk
from vaekernels import _native

ROWS = {"even": (4, 4, 4), "uneven": (5, 1, 3), "an_empty_rank": (4, 0, 3), "only_one": (0, 6, 0)}
OPTIONS = {
    "plain": {},
    "batch": {"free_bits": 0.6},
    "batch_sum": {"free_bits": 0.6, "reduction": "sum"},
    "batch_mean_hinge": {"free_bits": 0.6, "reduction": "mean", "penalty": "hinge"},
    "batch_mask_tensor": {"free_bits": torch.tensor([0.2, 0.9, 0.5]), "penalty": "mask"},
    "one_group": {"free_bits": 1.8, "group_dims": ()},
    "sample": {"free_bits": 0.5, "clamp": "sample"},
    "sample_sum_mask": {"free_bits": 0.5, "clamp": "sample", "penalty": "mask", "reduction": "sum"},
    "sample_mean_hinge": {"free_bits": 0.5, "clamp": "sample", "penalty": "hinge", "reduction": "mean"},
}
WORLDS = (2, 3)
AGGREGATE_ROWS = ("even", "uneven", "an_empty_rank")
AGGREGATE = {
    "uniform": {},
    "minibatch": {"log_weight": 100},
    "stratified": {"log_weight": ("stratified", 100)},
    "leave_one_out": {"leave_one_out": True, "parameterization": "softplus"},
}
FACTORS = {
    "world": list(WORLDS),
    "rows": list(ROWS),
    "options": list(OPTIONS),
    "weight": ["uniform", "weighted"],
    "prior": ["standard", "balanced"],
}
CASES = [tuple(case.values()) for case in pairwise(FACTORS, lambda case: True)]


# By rank: what only ranks 0 and 2 do, and what rank 1 does; then what the error says of it.
TWO = (torch.zeros(2, 4), torch.zeros(2, 4))
DIFFERING = {
    "free_bits": ({"free_bits": 0.1}, {"free_bits": 0.5}, "free_bits is 0.1 on ranks 0, 2 and 0.5 on rank 1"),
    "free_bits_or_none": ({}, {"free_bits": 0.5}, "free_bits is None on ranks 0, 2 and 0.5 on rank 1"),
    "free_bits_tensor": (
        {"free_bits": torch.tensor([0.125, 0.125, 0.125, 0.125])},
        {"free_bits": torch.tensor([0.125, 0.125, 0.125, 0.5])},
        r"free_bits is \[0.125, .*, 0.125\] on ranks 0, 2 and \[0.125, .*, 0.5\] on rank 1",
    ),
    "clamp": (
        {"free_bits": 0.1},
        {"free_bits": 0.1, "clamp": "sample"},
        "clamp is batch on ranks 0, 2 and sample on rank 1",
    ),
    "penalty": (
        {"free_bits": 0.1},
        {"free_bits": 0.1, "penalty": "hinge"},
        "penalty is floor on ranks 0, 2 and hinge on rank 1",
    ),
    "reduction": ({}, {"reduction": "sum"}, "reduction is batchmean on ranks 0, 2 and sum on rank 1"),
    "batch_dims": ({"group_dims": ()}, {"batch_dims": 2}, "batch_dims is 1 on ranks 0, 2 and 2 on rank 1"),
    "group_dims": ({}, {"group_dims": ()}, r"group_dims is None on ranks 0, 2 and \(\) on rank 1"),
    "parameterization": ({}, {"parameterization": "softplus"}, "parameterization is logvar on ranks 0, 2"),
    "logvar_bounds": ({}, {"logvar_bounds": (-5, 5)}, r"logvar_bounds is None .* \(-5.0, 5.0\) on rank 1"),
    "prior": ({}, {"prior_mu": TWO[0], "prior_logvar": TWO[0]}, "prior is False on ranks 0, 2 and True on"),
    "balance": (
        {"prior_mu": TWO[0], "prior_logvar": TWO[0], "balance": 0.8},
        {"prior_mu": TWO[0], "prior_logvar": TWO[0], "balance": 0.7},
        "balance is 0.8 on ranks 0, 2 and 0.7 on rank 1",
    ),
    "shape": ({}, {"mu": torch.zeros(2, 7)}, r"shape_of_groups is \(4,\) on ranks 0, 2 and \(7,\) on rank 1"),
    "elements": (
        {"reduction": "mean", "group_dims": ()},
        {"reduction": "mean", "group_dims": (), "mu": torch.zeros(2, 7)},
        "latent_elements is 4 on ranks 0, 2 and 7 on rank 1",
    ),
    "dtype": ({}, {"mu": torch.zeros(2, 4).double()}, r"dtype is torch.float32 .* torch.float64 on rank 1"),
}
ALIKE = {
    "weight": ({}, {"weight": torch.ones(2)}),
    "rows": ({}, {"mu": torch.zeros(5, 4)}),
    "positions": (
        {"group_dims": (2,), "mu": torch.zeros(2, 3, 4)},
        {"group_dims": (2,), "mu": torch.zeros(2, 5, 4)},
    ),
    "half": ({}, {"mu": torch.zeros(2, 4).bfloat16()}),
    "number": ({"free_bits": 1}, {"free_bits": 1.0}),
}


def problem(world: int, rows: tuple[int, ...], weighted: bool, prior: bool):
    """The whole batch, and each rank's slice of the rows."""
    draw = torch.Generator().manual_seed(world)
    counts = rows[:world]
    total = sum(counts)
    tensors = [torch.randn(total, 3, generator=draw, dtype=torch.float64) for _ in range(4 if prior else 2)]
    weight = torch.rand(total, generator=draw, dtype=torch.float64) * 2 if weighted else None
    ends = list(itertools.accumulate(counts, initial=0))
    return tensors, weight, [slice(a, b) for a, b in itertools.pairwise(ends)]


def evaluate(tensors, weight, options, group, how):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    options = options | ({"weight": weight} if weight is not None else {})
    if len(leaves) == 4:
        options = options | {"balance": 0.8}
    if how == "sample_kl":
        rng = torch.tensor([1, 0])
        _, kl, rate = vk.sample_kl(*leaves, rng=rng, process_group=group, **options)
    elif how == "packed":
        moments = torch.cat(leaves[:2], 1)
        kl, rate = vk.gaussian_kl_packed(
            moments, 1, *leaves[2:], process_group=group, return_per_group=True, **options
        )
    else:
        kl, rate = vk.gaussian_kl(*leaves, process_group=group, return_per_group=True, **options)
    # kl is used with factor 3 and the rates with their own factors: both gradients must be right
    (3 * kl + (rate * torch.arange(1.0, rate.numel() + 1).view(rate.shape)).sum()).backward()
    return {"kl": kl.detach(), "rate": rate.detach(), "grads": [t.grad for t in leaves]}


def work(rank: int, folder: str, reference: bool) -> None:
    torch.set_num_threads(1)
    if reference:
        _native.has_kernels = lambda device_type: False
        _native.C = None
        warnings.simplefilter("ignore", vk.FallbackWarning)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=max(WORLDS))
    groups = {world: dist.new_group(list(range(world))) for world in WORLDS}
    results: dict[tuple, object] = {}
    for case in CASES:
        world, rows, name, weighted, prior = case
        if rank >= world:
            continue
        tensors, weight, slices = problem(world, ROWS[rows], weighted == "weighted", prior == "balanced")
        mine = [t[slices[rank]] for t in tensors]
        w = None if weight is None else weight[slices[rank]]
        for how in ("gaussian_kl", "sample_kl", "packed"):
            try:
                results[(*case, how)] = evaluate(mine, w, OPTIONS[name], groups[world], how)
            except Exception:
                results[(*case, how)] = traceback.format_exc()
    results["backward"] = _backward_alone(rank, groups[3])
    results["compiled"] = _compiled(rank, groups[3])
    for rows, name in itertools.product(AGGREGATE_ROWS, AGGREGATE):
        results[("aggregate", rows, name)] = _aggregate(rank, rows, AGGREGATE[name], groups[3])
    results["aggregates that differ"] = _aggregates_that_differ(rank, groups[3])
    results["collectives"] = _collectives(rank, groups[3])
    results["differing"] = _differing(rank, groups[3])
    results["comparisons"] = _comparisons(rank, groups[3])
    results["half"] = vk.gaussian_kl(
        torch.ones(2, 3).bfloat16(), torch.zeros(2, 3).bfloat16(), process_group=groups[3]
    )
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def aggregate_problem(rows: str):
    """z, mu, logvar of the whole batch, and each rank's slice of the rows."""
    (mu, logvar), _, slices = problem(3, ROWS[rows], False, False)
    draw = torch.Generator().manual_seed(9)
    return (
        mu + torch.exp(0.5 * logvar) * torch.randn(mu.shape, generator=draw).double(),
        mu,
        logvar,
    ), slices


def decompose(tensors, options, group):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    parts = vk.kl_decomposition(*leaves, process_group=group, **options)
    (parts.mutual_information + 6 * parts.total_correlation + 2 * parts.dimension_wise_kl).backward()
    return {
        "parts": torch.stack(parts).detach(),
        "information": vk.mutual_information(*tensors, process_group=group, **options),
        "grads": [t.grad for t in leaves],
    }


def _aggregate(rank: int, rows: str, options: dict, group) -> object:
    tensors, slices = aggregate_problem(rows)
    mine = [t[slices[rank]] for t in tensors]
    try:
        found: dict = decompose(mine, options, group)
        leaves = [t.clone().requires_grad_() for t in mine]
        log_qz, _ = vk.log_aggregate_posterior(*leaves, process_group=group, **options)
        (log_qz * torch.arange(1.0, len(log_qz) + 1)).sum().backward()
        return found | {"log_qz": log_qz.detach(), "own": [t.grad for t in leaves]}
    except Exception:
        return traceback.format_exc()


def _aggregates_that_differ(rank: int, group) -> list[str]:
    said = []
    for most, one in (({}, {"leave_one_out": True}), ({}, {"columns": 2}), ({}, {"dtype": torch.float64})):
        options = dict(one if rank == 1 else most)
        shape, dtype = (2, options.pop("columns", 3)), options.pop("dtype", torch.float32)
        zero = torch.zeros(shape, dtype=dtype)
        try:
            vk.log_aggregate_posterior(zero, zero, zero, process_group=group, **options)
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))
    return said


def _call(options: dict, group) -> object:
    options = dict(options)
    mu = options.pop("mu", TWO[0])
    try:
        return float(vk.gaussian_kl(mu, torch.zeros_like(mu) + 0.5, process_group=group, **options))
    except ValueError as error:
        return str(error)


def _differing(rank: int, group) -> dict[str, object]:
    """What each rank is told where the ranks' options differ, and that the group still works after it."""
    said: dict[str, object] = {}
    for name, (most, one, *_) in (DIFFERING | ALIKE).items():
        said[name] = _call(one if rank == 1 else most, group)
        said[f"{name}, after"] = _call({"free_bits": 0.25}, group)
    return said


def _comparisons(rank: int, group) -> list[int]:
    """How many comparisons each call makes: of new options, of the same, of others, of the first."""
    calls: list[int] = []
    original = dist.all_gather
    counts = []
    dist.all_gather = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    try:
        for bits in (0.375, 0.375, torch.tensor(0.375), torch.tensor(0.5), 0.4375, 0.375):
            _call({"free_bits": bits}, group)
            counts.append(len(calls))
    finally:
        dist.all_gather = original
    return counts


def _backward_alone(rank: int, group) -> object:
    """Only rank 0 runs backward: it would hang here if backward held a collective."""
    mu = torch.ones(2, 3, requires_grad=True)
    kl = vk.gaussian_kl(mu, torch.zeros(2, 3), free_bits=0.1, process_group=group)
    if rank == 0:
        kl.backward()
        return mu.grad
    return None


def _compiled(rank: int, group) -> object:
    tensors, _, slices = problem(3, ROWS["uneven"], False, False)
    mine = [t[slices[rank]].clone().requires_grad_() for t in tensors]
    try:
        function = torch.compile(
            lambda m, v: vk.gaussian_kl(m, v, free_bits=0.6, process_group=group),
            fullgraph=True,
            backend="aot_eager",
        )
        kl = function(*mine)
        kl.backward()
    except Exception:
        return traceback.format_exc()
    return {"kl": kl.detach(), "grads": [t.grad for t in mine]}


def _collectives(rank: int, group) -> int:
    """How many collectives one call makes."""
    calls = []
    original = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    try:
        mu = torch.ones(2, 3, requires_grad=True)
        vk.gaussian_kl(mu, mu, free_bits=0.1, weight=torch.ones(2), process_group=group).backward()
    finally:
        dist.all_reduce = original
    return len(calls)


@pytest.fixture(scope="module", params=["kernels", "reference"])
def ranks(request, tmp_path_factory) -> list[dict]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    if request.param == "kernels":
        require_kernels("cpu")
    folder = tmp_path_factory.mktemp("ranks")
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        mp.start_processes(
            work, (str(folder), request.param == "reference"), max(WORLDS), start_method="spawn"
        )
    finally:
        os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(max(WORLDS))]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_ranks_agree_with_one_rank_holding_all_rows(case, ranks):
    world, rows, name, weighted, prior = case
    tensors, weight, slices = problem(world, ROWS[rows], weighted == "weighted", prior == "balanced")
    for how in ("gaussian_kl", "sample_kl", "packed"):
        whole = evaluate(tensors, weight, OPTIONS[name], None, how)
        for rank in range(world):
            got = ranks[rank][(*case, how)]
            assert not isinstance(got, str), f"rank {rank}, {how}: {got}"
            torch.testing.assert_close(got["kl"], whole["kl"])
            torch.testing.assert_close(got["rate"], whole["rate"])
            for mine, full in zip(got["grads"], whole["grads"], strict=True):
                # DDP divides by the number of ranks
                torch.testing.assert_close(mine / world, full[slices[rank]])


@pytest.mark.parametrize("rows", AGGREGATE_ROWS)
@pytest.mark.parametrize("name", AGGREGATE)
def test_the_aggregate_posterior_of_all_ranks(name, rows, ranks):
    tensors, slices = aggregate_problem(rows)
    whole = decompose(tensors, AGGREGATE[name], None)
    leaves = [t.clone().requires_grad_() for t in tensors]
    log_qz, _ = vk.log_aggregate_posterior(*leaves, **AGGREGATE[name])
    places = torch.cat([torch.arange(1.0, part.stop - part.start + 1) for part in slices])
    (log_qz * places).sum().backward()
    for rank, part in enumerate(slices):
        got = ranks[rank][("aggregate", rows, name)]
        assert not isinstance(got, str), f"rank {rank}: {got}"
        torch.testing.assert_close(got["parts"], whole["parts"])
        torch.testing.assert_close(got["information"], whole["information"])
        torch.testing.assert_close(got["log_qz"], log_qz[part].detach())
        for mine, full in zip(got["grads"], whole["grads"], strict=True):
            torch.testing.assert_close(mine / 3, full[part])
        for mine, leaf in zip(got["own"], leaves, strict=True):
            torch.testing.assert_close(mine, leaf.grad[part])


def test_ranks_whose_aggregates_differ_are_all_told(ranks):
    for rank in ranks:
        options, columns, dtype = rank["aggregates that differ"]
        for said in (options, columns, dtype):
            assert said.startswith("process_group: every rank must be called with the same options, dtype")
        assert "the dimensions are 3 on ranks 0, 2 and 2 on rank 1" in columns


def test_every_rank_returns_the_same_bits(ranks):
    for case in CASES:
        first = ranks[0][(*case, "gaussian_kl")]
        for rank in range(1, case[0]):
            assert torch.equal(first["kl"], ranks[rank][(*case, "gaussian_kl")]["kl"])
            assert torch.equal(first["rate"], ranks[rank][(*case, "gaussian_kl")]["rate"])


def test_local_means_would_be_wrong_here(ranks):
    """The cases can tell a global clamp from a clamp on every rank's own mean (what other libraries do)."""
    tensors, _, slices = problem(3, ROWS["uneven"], False, False)
    local = [vk.gaussian_kl(*(t[s] for t in tensors), free_bits=0.6) for s in slices]
    whole = vk.gaussian_kl(*tensors, free_bits=0.6)
    assert abs(float(torch.stack(local).mean() - whole)) > 0.01


def test_backward_has_no_collective(ranks):
    # the gradient of the mean over 6 rows, times the 3 ranks that DDP divides by
    torch.testing.assert_close(ranks[0]["backward"], torch.full((2, 3), 3 / 6))


def test_compiled_calls_use_functional_collectives(ranks):
    tensors, _, slices = problem(3, ROWS["uneven"], False, False)
    leaves = [t.clone().requires_grad_() for t in tensors]
    kl = vk.gaussian_kl(*leaves, free_bits=0.6)
    kl.backward()
    for rank, rows in enumerate(slices):
        got = ranks[rank]["compiled"]
        assert not isinstance(got, str), got
        torch.testing.assert_close(got["kl"], kl.detach())
        for mine, full in zip(got["grads"], leaves, strict=True):
            torch.testing.assert_close(mine / 3, full.grad[rows])


def test_one_all_reduce_for_each_call(ranks):
    assert [r["collectives"] for r in ranks] == [1, 1, 1]


@pytest.mark.parametrize("name", DIFFERING)
def test_ranks_with_different_options_are_all_told_which(name, ranks):
    said = [rank["differing"][name] for rank in ranks]
    assert said[0] == said[1] == said[2]
    assert re.match(
        "process_group: every rank must be called with the same options, and they differ: .*"
        + DIFFERING[name][2],
        str(said[0]),
    ), said[0]
    after = {rank["differing"][f"{name}, after"] for rank in ranks}
    assert len(after) == 1 and isinstance(after.pop(), float)


@pytest.mark.parametrize("name", ALIKE)
def test_what_may_differ_between_ranks_is_not_refused(name, ranks):
    said = {rank["differing"][name] for rank in ranks}
    assert len(said) == 1 and isinstance(said.pop(), float)


def test_the_same_options_are_compared_once(ranks):
    assert [rank["comparisons"] for rank in ranks] == [[1, 1, 2, 2, 3, 3]] * 3


def test_half_types_reduce_in_float32(ranks):
    assert ranks[0]["half"].dtype == torch.float32 and float(ranks[0]["half"]) == 1.5


@pytest.mark.parametrize("reduction", ["none", "elementwise"])
def test_reductions_without_a_sum_reject_a_process_group(reduction, backend):
    mu = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=f"process_group.*{reduction}"):
        vk.gaussian_kl(mu, mu, reduction=reduction, process_group=object())
