"""What the user sees: the objective in words, one progress bar, a line per epoch, a table at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from rich.console import Console, JustifyMethod
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from vaekernels.training.evaluate import Evaluation

__all__ = ["Bar", "console", "epoch_line", "evaluation_tables", "price", "progress_bar"]

_DIMS_PER_ROW = (8, 16)  # at most, in 80 columns and in twice as many
_FILE_WIDTH = 100  # columns of a table in a file


def console(*, quiet: bool = False) -> Console:
    """Standard output. Text is printed as it is: what is printed holds names, paths and sentences of the
    user's, in which ``[red]`` or ``:smile:`` means nothing. In a file, which has no width, lines of text are
    not wrapped, unless COLUMNS is set."""
    made = Console(quiet=quiet, markup=False, emoji=False, highlight=False)
    if made.is_terminal or "COLUMNS" in os.environ:
        return made
    return Console(quiet=quiet, markup=False, emoji=False, highlight=False, width=_FILE_WIDTH, soft_wrap=True)


class Bar:
    """The bar of one training run."""

    def __init__(self, progress: Progress, *, epochs: int, steps: int, done: int) -> None:
        self._progress = progress
        self._epochs = epochs
        self._task = progress.add_task("", total=steps, completed=done, epoch=f"1/{epochs}", terms="")

    def update(self, *, epoch: int, step: int, rate: float, nll: float, weight: float) -> None:
        """``rate`` and ``nll`` are means over the epoch so far, in nats."""
        self._progress.update(
            self._task,
            completed=step,
            epoch=f"{epoch + 1}/{self._epochs}",
            terms=f"rate {rate:.2f} NLL {nll:.2f} weight {weight:.2f}",
        )


@contextmanager
def progress_bar(console: Console, *, epochs: int, steps: int, done: int) -> Iterator[Bar]:
    """A live bar on a terminal, nothing elsewhere (a log file gets the line per epoch)."""
    columns = (
        TextColumn("epoch {task.fields[epoch]}", markup=False),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("{task.fields[terms]}", markup=False),
        TimeRemainingColumn(compact=True),
    )
    with Progress(
        *columns, console=console, transient=True, refresh_per_second=4, disable=not console.is_terminal
    ) as progress:
        yield Bar(progress, epochs=epochs, steps=steps, done=done)


def epoch_line(epoch: int, epochs: int, weight: float, evaluation: Evaluation) -> str:
    """Held-out figures after an epoch, at most 80 columns."""
    return (
        f"epoch {epoch}/{epochs}  weight {weight:.2f}  held out: rate {evaluation.rate:.2f}  "
        f"NLL {evaluation.nll:.2f}  Δ_shuffle {evaluation.delta_shuffle.value:.2f}"
    )


def evaluation_tables(evaluation: Evaluation, width: int = 80) -> list[Table]:
    """All held-out figures: the totals, and rate and Var(mu) per dimension, as many in a row as fit into
    ``width`` columns."""
    dims = len(evaluation.rate_per_dim)
    totals = Table(
        title=f"held out, {evaluation.examples:,} examples, nats per example", title_justify="left"
    )
    totals.add_column("measure", overflow="fold")
    totals.add_column("value", justify="right", overflow="fold")
    totals.add_row("rate (KL, unclamped)", f"{evaluation.rate:,.2f}")
    totals.add_row("NLL (reconstruction)", f"{evaluation.nll:,.2f}")
    totals.add_row("NELBO (NLL + rate)", f"{evaluation.nelbo:,.2f}")
    totals.add_row("I(x;z), lower bound [95%]", str(evaluation.mi_lower))
    totals.add_row("active units, Var(mu) > 0.01", f"{evaluation.active_units} of {dims}")
    totals.add_row("Δ_shuffle [95%]: NLL with another's z", str(evaluation.delta_shuffle))

    rates = [f"{rate:.2f}" for rate in evaluation.rate_per_dim]
    variances = [f"{variance:.2f}" for variance in evaluation.mu_variance_per_dim]
    labels, names = len(f"dims {dims - 1}-{dims - 1}"), len("Var(mu)")
    cell = max(map(len, rates + variances)) + 3  # padding and a line
    fitting = (width - labels - names - 7) // cell
    columns = max(1, min(dims, fitting, _DIMS_PER_ROW[width >= 160]))
    per_dim = Table(title="per latent dimension", title_justify="left", show_header=False)
    for justify in ("right", "left", *["right"] * columns):
        per_dim.add_column(justify=cast(JustifyMethod, justify), no_wrap=True)
    for start in range(0, dims, columns):
        stop = min(start + columns, dims)
        label = f"dims {start}-{stop - 1}" if stop - start > 1 else f"dim {start}"
        per_dim.add_row(label, "rate", *rates[start:stop])
        per_dim.add_row("", "Var(mu)", *variances[start:stop], end_section=True)
    return [totals, per_dim]


def price(mi_seconds: float, seconds: float) -> str:
    """What the bound on I(x;z) of every evaluation has cost of the ``seconds`` of a run."""
    share = f"{100 * mi_seconds / max(seconds, mi_seconds, 1e-9):.1f} %"
    return f"the bound on I(x;z), after every epoch, took {mi_seconds:.2f} s of {seconds:.1f} s ({share})"
