"""Posterior collapse and its cure, side by side, in a few minutes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vaekernels.training import data as datasets
from vaekernels.training.config import Config
from vaekernels.training.data import Text
from vaekernels.training.data.base import UNK
from vaekernels.training.evaluate import Evaluation
from vaekernels.training.loop import Trainer
from vaekernels.training.models import GRUTextVAE

__all__ = ["DEMOS", "Outcome", "conclusion", "docstrings"]

_FREE_BITS = 0.25
_PRIOR_SAMPLES = 200
_RECONSTRUCTIONS = 4
_USED = 0.1  # nats: a Δ_shuffle wholly below it is called unused, one wholly above it used


@dataclass(frozen=True)
class Outcome:
    title: str
    evaluation: Evaluation
    seconds: float
    reconstructions: list[str]
    samples: list[str]

    @property
    def distinct(self) -> int:
        return len(set(self.samples))

    @property
    def verdict(self) -> str:
        """Whether the decoder uses z, as far as the held-out interval can tell."""
        delta = self.evaluation.delta_shuffle
        if delta.high < _USED:
            return "ignored"
        return "used" if delta.low > _USED else "undecided"


def docstrings(settings: Config, run_dir: Path, console: Console) -> None:
    """Train the sentence VAE twice from the same start, at beta 1 without and with free bits, and compare."""
    data = datasets.load(settings.data, console.print)
    if not isinstance(data, Text):
        raise TypeError(f"the demo needs text, got {type(data).__name__}")
    console.print(
        f"{len(data.train)} {data.described}, {len(data.heldout)} more held out. Both runs start "
        f"from the same parameters and see the same batches.\n",
        highlight=False,
    )
    cure = replace(settings.objective, free_bits=_FREE_BITS, clamp="batch", group="dim")
    runs = {"beta 1": settings, f"free bits {_FREE_BITS:g}": replace(settings, objective=cure)}
    outcomes: list[Outcome] = []
    for number, (title, config) in enumerate(runs.items(), start=1):
        console.print(f"[bold]run {number} of {len(runs)}: {title}[/bold]", highlight=False)
        outcomes.append(_run(title, config, data, run_dir / title.replace(" ", "-"), console))
        console.print()
    before, after = outcomes
    console.print(_comparison(before, after, settings.model.latent_dim))
    console.print(_sentences(data, before, after))
    console.print(conclusion(before, after), highlight=False)
    console.print(f"\nBoth runs are kept in {run_dir}.", highlight=False)


DEMOS: dict[str, Callable[[Config, Path, Console], None]] = {"docstrings": docstrings}


def _run(title: str, config: Config, data: Text, run_dir: Path, console: Console) -> Outcome:
    trainer = Trainer(config, data, run_dir, console)
    evaluation = trainer.fit()
    model = cast(GRUTextVAE, trainer.model).eval()
    device = trainer.fabric.device
    with torch.no_grad():
        mu, _ = model.encode(_examples(data).to(device))
    noise = torch.randn(_PRIOR_SAMPLES, model.latent_dim, generator=torch.Generator().manual_seed(0)).to(
        device
    )
    return Outcome(
        title,
        evaluation,
        trainer.progress.seconds,
        [data.sentence(tokens) for tokens in model.greedy(mu)],
        [data.sentence(tokens) for tokens in model.greedy(noise)],
    )


def _examples(data: Text) -> Tensor:
    """The first held-out sentences, those made of known words only before others."""
    rows = sorted(data.heldout, key=lambda row: bool((row == UNK).any()))
    return torch.stack(rows[:_RECONSTRUCTIONS])


def _comparison(before: Outcome, after: Outcome, latent_dim: int) -> Table:
    table = Table(title="held-out data, nats per sentence", title_justify="left")
    table.add_column("")
    for outcome in (before, after):
        table.add_column(outcome.title, justify="right")

    def row(label: str, show: Callable[[Outcome], str]) -> None:
        table.add_row(label, show(before), show(after))

    row("rate (KL, unclamped)", lambda o: f"{o.evaluation.rate:.2f}")
    row(f"active units, of {latent_dim}", lambda o: str(o.evaluation.active_units))
    row("Δ_shuffle [95%]: NLL with another's z", lambda o: str(o.evaluation.delta_shuffle))
    row("NLL (reconstruction)", lambda o: f"{o.evaluation.nll:.2f}")
    row("NELBO (NLL + rate)", lambda o: f"{o.evaluation.nelbo:.2f}")
    row(f"distinct among {_PRIOR_SAMPLES} prior samples", lambda o: str(o.distinct))
    row("training time, s", lambda o: f"{o.seconds:.0f}")
    return table


def _sentences(data: Text, before: Outcome, after: Outcome) -> Table:
    table = Table(title="greedy decoding", title_justify="left", show_lines=True)
    table.add_column("held-out sentence")
    table.add_column(before.title)
    table.add_column(after.title)
    originals = [data.sentence(row) for row in _examples(data)]
    for original, first, second in zip(originals, before.reconstructions, after.reconstructions, strict=True):
        table.add_row(original, first, second)
    for i in range(_RECONSTRUCTIONS - 1):
        table.add_row("(a sample of the prior)", before.samples[i], after.samples[i])
    return table


def conclusion(before: Outcome, after: Outcome) -> str:
    """What was seen, from the figures of these two runs and no others."""
    told = {
        "ignored": "its decoder ignores z: swapping the codes of two sentences changes next to nothing",
        "used": "its decoder uses z: with another sentence's code the same sentence is explained worse",
        "undecided": "whether its decoder uses z is undecided by this much held-out data",
    }

    def one(o: Outcome) -> str:
        return (
            f"With {o.title} the encoder sends {o.evaluation.rate:.2f} nats and {told[o.verdict]} "
            f"(Δ_shuffle {o.evaluation.delta_shuffle}); {len(o.samples)} prior samples give {o.distinct} "
            f"distinct sentence{'' if o.distinct == 1 else 's'}."
        )

    cost = after.evaluation.nelbo - before.evaluation.nelbo
    if before.verdict == "ignored":
        opening = "The first model has collapsed. "
    else:
        opening = "The first model has not collapsed in this run. "
    if cost > 0:
        price = f"The cure costs likelihood: its NELBO is {cost:.2f} nats per sentence worse."
    else:
        price = f"The cure cost no likelihood here: its NELBO is {-cost:.2f} nats per sentence better."
    if after.verdict != "used":
        price = (
            f"Free bits have not cured it in this run. The NELBO changes by {cost:+.2f} nats per sentence."
        )
    return f"{opening}{one(before)} {one(after)} {price}"
