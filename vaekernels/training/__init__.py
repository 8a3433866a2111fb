"""The reference trainer: settings, data, models, the loop, held-out evaluation. Needs vaekernels[train].

::

    import vaekernels as vk

    run = vk.training.train("text:slogans.txt", out="runs/slogans")  # a Run; also a Config, or a preset
    run = vk.training.open_run("runs/slogans")
    mu, logvar = run.encode("a sentence of mine")
    run.decode(mu)
    run.sample(20)
    print(run.report())
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vaekernels.training.codec import Codes
    from vaekernels.training.config import Config
    from vaekernels.training.trainer import Trainer
    from vaekernels.training.use import Run, open_run, train

__all__ = ["Codes", "Config", "Run", "Trainer", "open_run", "train"]

# Imported when asked for: what needs one module of the trainer does not wait for all of them.
_HOMES = {
    "Codes": "codec",
    "Config": "config",
    "Run": "use",
    "Trainer": "trainer",
    "open_run": "use",
    "train": "use",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
