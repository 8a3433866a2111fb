"""The diagnosis of a run: its model's two functions, and what the run knows besides, for the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vaekernels import collapse
from vaekernels.collapse import ACTIVE_THRESHOLD, Curve, Extras, Report, TextTable, strata
from vaekernels.collapse.decoder import Codes
from vaekernels.collapse.estimate import Bootstrap, along_cycle
from vaekernels.collapse.model import Model
from vaekernels.collapse.pairing import derangement
from vaekernels.collapse.verdict import FOUND_IN
from vaekernels.training import gallery, labels, logs, objectives, strategies
from vaekernels.training.data import Text
from vaekernels.training.errors import CheckpointError, InputError
from vaekernels.training.objectives import Task
from vaekernels.training.run import Run, open_run

__all__ = ["against", "curves", "diagnose", "extras", "grid", "save"]

_SAME = ("n", "k", "seed", "active_threshold", "condition")
"""Settings of two reports that are compared."""


def diagnose(
    run: Run,
    *,
    n: int = 2048,
    k: int = 32,
    seed: int = 0,
    active_threshold: float = ACTIVE_THRESHOLD,
    classes: str | None = None,
    condition: str | None = None,
    budget_s: float | None = None,
    train: bool = True,
    progress: bool = True,
) -> Report:
    """:func:`vaekernels.collapse.diagnose` of the model of ``run`` on its held-out data, and, with ``train``,
    on its training data as well. Inference is refined at the run's effective beta, 1 where it has none.

    ``classes``, ``condition``: labels of :func:`labels.find`. No model here is told the length or the class,
    so z may hold it, and ``condition`` is None unless asked for; where most of what z says is the length of
    the sentence, a reason of the report says so. InputError where there are no such labels, or too few
    examples of each."""
    task = Task.of(run.config, run.data, run.model.latent_dim)
    beta = objectives.build(run.config.objective, task).effective_beta
    given: object = None
    if condition is not None:
        of_train, of_heldout = labels.find(run.data, condition, run.config.data)
        given = (of_heldout, of_train) if train else of_heldout
    try:
        report = collapse.diagnose(
            run.model.encode,
            run.model.log_likelihood,
            run.data.heldout,
            train=run.data.train if train else None,
            condition=given,
            n=n,
            k=k,
            seed=seed,
            beta=1.0 if beta is None else beta,
            active_threshold=active_threshold,
            classes=None if classes is None else labels.find(run.data, classes, run.config.data)[1],
            device=run.device,
            budget_s=budget_s,
            progress=progress,
        )
    except ValueError as error:
        if condition is None or not str(error).startswith("condition "):
            raise
        raise InputError(f"--condition {condition}: {error}") from error
    told = {name: what for name, what in (("classes", classes), ("condition", condition)) if what}
    told |= _settings(run)
    skipped = {name: why for name, why in report.skipped.items() if name not in told}
    report = replace(report, settings=report.settings | told, skipped=skipped)
    if condition is None and budget_s is None and isinstance(run.data, Text) and report.verdict in FOUND_IN:
        report = _with_lengths(report, run, n, seed)
    return report


def _with_lengths(report: Report, run: Run, n: int, seed: int) -> Report:
    """``report`` and, where it is so, that most of what the decoder reads from z is the length of the
    sentence: less than half of what another example's z costs remains, significantly, where that example has
    the same length."""
    generator = torch.Generator().manual_seed(seed)
    x = run.data.heldout
    x = x[torch.randperm(len(x), generator=generator)[:n]]
    x = x[strata.order(run.data.lengths(x))]
    if len(x) < 2 * strata.LEAST:
        return report
    pairs = derangement(len(x), generator=generator)
    within = strata.derangement_within(run.data.lengths(x), generator)
    model = Model(run.model.encode, run.model.log_likelihood, device=run.device)
    codes = Codes.draw(*model.moments(x), generator)
    own = model.nll(x, codes.own)
    other, alike = (model.nll(x, partial(codes.shuffled, others)) for others in (pairs, within))
    any_length = along_cycle(other - own, pairs)
    same_length = along_cycle(alike - own, within)
    columns = torch.stack([any_length, same_length, any_length - 2 * same_length], dim=1)
    cost, left, more = Bootstrap(len(x), generator=generator).estimates(columns)
    if more.low <= 0:
        return report
    told = (
        f"of the {cost.show(2)} nats that another sentence's z costs, {left.show(2)} remain where it has the "
        f"same length: more than half of what z says is the length"
    )
    remedy = "what z says beside the length of the sentence: --condition length"
    return replace(report, reasons=[*report.reasons, told], advice=[*report.advice, remedy])


def against(report: Report, run: Path, other: Path, device: str | None) -> str:
    """``report`` of ``run`` beside that of the run in ``other``: its saved one where that was made with the
    same arguments at the present step, or one that is made now and not saved. CheckpointError if the two have
    other held-out data."""
    opened = open_run(other, lambda text: None, device=device)
    told = report.settings
    found = _saved(other, opened.step, told)
    if found is None:
        found = diagnose(
            opened,
            n=told["n"],
            k=told["k"],
            seed=told["seed"],
            active_threshold=told["active_threshold"],
            condition=told.get("condition"),
            train=False,
        )
    try:
        return report.against(found, (str(run), str(other)))
    except ValueError as error:
        raise CheckpointError(f"{run} and {other} cannot be compared: {error}") from error


def _saved(folder: Path, step: int, told: Mapping[str, Any]) -> Report | None:
    try:
        found = Report.load(folder)
    except (OSError, ValueError):
        return None
    same = all(found.settings.get(name) == told.get(name) for name in _SAME)
    return found if same and found.settings.get("steps") == step else None


def extras(run: Run) -> Extras:
    """Training curves, and what the model makes of its latent."""
    return Extras(curves=curves(run), **_shown(run))


def save(report: Report, folder: Path, more: Extras) -> Path:
    """Write report.json and report.html; returns the path of the page. CheckpointError if that fails."""
    try:
        return report.save(folder, more)
    except OSError as error:
        raise CheckpointError(f"cannot write the report into {folder}: {error.strerror}") from error


def curves(run: Run) -> dict[str, dict[str, Curve]]:
    """Rate, information, active units, weight and reconstruction over the steps, from the log of the run."""
    epochs = [line for line in logs.read(run.folder.log) if line["kind"] == "epoch"]
    if not epochs:
        return {}
    steps = [line["step"] for line in epochs]

    def line(pick: Callable[[dict[str, Any]], float]) -> Curve:
        return Curve(steps, [pick(each) for each in epochs])

    return {
        "rate, nats": {
            "train": line(lambda each: each["train"]["rate"]),
            "held out": line(lambda each: each["heldout"]["rate"]),
        },
        "I(x;z), lower bound, nats": {"held out": line(lambda each: each["heldout"]["mi_lower"]["value"])},
        "active units": {"held out": line(lambda each: each["heldout"]["active_units"])},
        "weight of the KL": {"weight": line(lambda each: each["weight"])},
        "reconstruction NLL, nats": {
            "train": line(lambda each: each["train"]["nll"]),
            "held out": line(lambda each: each["heldout"]["nll"]),
        },
    }


def _settings(run: Run) -> dict[str, Any]:
    config, data = run.config, run.data
    objective = config.objective
    task = Task.of(config, data, run.model.latent_dim)
    told = {
        "run": str(run.folder.path),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "data": data.name,
        "data_set_sha256": data.sha256,
        "model": f"{config.model.kind}, {config.model.likelihood} likelihood, {run.model.latent_dim} dims",
        "steps": run.step,
        "objective": strategies.describe(config, task),
        "beta": objective.beta,
        "effective_beta": objectives.build(objective, task).effective_beta,
        "free_bits": objective.free_bits,
    }
    if objective.free_bits is not None:
        told["free_bits_mode"] = f"{objective.clamp}, {objective.group}, {objective.penalty}"
    return told


def _shown(run: Run) -> dict[str, Any]:
    seen = gallery.look(run.model, run.data, run.device)
    if isinstance(seen, gallery.Sentences):
        rows = list(zip(seen.originals, seen.reconstructions, strict=True))
        return {
            "texts": {
                "What each dimension changes": TextTable(
                    ["dim", *(f"z_d = {value:g}" for value in gallery.REACHED)],
                    [[str(dim), *row] for dim, row in zip(seen.traversed, seen.traversals, strict=True)],
                ),
                "Reconstructions": TextTable(["held-out sentence", "decoded from its mu"], rows),
            },
            "interpolations": {
                f"from sentence {number} to sentence {number + len(seen.interpolations)}": line
                for number, line in enumerate(seen.interpolations, start=1)
            },
            "prior_samples": seen.samples,
        }
    if isinstance(seen, gallery.Images):
        return {
            "images": {
                "Held-out images above their reconstructions": torch.stack(
                    [seen.originals, seen.reconstructions]
                ),
                f"Samples of the prior, {seen.distinct} of {len(seen.samples)} distinct": grid(
                    seen.samples[:32], 8
                ),
                "Lines between the codes of two images": seen.interpolations,
                f"What each dimension changes: dims {_listed(seen.traversed)}, -2.5 to 2.5": seen.traversals,
            }
        }
    return {}


def grid(images: Tensor, columns: int) -> Tensor:
    """[rows, columns, ...] of the first full rows."""
    rows = len(images) // columns
    return images[: rows * columns].reshape(rows, columns, *images.shape[1:])


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
