"""A trained model put to use: examples to codes and back, in the units of the user's data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from vaekernels import ops
from vaekernels.training.data import Arrays, Data, Text
from vaekernels.training.data.base import encode_sentences
from vaekernels.training.data.text import tokenize
from vaekernels.training.errors import InputError
from vaekernels.training.models import VAE

__all__ = ["Codec", "Codes", "Decoded"]

Decoded: TypeAlias = "list[str] | Tensor"
"""Sentences, or images and vectors [N, *shape], float32 on the CPU."""

_BATCH = 256
_SHORTEST = 24  # tokens at most of a decoded sentence, where the training data have no longer ones


class Codes(NamedTuple):
    """q(z|x) = N(mu, diag exp(logvar)) of N examples: [N, D] each, float32 on the CPU."""

    mu: Tensor
    logvar: Tensor

    @property
    def rate(self) -> Tensor:
        """KL(q(z_d|x) || N(0, 1)) of every example and dimension, nats, [N, D]."""
        each = (part.reshape(-1, 1) for part in self)
        return ops.gaussian_kl(*each, reduction="none").view_as(self.mu)


@dataclass(frozen=True)
class Codec:
    """``like``: the data set that ``model`` was trained on, for what its examples are: their shape and
    levels, or the vocabulary."""

    model: VAE
    like: Data
    device: torch.device

    def encode(self, x: Any) -> Codes:
        """Text: a sentence or a list of them. Arrays: one example or N of them along the first axis, a tensor
        or what NumPy takes for an array. Images may have their channels first, last or, if grey, no such
        axis. Whole numbers are levels as in the data set; real numbers are in [0, 1] where the data have
        levels, in the units of the data where they have none. InputError for anything else."""
        examples = self.examples(x)
        found = [self._moments(part) for part in torch.split(examples, _BATCH)]
        mu, logvar = (torch.cat(parts) for parts in zip(*found, strict=True))
        return Codes(mu, logvar)

    def decode(self, z: Any) -> Decoded:
        """``z``: [N, D] or one code [D], or :class:`Codes`, of which mu is taken. Sentences are greedy
        decodings. Images and vectors are the expected data: in [0, 1] where the data have levels, else in
        their own units. InputError for another shape, NaN or inf."""
        codes = self._codes(z)
        found = [self._generated(part) for part in torch.split(codes, _BATCH)]
        if isinstance(self.like, Text):
            return [self.like.sentence(row) for part in found for row in part]
        decoded = torch.cat(found).float()
        assert isinstance(self.like, Arrays)
        return decoded if self.like.levels is None else decoded.clamp(0, 1)

    def sample(self, n: int = 20, *, temperature: float = 1.0, seed: int = 0) -> Decoded:
        """Decodes ``n`` z ~ N(0, temperature² I). The same seed gives the same z."""
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise InputError(f"n must be an integer of at least 1, got {n!r}")
        if not 0 <= temperature < math.inf:
            raise InputError(f"temperature must be finite and at least 0, got {temperature!r}")
        generator = torch.Generator().manual_seed(seed)
        return self.decode(temperature * torch.randn(n, self.model.latent_dim, generator=generator))

    def interpolate(self, a: Any, b: Any, *, steps: int = 7) -> Decoded:
        """Decodes ``steps`` codes on the straight line from the mu of ``a`` to that of ``b``, the ends
        included. ``a``, ``b``: one example each, as :meth:`encode` takes it, or one :class:`Codes`."""
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
            raise InputError(f"steps must be an integer of at least 2, got {steps!r}")
        ends = [(each if isinstance(each, Codes) else self.encode(each)).mu for each in (a, b)]
        for name, end in zip("ab", ends, strict=True):
            if len(end) != 1:
                raise InputError(f"{name} must be one example, got {len(end)}")
        return self.decode(torch.lerp(ends[0], ends[1], torch.linspace(0, 1, steps).unsqueeze(1)))

    def traverse(self, dim: int, values: Sequence[float], *, z: Any = None) -> Decoded:
        """Decodes one code once for each of ``values``, which takes the place of its element ``dim``.
        ``z``: the code, the prior's mean unless given."""
        dims = self.model.latent_dim
        if isinstance(dim, bool) or not isinstance(dim, int) or not 0 <= dim < dims:
            raise InputError(f"dim must be one of 0 to {dims - 1}, got {dim!r}")
        code = self._codes(torch.zeros(dims) if z is None else z)
        if len(code) != 1:
            raise InputError(f"z must be one code, got {len(code)}")
        codes = code.repeat(len(values), 1)
        codes[:, dim] = torch.tensor(values)
        return self.decode(codes)

    def unknown(self, sentence: str) -> list[str]:
        """The words of ``sentence`` that are not in the vocabulary; none where the data are no text."""
        if not isinstance(self.like, Text):
            return []
        return [word for word in _words(self.like, sentence) if word not in self.like.vocabulary]

    @property
    def length(self) -> int:
        """Tokens at most of a decoded sentence, its end included."""
        return max(_SHORTEST, self.like.train.shape[1])

    def examples(self, x: Any) -> Tensor:
        """``x`` as the model takes it, see :meth:`encode`."""
        return self._sentences(x) if isinstance(self.like, Text) else self._arrays(x)

    def _sentences(self, x: Any) -> Tensor:
        assert isinstance(self.like, Text)
        if isinstance(x, Tensor):
            if x.dim() != 2 or x.dtype != torch.int64 or not len(x):
                raise InputError(f"x must be int64 tokens [N, T], got {x.dtype} {list(x.shape)}")
            return x
        sentences = [x] if isinstance(x, str) else list(x)
        if not sentences or not all(isinstance(each, str) for each in sentences):
            raise InputError(f"x must be a sentence or a list of sentences, got {x!r:.80}")
        words = [_words(self.like, each) for each in sentences]
        for number, each in enumerate(words):
            if not each:
                raise InputError(f"x must be sentences of at least one word, number {number} has none")
        return encode_sentences(words, self.like.vocabulary)

    def _arrays(self, x: Any) -> Tensor:
        like = self.like
        assert isinstance(like, Arrays)
        given = _tensor(x)
        if given.is_complex():
            raise InputError(f"x must be real or whole numbers, got {given.dtype}")
        rows = _in_rows(given, like.shape)
        if rows is None:
            raise InputError(f"x must be {_layouts(like.shape)}, got {list(given.shape)}")
        if not len(rows):
            raise InputError("x must be at least one example, got none")
        if rows.is_floating_point():
            rows = rows.float()
            if not bool(rows.isfinite().all()):
                raise InputError("x must be finite, got NaN, inf or a value beyond float32")
            if like.levels is None:
                return rows
            if rows.min() < -1e-6 or rows.max() > 1 + 1e-6:
                raise InputError(
                    f"x must be real numbers in [0, 1] or whole ones in 0 to {like.levels - 1}, got "
                    f"real ones from {rows.min().item():g} to {rows.max().item():g}"
                )
            return rows * (like.levels - 1)
        if like.levels is None:
            return rows.float()
        if int(rows.min()) < 0 or int(rows.max()) >= like.levels:
            raise InputError(
                f"x must be whole numbers in 0 to {like.levels - 1}, got some from {rows.min().item()} to "
                f"{rows.max().item()}"
            )
        return rows.to(torch.uint8)

    def _codes(self, z: Any) -> Tensor:
        dims = self.model.latent_dim
        codes = z.mu if isinstance(z, Codes) else _tensor(z)
        codes = codes.unsqueeze(0) if codes.dim() == 1 else codes
        if codes.dim() != 2 or codes.shape[1] != dims or not len(codes):
            raise InputError(f"z must be [N, {dims}] or [{dims}], got {list(codes.shape)}")
        codes = codes.float()
        if not bool(codes.isfinite().all()):
            raise InputError("z must be finite, got NaN, inf or a value beyond float32")
        return codes

    @torch.no_grad()
    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.model.encode(x.to(self.device))
        return mu.float().cpu(), logvar.float().cpu()

    @torch.no_grad()
    def _generated(self, z: Tensor) -> Tensor:
        more = {"length": self.length} if isinstance(self.like, Text) else {}
        generate: Callable[..., Tensor] = self.model.generate
        return generate(z.to(self.device), **more).cpu()


def _words(like: Text, sentence: str) -> list[str]:
    """As in the data set. Docstrings are lower case with punctuation on its own, written or not."""
    words = sentence.split()
    if like.name != "docstrings":
        return words
    return [part for word in words for part in ([word] if word in like.vocabulary else tokenize(word))]


def _tensor(x: Any) -> Tensor:
    if isinstance(x, Tensor):
        return x.detach().cpu()
    import numpy as np

    array = np.asarray(x)
    if array.dtype.kind not in "buif" or array.dtype.itemsize > 8:
        raise InputError(f"takes an array of numbers, got {array.dtype} of {list(array.shape)}")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))


def _in_rows(x: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """``x`` as [N, *shape]; None where it has another layout."""
    given = tuple(x.shape)
    if len(shape) == 3:
        channels, height, width = shape
        flat, last = (height, width), (height, width, channels)
        if channels == 1 and (given == flat or (given[1:] == flat and len(given) == 3)):
            return x.reshape(-1, *shape)
        if given[-3:] == last != shape and len(given) in (3, 4):
            return x.movedim(-1, -3).reshape(-1, *shape)
    return x.reshape(-1, *shape) if given == shape or given[1:] == shape else None


def _layouts(shape: tuple[int, ...]) -> str:
    numbers = ", ".join(map(str, shape))
    kind = "vectors" if len(shape) == 1 else "images"
    return f"{kind} [N, {numbers}] or one of them, [{numbers}]"
