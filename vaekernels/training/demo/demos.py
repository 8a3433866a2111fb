"""The demos: which models are trained, one after the other; then their tables and their page."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from vaekernels.training.checkpoint import write_text
from vaekernels.training.demo import tables
from vaekernels.training.demo.outcome import Outcome, Variant, run

__all__ = ["DEMOS", "PAGE", "Part", "show"]

PAGE = "demo.html"


@dataclass(frozen=True)
class Part:
    """Models to compare; the first is the one that the others are compared with."""

    title: str
    variants: tuple[Variant, ...]


DEMOS: dict[str, tuple[Part, ...]] = {
    "docstrings": (
        Part(
            "A sentence VAE, collapsed and cured",
            (
                Variant("beta 1", "docstrings"),
                Variant(
                    "free bits + annealing",
                    "docstrings",
                    "objective.free_bits=0.25 objective.anneal=linear objective.anneal_epochs=4",
                ),
                Variant("one group", "docstrings", "objective.free_bits=4 objective.group=all"),
                Variant("PI controller", "docstrings", "objective.pi_target=4"),
            ),
        ),
    ),
    "digits": (
        Part(
            "Too aggressive KL weighting",
            (
                Variant("beta 6", "digits", "objective.beta=6 optim.epochs=100"),
                Variant(
                    "annealed to 6",
                    "digits",
                    "objective.beta=6 objective.anneal=linear optim.epochs=100",
                ),
                Variant(
                    "beta 6, free bits",
                    "digits",
                    "objective.beta=6 objective.free_bits=0.25 optim.epochs=100",
                ),
            ),
        ),
        Part(
            "Better ELBO, dead latents",
            (
                Variant("MLP", "digits", "data.binarize=threshold"),
                Variant("row-GRU, beta 2", "digits-row-gru", "data.binarize=threshold objective.beta=2"),
            ),
        ),
    ),
    "sprites": (
        Part(
            "The parts of the KL",
            (
                Variant("beta 1", "sprites"),
                Variant("beta 6", "sprites", "objective.beta=6"),
                Variant("total correlation 6", "sprites", "objective.tc_beta=6"),
                Variant("information free", "sprites", "objective.mi_weight=0"),
            ),
        ),
    ),
}


def _left(seconds: float, done: int, total: int) -> str:
    """About how long the models that are left take, if each takes as long as those that are done."""
    if not done:
        return ""
    left = seconds / done * (total - done)
    return f" (about {left:.0f} s left)" if left < 90 else f" (about {left / 60:.0f} minutes left)"


def show(name: str, over: Mapping[str, object], folder: Path, console: Console) -> list[list[Outcome]]:
    """Run a demo, print what came of it and write ``demo.html`` into ``folder``."""
    parts = DEMOS[name]
    total = sum(len(part.variants) for part in parts)
    outcomes: list[list[Outcome]] = []
    started = time.monotonic()
    for part in parts:
        found: list[Outcome] = []
        for variant in part.variants:
            number = sum(map(len, outcomes)) + len(found) + 1
            console.print(
                f"{number} of {total}: {variant.title}{_left(time.monotonic() - started, number - 1, total)}",
                style="bold",
                highlight=False,
            )
            found.append(run(variant, over, folder / variant.folder, console))
            console.print()
        outcomes.append(found)
    from vaekernels.training.demo import html  # matplotlib takes seconds to import

    titled = [(part.title, found) for part, found in zip(parts, outcomes, strict=True)]
    write_text(folder / PAGE, html.render(f"Posterior collapse and its cure: {name}", titled))
    for part, found in zip(parts, outcomes, strict=True):
        console.print(tables.table(part.title, found))
        if excerpt := tables.excerpt(found):
            console.print(excerpt)
        for line in tables.conclusions(found):
            console.print(f"- {line}", highlight=False)
        console.print()
    console.print(f"side by side, with pictures: {folder / PAGE}", highlight=False, soft_wrap=True)
    return outcomes
