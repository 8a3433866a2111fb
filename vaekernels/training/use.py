"""A trained model from Python: train one, open it, encode and decode with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vaekernels.collapse import ACTIVE_THRESHOLD, Report
from vaekernels.training import data as datasets
from vaekernels.training import diagnosis, display, engine, run
from vaekernels.training.codec import Codes, Decoded, codes_of, examples_of, words_of
from vaekernels.training.config import Config, combinations, presets
from vaekernels.training.data import Arrays, Text
from vaekernels.training.errors import InputError
from vaekernels.training.run import new_run_folder
from vaekernels.training.trainer import Trainer

__all__ = ["TRAVERSED", "Run", "open_run", "train"]

TRAVERSED = (-2.5, -1.5, -0.5, 0.5, 1.5, 2.5)
"""The values of a traversal, in standard deviations of the prior."""

_BATCH = 256
_SHORTEST = 24  # tokens at most of a decoded sentence, where the training data have no longer ones


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
        examples = examples_of(self.data, x)
        found = [self._moments(part) for part in torch.split(examples, _BATCH)]
        mu, logvar = (torch.cat(parts) for parts in zip(*found, strict=True))
        return Codes(mu, logvar)

    def decode(self, z: Any) -> Decoded:
        """What the decoder makes of ``z``, [N, D], [D] or :class:`Codes` (mu is taken): sentences (greedy
        decoding), or the expected images or vectors, float32 [N, *shape], in [0, 1] where the data have
        levels. InputError for another shape, NaN or inf."""
        codes = codes_of(z, self.model.latent_dim)
        found = [self._generated(part) for part in torch.split(codes, _BATCH)]
        if isinstance(self.data, Text):
            return [self.data.sentence(row) for part in found for row in part]
        decoded = torch.cat(found).float()
        assert isinstance(self.data, Arrays)
        return decoded if self.data.levels is None else decoded.clamp(0, 1)

    def sample(self, n: int = 20, *, temperature: float = 1.0, seed: int = 0) -> Decoded:
        """:meth:`decode` of ``n`` z ~ N(0, temperature² I). The same ``seed`` gives the same z."""
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise InputError(f"n must be an integer of at least 1, got {n!r}")
        if not 0 <= temperature < math.inf:
            raise InputError(f"temperature must be finite and at least 0, got {temperature!r}")
        generator = torch.Generator().manual_seed(seed)
        return self.decode(temperature * torch.randn(n, self.model.latent_dim, generator=generator))

    def interpolate(self, a: Any, b: Any, *, steps: int = 7) -> Decoded:
        """:meth:`decode` of ``steps`` codes on the line from the mu of ``a`` to that of ``b``, which are one
        example or one :class:`Codes` each. Where all of them are the same sentence or image, z changes
        nothing."""
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
            raise InputError(f"steps must be an integer of at least 2, got {steps!r}")
        ends = [(each if isinstance(each, Codes) else self.encode(each)).mu for each in (a, b)]
        for name, end in zip("ab", ends, strict=True):
            if len(end) != 1:
                raise InputError(f"{name} must be one example, got {len(end)}")
        return self.decode(torch.lerp(ends[0], ends[1], torch.linspace(0, 1, steps).unsqueeze(1)))

    def traverse(self, dim: int, values: Any = TRAVERSED, *, z: Any = None) -> Decoded:
        """:meth:`decode` of one code with each of ``values`` in the place of z_dim. ``z``: the code; 0, the
        mean of the prior, unless given."""
        dims = self.model.latent_dim
        if isinstance(dim, bool) or not isinstance(dim, int) or not 0 <= dim < dims:
            raise InputError(f"dim must be one of 0 to {dims - 1}, got {dim!r}")
        code = codes_of(torch.zeros(dims) if z is None else z, dims)
        if len(code) != 1:
            raise InputError(f"z must be one code, got {len(code)}")
        codes = code.repeat(len(values), 1)
        codes[:, dim] = torch.tensor([float(value) for value in values])
        return self.decode(codes)

    def unknown(self, sentence: str) -> list[str]:
        """The words of ``sentence`` that the model does not know; none where the data are no text."""
        if not isinstance(self.data, Text):
            return []
        return [word for word in words_of(self.data, sentence) if word not in self.data.vocabulary]

    def report(
        self,
        *,
        n: int = 2048,
        k: int = 32,
        seed: int = 0,
        active_threshold: float = ACTIVE_THRESHOLD,
        classes: str | None = None,
        condition: str | None = None,
        train: bool = True,
        progress: bool = False,
    ) -> Report:
        """The diagnosis of :func:`vaekernels.collapse.diagnose`, measured now on the data of the run;
        ``train``: on the training data as well. Writes nothing.

        ``classes``, ``condition``: the name of labels that the data have ("length" of text, "digit" of
        digits, the factors of sprites), or the path of a file of labels, a whole number for each example.
        DataError where the data or the file are missing, InputError where there are no such labels."""
        self.require_examples()
        return diagnosis.diagnose(
            self,
            n=n,
            k=k,
            seed=seed,
            active_threshold=active_threshold,
            classes=classes,
            condition=condition,
            train=train,
            progress=progress,
        )

    @property
    def length(self) -> int:
        """Tokens at most of a decoded sentence, its end included."""
        return max(_SHORTEST, self.data.train.shape[1])

    @torch.no_grad()
    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.model.encode(x.to(self.device))
        return mu.float().cpu(), logvar.float().cpu()

    @torch.no_grad()
    def _generated(self, z: Tensor) -> Tensor:
        more = {"length": self.length} if isinstance(self.data, Text) else {}
        generate: Callable[..., Tensor] = self.model.generate
        return generate(z.to(self.device), **more).cpu()


def open_run(path: Path | str, *, device: str | None = None, say: Callable[[str], None] = print) -> Run:
    """The run in the folder ``path`` as its last checkpoint has it. ``device``: "cpu", "cuda", "mps" or
    "auto"; None for that of the run. ``say`` is told, in a sentence, what takes long.

    The model can be used without the data of the run: where they cannot be read or are others, ``say`` is
    told, and ``data`` are without examples. CheckpointError if there is no run.
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
    engine.set_threads(chosen.engine)
    data = datasets.load(chosen.data, console.print)
    combinations.resolve(chosen, data)  # what it refuses leaves no empty folder
    folder = new_run_folder(chosen.data.name) if out is None else Path(out)
    Trainer(chosen, data, folder, console).fit()
    return open_run(folder, say=console.print)
