"""The commands ``train``, ``diagnose`` and ``demo``."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console

from vaekernels import collapse
from vaekernels._command import STOPPED
from vaekernels.training import commands, diagnosis, display, engine, objectives, strategies
from vaekernels.training import data as datasets
from vaekernels.training import demo as demos
from vaekernels.training.config import Config, DataConfig, EngineConfig, combinations, presets, settings
from vaekernels.training.data import Data
from vaekernels.training.errors import ConfigError, Interrupted, TrainingError, nearest
from vaekernels.training.run import RunFolder, new_run_folder, open_run
from vaekernels.training.trainer import Trainer

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

_Float = float | None
_Int = int | None
_Str = str | None
_Path = Path | None


def _default(table: str, name: str) -> str:
    """Of a setting, with the presets that have another one."""
    usual = getattr(getattr(Config(DataConfig("x")), table), name)
    told = [str(usual)]
    for preset, config in presets.PRESETS.items():
        value = getattr(getattr(config, table), name)
        if value != usual:
            told.append(f"{preset} {value}")
    return "; ".join([told[0], *([", ".join(told[1:])] if len(told) > 1 else [])])


_Threads = Annotated[
    _Int, typer.Option(help="CPU threads of torch (default: torch's choice).", show_default=False)
]


@app.callback()
def _main() -> None:
    """Train VAEs, with settings against posterior collapse."""


@app.command()
def train(
    preset: Annotated[
        _Str,
        typer.Argument(
            help=f"One of: {', '.join(presets.PRESETS)}; or your own data, as "
            f"{', '.join(f'{kind}:PATH' for kind in datasets.OWN)}.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        _Path, typer.Option(help="Settings from a TOML file; override those of PRESET.", show_default=False)
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="TABLE.KEY=VALUE",
            help="One setting; overrides all others. May be repeated.",
            show_default=False,
        ),
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
            help="What one threshold covers: dim (each dimension) | channel (of model.latent_channels) | all "
            "(their sum) (default: dim).",
            show_default=False,
        ),
    ] = None,
    beta: Annotated[_Float, typer.Option(help="Weight of the KL (default: 1).", show_default=False)] = None,
    anneal: Annotated[
        _Float,
        typer.Option(
            metavar="EPOCHS",
            help="Raise the weight linearly from 0 to beta over this many epochs, 0.5 is fine (default: 0).",
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[
        _Int,
        typer.Option(
            help=f"Passes over the data (default: {_default('optim', 'epochs')}).", show_default=False
        ),
    ] = None,
    batch_size: Annotated[
        _Int, typer.Option(help="Examples per step (default: 64).", show_default=False)
    ] = None,
    lr: Annotated[
        _Float, typer.Option(help="Adam's learning rate (default: 0.001).", show_default=False)
    ] = None,
    latent_dim: Annotated[
        _Int,
        typer.Option(
            help=f"Latent dimensions (default: {_default('model', 'latent_dim')}).", show_default=False
        ),
    ] = None,
    seed: Annotated[
        _Int,
        typer.Option(help="Seed of parameters, noise and data order (default: 0).", show_default=False),
    ] = None,
    run_dir: Annotated[
        _Path,
        typer.Option(
            "--run-dir",
            "--out",
            help="Where the run is kept (default: runs/PRESET-TIME).",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        _Path,
        typer.Option(
            metavar="RUN", help="Continue the run in this folder, with its settings.", show_default=False
        ),
    ] = None,
    device: Annotated[
        _Str, typer.Option(help="auto | cpu | cuda | mps (default: auto).", show_default=False)
    ] = None,
    devices: Annotated[
        _Int, typer.Option(help="Processes, one per device (default: 1).", show_default=False)
    ] = None,
    precision: Annotated[
        _Str, typer.Option(help="32-true | bf16-mixed (default: 32-true).", show_default=False)
    ] = None,
    threads: _Threads = None,
) -> None:
    """Train a VAE and evaluate it on held-out data: is the latent used?

    PRESET and --config are read first, then the options, then --set. All settings:
    `vaekernels settings`.
    """
    with _reported():
        if resume is not None and run_dir is not None:
            raise ConfigError("--resume goes on in the folder of the run; leave out --run-dir")
        options: dict[str, dict[str, Any]] = {
            "model": {"latent_dim": latent_dim},
            "objective": {"beta": beta, "free_bits": free_bits, "clamp": clamp, "group": group},
            "optim": {"epochs": epochs, "batch_size": batch_size, "lr": lr},
            "engine": {
                "seed": seed,
                "device": device,
                "devices": devices,
                "precision": precision,
                "threads": threads,
            },
        }
        given = {
            table: {key: value for key, value in values.items() if value is not None}
            for table, values in options.items()
        }
        if anneal:
            given["objective"] |= {"anneal": "linear", "anneal_epochs": anneal}
        base = _base(preset, config) if resume is None else _resumed(RunFolder(resume), preset, config)
        chosen = settings.changed(settings.changed(base, given), settings.parse_set(sets or ()))
        if resume is not None:
            RunFolder(resume).require_same(base, chosen)
        combinations.check(chosen)
        engine.set_threads(chosen.engine)
        fabric = engine.launch(chosen.engine)
        _train(chosen, fabric, resume, run_dir)
        engine.leave(fabric)


def _train(chosen: Config, fabric: Fabric, resume: Path | None, run_dir: Path | None) -> None:
    console = display.console(quiet=not fabric.is_global_zero)
    data = (
        datasets.load(chosen.data, console.print)
        if resume is None
        else RunFolder(resume).load_data(chosen, console.print)
    )
    combinations.resolve(chosen, data)  # what it refuses leaves no empty folder
    directory = resume or run_dir or engine.once(fabric, lambda: new_run_folder(chosen.data.name))
    trainer = Trainer(chosen, data, directory, console, resume=resume is not None, fabric=fabric)
    _announce(trainer, data, console)
    if trainer.finished:
        epochs = trainer.config.optim.epochs
        console.print(
            f"this run is finished: all {epochs} epochs are trained; to train longer, --epochs {2 * epochs}"
        )
    evaluation = trainer.fit()
    for table in display.evaluation_tables(evaluation, console.width):
        console.print(table)
    console.print(display.price(trainer.monitor.mi_seconds, trainer.progress.seconds))
    verdict, *advised = trainer.closing()
    console.print(verdict)
    for command in advised:  # to be copied, so not wrapped
        console.print(command, soft_wrap=True)
    console.print(f"all of it is in {directory}", soft_wrap=True)


@app.command()
def diagnose(
    run: commands.Newest = None,
    n: Annotated[int, typer.Option("-n", help="How many examples of each split are used.")] = 2048,
    k: Annotated[int, typer.Option("-k", help="Contrast codes of I_dec; samples of the IWAE bound.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of everything random in the diagnosis.")] = 0,
    budget: Annotated[
        _Float,
        typer.Option(
            metavar="SECONDS",
            help="Stop measuring after this time; n and k are lowered to fit (default: no limit).",
            show_default=False,
        ),
    ] = None,
    train: Annotated[
        bool, typer.Option("--train/--no-train", help="Measure on the training data too, to see overfitting.")
    ] = True,
    active_threshold: Annotated[
        float, typer.Option(help="Variance of mu from which a dimension is an active unit.")
    ] = collapse.ACTIVE_THRESHOLD,
    classes: Annotated[
        _Str,
        typer.Option(
            metavar="LABELS",
            help="Also print the measures of each class: length (of text), digit (of digits), a factor of "
            "sprites, or a file of labels, a whole number for each example.",
            show_default=False,
        ),
    ] = None,
    condition: Annotated[
        _Str,
        typer.Option(
            metavar="LABELS",
            help="Measure within the classes of these labels: what z says of the class does not count.",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        _Path,
        typer.Option(
            metavar="RUN",
            help="Also diagnose this run on the same data, and print paired differences.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        _Str, typer.Option(help="auto | cpu | cuda | mps (default: that of the run).", show_default=False)
    ] = None,
    threads: _Threads = None,
) -> None:
    """Is the latent of RUN used, and if not, why? Writes report.json and report.html into RUN."""
    with _reported():
        for name, value, least in (("-n", n, 4), ("-k", k, 2)):
            if value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
        if budget is not None and not budget > 0:
            raise ConfigError(f"--budget must be greater than 0, got {budget:g}")
        if not 0 <= active_threshold < math.inf:
            raise ConfigError(f"--active-threshold must be at least 0, got {active_threshold:g}")
        engine.set_threads(EngineConfig(threads=threads))
        run = commands.or_newest(run)
        opened = open_run(run, lambda text: print(text, file=sys.stderr), device=device)
        opened.require_examples()
        report = diagnosis.diagnose(
            opened,
            n=n,
            k=k,
            seed=seed,
            active_threshold=active_threshold,
            classes=classes,
            condition=condition,
            budget_s=budget,
            train=train,
        )
        try:
            page = diagnosis.save(report, run, diagnosis.extras(opened))
        finally:  # saved first, for standard output may be closed; printed even if it cannot be saved
            print(report)
        print(f"\nwith pictures: {page}")
        if against is not None:
            print()
            print(diagnosis.against(report, run, against, device))


@app.command()
def demo(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(demos.DEMOS)}.")] = "docstrings",
    epochs: Annotated[
        _Int, typer.Option(help="Passes over the data (default: 8; digits 60 and 100).", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of all runs.")] = 0,
    run_dir: Annotated[
        _Path,
        typer.Option(
            "--run-dir",
            "--out",
            help="Where the runs and the page are kept (default: runs/demo-NAME-TIME).",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        int,
        typer.Option(help="CPU threads of torch. On a busy machine more than one slows it down."),
    ] = 1,
) -> None:
    """Show posterior collapse and its cures: models trained, diagnosed and compared, in a few minutes."""
    with _reported():
        if name not in demos.DEMOS:
            raise ConfigError(f"unknown demo {name!r}; {nearest(name, demos.DEMOS)}")
        over: dict[str, dict[str, Any]] = {"engine": {"seed": seed, "threads": threads, "tensorboard": False}}
        if epochs is not None:
            over["optim"] = {"epochs": epochs}
        engine.set_threads(EngineConfig(seed=seed, threads=threads))
        demos.show(name, over, run_dir or new_run_folder(f"demo-{name}"), display.console())


def _announce(trainer: Trainer, data: Data, console: Console) -> None:
    config = trainer.config
    console.print(f"{data.name}: {len(data.train):,} + {len(data.heldout):,} held-out {data.described}")
    parameters = sum(p.numel() for p in trainer.model.parameters())
    console.print(f"{config.model.kind} VAE, {config.model.likelihood} likelihood, {parameters:,} parameters")
    for line in strategies.describe(config, trainer.task):
        console.print(line)
    if warning := objectives.build(config.objective, trainer.task).warning:
        console.print(warning, style="yellow")


def _base(preset: str | None, config: Path | None) -> Config:
    """The settings of the preset, with those of the file over them."""
    if preset is None and config is None:
        raise ConfigError(f"name a preset: {', '.join(presets.PRESETS)}; or your own data, or --config PATH")
    if preset is None:
        assert config is not None
        return settings.load(config)
    found = presets.find(preset)
    if config is None:
        return found
    tables = settings.read_toml(config)
    try:
        return settings.changed(found, tables)
    except ConfigError as error:
        raise ConfigError(f"{config}: {error}") from error


def _resumed(folder: RunFolder, preset: str | None, config: Path | None) -> Config:
    if preset is not None or config is not None:
        raise ConfigError("--resume takes the settings of the run; leave out the preset and --config")
    return folder.settings()


@contextmanager
def _reported() -> Iterator[None]:
    """Errors meant for the user in one line on standard error: status 2 for a wrong setting, 130 for Ctrl-C,
    else 1. Where there is too little memory it is torch's or Python's own error, of many lines."""
    try:
        yield
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        raise typer.Exit(STOPPED) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise typer.Exit(STOPPED) from None
    except (MemoryError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in reason:
            raise
        print(f"error: too little memory for this model and these data ({reason})", file=sys.stderr)
        raise typer.Exit(1) from error
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from error


def _in_one_line(command: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(command)
    def reported(*arguments: Any, **options: Any) -> None:
        with _reported():
            command(*arguments, **options)

    return reported


for _command in commands.COMMANDS:
    app.command()(_in_one_line(_command))
