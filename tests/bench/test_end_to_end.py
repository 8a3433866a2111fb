"""The models of the end-to-end benchmark learn the same with fused ops and with the usual lines, and its
report says what was measured."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import settings, tiny_data  # noqa: F401
from torch import Tensor, nn

import vaekernels as vk
from vaekernels.training import data as datasets
from vaekernels.training import models
from vaekernels.training.latents import ELBO, LatentOptions

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
latent_ops: Any = import_module("latent_ops")
deep_vae: Any = import_module("deep_vae")
state_space: Any = import_module("state_space")
end_to_end: Any = import_module("end_to_end")

CPU = torch.device("cpu")
DEEP = deep_vae.Sizes(
    width=8,
    bottleneck=4,
    latent_channels=3,
    encoder=((8, 2), (4, 1), (1, 1)),
    decoder=((1, 1), (4, 2), (8, 3)),
)
WORLD = state_space.Sizes(observations=14, stochastic=5, deterministic=6, hidden=7, dense=8)


def fused_noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """The normals that the fused op would take from the same generator in the same place."""
    zero = torch.zeros_like(like)
    return vk.reparameterize(zero, zero, generator=generator)


SAME_NOISE = latent_ops.eager(fused_noise)


def loss_and_gradients(model: nn.Module, loss: Callable[[], Tensor]) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    value = loss()
    value.backward()
    return [value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def agree(model: nn.Module, loss: Callable[[Any], Tensor]) -> None:
    fused = loss_and_gradients(model, lambda: loss(latent_ops.FUSED))
    eager = loss_and_gradients(model, lambda: loss(SAME_NOISE))
    assert len(fused) == len(eager) > 1
    for a, b in zip(fused, eager, strict=True):
        # In float64 the formulas differ by roundings alone, however deep the model.
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def moved(model: nn.Module, seed: int) -> nn.Module:
    """In float64, with every parameter off the point where it starts: no layer is a copy of its prior."""
    torch.manual_seed(seed)
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model.double()


@pytest.mark.usefixtures("kernels")
class TestSameLosses:
    def test_deep_vae(self) -> None:
        x = deep_vae.photographs(2, DEEP.image, torch.Generator().manual_seed(0))
        model = moved(deep_vae.DeepVAE(DEEP), 1)
        model.likelihood.features = lambda x: x.double() / 255  # in place of float32
        model.likelihood._said = lambda said: (said[:, 0] + 0.5, said[:, 1] - 1.5)
        agree(model, lambda ops: model(x, ops))

    @pytest.mark.parametrize("free_nats", [0.0, 1e3])
    def test_state_space_model(self, free_nats: float, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(state_space, "FREE_NATS", free_nats)
        generator = torch.Generator().manual_seed(0)
        seen, actions = state_space.spring_chain(4, 3, WORLD, generator)
        model = moved(state_space.StateSpaceModel(WORLD), 1)
        agree(model, lambda ops: model(seen.double(), actions.double(), ops))

    @pytest.mark.usefixtures("tiny_data")
    @pytest.mark.parametrize(
        "name, kind",
        [
            ("digits", "mlp"),
            ("digits", "ladder"),
            ("digits", "row-gru"),
            ("digits", "conv"),
            ("docstrings", "gru"),
            ("docstrings", "lstm"),
        ],
    )
    def test_models_of_the_trainer(self, name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        config = settings(name, f"model.kind={kind}")
        data = datasets.load(config.data, lambda text: None)
        x = data.train[:6]
        model = models.build(config.model, data)
        torch.manual_seed(1)
        for p in model.parameters():
            p.data += 0.05 * torch.randn_like(p)

        def loss(ops: Any) -> Tensor:
            monkeypatch.setattr("vaekernels.ops.sample_kl_packed", ops.sample_kl_packed)
            elbo = ELBO(model, LatentOptions(free_bits=0.05))
            terms = elbo(x, len(x), torch.Generator().manual_seed(5))
            return terms.nll + terms.kl.sum()

        fused = loss_and_gradients(model, lambda: loss(latent_ops.FUSED))
        eager = loss_and_gradients(model, lambda: loss(SAME_NOISE))
        for a, b in zip(fused, eager, strict=True):
            # float32 throughout: sums of up to a few hundred terms, each to about 1e-6.
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_the_eager_layer_leaves_out_is_refused() -> None:
    with pytest.raises(ValueError, match="clamp='sample': the eager layer"):
        latent_ops.eager().sample_kl_packed(torch.zeros(2, 4), clamp="sample")


def test_forty_layers_from_1_to_32() -> None:
    for sizes in (deep_vae.SMALL, deep_vae.PUBLISHED):
        assert sizes.layers == 40
        assert [size for size, _ in sizes.decoder] == [1, 4, 8, 16, 32]
    parameters = sum(p.numel() for p in deep_vae.DeepVAE(deep_vae.PUBLISHED).parameters())
    assert 30e6 < parameters < 50e6  # 39 M as published, with 43 layers and a mixture as likelihood


def deep_steps() -> Any:
    return end_to_end.deep_steps(DEEP, 2, CPU)


def test_calls_of_a_step() -> None:
    calls: list[Any] = []
    deep_steps().step(latent_ops.recording(latent_ops.FUSED, calls), 0)
    assert [(call.name, call.elements) for call in calls] == [
        ("sample_kl_packed", 2 * 3 * size**2) for size in (1, 4, 4, 8, 8, 8)
    ]
    calls.clear()
    end_to_end.state_space_steps(WORLD, CPU, steps=4, batch=3).step(
        latent_ops.recording(latent_ops.FUSED, calls), 0
    )
    assert [call.name for call in calls] == ["reparameterize"] * 4 + ["gaussian_kl"]
    assert calls[0].elements == 3 * 5 and calls[-1].elements == 4 * 3 * 5
    # mu and std of the posterior; for the KL the prior's too.
    assert [len(call.leaves) for call in calls] == [2, 2, 2, 2, 4]


def test_steps_train() -> None:
    workload = deep_steps()
    before = [p.clone() for p in workload.model.parameters()]
    for number in range(2):  # in the first the top has the gradient 0: it starts from zeros
        workload.step(latent_ops.FUSED, number)
    assert all(not torch.equal(a, b) for a, b in zip(before, workload.model.parameters(), strict=True))


@pytest.mark.usefixtures("tiny_data")
def test_trainer_has_its_own_op_back(tmp_path: Path) -> None:
    own = vk.ops.sample_kl_packed
    workload = end_to_end.TrainerSteps("digits", CPU, tmp_path)
    calls: list[Any] = []
    workload.step(latent_ops.recording(latent_ops.FUSED, calls), 0)
    assert len(calls) == 1 and vk.ops.sample_kl_packed is own


RESULT = end_to_end.Result(
    model="m",
    parameters=1_250_000,
    latent_calls=2,
    latent_elements=1024,
    contender="vaekernels",
    threads=1,
    rounds=3,
    step_p20=9.0,
    step=10.0,
    step_p80=11.0,
    ratio_p20=1.0,
    ratio=1.0,
    ratio_p80=1.0,
    latent=0.5,
    explained=0.0,
    peak_bytes=2_000_000,
)


def other(model: str, low: float, middle: float, high: float, peak: int = 2_000_000) -> Any:
    ratios = {"ratio_p20": low, "ratio": middle, "ratio_p80": high}
    return replace(RESULT, model=model, contender="eager", explained=0.15, peak_bytes=peak, **ratios)


def test_table() -> None:
    lines = end_to_end.table([RESULT, other("m", 1.0, 1.25, 2.0)]).splitlines()
    assert lines[2:] == [
        "| m (1.2 M parameters) | 2, of 1,024 elements | vaekernels | 10.0 (9.0 to 11.0) |  |  "
        "| 0.50 | 5.0 % | 2.0 |",
        "|  |  | eager | 10.0 (9.0 to 11.0) | 20.0 % (0.0 to 50.0) | 15.0 % | 0.50 | 5.0 % | 2.0 |",
    ]


def test_verdict() -> None:
    fused = [replace(RESULT, model=model) for model in "abc"]
    peers = [
        other("a", 1.1, 1.25, 1.3, peak=4_000_000),
        other("b", 0.9, 1.0, 1.1, peak=1_600_000),
        other("c", 0.5, 0.8, 0.9, peak=2_010_000),
    ]
    text = end_to_end.verdict([*fused, *peers])
    assert "Against eager, saves time: a (20.0 %)." in text
    assert "Against eager, worth nothing: b (0.0 %)." in text
    assert "Against eager, costs time: c (-25.0 %)." in text
    assert "Against eager, saves memory: a (50.0 %)." in text
    assert "Against eager, costs memory: b (-25.0 %)." in text


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(end_to_end, "MODELS", {"deep": lambda device, folder: deep_steps()})
    monkeypatch.setattr(end_to_end, "SECONDS_PER_TIMING", 0.0)
    path = tmp_path / "a.csv"
    assert end_to_end.main(["--rounds", "2", "--no-compile", "--output", str(path)]) == 0
    assert "| deep (" in capsys.readouterr().out
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["contender"] for row in rows] == ["vaekernels", "eager"]
    assert all(float(row["share"]) > 0 and row["latent_calls"] == "6" for row in rows)
    fused, eager = rows
    assert fused["ratio"] == "1.0" and int(fused["peak_bytes"]) > 0 and float(eager["ratio"]) > 0


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--models", "resnet"], "invalid choice: 'resnet'"),
        (["--output", "absent/a.csv"], "--output absent/a.csv: there is no folder absent"),
    ],
)
def test_refuses(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        end_to_end.main(arguments)
    assert words in capsys.readouterr().err
