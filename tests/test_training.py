"""The trainer: resumption, interruption, losses, evaluation, models, configuration."""

from __future__ import annotations

import json
import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning_fabric", reason="the trainer needs vaekernels[train]")
pytest.importorskip("typer", reason="the trainer needs vaekernels[train]")
pytest.importorskip("rich", reason="the trainer needs vaekernels[train]")

import torch
from tiny_runs import (
    checkpoint_of,
    log_of,
    same,
    settings,
    stop_at,
    tiny_data,  # noqa: F401 (the fixture)
    trainer,
)
from torch import Tensor

from vaekernels.training import config as configs
from vaekernels.training import data as datasets
from vaekernels.training.config import (
    DataConfig,
    ModelConfig,
)
from vaekernels.training.data.base import Images
from vaekernels.training.errors import CheckpointError, ConfigError, Interrupted, NonFiniteError
from vaekernels.training.evaluate import evaluate
from vaekernels.training.loop import CHECKPOINT, CONFIG, LOG
from vaekernels.training.models import ELBO, VAE, GRUTextVAE, build

pytestmark = [
    pytest.mark.filterwarnings("ignore::vaekernels.FallbackWarning"),
    pytest.mark.usefixtures("tiny_data"),
]


# --- resumption


@pytest.mark.parametrize("name", ["docstrings", "digits"])
@pytest.mark.parametrize("steps", [(1,), (14,), (15,), (2, 30)])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    name: str, steps: tuple[int, ...], tmp_path: Path
) -> None:
    config = settings(name, free_bits=0.1, anneal_epochs=1.5)
    whole = trainer(config, tmp_path / "whole")
    expected = whole.fit()

    run = trainer(config, tmp_path / "parts")
    for step in steps:
        stop_at(run, step)
        with pytest.raises(Interrupted, match=f"stopped at step {step}, all saved"):
            run.fit()
        torch.manual_seed(999)  # whatever the process that resumes has drawn before
        run = trainer(config, tmp_path / "parts", resume=True)
        assert run.progress.step == step
    assert run.fit() == expected
    assert same(checkpoint_of(tmp_path / "whole"), checkpoint_of(tmp_path / "parts"))
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")


def test_two_runs_of_one_seed_are_equal_and_of_two_seeds_are_not(tmp_path: Path) -> None:
    config = settings()
    other = replace(config, engine=replace(config.engine, seed=1))
    results = [trainer(c, tmp_path / str(i)).fit() for i, c in enumerate((config, config, other))]
    assert results[0] == results[1] != results[2]


def test_lower_precision_trains(tmp_path: Path) -> None:
    config = settings("digits", free_bits=0.1)
    exact = trainer(config, tmp_path / "a").fit()
    lower = replace(config, engine=replace(config.engine, precision="bf16-mixed"))
    assert trainer(lower, tmp_path / "b").fit().nll == pytest.approx(exact.nll, rel=0.02)


def test_a_run_may_be_resumed_for_more_epochs(tmp_path: Path) -> None:
    config = settings()
    longer = replace(config, optim=replace(config.optim, epochs=5))
    trainer(config, tmp_path / "a").fit()
    resumed = trainer(longer, tmp_path / "a", resume=True).fit()
    assert resumed == trainer(longer, tmp_path / "b").fit()
    assert [line["epoch"] for line in log_of(tmp_path / "a")] == [1, 2, 3, 4, 5]
    assert configs.load(tmp_path / "a" / CONFIG) == longer


def test_a_finished_run_that_is_resumed_only_evaluates(tmp_path: Path) -> None:
    first = trainer(settings(), tmp_path / "a").fit()
    before = checkpoint_of(tmp_path / "a")
    assert trainer(settings(), tmp_path / "a", resume=True).fit() == first
    assert same(checkpoint_of(tmp_path / "a"), before)


def test_log_lines_after_the_checkpoint_are_dropped_on_resumption(tmp_path: Path) -> None:
    # A run killed between the log and the checkpoint, while it wrote the log.
    config = settings()
    whole = trainer(config, tmp_path / "whole")
    whole.fit()
    run = trainer(config, tmp_path / "killed")
    stop_at(run, 20)
    with pytest.raises(Interrupted):
        run.fit()
    with open(tmp_path / "killed" / LOG, "a") as file:
        file.write(json.dumps({"epoch": 2, "step": 99}) + '\n{"epoch": 3, "st')
    trainer(config, tmp_path / "killed", resume=True).fit()
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "killed")


def test_ctrl_c_finishes_the_step_saves_and_gives_the_signal_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    run = trainer(settings(), tmp_path)
    stop_at(run, 3, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted, match=f"vaekernels train --resume {tmp_path}"):
        run.fit()
    assert checkpoint_of(tmp_path)["progress"]["step"] == 3
    assert signal.getsignal(signal.SIGINT) is before


def test_a_failed_write_leaves_the_last_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(settings(), tmp_path)
    stop_at(run, 3)
    with pytest.raises(Interrupted):
        run.fit()
    before = checkpoint_of(tmp_path)

    def full(state: object, path: str, *arguments: object, **options: object) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    resumed = trainer(settings(), tmp_path, resume=True)
    monkeypatch.setattr(resumed.fabric, "save", lambda path, state: full(state, path))
    with pytest.raises(CheckpointError, match="No space left on device; nothing there was overwritten"):
        resumed.fit()
    assert same(checkpoint_of(tmp_path), before)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CHECKPOINT, CONFIG, LOG]


# --- losses


def test_nan_stops_before_the_step_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    run = trainer(settings(), tmp_path)
    parameters: dict[str, Tensor] = {}

    def poison() -> None:
        parameters.update({name: value.clone() for name, value in run.model.state_dict().items()})
        run.schedule.value.fill_(math.nan)

    stop_at(run, len(run.batches) + 2, poison)
    with pytest.raises(NonFiniteError) as raised:
        run.fit()
    assert f"step {len(run.batches) + 2} (epoch 2, batch 2 of {len(run.batches)}): loss nan, nll" in str(
        raised.value
    )
    assert f"the last good checkpoint is {tmp_path / CHECKPOINT}" in str(raised.value)
    assert checkpoint_of(tmp_path)["progress"]["step"] == len(run.batches)
    assert same(dict(run.model.state_dict()), parameters)


def test_a_gradient_that_is_not_finite_is_not_stepped_along(tmp_path: Path) -> None:
    run = trainer(settings(), tmp_path)
    parameter = next(run.model.parameters())
    parameter.register_hook(lambda grad: grad * math.inf)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    with pytest.raises(NonFiniteError, match=r"step 1 \(epoch 1, batch 1 of .*gradient norm nan"):
        run.fit()
    assert same(dict(run.model.state_dict()), before)


def test_parameters_that_blow_up_are_never_saved(tmp_path: Path) -> None:
    config = settings("digits")
    run = trainer(replace(config, optim=replace(config.optim, lr=1e30, batch_size=1000)), tmp_path)
    with pytest.raises(
        NonFiniteError, match=r"after step 1: on held-out data .* no checkpoint had been written yet"
    ):
        run.fit()
    assert not (tmp_path / CHECKPOINT).exists()


def test_the_weight_follows_training_steps_only(tmp_path: Path) -> None:
    run = trainer(settings(beta=2.0, anneal_epochs=2.0), tmp_path)
    steps = len(run.batches)
    assert run.anneal_steps == 2 * steps
    seen: list[float] = []
    forward = run.elbo.forward

    def watched(*arguments: Any) -> Any:
        seen.append(run.schedule.value.item())
        return forward(*arguments)

    run.elbo.forward = watched  # type: ignore[method-assign]
    run.fit()  # evaluates after each of its three epochs
    assert seen == pytest.approx([2.0 * min(1.0, t / (2 * steps)) for t in range(3 * steps)])
    assert run.schedule.state_dict() == {"steps": 3 * steps}


def test_evaluation_is_at_weight_one_unclamped_and_touches_nothing(tmp_path: Path) -> None:
    run = trainer(settings(beta=3.0, free_bits=5.0, anneal_epochs=9.0), tmp_path)
    states = torch.get_rng_state(), run.noise.get_state(), run.schedule.state_dict()
    run.model.train()
    first = evaluate(run.model, run.data.heldout)
    assert run.model.training
    assert same(states, (torch.get_rng_state(), run.noise.get_state(), run.schedule.state_dict()))
    assert first == evaluate(run.model, run.data.heldout)
    assert first.nelbo == first.nll + first.rate
    assert first.rate == pytest.approx(sum(first.rate_per_dim), rel=1e-5)
    assert first.rate < 1.0, "the rate is the one before the floor of 5 nats a dimension"
    mu, logvar = run.model.encode(run.data.heldout)
    expected = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).mean(dim=0)
    torch.testing.assert_close(torch.tensor(first.rate_per_dim), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("clamp", ["batch", "sample"])
@pytest.mark.parametrize("group", ["dim", "all"])
def test_the_loss_is_nll_plus_the_clamped_kl(clamp: str, group: str) -> None:
    torch.manual_seed(0)
    data = datasets.load(DataConfig("docstrings"), lambda text: None)
    model = build(settings().model, data)
    x = data.train[:32]
    mu, logvar = model.encode(x)
    kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar)
    cells = kl if group == "dim" else kl.sum(dim=1, keepdim=True)
    floor = 1.05 * cells.mean().item()  # some groups above it, some below
    if clamp == "batch":
        expected = cells.mean(dim=0).clamp(min=floor).sum()
    else:
        expected = cells.clamp(min=floor).sum(dim=1).mean()
    objective = settings(free_bits=floor, clamp=clamp, group=group).objective
    terms = ELBO(model, objective)(x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(terms.kl, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(terms.rate, kl.sum(dim=1).mean(), rtol=1e-4, atol=1e-6)
    assert expected > terms.rate


@pytest.mark.parametrize("name", ["docstrings", "digits"])
def test_log_likelihood_is_a_log_probability(name: str) -> None:
    """It sums to one over everything the decoder can say (sentences of one word; images of four pixels)."""
    torch.manual_seed(0)
    model: VAE
    if name == "docstrings":
        model = GRUTextVAE(6, latent_dim=2, hidden=4, embedding=3)
        # Over first tokens: every one but the last is followed by EOS, which the second factor sums over.
        x = torch.tensor([[token, end] for token in range(1, 6) for end in range(1, 6)])
        with torch.no_grad():
            model.to_logits.bias[0] = -1e9  # PAD is no target
    else:
        model = build(
            ModelConfig(latent_dim=2, hidden=4), Images("i", torch.zeros(1, 4), torch.zeros(1, 4), "", (2, 2))
        )
        x = torch.tensor([[float(i >> bit & 1) for bit in range(4)] for i in range(16)])
    z = torch.randn(1, 2).expand(len(x), 2)
    assert model.log_likelihood(x, z).exp().sum().item() == pytest.approx(1.0, rel=1e-5)


def test_padding_changes_neither_posterior_nor_likelihood() -> None:
    data = datasets.load(DataConfig("docstrings"), lambda text: None)
    model = build(ModelConfig(latent_dim=3, hidden=8, embedding=4), data)
    row = data.train[int(data.lengths(data.train).argmin())]
    cut = row[: int((row != 0).sum())]
    assert len(cut) < len(row)
    z = torch.randn(1, 3)
    torch.testing.assert_close(model.encode(row[None]), model.encode(cut[None]))
    torch.testing.assert_close(model.log_likelihood(row[None], z), model.log_likelihood(cut[None], z))


def test_greedy_decoding_takes_the_likeliest_and_ends() -> None:
    torch.manual_seed(0)
    model = GRUTextVAE(9, latent_dim=2, hidden=8, embedding=4)
    z = 5 * torch.randn(50, 2)
    tokens = model.greedy(z, length=12)
    assert tokens.shape[0] == 50 and tokens.shape[1] <= 12
    alternatives = torch.arange(2, 9)[:, None]  # PAD and BOS are never said
    likelihood = model.log_likelihood(alternatives, z[:1].expand(len(alternatives), 2))
    assert alternatives[likelihood.argmax()].item() == tokens[0, 0].item()
    ended = (tokens == 2).cumsum(dim=1) - (tokens == 2).long() > 0
    assert ended.any() and not ended[:, -1].all(), "some sentences end before others"
    assert ((tokens == 0) == ended).all(), "PAD after EOS and nowhere else"
    with torch.no_grad():
        model.to_logits.bias[2] = 1e3  # EOS at once
    assert model.greedy(z).tolist() == [[2]] * 50


# --- configuration


def test_config_survives_its_file(tmp_path: Path) -> None:
    config = settings(free_bits=0.25, clamp="sample", group="all")
    (tmp_path / CONFIG).write_text(configs.to_json(config))
    assert configs.load(tmp_path / CONFIG) == config


@pytest.mark.parametrize(
    ("table", "values", "message"),
    [
        ("objective", {"beta": -1}, "beta must be at least 0, got -1"),
        ("objective", {"beta": math.nan}, "beta must be finite, got nan"),
        ("objective", {"clamp": "row"}, "clamp must be one of batch, sample; got 'row'"),
        ("objective", {"free_bits": "much"}, "free_bits must be of type float, got 'much'"),
        ("objective", {"gamma": 1}, "unknown setting objective.gamma; known here: beta, anneal_epochs"),
        ("optim", {"lr": 0}, "lr must be greater than 0, got 0"),
        ("optim", {"epochs": True}, "epochs must be of type int, got True"),
        ("engine", {"seed": 2**32}, "seed must be at most 4294967295"),
        ("engine", {"device": "tpu"}, "device must be one of auto, cpu, cuda, mps; got 'tpu'"),
        ("model", [], "model. must be a table of settings"),
    ],
)
def test_bad_settings_in_a_file_are_named(table: str, values: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / CONFIG
    path.write_text(json.dumps({"data": {"name": "digits"}, table: values}))
    with pytest.raises(ConfigError) as raised:
        configs.load(path)
    assert str(path) in str(raised.value) and message in str(raised.value)
