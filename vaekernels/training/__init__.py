"""The reference trainer: settings, data, models, the loop, held-out evaluation. Needs vaekernels[train].

::

    from pathlib import Path
    from rich.console import Console
    from vaekernels.training import Trainer, data, open_run
    from vaekernels.training.config import presets

    config = presets.find("digits")  # a Config
    Trainer(config, data.load(config.data, print), Path("runs/digits"), Console()).fit()
    model = open_run("runs/digits").model
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vaekernels.training.config import Config
    from vaekernels.training.run import open_run
    from vaekernels.training.trainer import Trainer

__all__ = ["Config", "Trainer", "open_run"]

# Imported when asked for: what needs one module of the trainer does not wait for all of them.
_HOMES = {"Config": "config", "Trainer": "trainer", "open_run": "run"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
