"""The last lines of a training run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("lightning_fabric", reason="the trainer needs vaekernels[train]")

from tiny_runs import (
    settings,
    tiny_data,  # noqa: F401 (the fixture)
    trainer,
)

from vaekernels.collapse import Reading
from vaekernels.collapse.estimate import Estimate
from vaekernels.training import closing
from vaekernels.training.config import Config

pytestmark = [
    pytest.mark.filterwarnings("ignore::vaekernels.FallbackWarning"),
    pytest.mark.usefixtures("tiny_data"),
]


def reading(information: float, gap: float, nll: float = 5.0) -> Reading:
    def near(value: float) -> Estimate:
        return Estimate(value, value - 0.02, value + 0.02)

    return Reading(9, (information,), 1, near(information), near(information), near(gap), nll, (1.0,))


def lines(*readings: Reading, sigmas: tuple[float, ...] = (), config: Config | None = None) -> list[str]:
    readings = tuple(replace(each, step=epoch) for epoch, each in enumerate(readings))
    return closing.lines(readings, sigmas, config or settings(), Path("runs/a b"))


def test_an_empty_latent_gets_a_command_against_it() -> None:
    found = lines(reading(0.0, 0.0), reading(0.01, 0.0))
    assert found[0].startswith("the latent is not used: changing z changes nothing. I(x;z) 0.01")
    assert found[1:] == [
        "  vaekernels diagnose 'runs/a b'",
        "  vaekernels train --config 'runs/a b/config.toml' --free-bits 0.25",
    ]
    assert len(lines(reading(0.0, 0.0), config=settings(free_bits=0.5))) == 2
    assert len(lines(reading(0.0, 0.0), config=settings(capacity=0.5))) == 2


def test_a_used_latent_and_one_that_is_not_clear() -> None:
    assert lines(reading(2.0, 3.0))[0].startswith("the latent is used. I(x;z) 2.00")
    assert lines(reading(0.11, 0.2), reading(0.11, 0.2))[0].startswith("not clear whether")
    assert lines(reading(0.02, 0.0), reading(0.08, 0.05))[0].startswith("still training: what z tells")


def test_a_falling_sigma_is_still_training() -> None:
    found = lines(reading(2.0, 3.0), sigmas=(0.5, 0.4))
    assert found[0].startswith("still training: the learned sigma fell from 0.5 to 0.4 in the last epoch")
    assert found[1] == "  vaekernels train --resume 'runs/a b' --epochs 6"
    assert lines(reading(2.0, 3.0), sigmas=(0.5, 0.495))[0].startswith("the latent is used")


@pytest.mark.parametrize(
    ("nll", "still"),
    [
        ((68137, 65511, 65264), True),  # photos after 64 steps
        ((19.4, 9.1, 8.4), True),
        ((19.4, 8.7, 8.4), False),
        ((68137, 65511, 65511), False),
        ((68137, 65511), False),
    ],
)
def test_a_model_that_still_learns_is_told_to_go_on(nll: tuple[float, ...], still: bool) -> None:
    found = lines(*(reading(2.0, 3.0, each) for each in nll))
    assert found[0].startswith("the latent is used")
    assert ("the model still learns" in found[0]) == still
    assert ("  vaekernels train --resume 'runs/a b' --epochs 6" in found) == still


def test_a_finished_run_that_is_read_again_is_told_the_same() -> None:
    first, second, last = (
        replace(reading(2.0, 3.0, nll), step=step) for step, nll in ((8, 60.0), (16, 50.0), (24, 45.0))
    )
    told = closing.lines([first, second, last], (), settings(), Path("run"))
    assert "the model still learns" in told[0]
    assert closing.lines([first, second, last, last], (), settings(), Path("run")) == told


def test_a_short_run_is_warned_of_collapse_and_told_so() -> None:
    run = trainer(settings("docstrings", "optim.epochs=6 optim.lr=1e-6", beta=50.0), Path("run"))
    run.fit()
    assert run.progress.step < 200 and run.monitor.collapsed_at is not None
    assert run.closing()[0].startswith("the latent is not used")


def test_a_learned_sigma_is_followed() -> None:
    run = trainer(settings("digits", "model.likelihood=gaussian optim.lr=0.01"), Path("run"))
    run.fit()
    assert len(run._sigmas) == 2 and run.closing()[0].startswith("still training: the learned sigma fell")
