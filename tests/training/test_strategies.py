"""What is trained when; and the same training on the fused ops and on eager code."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import eager_layer
import pytest

pytest.importorskip("lightning_fabric", reason="the trainer needs vaekernels[train]")
pytest.importorskip("rich", reason="the trainer needs vaekernels[train]")

import torch
from tiny_runs import (
    log_of,
    same,
    settings,
    tiny_data,  # noqa: F401 (the fixture)
    trainer,
)
from torch import Tensor

from vaekernels.training.progress import Step
from vaekernels.training.strategies import Aggressive, Part, Pretrained
from vaekernels.training.trainer import Trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::vaekernels.FallbackWarning"),
    pytest.mark.usefixtures("tiny_data"),
]


def parts(run: Trainer) -> dict[str, dict[str, Tensor]]:
    return {
        name: {key: value.clone() for key, value in getattr(run.model, name).state_dict().items()}
        for name in ("encoder", "decoder")
    }


# --- aggressive


class Script:
    """Stands for the losses of the encoder's own steps, and keeps which steps were taken."""

    def __init__(self, run: Trainer, losses: list[float]) -> None:
        self.taken: list[Part] = []
        self._update, self._losses = run.update, iter(losses)
        run.update = self  # type: ignore[method-assign,assignment]

    def __call__(self, batch: Tensor, trained: Part) -> Step:
        self.taken.append(trained)
        step = self._update(batch, trained)
        return step._replace(loss=next(self._losses)) if trained == "encoder" else step


def aggressive(path: Path, **strategy: Any) -> tuple[Trainer, Aggressive]:
    given = " ".join(["strategy.aggressive=true", *(f"strategy.{k}={v}" for k, v in strategy.items())])
    run = trainer(settings("digits", given), path)
    assert isinstance(run.strategy, Aggressive)
    return run, run.strategy


@pytest.mark.parametrize(
    ("losses", "steps"),
    [
        ([5, 5, 5, 5], 4),  # the second mean is not below the first
        ([5, 5, 4, 4, 3, 3, 4, 4], 8),  # falls twice, then rises
        ([5, 3, 3, 5], 4),  # means over two: 4, 4
        ([9 - n for n in range(20)], 10),  # falls to the end: at most inner_steps
    ],
)
def test_the_encoder_steps_until_its_mean_loss_no_longer_falls(
    losses: list[float], steps: int, tmp_path: Path
) -> None:
    run, strategy = aggressive(tmp_path, inner_steps=10, check_every=2)
    script = Script(run, losses)
    strategy.before_step(run.update, run.batches)
    assert script.taken == ["encoder"] * steps
    assert strategy.state_dict()["drawn"] == steps


def test_encoder_and_decoder_move_in_their_own_steps_only(tmp_path: Path) -> None:
    run, strategy = aggressive(tmp_path)
    batch = run.batches.order(0)[0]
    start = parts(run)
    run.update(batch, "encoder")
    after_encoder = parts(run)
    assert same(after_encoder["decoder"], start["decoder"])
    assert not same(after_encoder["encoder"], start["encoder"])
    assert strategy.trained == "decoder"
    run.update(batch, strategy.trained)
    after_decoder = parts(run)
    assert same(after_decoder["encoder"], after_encoder["encoder"])
    assert not same(after_decoder["decoder"], after_encoder["decoder"])
    # Adam's averages of a part count the steps of that part
    steps = {float(state["step"]) for state in run.optimizer.optimizer.state.values()}
    assert steps == {1.0}
    strategy.burning_in = False
    run.update(batch, strategy.trained)
    both = parts(run)
    assert not same(both["encoder"], after_decoder["encoder"])
    assert not same(both["decoder"], after_decoder["decoder"])


def test_schedules_count_the_decoders_steps(tmp_path: Path) -> None:
    given = "strategy.aggressive=true strategy.inner_steps=6 strategy.check_every=3 optim.epochs=1"
    run = trainer(settings("digits", given, anneal="linear", anneal_epochs=1.0), tmp_path)
    script = Script(run, [1.0] * 10_000)
    run.fit()
    assert script.taken.count("decoder") == len(run.batches)
    assert script.taken.count("encoder") == 6 * len(run.batches), "two equal means of three, every time"
    assert run.objective.state_dict()["weight"] == {"steps": len(run.batches)}


def test_burning_in_ends_when_the_information_on_held_out_data_falls(tmp_path: Path) -> None:
    run, strategy = aggressive(tmp_path)
    said = []
    for value, still in ((0.5, True), (0.7, True), (0.7, True), (0.69, False), (3.0, False)):
        said.append(strategy.end_epoch(value))
        assert strategy.burning_in is still
    ends = "aggressive training ends: the mutual information fell to 0.69 nats"
    assert said == [None, None, None, ends, None]
    assert strategy.trained == "all"
    script = Script(run, [])
    strategy.before_step(run.update, run.batches)
    assert script.taken == []
    other = trainer(settings("digits", "strategy.aggressive=true"), tmp_path / "other").strategy
    other.load_state_dict(strategy.state_dict())
    assert other.state_dict() == strategy.state_dict()


def test_information_that_is_not_finite_does_not_end_burning_in_and_is_counted(tmp_path: Path) -> None:
    _, strategy = aggressive(tmp_path)
    for value, still in ((0.5, True), (math.nan, True), (math.inf, True), (0.6, True), (0.4, False)):
        said = strategy.end_epoch(value)
        assert strategy.burning_in is still
        assert math.isfinite(value) or (said is not None and f"information is {value}: ignored" in said)
    assert strategy.ignored == strategy.state_dict()["ignored"] == 2
    other = trainer(settings("digits", "strategy.aggressive=true"), tmp_path / "other").strategy
    other.load_state_dict(strategy.state_dict())
    assert other.state_dict() == strategy.state_dict()


# --- pretrained


def test_after_pretraining_the_decoder_is_new_the_encoder_stays_and_the_schedules_begin(
    tmp_path: Path,
) -> None:
    given = "strategy.pretrain_epochs=1 engine.log_steps=1"
    run = trainer(settings("digits", given, anneal="linear", anneal_epochs=1.0, free_bits=0.1), tmp_path)
    assert isinstance(run.strategy, Pretrained)
    before: list[Any] = []
    after: list[Any] = []
    start = run.strategy.start_epoch

    def watched(*given: Any) -> str | None:
        before.append((parts(run), len(run.optimizer.optimizer.state)))
        said = start(*given)
        after.append((parts(run), len(run.optimizer.optimizer.state)))
        return said

    run.strategy.start_epoch = watched  # type: ignore[method-assign]
    run.fit()
    assert same(before[0], after[0]) and same(before[2], after[2]), "only where the second stage begins"
    (old, states), (new, left) = before[1], after[1]
    assert same(old["encoder"], new["encoder"])
    for name, value in new["decoder"].items():
        assert not torch.equal(value, old["decoder"][name]), name
    assert (states, left) == (8, 4), "the decoder's averages are forgotten"
    assert "the encoder is pretrained: the decoder starts anew" in run.console.file.getvalue()  # type: ignore[attr-defined]

    steps = len(run.batches)
    weights = [line["weight"] for line in log_of(tmp_path) if line["kind"] == "step"]
    assert weights[:steps] == [0.0] * steps
    assert weights[steps:] == pytest.approx([min(1.0, t / steps) for t in range(2 * steps)])
    losses = [(line["loss"], line["nll"]) for line in log_of(tmp_path) if line["kind"] == "step"]
    assert all(loss == nll for loss, nll in losses[:steps])


# --- the fused ops against eager code


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("docstrings", "objective.free_bits=0.02"),
        ("docstrings", "objective.free_bits=0.1 objective.group=all objective.clamp=sample"),
        ("digits", "objective.pi_target=0.5 objective.pi_ki=0.05"),
        ("digits", "model.kind=ladder objective.free_bits=0.05"),
    ],
)
def test_fused_and_eager_training_take_the_same_course(
    name: str, given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(name, f"{given} engine.log_steps=1")
    trainer(config, tmp_path / "fused").fit()
    run = trainer(config, tmp_path / "eager")
    monkeypatch.setattr("vaekernels.ops.sample_kl_packed", eager_layer.sample_kl_packed)
    run.fit()
    fused, eager = log_of(tmp_path / "fused"), log_of(tmp_path / "eager")
    assert len(fused) == len(eager) > 40
    bound = False
    for mine, theirs in zip(fused, eager, strict=True):
        if mine["kind"] == "step":
            bound |= mine["kl"] > mine["rate"] * 1.01
            for value in ("loss", "nll", "rate", "kl", "weight"):
                # rounding, grown over up to 42 steps of Adam; 1e-6 absolute: eager's KL near collapse
                assert mine[value] == pytest.approx(theirs[value], rel=1e-3, abs=1e-6), (mine["step"], value)
    assert bound == ("free_bits" in given), "the floors bind"
    last = fused[-1]["heldout"]["nelbo"], eager[-1]["heldout"]["nelbo"]
    assert last[0] == pytest.approx(last[1], rel=1e-4) and math.isfinite(last[0])
