"""What torch's tracers make of the ops: make_fx, torch.fx.symbolic_trace, both exporters to ONNX."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import vaekernels as vk
from vaekernels import reparameterize_packed
from vaekernels.nn import GaussianLatent, LearnedPriorLatent
from vaekernels.schedules import Linear


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode):
    def f(m):
        return vk.sample_kl_packed(m, 1, free_bits=0.1)[:2]

    def gradient(m):
        m = m.detach().requires_grad_()
        return torch.autograd.grad(vk.gaussian_kl_packed(m, 1), m)[0]

    example = torch.randn(6, 8)
    graph, slope = make_fx(f, tracing_mode=mode)(example), make_fx(gradient, tracing_mode=mode)(example)
    for rows in (6,) if mode != "symbolic" else (6, 9):
        m = torch.randn(rows, 8)
        (z, kl), (again, _) = graph(m), graph(m)
        assert z.shape == (rows, 4) and not torch.equal(z, again)
        torch.testing.assert_close(kl, vk.gaussian_kl_packed(m, 1, free_bits=0.1))
        torch.testing.assert_close(slope(m), gradient(m))


class Functions(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Linear(6, 8)

    def forward(self, x, rng):
        moments = self.encoder(x)
        z, kl, rate = vk.sample_kl_packed(moments, 1, free_bits=0.1, rng=rng)
        mu, logvar = moments.chunk(2, 1)
        return z, kl + vk.gaussian_kl(mu, logvar), rate


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Linear(6, 8)
        self.latent = GaussianLatent(4, beta=Linear(1.0, steps=10, start=0.5), free_bits=0.1)
        self.learned = LearnedPriorLatent(4, balance=0.8)

    def forward(self, x, rng):
        moments = self.encoder(x)
        z, kl, _ = self.latent(moments, rng=rng)
        _, to_prior, rate = self.learned(moments, 0.5 * moments, rng=rng)
        return z, kl + to_prior, rate


@pytest.mark.parametrize("kind", [Functions, Layers])
def test_symbolic_trace(kind, backend):
    module, x, rng = kind(), torch.randn(5, 6), torch.tensor([7, 4])
    traced = torch.fx.symbolic_trace(module)
    for a, b in zip(traced(x, rng), module(x, rng), strict=True):
        assert torch.equal(a, b)
    if kind is Layers:
        assert int(module.latent.num_batches_tracked) == int(traced.latent.num_batches_tracked) + 1 == 2 or (
            traced.latent is module.latent
        )


def test_a_function_imported_by_name_has_to_be_wrapped():
    with pytest.raises(TypeError, match=r"got Proxy; .* torch.fx.wrap\('sample_kl'\)"):
        torch.fx.symbolic_trace(lambda m: reparameterize_packed(m, 1))


class Exported(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.encoder, self.options = torch.nn.Linear(6, 8), options

    def forward(self, x):
        z, kl, rate = vk.sample_kl_packed(self.encoder(x), 1, free_bits=0.1, **self.options)
        return z, kl, rate


def onnx_file(module: torch.nn.Module, x: torch.Tensor, path: Any, dynamo: bool) -> Any:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module.eval(), (x,), path, dynamo=dynamo, verbose=False)
    model = onnx.load(path)
    onnx.checker.check_model(model)
    return model


@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx(dynamo, tmp_path, backend):
    """Plain operators of ONNX, whose own random numbers make z; the KL is ours."""
    module, x = Exported(), torch.randn(5, 6)
    model = onnx_file(module, x, str(tmp_path / "model.onnx"), dynamo)
    assert {node.domain for node in model.graph.node} <= {""}
    assert any(node.op_type.startswith("RandomNormal") for node in model.graph.node)
    if not dynamo:
        with pytest.raises(ValueError, match="rng and generator must be None in an ONNX export"):
            onnx_file(Exported(rng=torch.tensor([1, 0])), x, str(tmp_path / "no.onnx"), dynamo)
    reference = pytest.importorskip("onnx.reference")
    values = reference.ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})
    _, kl, rate = module(x)
    assert values[0].shape == (5, 4)
    torch.testing.assert_close(torch.as_tensor(values[1]), kl.detach())
    torch.testing.assert_close(torch.as_tensor(values[2]), rate.detach())
