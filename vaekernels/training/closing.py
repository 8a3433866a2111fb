"""What to say at the end of a training run: is the latent used, and what to do now, as commands."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from vaekernels.collapse import Reading
from vaekernels.collapse.verdict import EPS_GLOBAL
from vaekernels.training.config import Config
from vaekernels.training.config.combinations import SET_THE_WEIGHT

__all__ = ["lines"]

_FALLS = 0.02  # of sigma, in the last epoch: a run of which less is left has settled
_GROWS = 1.1  # times, of the information in the last epoch
_LEARNS = 0.03  # of all that the NLL fell since the first epoch, and half a nat, in the last one
_LEAST_NATS = 0.5


def lines(readings: Sequence[Reading], sigmas: Sequence[float], config: Config, folder: Path) -> list[str]:
    """One line with the verdict, then commands. ``readings``: of the monitor, the last one that of the
    finished model; ``sigmas``: the learned standard deviation of a Gaussian likelihood before and after the
    last epoch, empty where there is none."""
    readings = list({reading.step: reading for reading in readings}.values())  # a finished run is read again
    last = readings[-1]
    where = shlex.quote(str(folder))
    told = f"I(x;z) {last.mi_lower} nats or more, another example's z costs {last.shuffle_gap} nats"
    longer = f"vaekernels train --resume {where} --epochs {2 * config.optim.epochs}"
    commands = [f"vaekernels diagnose {where}"]
    growing = len(readings) > 1 and last.mi_lower.value > _GROWS * max(readings[-2].mi_lower.value, 0.02)
    gap = last.shuffle_gap
    if len(sigmas) == 2 and sigmas[1] < (1 - _FALLS) * sigmas[0]:
        verdict = (
            f"still training: the learned sigma fell from {sigmas[0]:.3g} to {sigmas[1]:.3g} in the last "
            f"epoch, and how much of z is worth its rate depends on it"
        )
        commands.insert(0, longer)
    elif last.empty and not growing:
        verdict = "the latent is not used: changing z changes nothing"
        objective = config.objective
        if objective.free_bits is None and all(getattr(objective, name) is None for name in SET_THE_WEIGHT):
            settings = shlex.quote(str(folder / "config.toml"))
            commands.append(f"vaekernels train --config {settings} --free-bits 0.25")
    elif last.mi_lower.low >= EPS_GLOBAL and gap is not None and gap.low >= EPS_GLOBAL:
        verdict = "the latent is used"
    elif growing:
        verdict = "still training: what z tells of x grew in the last epoch"
        commands.insert(0, longer)
    else:
        verdict = "not clear whether the latent is used"
    fell = _fell(readings)
    if fell is not None and longer not in commands:
        verdict += f"; the model still learns, in the last epoch the held-out NLL fell by {fell:,.3g} nats"
        commands.insert(0, longer)
    return [f"{verdict}. {told}", *(f"  {command}" for command in commands)]


def _fell(readings: Sequence[Reading]) -> float | None:
    """By how much the NLL fell in the last epoch, where that is a lot: an own data set of a few hundred
    examples has 64 steps in the usual 8 epochs, and its codes are used long before anything can be seen in
    what is decoded."""
    nll = [reading.nll for reading in readings if reading.nll is not None]
    if len(nll) < 3:
        return None
    fell = nll[-2] - nll[-1]
    return fell if fell > max(_LEAST_NATS, _LEARNS * (nll[0] - nll[-1])) else None
