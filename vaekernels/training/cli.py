"""The commands ``train`` and ``demo``."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from vaekernels.training import config as configs
from vaekernels.training import data as datasets
from vaekernels.training import demo as demos
from vaekernels.training import display
from vaekernels.training.config import Config
from vaekernels.training.errors import CheckpointError, ConfigError, DataError, Interrupted, TrainingError
from vaekernels.training.loop import CONFIG, Trainer

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

# May differ between a run and its resumption: they do not change which run it is.
_RESUMABLE = ("optim.epochs", "engine.device", "engine.threads")

_Float = float | None
_Int = int | None
_Str = str | None
_Path = Path | None

_Threads = Annotated[
    _Int, typer.Option(help="CPU threads of torch (default: torch's choice).", show_default=False)
]


@app.callback()
def _main() -> None:
    """Train VAEs whose latents stay alive."""


@app.command()
def train(
    dataset: Annotated[
        _Str, typer.Argument(help=f"One of: {', '.join(datasets.DATASETS)}.", show_default=False)
    ] = None,
    free_bits: Annotated[
        _Float,
        typer.Option(
            help="Nats per group below which the KL is pushed no further (default: off).", show_default=False
        ),
    ] = None,
    clamp: Annotated[
        _Str,
        typer.Option(
            help="Free bits after the mean over the batch or per sample: batch | sample (default: batch).",
            show_default=False,
        ),
    ] = None,
    group: Annotated[
        _Str,
        typer.Option(
            help="What one threshold covers: dim (each dimension) | all (their sum) (default: dim).",
            show_default=False,
        ),
    ] = None,
    beta: Annotated[_Float, typer.Option(help="Weight of the KL (default: 1).", show_default=False)] = None,
    anneal: Annotated[
        _Float,
        typer.Option(
            metavar="EPOCHS",
            help="Raise the weight linearly from 0 to beta over so many epochs, whole or not (default: 0).",
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[
        _Int, typer.Option(help="Passes over the data (default: 8; digits 60).", show_default=False)
    ] = None,
    batch_size: Annotated[
        _Int, typer.Option(help="Examples a step (default: 64).", show_default=False)
    ] = None,
    lr: Annotated[
        _Float, typer.Option(help="Adam's learning rate (default: 0.001).", show_default=False)
    ] = None,
    latent_dim: Annotated[
        _Int, typer.Option(help="Latent dimensions (default: 16; digits 8).", show_default=False)
    ] = None,
    seed: Annotated[
        _Int,
        typer.Option(help="Of parameters, noise and the order of the data (default: 0).", show_default=False),
    ] = None,
    run_dir: Annotated[
        _Path,
        typer.Option(
            "--run-dir",
            "--out",
            help="Where the run is kept (default: runs/DATASET-TIME).",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        _Path,
        typer.Option(
            metavar="RUN", help="Go on with the run in this directory, with its settings.", show_default=False
        ),
    ] = None,
    device: Annotated[
        _Str, typer.Option(help="auto | cpu | cuda | mps (default: auto).", show_default=False)
    ] = None,
    precision: Annotated[
        _Str, typer.Option(help="32-true | bf16-mixed (default: 32-true).", show_default=False)
    ] = None,
    threads: _Threads = None,
) -> None:
    """Train a VAE on DATASET and evaluate it on held-out data: is the latent used?"""
    with _reported():
        if resume is not None and run_dir is not None:
            raise ConfigError("--resume goes on in the directory of the run; leave out --run-dir")
        given: dict[str, dict[str, Any]] = {
            "data": {"name": dataset},
            "model": {"latent_dim": latent_dim},
            "objective": {
                "beta": beta,
                "anneal_epochs": anneal,
                "free_bits": free_bits,
                "clamp": clamp,
                "group": group,
            },
            "optim": {"epochs": epochs, "batch_size": batch_size, "lr": lr},
            "engine": {"seed": seed, "device": device, "precision": precision, "threads": threads},
        }
        settings = _new_settings(dataset, given) if resume is None else _resumed_settings(resume, given)
        directory = resume or run_dir or _default_run_dir(settings.data.name)
        console = Console()
        _set_threads(settings)
        data = datasets.load(settings.data, console.print)
        trainer = Trainer(settings, data, directory, console, resume=resume is not None)
        console.print(
            f"{data.name}: {len(data.train)} + {len(data.heldout)} held-out {data.described}", highlight=False
        )
        console.print(
            display.describe_objective(settings.objective, settings.model.latent_dim, trainer.anneal_steps),
            highlight=False,
        )
        evaluation = trainer.fit()
        for table in display.evaluation_tables(evaluation):
            console.print(table)
        console.print(f"all of it is in {directory}", highlight=False)


@app.command()
def demo(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(demos.DEMOS)}.")] = "docstrings",
    epochs: Annotated[
        _Int, typer.Option(help="Passes over the data (default: 8).", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of both runs.")] = 0,
    run_dir: Annotated[
        _Path,
        typer.Option(
            "--run-dir",
            "--out",
            help="Where the runs are kept (default: runs/demo-NAME-TIME).",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        int,
        typer.Option(help="CPU threads of torch. On a busy machine more than one slows it down."),
    ] = 1,
) -> None:
    """Show posterior collapse and its cure: two trainings side by side."""
    with _reported():
        if name not in demos.DEMOS:
            raise ConfigError(f"unknown demo {name!r}; known: {', '.join(demos.DEMOS)}")
        settings = configs.preset(name)
        optim = settings.optim if epochs is None else replace(settings.optim, epochs=epochs)
        settings = replace(settings, optim=optim, engine=replace(settings.engine, seed=seed, threads=threads))
        _set_threads(settings)
        demos.DEMOS[name](settings, run_dir or _default_run_dir(f"demo-{name}"), Console())


def _new_settings(dataset: str | None, given: dict[str, dict[str, Any]]) -> Config:
    if dataset is None:
        raise DataError(f"name a data set: {', '.join(datasets.DATASETS)}")
    datasets.check_known(dataset)
    return _changed(configs.preset(dataset), given)


def _resumed_settings(run: Path, given: dict[str, dict[str, Any]]) -> Config:
    if not (run / CONFIG).is_file():
        raise CheckpointError(f"no run in {run} (it has no {CONFIG}); --resume takes the directory of a run")
    saved = configs.load(run / CONFIG)
    settings = _changed(saved, given)
    changed = {
        key: values for key, values in configs.differences(saved, settings).items() if key not in _RESUMABLE
    }
    if changed:
        listed = ", ".join(f"{key} = {old!r}, not {new!r}" for key, (old, new) in changed.items())
        raise ConfigError(
            f"the run in {run} has {listed}; a resumed run keeps its settings, so start a new one"
        )
    return settings


def _changed(settings: Config, given: dict[str, dict[str, Any]]) -> Config:
    """``settings`` with those options that were given."""
    tables = {
        table: replace(
            getattr(settings, table), **{key: value for key, value in options.items() if value is not None}
        )
        for table, options in given.items()
    }
    return replace(settings, **tables)


def _default_run_dir(name: str) -> Path:
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _set_threads(settings: Config) -> None:
    if settings.engine.threads is not None:
        torch.set_num_threads(settings.engine.threads)


@contextmanager
def _reported() -> Iterator[None]:
    """Errors meant for the user in one line on standard error: status 2 for a wrong setting, 130 for Ctrl-C,
    else 1."""
    try:
        yield
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        raise typer.Exit(130) from None
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from error
