"""Bad input: an error that names the argument, what it got and what to do, the same on both paths."""

from __future__ import annotations

import re

import pytest
import torch

import vaekernels as vk

NAN = float("nan")


def t(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


def kl(*args, **options):
    return lambda: vk.gaussian_kl(*args, **options)


def draw(*args, **options):
    return lambda: vk.reparameterize(*args, **options)


def both(*args, **options):
    return lambda: vk.sample_kl(*args, **options)


M = t(2, 3)
# name: (call, the words that the message must hold)
BAD = {
    # tensors
    "shapes": (both(M, t(2, 4)), ["mu", "logvar", "(2, 3)", "(2, 4)"]),
    "shapes_that_would_broadcast": (kl(M, t(1, 3)), ["mu", "logvar", "(2, 3)", "(1, 3)"]),
    "prior_shape": (kl(M, M, t(1, 3), t(1, 3)), ["prior_mu", "(1, 3)", "(2, 3)", "expand"]),
    "prior_logvar_shape": (kl(M, M, M, t(3)), ["prior_logvar", "(3,)", "(2, 3)"]),
    "dtypes": (draw(M, t(2, 3, dtype=torch.bfloat16)), ["mu", "logvar", "float32", "bfloat16"]),
    "prior_dtypes": (kl(M, M, M.double(), M.double()), ["prior_mu", "float64", "float32"]),
    "devices": (draw(M, M.to("meta")), ["mu", "logvar", "cpu", "meta"]),
    "prior_devices": (kl(M, M, M.to("meta"), M.to("meta")), ["prior_mu", "cpu", "meta"]),
    "integers": (both(M.long(), M.long()), ["mu", "int64", "float32"]),
    "bools": (draw(M.bool(), M.bool()), ["mu", "bool", "float32"]),
    "complex": (kl(M.cfloat(), M.cfloat()), ["mu", "complex64", "float32"]),
    "not_a_tensor": (draw([0.0], M), ["mu", "list"]),
    "logvar_not_a_tensor": (draw(M, 0.0), ["logvar", "float"]),
    "prior_without_logvar": (kl(M, M, M), ["prior_mu", "prior_logvar"]),
    "prior_without_mu": (kl(M, M, None, M), ["prior_mu", "prior_logvar"]),
    # free_bits
    "negative_free_bits": (kl(M, M, free_bits=-0.5), ["free_bits", "-0.5", "non-negative"]),
    "nan_free_bits": (kl(M, M, free_bits=NAN), ["free_bits", "nan"]),
    "negative_free_bits_tensor": (
        kl(M, M, free_bits=torch.tensor([0.0, -2.0, 1.0])),
        ["free_bits", "-2", "non-negative", "index 1"],
    ),
    "negative_free_bits_tensor_sample": (
        both(M, M, free_bits=torch.tensor([0.0, 1.0, -2.0]), clamp="sample"),
        ["free_bits", "-2", "index 2"],
    ),
    "nan_free_bits_tensor": (
        kl(M, M, free_bits=torch.tensor([NAN, 0.0, 1.0])),
        ["free_bits", "nan", "index 0"],
    ),
    "free_bits_shape": (kl(M, M, free_bits=t(2)), ["free_bits", "(2,)", "(3,)"]),
    "free_bits_of_higher_rank": (kl(M, M, free_bits=t(2, 3)), ["free_bits", "(2, 3)", "(3,)"]),
    "free_bits_requires_grad": (kl(M, M, free_bits=t(3).requires_grad_()), ["free_bits", "grad", "detach"]),
    "free_bits_string": (kl(M, M, free_bits="much"), ["free_bits", "str"]),
    # dims
    "group_dims_out_of_range": (kl(M, M, group_dims=2), ["group_dims", "2"]),
    "group_dims_negative_out_of_range": (kl(M, M, group_dims=(-3,)), ["group_dims", "-3"]),
    "group_dims_repeated": (kl(t(2, 3, 4), t(2, 3, 4), group_dims=(1, -2)), ["group_dims", "-2"]),
    "group_dims_of_the_batch": (kl(M, M, group_dims=0), ["group_dims", "0", "batch"]),
    "group_dims_within_batch_dims": (
        kl(t(2, 3, 4), t(2, 3, 4), batch_dims=2, group_dims=1),
        ["group_dims", "batch"],
    ),
    "batch_dims_too_large": (kl(M, M, batch_dims=3), ["batch_dims", "3", "2"]),
    "batch_dims_negative": (kl(M, M, batch_dims=-1), ["batch_dims", "-1"]),
    # weight
    "negative_weight": (
        kl(M, M, weight=torch.tensor([1.0, -3.0])),
        ["weight", "-3", "non-negative", "index 1"],
    ),
    "negative_integer_weight": (kl(M, M, weight=torch.tensor([1, -3])), ["weight", "-3", "index 1"]),
    "nan_weight": (both(M, M, weight=torch.tensor([NAN, 1.0])), ["weight", "nan", "index 0"]),
    "weight_shape": (kl(M, M, weight=t(3)), ["weight", "(3,)", "(2,)"]),
    "weight_shape_batch_dims": (
        kl(t(2, 3, 4), t(2, 3, 4), batch_dims=2, weight=t(2)),
        ["weight", "(2,)", "(2, 3)"],
    ),
    "weight_requires_grad": (kl(M, M, weight=t(2).requires_grad_()), ["weight", "grad", "detach"]),
    "weight_complex": (kl(M, M, weight=t(2).cfloat()), ["weight", "complex64"]),
    "weight_with_none": (kl(M, M, weight=t(2), reduction="none"), ["weight", "none"]),
    "weight_with_elementwise": (kl(M, M, weight=t(2), reduction="elementwise"), ["weight", "elementwise"]),
    "weight_device": (kl(M, M, weight=t(2).to("meta")), ["weight", "cpu", "meta"]),
    # strings
    "unknown_clamp": (kl(M, M, free_bits=1.0, clamp="row"), ["clamp", "row", "batch", "sample"]),
    "unknown_clamp_without_free_bits": (kl(M, M, clamp="row"), ["clamp", "row", "batch", "sample"]),
    "unknown_penalty": (kl(M, M, free_bits=1.0, penalty="max"), ["penalty", "max", "floor", "hinge", "mask"]),
    "unknown_reduction": (
        kl(M, M, reduction="avg"),
        ["reduction", "avg", "batchmean", "sum", "mean", "none", "elementwise"],
    ),
    "unknown_parameterization": (
        draw(M, M, parameterization="var"),
        ["parameterization", "var", "logvar", "log_std", "std", "softplus"],
    ),
    "clamp_none": (kl(M, M, free_bits=1.0, clamp=None), ["clamp", "None", "batch", "sample"]),
    # combinations
    "none_with_batch_clamp": (
        kl(M, M, free_bits=1.0, reduction="none"),
        ["reduction", "none", "clamp", "sample"],
    ),
    "elementwise_with_free_bits": (
        kl(M, M, free_bits=1.0, clamp="sample", reduction="elementwise"),
        ["reduction", "elementwise", "free_bits"],
    ),
    "balance_without_prior": (kl(M, M, balance=0.8), ["balance", "prior_mu", "prior_logvar"]),
    "balance_above_one": (kl(M, M, M, M, balance=1.5), ["balance", "1.5"]),
    "balance_negative": (kl(M, M, M, M, balance=-0.1), ["balance", "-0.1"]),
    "balance_nan": (kl(M, M, M, M, balance=NAN), ["balance", "nan"]),
    "bounds_reversed": (draw(M, M, logvar_bounds=(2.0, -2.0)), ["logvar_bounds", "2.0", "-2.0"]),
    "bounds_nan": (draw(M, M, logvar_bounds=(NAN, 2.0)), ["logvar_bounds", "nan"]),
    "bounds_of_one_number": (draw(M, M, logvar_bounds=(2.0,)), ["logvar_bounds", "2.0"]),
    "bounds_number": (draw(M, M, logvar_bounds=2.0), ["logvar_bounds", "2.0"]),
    "negative_num_samples": (draw(M, M, num_samples=-1), ["num_samples", "-1"]),
    "num_samples_float": (both(M, M, num_samples=1.5), ["num_samples", "float", "int"]),
    # packed
    "odd_packed_size": (lambda: vk.sample_kl_packed(t(2, 5)), ["moments", "dim", "5", "even"]),
    "odd_packed_size_last": (lambda: vk.gaussian_kl_packed(t(2, 4, 3), -1), ["moments", "dim", "3", "even"]),
    "packed_dim_out_of_range": (lambda: vk.reparameterize_packed(t(2, 4), 2), ["dim", "2"]),
    "packed_dim_negative": (lambda: vk.reparameterize_packed(t(2, 4), -3), ["dim", "-3"]),
    "packed_default_dim_of_a_vector": (lambda: vk.reparameterize_packed(t(4)), ["dim", "1"]),
    "packed_integers": (lambda: vk.sample_kl_packed(t(2, 4).int()), ["moments", "int32"]),
    "packed_prior_shape": (
        lambda: vk.gaussian_kl_packed(t(2, 4), 1, t(2, 4), t(2, 4)),
        ["prior_mu", "(2, 4)", "(2, 2)"],
    ),
    # random state
    "rng_dtype": (draw(M, M, rng=t(2)), ["rng", "float32", "int64"]),
    "rng_shape": (draw(M, M, rng=t(3).long()), ["rng", "(3,)", "(2,)"]),
    "rng_not_a_tensor": (draw(M, M, rng=5), ["rng", "int"]),
    "rng_device": (draw(M, M, rng=t(2).long().to("meta")), ["rng", "meta", "cpu"]),
    "rng_offset": (draw(M, M, rng=torch.tensor([1, 6])), ["rng", "offset", "6", "multiple of 4"]),
    "rng_and_generator": (both(M, M, rng=t(2).long(), generator=torch.Generator()), ["rng", "generator"]),
    "generator_type": (draw(M, M, generator=5), ["generator", "int"]),
    "rng_state_like": (lambda: vk.rng_state(3), ["like", "int"]),
}


@pytest.mark.parametrize("name", BAD)
def test_the_error_names_what_is_wrong(name, backend):
    call, expected = BAD[name]
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    message = str(error.value)
    brackets = str.maketrans("[]", "()")
    plain = message.translate(brackets).replace(",)", ")")
    missing = [word for word in expected if word.replace(",)", ")") not in plain]
    assert not missing, f"{missing} not in {message!r}"
    assert len(message) > 30, f"no remedy in {message!r}"


def test_the_same_text_on_kernels_and_reference(kernels, monkeypatch):
    def errors():
        out = {}
        for name, (call, _) in BAD.items():
            with pytest.raises((ValueError, TypeError)) as error:
                call()
            # -3 and -3.000000 are the same number
            text = re.sub(r"-?\d+\.\d+", lambda m: f"{float(m[0]):g}", str(error.value))
            out[name] = (error.type, text)
        return out

    ours = errors()
    monkeypatch.setattr(vk._native, "has_kernels", lambda device_type: False)
    monkeypatch.setattr(vk._native, "C", None)
    reference = errors()
    assert {n: (ours[n], reference[n]) for n in ours if ours[n] != reference[n]} == {}


def test_a_failed_call_draws_nothing(backend):
    before = torch.get_rng_state()
    for call in (both(M, t(2, 4)), both(M, M, free_bits=-1.0), both(M, M, group_dims=5)):
        with pytest.raises(ValueError):
            call()
    assert torch.equal(torch.get_rng_state(), before)


def test_good_input_of_every_kind_is_taken(backend):
    """The other side of the checks: what must not be refused."""
    vk.gaussian_kl(M, M, free_bits=0)
    vk.gaussian_kl(M, M, free_bits=float("inf"), penalty="hinge")
    vk.gaussian_kl(M, M, free_bits=torch.tensor(0.5))
    vk.gaussian_kl(M, M, free_bits=torch.ones(1))
    vk.gaussian_kl(t(2, 3, 4), t(2, 3, 4), free_bits=t(4, dtype=torch.float64))
    vk.gaussian_kl(t(2, 3, 4), t(2, 3, 4), free_bits=torch.ones(3, 1, dtype=torch.int64))
    vk.gaussian_kl(M, M, group_dims=[-1])
    vk.gaussian_kl(M, M, batch_dims=2)
    vk.gaussian_kl(M, M, M, M, balance=0)
    vk.gaussian_kl(M, M, M, M, balance=1)
    vk.gaussian_kl(M, M, weight=torch.tensor([True, False]))
    vk.gaussian_kl(M, M, reduction="none", return_per_group=True)
    vk.reparameterize(M, M, num_samples=0, logvar_bounds=[-1, 1])
    vk.reparameterize(M, M, generator=torch.Generator())
    vk.reparameterize(torch.tensor(0.0), torch.tensor(0.0))
    vk.gaussian_kl(torch.tensor(0.0), torch.tensor(0.0), batch_dims=0)


@pytest.mark.parametrize("name", ["free_bits", "weight"])
def test_bad_values_are_found_anywhere_in_long_tensors(name, backend):
    """The kernels check on the way: in every chunk, whatever the thread."""
    rows, cols = (70_001, 2) if name == "weight" else (2, 70_001)
    mu = t(rows, cols)
    for at in (0, 4096, 69_999, 70_000):
        bad = torch.ones(70_001)
        bad[at] = -1.0
        with pytest.raises(ValueError, match=rf"{name}.*index {at}\b"):
            vk.gaussian_kl(mu, mu, **{name: bad})
