"""Sentences as a data set: the vocabulary is the most frequent words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from vaekernels.training.data.base import SPECIALS, UNK, Text, digest, encode_sentences, split

__all__ = ["text_data"]


def text_data(name: str, sentences: Sequence[Sequence[str]], size: int) -> Text:
    """The data set of ``sentences`` with a vocabulary of ``size`` tokens, the special ones included.

    ``<unk>`` in a sentence, as in the Penn Treebank, is the unknown token; the other special tokens are no
    words, so a literal ``<eos>`` is a word like any other."""
    counts = Counter(word for sentence in sentences for word in sentence)
    del counts[SPECIALS[UNK]]
    # Ties broken by the word: the vocabulary is a function of the sentences alone.
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    vocabulary = (*SPECIALS, *ranked[: size - len(SPECIALS)])
    x = encode_sentences(sentences, vocabulary)
    train, heldout = split(x)
    return Text(name, train, heldout, digest(x, vocabulary), vocabulary)
