"""torch.export and AOTInductor: exported, saved, and run in a process that has only imported vaekernels."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vaekernels as vk
from vaekernels import _native

RNG = torch.tensor([7, 4])


class Layer(torch.nn.Module):
    """A state given: a pure function."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = torch.nn.Linear(4, 6)

    def forward(self, x, rng):
        z, kl, rate = vk.sample_kl_packed(self.encoder(x), rng=rng, free_bits=0.4)
        aggregate, _ = vk.log_aggregate_posterior(z, z, x[:, :3], leave_one_out=True)
        return z, kl, rate, vk.gaussian_kl(z, x[:, :3], group_dims=(), free_bits=0.1), aggregate


class Drawing(Layer):
    """From the default generator."""

    def forward(self, x, rng):
        return vk.reparameterize_packed(self.encoder(x)), vk.reparameterize_packed(self.encoder(x))


def export(layer: torch.nn.Module) -> torch.export.ExportedProgram:
    x = torch.randn(5, 4)
    rows = torch.export.Dim("rows", min=2, max=1_000_000)  # torch 2.6 asks for a largest number
    return torch.export.export(layer.eval(), (x, RNG), dynamic_shapes=({0: rows}, None))


RUN = """
import sys
import torch
import vaekernels
folder, how = sys.argv[1:]
load = torch.export.load if how == "export" else torch._inductor.aoti_load_package
program = load(f"{folder}/program.pt2")
program = program.module() if how == "export" else program
x, rng = torch.load(f"{folder}/inputs.pt")
torch.manual_seed(3)
outputs = [program(x, rng), program(x, rng)]
torch.save(outputs, f"{folder}/outputs.pt")
"""


def elsewhere(folder: Path, how: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN, str(folder), how],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        cwd=folder, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def run_elsewhere(folder: Path, how: str) -> list[tuple[torch.Tensor, ...]]:
    torch.save((torch.randn(11, 4), RNG), folder / "inputs.pt")  # another batch size than the example's
    done = elsewhere(folder, how)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "outputs.pt")


def save(program: torch.export.ExportedProgram, folder: Path, how: str) -> None:
    path = str(folder / "program.pt2")
    if how == "export":
        torch.export.save(program, path)
    else:
        torch._inductor.aoti_compile_and_package(program, package_path=path)


HOW = ["export", pytest.param("aoti", marks=pytest.mark.slow)]


@pytest.mark.parametrize("how", HOW)
def test_in_a_fresh_process(how, tmp_path, kernels):
    program = export(Layer())
    called = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert torch.ops.vaekernels.latent.default in called
    save(program, tmp_path, how)
    outputs = run_elsewhere(tmp_path, how)
    x, rng = torch.load(tmp_path / "inputs.pt")
    for found in outputs:
        for a, b in zip(found, Layer()(x, rng), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("how", HOW)
def test_a_program_that_draws_draws_afresh_and_from_the_seed(how, tmp_path, kernels):
    save(export(Drawing()), tmp_path, how)
    (a, b), (c, d) = run_elsewhere(tmp_path, how)
    assert len({tuple(t.flatten().tolist()) for t in (a, b, c, d)}) == 4
    x, rng = torch.load(tmp_path / "inputs.pt")
    drawing = Drawing()
    torch.manual_seed(3)
    torch.testing.assert_close(drawing(x, rng)[0], a)


def test_a_clamp_per_sample_with_rows_that_vary(kernels):
    """It saves a bit for each row and group. Whether they fit one byte is a constant of a traced program, so
    one for 9 rows and more is exported from an example of that many."""

    class Clamped(torch.nn.Module):
        def forward(self, mu):
            return vk.gaussian_kl(mu, mu, group_dims=(), free_bits=0.1, clamp="sample")

    rows = torch.export.Dim("rows", min=9)
    program = torch.export.export(Clamped(), (torch.randn(16, 3),), dynamic_shapes=({0: rows},)).module()
    for count in (9, 16, 40):
        mu = torch.randn(count, 3)
        torch.testing.assert_close(program(mu), Clamped()(mu))


def test_an_exported_program_trains(kernels):
    program = torch.export.export(Layer(), (torch.randn(5, 4), RNG)).module()
    eager, x = Layer(), torch.randn(5, 4)
    for layer in (program, eager):
        z, kl, *_ = layer(x, RNG)
        (z.square().sum() + kl).backward()
    torch.testing.assert_close(program.encoder.weight.grad, eager.encoder.weight.grad)


def test_exported_from_the_reference_it_needs_no_library(monkeypatch):
    monkeypatch.setattr(_native, "has_kernels", lambda device_type: False)
    monkeypatch.setattr(_native, "C", None)
    program = export(Layer())
    assert not any("vaekernels" in str(node.target) for node in program.graph.nodes)


@pytest.mark.skipif(torch.__version__.startswith("2.8."), reason="torch 2.8 hides it, see docs/install.md")
def test_without_the_compiled_library_it_says_what_it_needs(tmp_path, kernels):
    """The package as it is where nothing is compiled: without its library, and without a cache of one."""
    package = Path(vk.__file__).parent
    shutil.copytree(
        package,
        tmp_path / "path/vaekernels",
        ignore=shutil.ignore_patterns("_C*", "_build.json", "__pycache__"),
    )
    save(export(Layer()), tmp_path, "export")
    torch.save((torch.randn(5, 4), RNG), tmp_path / "inputs.pt")
    done = elsewhere(
        tmp_path,
        "export",
        PYTHONPATH=str(tmp_path / "path"),
        XDG_CACHE_HOME=str(tmp_path),
        HOME=str(tmp_path),
    )
    assert done.returncode != 0
    needs = r"exported programs need the compiled library of vaekernels: .*no library lies in"
    assert re.search(needs, done.stderr)
    assert "vaekernels build" in done.stderr


def test_the_absent_namespace_names_the_operator():
    absent = _native.AbsentOperators("vaekernels")
    with pytest.raises(RuntimeError, match=r"calls torch\.ops\.vaekernels\.sample_kl, and exported"):
        absent.sample_kl  # noqa: B018
    assert not hasattr(absent, "__wrapped__")
