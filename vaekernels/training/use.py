"""A trained model from Python: train one, open it, encode and decode with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from vaekernels.collapse import Report
from vaekernels.training import data as datasets
from vaekernels.training import diagnosis, display, run
from vaekernels.training.codec import Codec, Codes, Decoded
from vaekernels.training.config import Config, combinations, presets
from vaekernels.training.run import new_run_folder
from vaekernels.training.trainer import Trainer

__all__ = ["TRAVERSED", "Run", "open_run", "train"]

TRAVERSED = (-2.5, -1.5, -0.5, 0.5, 1.5, 2.5)
"""The values of a traversal, in standard deviations of the prior."""


class Run(run.Run):
    """A trained model with what it was trained on::

        run = vk.training.open_run("runs/s8")
        mu, logvar = run.encode(["a sentence of mine", "another one"])
        run.decode(mu)                    # text: sentences; else a tensor
        run.sample(20)

    Everything runs without gradients, 256 examples at a time, on ``device``; tensors come back on the CPU.
    ``model`` is the torch module in eval mode, ``config`` its settings, ``data`` its data set,
    ``folder.path`` where it lies.
    """

    def encode(self, x: Any) -> Codes:
        """mu and logvar of q(z|x), [N, D] each, and per example and dimension their ``rate``.

        ``x``: a sentence or a list of sentences; or an image or vector, or N of them along the first axis, as
        a tensor or a NumPy array. Images may have their channels first, last or, if grey, no such axis. Whole
        numbers are grey levels as in the data set. Real numbers are in [0, 1] where the data have levels, and
        else in the units of the data. Words outside the vocabulary become the unknown word. InputError (a
        ValueError) for what the model cannot take.
        """
        return self._codec.encode(x)

    def decode(self, z: Any) -> Decoded:
        """What the decoder makes of ``z``, [N, D] or [D]: sentences (greedy decoding), or the expected images
        or vectors, float32 [N, *shape], in [0, 1] where the data have levels. InputError for another shape,
        NaN or inf."""
        return self._codec.decode(z)

    def sample(self, n: int = 20, *, temperature: float = 1.0, seed: int = 0) -> Decoded:
        """:meth:`decode` of ``n`` z ~ N(0, temperature² I). The same ``seed`` gives the same z."""
        return self._codec.sample(n, temperature=temperature, seed=seed)

    def interpolate(self, a: Any, b: Any, *, steps: int = 7) -> Decoded:
        """:meth:`decode` of ``steps`` codes on the line from the mu of example ``a`` to that of ``b``. Where
        all of them are the same sentence or image, z changes nothing."""
        return self._codec.interpolate(a, b, steps=steps)

    def traverse(
        self, dim: int, values: Any = (-2.5, -1.5, -0.5, 0.5, 1.5, 2.5), *, z: Any = None
    ) -> Decoded:
        """:meth:`decode` of one code with each of ``values`` in the place of z_dim. ``z``: the code; 0, the
        mean of the prior, unless given."""
        return self._codec.traverse(dim, [float(value) for value in values], z=z)

    def unknown(self, sentence: str) -> list[str]:
        """The words of ``sentence`` that the model does not know; none where the data are no text."""
        return self._codec.unknown(sentence)

    def report(
        self, *, n: int = 2048, k: int = 32, seed: int = 0, train: bool = True, progress: bool = False
    ) -> Report:
        """The diagnosis of :func:`vaekernels.collapse.diagnose`, measured now on the data of the run;
        ``train``: on the training data as well. Writes nothing."""
        return diagnosis.diagnose(self, n=n, k=k, seed=seed, train=train, progress=progress)

    @property
    def length(self) -> int:
        """Tokens at most of a decoded sentence, its end included."""
        return self._codec.length

    @property
    def _codec(self) -> Codec:
        return Codec(self.model, self.data, self.device)


def open_run(path: Path | str, *, device: str | None = None, say: Callable[[str], None] = print) -> Run:
    """The run in the folder ``path`` as its last checkpoint has it. ``device``: "cpu", "cuda", "mps" or
    "auto"; None for that of the run. ``say`` is told, in a sentence, what takes long.

    CheckpointError if there is no run, or none that was trained on the data as they are here.
    """
    opened = run.open_run(path, say, device=device)
    return Run(**{field.name: getattr(opened, field.name) for field in fields(opened)})


def train(config: Config | str, *, out: Path | str | None = None, quiet: bool = False) -> Run:
    """Trains a VAE as ``vaekernels train`` does and returns the run, opened::

        config = vk.training.Config(DataConfig("text:slogans.txt"), objective=ObjectiveConfig(free_bits=0.25))
        run = vk.training.train(config, out="runs/slogans")

    ``config``: all settings, or the name of a preset or of data, as on the command line. ``out``: the folder
    of the run, runs/NAME-TIME unless given; one that holds a run is refused. ``quiet``: print nothing.

    ConfigError for settings that do not fit each other or the data, DataError for data that cannot be read,
    CheckpointError where the folder cannot be used, NonFiniteError for a loss that is NaN or inf.
    """
    chosen = presets.find(config) if isinstance(config, str) else config
    console = display.console(quiet=quiet)
    if chosen.engine.threads is not None:
        torch.set_num_threads(chosen.engine.threads)
    data = datasets.load(chosen.data, console.print)
    combinations.resolve(chosen, data)  # what it refuses leaves no empty folder
    folder = new_run_folder(chosen.data.name) if out is None else Path(out)
    Trainer(chosen, data, folder, console).fit()
    return open_run(folder, say=console.print)
