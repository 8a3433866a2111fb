"""What a data set is to the rest of the trainer, and how its batches are made."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BOS", "EOS", "PAD", "SPECIALS", "UNK", "Batches", "Data", "Images", "Text", "digest", "split"]

PAD, BOS, EOS, UNK = range(4)
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")

_HELD_OUT_SHARE = 10  # one example in ten


@dataclass(frozen=True)
class Data:
    """Examples along the first axis of ``train`` and ``heldout``. ``sha256`` is of all examples, in order,
    and of what gives them meaning (the vocabulary)."""

    name: str
    train: Tensor
    heldout: Tensor
    sha256: str

    def lengths(self, x: Tensor) -> Tensor:
        """The length that the examples of one batch share, int64 [N]."""
        return torch.full((len(x),), x.shape[1], dtype=torch.int64)

    @property
    def described(self) -> str:
        """What one example is, for the user: its data dimensions, which the NLL is summed over."""
        raise NotImplementedError


@dataclass(frozen=True)
class Images(Data):
    """Binary images, float32 [N, pixels] of zeros and ones; ``shape`` = (height, width)."""

    shape: tuple[int, int]

    @property
    def described(self) -> str:
        return f"{self.shape[0]}x{self.shape[1]} binary images"


@dataclass(frozen=True)
class Text(Data):
    """Sentences, int64 [N, T]: tokens, then EOS, then PAD. ``vocabulary[i]`` is the word of token i."""

    vocabulary: tuple[str, ...]

    def lengths(self, x: Tensor) -> Tensor:
        return (x != PAD).sum(dim=1)

    @property
    def described(self) -> str:
        tokens = (self.train != PAD).sum().item() / len(self.train)
        return f"sentences (mean {tokens:.1f} tokens, vocabulary {len(self.vocabulary)})"

    def sentence(self, tokens: Tensor) -> str:
        """Tokens [T] up to the first EOS, as a line of text."""
        words: list[str] = []
        for token in tokens.tolist():
            if token in (EOS, PAD):
                break
            words.append(self.vocabulary[token])
        return " ".join(words)


def encode_sentences(sentences: Sequence[Sequence[str]], vocabulary: Sequence[str]) -> Tensor:
    """int64 [N, T] with T one more than the longest sentence; words outside the vocabulary become UNK."""
    index = {word: token for token, word in enumerate(vocabulary)}
    x = torch.full((len(sentences), 1 + max(map(len, sentences))), PAD, dtype=torch.int64)
    for row, words in zip(x, sentences, strict=True):
        row[: len(words)] = torch.tensor([index.get(word, UNK) for word in words])
        row[len(words)] = EOS
    return x


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """(train, heldout): one example in ten is held out, the same ones whatever the seed of the run."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    count = len(x) // _HELD_OUT_SHARE
    return x[order[count:]], x[order[:count]]


def digest(x: Tensor, vocabulary: Sequence[str] = ()) -> str:
    """SHA-256 of the shape, dtype and values of ``x`` and of the vocabulary."""
    h = hashlib.sha256(f"{list(x.shape)} {x.dtype}\n".encode())
    h.update(x.contiguous().numpy().tobytes())
    h.update("\n".join(vocabulary).encode())
    return h.hexdigest()


class Batches:
    """Shuffled batches of examples of equal length, cut to that length.

    The order of an epoch is a function of (seed, epoch) alone, so a position in the data is two numbers.
    """

    def __init__(self, data: Data, *, batch_size: int, seed: int) -> None:
        self._x = data.train
        self._lengths = data.lengths(data.train)
        self._batch_size = batch_size
        self._seed = seed
        self._buckets = [
            torch.nonzero(self._lengths == n).squeeze(1) for n in sorted(set(self._lengths.tolist()))
        ]

    def __len__(self) -> int:
        """Batches in an epoch."""
        return sum(-(-len(bucket) // self._batch_size) for bucket in self._buckets)

    def order(self, epoch: int) -> list[Tensor]:
        """The batches of an epoch, each as the indices of its examples."""
        # Hashed, since the CPU generator uses only the low 32 bits of a seed, and a sum would give run s in
        # epoch e + 1 the order of run s + 1 in epoch e.
        mixed = hashlib.sha256(f"{self._seed} {epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(mixed[:4], "little"))
        batches: list[Tensor] = []
        for bucket in self._buckets:
            shuffled = bucket[torch.randperm(len(bucket), generator=generator)]
            batches.extend(torch.split(shuffled, self._batch_size))
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def take(self, batch: Tensor) -> Tensor:
        """The examples of a batch."""
        return self._x[batch, : int(self._lengths[batch[0]])]
