"""What a training step of other libraries takes on their own latent layer and on the fused one.

    python benchmarks/integrations.py [--threads N] [--rounds N] [--csv FILE]

Needs vaekernels[integrations]. The same model, weights and data; a step is forward and backward, without
the optimizer. A round times some steps of each, one after the other, so that a change in the machine's speed
meets both. Beside the whole step the latent layer alone, at the shape that the model has.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import monai.networks.nets
import pyro
import pythae.models
import scvi
import torch
from diffusers.models.autoencoders import autoencoder_kl
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor
from torch.distributions import kl_divergence
from torchrl.objectives import DreamerModelLoss

import vaekernels as vk
from vaekernels import bench
from vaekernels.bench.measure import interleaved, spread, timed
from vaekernels.bench.report import write_csv
from vaekernels.integrations import diffusers as fused_diffusers
from vaekernels.integrations import monai as fused_monai
from vaekernels.integrations import pyro as fused_pyro
from vaekernels.integrations import pythae as fused_pythae
from vaekernels.integrations import torch_distributions as fused_distributions
from vaekernels.integrations import torchrl as fused_torchrl

EXAMPLES = Path(__file__).parents[1] / "examples"
LIBRARY, OURS = "library", "vaekernels"
Step = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Microseconds; p20, median and p80 over the rounds."""

    library: str
    version: str
    part: str
    latent: str
    contender: str
    p20: float
    median: float
    p80: float


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def training_step(model: torch.nn.Module, loss: Callable[[], Tensor]) -> Step:
    def step() -> None:
        model.zero_grad()
        loss().backward()

    return step


def layer_step(inputs: Sequence[Tensor], layer: Callable[..., tuple[Tensor, Tensor]]) -> Step:
    def step() -> None:
        for t in inputs:
            t.grad = None
        z, kl = layer(*inputs)
        torch.autograd.backward([z, kl], [torch.ones_like(z), torch.ones_like(kl)])

    return step


def of_diffusers() -> Iterator[tuple[str, tuple[int, ...], dict[str, Step]]]:
    shape = (4, 4, 32, 32)
    model = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        latent_channels=4,
        norm_num_groups=4,
    )
    x = torch.randn(4, 3, 64, 64)

    def loss() -> Tensor:
        posterior = model.encode(x).latent_dist
        z = posterior.sample()
        return (model.decode(z).sample - x).square().mean() + 1e-6 * posterior.kl().mean()

    plain = training_step(model, loss)

    def on(posterior: type[DiagonalGaussianDistribution]) -> Step:
        def step() -> None:
            # What patch() does to this model, without its walk over all modules, which would count.
            autoencoder_kl.DiagonalGaussianDistribution = posterior
            plain()

        return step

    fused = fused_diffusers.DiagonalGaussianDistribution
    yield "step", shape, {LIBRARY: on(DiagonalGaussianDistribution), OURS: on(fused)}
    autoencoder_kl.DiagonalGaussianDistribution = DiagonalGaussianDistribution
    moments = torch.randn(4, 8, 32, 32, requires_grad=True)

    def theirs(moments: Tensor) -> tuple[Tensor, Tensor]:
        posterior = DiagonalGaussianDistribution(moments)
        return posterior.sample(), posterior.kl().mean()

    def ours(moments: Tensor) -> tuple[Tensor, Tensor]:
        z, kl = vk.distributions.DiagonalGaussian(moments).sample_kl()
        return z, kl.mean()

    yield (
        "latent layer",
        shape,
        {LIBRARY: layer_step([moments], theirs), OURS: layer_step([moments], ours)},
    )


def of_pythae() -> Iterator[tuple[str, tuple[int, ...], dict[str, Step]]]:
    shape = (128, 16)
    config = pythae.models.VAEConfig(input_dim=(1, 28, 28), latent_dim=16, reconstruction_loss="bce")
    theirs, ours = pythae.models.VAE(config), fused_pythae.VAE(copy.deepcopy(config))
    ours.load_state_dict(theirs.state_dict())
    inputs = {"data": torch.rand(128, 1, 28, 28)}
    yield (
        "step",
        shape,
        {name: training_step(m, lambda m=m: m(inputs).loss) for name, m in ((LIBRARY, theirs), (OURS, ours))},
    )

    few = inputs["data"][:16]
    yield (
        "get_nll",
        (100, 16),
        {
            name: lambda m=m: m.get_nll(few, n_samples=100, batch_size=100)
            for name, m in ((LIBRARY, theirs), (OURS, ours))
        },
    )

    def eager(mu: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor]:
        z, _ = theirs._sample_gauss(mu, torch.exp(0.5 * log_var))
        return z, (-0.5 * torch.sum(1 + log_var - mu.pow(2) - log_var.exp(), dim=-1)).mean(dim=0)

    pair = [torch.randn(shape, requires_grad=True) for _ in range(2)]
    fused = layer_step(pair, lambda mu, log_var: vk.sample_kl(mu, log_var)[:2])
    yield "latent layer", shape, {LIBRARY: layer_step(pair, eager), OURS: fused}


def scvi_steps(module: torch.nn.Module, batch: dict[str, Tensor]) -> dict[str, Step]:
    theirs = torch.distributions.Normal
    plain = training_step(module, lambda: module(batch)[2].loss)
    # What patch() rebinds, found once: its walk over all modules would count.
    places = [
        (found, name)
        for found in list(sys.modules.values())
        if found.__name__.startswith("scvi.")
        for name, value in vars(found).items()
        if value is theirs
    ]

    def on(normal: type[torch.distributions.Normal]) -> Step:
        def step() -> None:
            for found, name in places:
                setattr(found, name, normal)
            plain()
            for found, name in places:
                setattr(found, name, theirs)

        return step

    return {LIBRARY: on(theirs), OURS: on(fused_distributions.Normal)}


def of_scvi() -> Iterator[tuple[str, tuple[int, ...], dict[str, Step]]]:
    shape = (128, 10)
    for name, options in (
        ("SCVI", {}),
        ("TOTALVI", {"protein_expression_obsm_key": "protein_expression"}),
        ("PEAKVI", {}),
    ):
        cells = scvi.data.synthetic_iid(batch_size=128, n_genes=2000, n_batches=1)
        model = getattr(scvi.model, name)
        model.setup_anndata(cells, **options)
        owner = model(cells)
        module = owner.module.train()
        batch = next(iter(scvi.dataloaders.AnnDataLoader(owner.adata_manager, batch_size=128)))
        yield f"step of {name}", (128, module.n_latent), scvi_steps(module, batch)

    def layer(normal: type[torch.distributions.Normal]) -> Callable[..., tuple[Tensor, Tensor]]:
        def run(mean: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
            posterior = normal(mean, (raw.exp() + 1e-4).sqrt())
            z = posterior.rsample()
            prior = scvi.distributions.Normal(torch.zeros_like(z), torch.ones_like(z))
            return z, kl_divergence(posterior, prior).sum(-1).mean()

        return run

    pair = [torch.randn(shape, requires_grad=True) for _ in range(2)]
    yield (
        "latent layer",
        shape,
        {
            LIBRARY: layer_step(pair, layer(torch.distributions.Normal)),
            OURS: layer_step(pair, layer(fused_distributions.Normal)),
        },
    )


def of_torch_distributions() -> Iterator[tuple[str, tuple[int, ...], dict[str, Step]]]:
    shape = (128, 10)
    theirs = example("torch_distributions_vae").CountsVAE(genes=2000)
    ours = copy.deepcopy(theirs)
    theirs.normal = torch.distributions.Normal
    counts = torch.poisson(torch.rand(128, 2000)) + 1.0
    yield (
        "step",
        shape,
        {name: training_step(m, lambda m=m: m.loss(counts)) for name, m in ((LIBRARY, theirs), (OURS, ours))},
    )

    def layer(normal: type[torch.distributions.Normal]) -> Callable[..., tuple[Tensor, Tensor]]:
        def run(loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
            posterior = normal(loc, scale)
            prior = normal(torch.zeros_like(loc), torch.ones_like(scale))
            return posterior.rsample(), kl_divergence(posterior, prior).sum(1).mean()

        return run

    pair = [torch.randn(shape, requires_grad=True), torch.rand(shape, requires_grad=True)]
    yield (
        "latent layer",
        shape,
        {
            LIBRARY: layer_step(pair, layer(torch.distributions.Normal)),
            OURS: layer_step(pair, layer(fused_distributions.Normal)),
        },
    )


def of_pyro() -> Iterator[tuple[str, tuple[int, ...], dict[str, Step]]]:
    module = example("pyro_vae")
    vae = module.VAE()
    x = (torch.rand(128, 64) < 0.5).float()
    elbo = module.TraceMeanField_ELBO()
    plain = training_step(vae, lambda: elbo.differentiable_loss(vae.model, vae.guide, x))

    def on(normal: type[Any]) -> Step:
        def step() -> None:
            module.Normal = normal
            plain()

        return step

    yield (
        "step",
        (128, module.LATENT),
        {LIBRARY: on(pyro.distributions.Normal), OURS: on(fused_pyro.Normal)},
    )


def of_monai() -> Iterator[tuple[str, tuple[int, ...], dict[str, Step]]]:
    model = monai.networks.nets.AutoencoderKL(
        spatial_dims=2, in_channels=1, out_channels=1, channels=(16, 32), latent_channels=4,
        num_res_blocks=1, norm_num_groups=4, attention_levels=(False, False),
        with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False,
    )  # fmt: skip
    x = torch.randn(4, 1, 64, 64)

    def eager(mu: Tensor, sigma: Tensor) -> Tensor:
        return 0.5 * (mu.pow(2) + sigma.pow(2) - torch.log(sigma.pow(2)) - 1).sum((1, 2, 3)).mean()

    def on(sampling: Callable[..., Tensor], kl_loss: Callable[[Tensor, Tensor], Tensor]) -> Step:
        def loss() -> Tensor:
            out, mu, sigma = model(x)
            return (out - x).abs().mean() + 1e-6 * kl_loss(mu, sigma)

        plain = training_step(model, loss)

        def step() -> None:
            type(model).sampling = sampling
            plain()

        return step

    theirs = type(model).sampling
    fused_monai.patch()
    ours = type(model).sampling
    fused_monai.unpatch()
    yield "step", (4, 4, 32, 32), {LIBRARY: on(theirs, eager), OURS: on(ours, fused_monai.kl_loss)}
    type(model).sampling = theirs


def of_torchrl() -> Iterator[tuple[str, tuple[int, ...], dict[str, Step]]]:
    """The KL alone, over the 50 steps of a sequence."""
    shape = (50, 50, 30)
    none = torch.nn.Identity()  # kl_loss asks nothing of the world model
    world = torch.nn.Sequential(torch.nn.Sequential(none, none), none)
    moments = [(torch.rand(shape) + 0.5).requires_grad_() for _ in range(4)]

    def on(cls: type[DreamerModelLoss]) -> Step:
        loss = cls(world, free_nats=3)

        def step() -> None:
            for t in moments:
                t.grad = None
            loss.kl_loss(*moments).backward()

        return step

    yield "KL", shape, {LIBRARY: on(DreamerModelLoss), OURS: on(fused_torchrl.DreamerModelLoss)}


CASES = {
    "diffusers": ("diffusers", of_diffusers),
    "pythae": ("pythae", of_pythae),
    "scvi-tools": ("scvi-tools", of_scvi),
    "torch.distributions": ("torch", of_torch_distributions),
    "Pyro": ("pyro-ppl", of_pyro),
    "MONAI": ("monai", of_monai),
    "torchrl": ("torchrl", of_torchrl),
}


def timings(rounds: int) -> Iterator[Timing]:
    for library, (package, cases) in CASES.items():
        torch.manual_seed(0)
        for part, shape, steps in cases():
            found = interleaved({name: timed(step) for name, step in steps.items()}, rounds)
            for contender, seconds in found.items():
                yield Timing(
                    *(library, version(package), part, "x".join(map(str, shape)), contender),
                    *(round(1e6 * value, 1) for value in spread(seconds)),
                )


def table(rows: Sequence[Timing]) -> str:
    """A line for each pair, the library's first."""
    lines = ["| library | part | latent | library (µs) | vaekernels (µs) | ratio |"]
    lines.append("| --- | --- | --- | ---: | ---: | ---: |")
    for theirs, ours in zip(rows[::2], rows[1::2], strict=True):
        lines.append(
            f"| {theirs.library} {theirs.version} | {theirs.part} | {theirs.latent} | {theirs.median:,.0f} | "
            f"{ours.median:,.0f} | {theirs.median / ours.median:.2f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Times training steps of other libraries.")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--rounds", type=int, default=31, help="timings of each contender (default: 31)")
    parser.add_argument("--csv", type=Path, help="also write every figure to this file")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = list(timings(options.rounds))
    machine = bench.machine(torch.device("cpu")) | {"threads": str(torch.get_num_threads())}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print()
    print(table(rows))
    if options.csv:
        write_csv(options.csv, rows, machine)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
