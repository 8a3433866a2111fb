"""What a trained model is given, examples and codes, as the tensors that it takes."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from vaekernels import ops
from vaekernels.training.data import Arrays, Data, Text
from vaekernels.training.data.base import encode_sentences, tokens_of
from vaekernels.training.data.text import tokenize
from vaekernels.training.errors import InputError

__all__ = ["Codes", "Decoded", "codes_of", "examples_of", "words_of"]

Decoded: TypeAlias = "list[str] | Tensor"
"""Sentences, or images and vectors [N, *shape], float32 on the CPU."""


class Codes(NamedTuple):
    """q(z|x) = N(mu, diag exp(logvar)) of N examples: [N, D] each, float32 on the CPU."""

    mu: Tensor
    logvar: Tensor

    @property
    def rate(self) -> Tensor:
        """KL(q(z_d|x) || N(0, 1)) of every example and dimension, nats, [N, D]."""
        each = (part.reshape(-1, 1) for part in self)
        return ops.gaussian_kl(*each, reduction="none").view_as(self.mu)


def examples_of(like: Data, x: Any) -> Tensor:
    """``x`` as a model of ``like`` takes it, see `use.Run.encode`. InputError for what it cannot take."""
    if isinstance(like, Text):
        return _sentences(like, x)
    assert isinstance(like, Arrays)
    return _arrays(like, x)


def codes_of(z: Any, dims: int) -> Tensor:
    """``z`` as float32 [N, dims]. InputError for another shape, NaN or inf."""
    codes = z.mu if isinstance(z, Codes) else _tensor(z)
    codes = codes.unsqueeze(0) if codes.dim() == 1 else codes
    if codes.dim() != 2 or codes.shape[1] != dims or not len(codes):
        raise InputError(f"z must be [N, {dims}] or [{dims}], got {list(codes.shape)}")
    codes = codes.float()
    if not bool(codes.isfinite().all()):
        raise InputError("z must be finite, got NaN, inf or a value beyond float32")
    return codes


def words_of(like: Text, sentence: str) -> list[str]:
    """The tokens, as in the data set. Docstrings are lower case with punctuation on its own, written or
    not."""
    words = tokens_of(sentence, like.unit)
    if like.name != "docstrings":
        return words
    return [part for word in words for part in ([word] if word in like.vocabulary else tokenize(word))]


def _sentences(like: Text, x: Any) -> Tensor:
    if isinstance(x, Tensor):
        if x.dim() != 2 or x.dtype != torch.int64 or not len(x):
            raise InputError(f"x must be int64 tokens [N, T], got {x.dtype} {list(x.shape)}")
        return x
    sentences = [x] if isinstance(x, str) else list(x)
    if not sentences or not all(isinstance(each, str) for each in sentences):
        raise InputError(f"x must be a sentence or a list of sentences, got {x!r:.80}")
    split = [words_of(like, each) for each in sentences]
    for number, each in enumerate(split):
        if not each:
            raise InputError(f"x must be sentences of at least one word, number {number} has none")
    return encode_sentences(split, like.vocabulary)


def _arrays(like: Arrays, x: Any) -> Tensor:
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
