"""What a data set is to the rest of the trainer, and what every loader needs: the split, the hash, and files
opened within a limit of size."""

from __future__ import annotations

import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

import torch
from torch import Tensor

from vaekernels._files import open_regular
from vaekernels.training.config import DataConfig
from vaekernels.training.errors import DataError

__all__ = [
    "BOS",
    "EOS",
    "FEWEST",
    "PAD",
    "SPECIALS",
    "UNK",
    "Arrays",
    "Data",
    "Factors",
    "Most",
    "Text",
    "Unit",
    "digest",
    "encode_sentences",
    "file_size",
    "opened",
    "split",
    "tokens_of",
    "without_examples",
]

PAD, BOS, EOS, UNK = range(4)
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")

_HELD_OUT_SHARE = 10  # one example in ten
FEWEST = 40  # examples: 4 held out, the fewest that a diagnosis can shuffle


Unit: TypeAlias = Literal["word", "char"]
"""What a token of a text is."""


@dataclass(frozen=True)
class Factors:
    """What the examples were made from, where that is known: float32 [N, factors], rows as in the data."""

    names: tuple[str, ...]
    train: Tensor
    heldout: Tensor


@dataclass(frozen=True)
class Data(ABC):
    """Examples along the first axis of ``train`` and ``heldout``. ``sha256`` is of all examples, in order,
    and of what gives them meaning (the vocabulary)."""

    name: str
    train: Tensor
    heldout: Tensor
    sha256: str

    @abstractmethod
    def lengths(self, x: Tensor) -> Tensor:
        """How much of each example is not padding, int64 [N]; a batch is cut to the longest of its own."""

    @property
    @abstractmethod
    def dims(self) -> float:
        """Data dimensions of an example, which the NLL is summed over; the mean where they differ."""

    @property
    @abstractmethod
    def described(self) -> str:
        """What the examples are, for the user."""

    @abstractmethod
    def meaning(self) -> dict[str, Any]:
        """What a model of these data needs to be used without the examples, as a checkpoint keeps it;
        :func:`without_examples` reads it."""


@dataclass(frozen=True)
class Arrays(Data):
    """Images [N, channels, height, width] or vectors [N, D]. uint8 values 0 .. levels-1, or, where ``levels``
    is None, real numbers (float32). ``standardize``: whether a model shifts and scales every column."""

    levels: int | None
    factors: Factors | None = None
    standardize: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example."""
        return tuple(self.train.shape[1:])

    @property
    def is_image(self) -> bool:
        return len(self.shape) == 3

    def lengths(self, x: Tensor) -> Tensor:
        return torch.ones(len(x), dtype=torch.int64)

    @property
    def dims(self) -> float:
        return float(math.prod(self.shape))

    def meaning(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "levels": self.levels, "standardize": self.standardize}

    @property
    def described(self) -> str:
        values = "real values" if self.levels is None else f"{self.levels} levels"
        if not self.is_image:
            scaled = ", standardized" if self.standardize else ""
            return f"vectors of {self.shape[0]:,} numbers, {values}{scaled}"
        channels, height, width = self.shape
        return f"{height}x{width} images, {channels} channel{'s' if channels > 1 else ''}, {values}"


@dataclass(frozen=True)
class Text(Data):
    """Sentences, int64 [N, T]: tokens, then EOS, then PAD. ``vocabulary[i]`` is the word or character of
    token i, which of them says ``unit``."""

    vocabulary: tuple[str, ...]
    factors: Factors | None = None
    unit: Unit = "word"

    def lengths(self, x: Tensor) -> Tensor:
        return (x != PAD).sum(dim=1)

    @property
    def dims(self) -> float:
        return (self.train != PAD).sum().item() / len(self.train)

    def meaning(self) -> dict[str, Any]:
        return {"vocabulary": list(self.vocabulary), "unit": self.unit, "length": self.train.shape[1]}

    @property
    def described(self) -> str:
        unit = "tokens" if self.unit == "word" else "characters"
        return f"sentences (mean {self.dims:.1f} {unit}, vocabulary {len(self.vocabulary):,})"

    def sentence(self, tokens: Tensor) -> str:
        """Tokens [T] up to the first EOS, as a line of text."""
        words: list[str] = []
        for token in tokens.tolist():
            if token in (EOS, PAD):
                break
            words.append(self.vocabulary[token])
        return (" " if self.unit == "word" else "").join(words)


def without_examples(name: str, meaning: Mapping[str, Any], sha256: str) -> Data:
    """The data set of :meth:`Data.meaning` with no examples in it."""
    if "vocabulary" in meaning:
        none = torch.empty(0, meaning["length"], dtype=torch.int64)
        return Text(name, none, none, sha256, tuple(meaning["vocabulary"]), unit=meaning["unit"])
    levels = meaning["levels"]
    none = torch.empty(0, *meaning["shape"], dtype=torch.float32 if levels is None else torch.uint8)
    return Arrays(name, none, none, sha256, levels=levels, standardize=meaning["standardize"])


def tokens_of(line: str, unit: Unit) -> list[str]:
    """The words of a line, or its characters, of which white space between words is one."""
    words = line.split()
    return words if unit == "word" else list(" ".join(words))


def encode_sentences(sentences: Sequence[Sequence[str]], vocabulary: Sequence[str]) -> Tensor:
    """int64 [N, T] with T one more than the longest sentence; words outside the vocabulary become UNK. The
    vocabulary begins with SPECIALS, which no word of a sentence is: a literal ``<pad>`` is a word."""
    index = {word: token for token, word in enumerate(vocabulary) if token >= len(SPECIALS)}
    x = torch.full((len(sentences), 1 + max(map(len, sentences))), PAD, dtype=torch.int64)
    for row, words in zip(x, sentences, strict=True):
        row[: len(words)] = torch.tensor([index.get(word, UNK) for word in words])
        row[len(words)] = EOS
    return x


def split(x: Tensor, where: str = "the data") -> tuple[Tensor, Tensor]:
    """(train, heldout): one example in ten is held out, the same ones whatever the seed of the run. DataError
    that begins with ``where`` if there are too few examples."""
    if len(x) < FEWEST:
        raise DataError(
            f"{where}: {len(x)} example{'' if len(x) == 1 else 's'}; at least {FEWEST} are needed, one in "
            f"ten is held out"
        )
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    count = len(x) // _HELD_OUT_SHARE
    return x[order[count:]], x[order[:count]]


def digest(x: Tensor, vocabulary: Sequence[str] = ()) -> str:
    """SHA-256 of the shape, dtype and values of ``x`` and of the vocabulary."""
    h = hashlib.sha256(f"{list(x.shape)} {x.dtype}\n".encode())
    h.update(x.contiguous().numpy().data)
    h.update("\n".join(vocabulary).encode())
    return h.hexdigest()


@dataclass(frozen=True)
class Most:
    """The most bytes that data may take, by ``config.max_gib``: a file of a few kB can unpack to, or claim to
    hold, more than any machine has."""

    config: DataConfig

    def check(self, where: str, size: int) -> None:
        """DataError that begins with ``where`` if ``size`` bytes are too many."""
        if size > self.config.max_gib * 2**30:
            raise DataError(
                f"{where}: {size / 2**30:,.1f} GiB, more than data.max_gib {self.config.max_gib:g}; if that "
                f"is right and fits into memory twice, raise the limit with --set data.max_gib=GIB"
            )


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file. DataError if it cannot be opened or read."""
    try:
        with open_regular(path) as file:
            yield file
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def file_size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size
