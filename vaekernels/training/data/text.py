"""Text: files of one sentence per line, and the first sentences of the standard library's docstrings.

Docstrings are text that every Python has and that need not be shipped; they are read from the sources at run
time. They differ between Python versions, so their hash is recorded with every run.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from vaekernels._build import NO_CACHE, user_cache
from vaekernels._files import lines_of, open_regular, write_atomically
from vaekernels.training.config import DataConfig
from vaekernels.training.data.base import (
    FEWEST,
    SPECIALS,
    UNK,
    Data,
    Most,
    Text,
    Unit,
    digest,
    encode_sentences,
    file_size,
    opened,
    split,
    tokens_of,
)
from vaekernels.training.data.synthetic import load_synthetic_text
from vaekernels.training.errors import DataError
from vaekernels.training.waiting import tracked

__all__ = [
    "cache_dir",
    "first_sentence",
    "load_docstrings",
    "load_text",
    "read_sentences",
    "text_data",
    "tokenize",
]


def text_data(
    name: str,
    sentences: Sequence[Sequence[str]],
    size: int,
    say: Callable[[str], None],
    unit: Unit = "word",
) -> Text:
    """The data set of ``sentences`` with a vocabulary of ``size`` tokens, the special ones included. ``say``
    is told how many of the tokens are unknown.

    ``<unk>`` in a sentence, as in the Penn Treebank, is the unknown token; the other special tokens are no
    words, so a literal ``<eos>`` is a word like any other."""
    counts = Counter(word for sentence in sentences for word in sentence)
    del counts[SPECIALS[UNK]]
    # Ties broken by the word: the vocabulary is a function of the sentences alone.
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    vocabulary = (*SPECIALS, *ranked[: size - len(SPECIALS)])
    x = encode_sentences(sentences, vocabulary)
    train, heldout = split(x)
    unknown = (x == UNK).sum().item() / sum(map(len, sentences))
    if unknown:
        say(
            f"{100 * unknown:.3g} % of the {_PLURAL[unit]} are unknown to the vocabulary of "
            f"{len(vocabulary):,} (--set data.vocabulary), which lowers the NLL: an unknown one is easily "
            f"guessed"
        )
    return Text(name, train, heldout, digest(x, vocabulary), vocabulary, unit=unit)


# --- files


def load_text(config: DataConfig, say: Callable[[str], None]) -> Data:
    """``text:PATH``: a UTF-8 file, one sentence per line, of words separated by white space or of characters
    (``config.tokens``); a word ``<unk>`` in it is the unknown token. Only a newline ends a line. Empty lines
    are passed over; lines of more than ``config.max_tokens`` tokens are left out, and ``say`` is told how
    many."""
    path = Path(config.name.partition(":")[2])
    text = lines_of(_decoded(path, Most(config)))
    unit = config.tokens
    if unit == "auto":
        unit, reason = _unit_of(text)
        if unit == "char":
            say(f"a token is a character, for {reason} (--set data.tokens=word)")
    lines = [tokens_of(line, unit) for line in text]
    sentences = [tokens for tokens in lines if 0 < len(tokens) <= config.max_tokens]
    if len(sentences) < FEWEST:
        raise DataError(
            f"{path}: {len(sentences)} of {len(lines)} line{'' if len(lines) == 1 else 's'} hold a sentence "
            f"of 1 to {config.max_tokens} {_PLURAL[unit]}; at least {FEWEST} are needed, one sentence per "
            f"line"
        )
    left_out = sum(len(tokens) > config.max_tokens for tokens in lines)
    if left_out:
        say(
            f"left out {left_out:,} of {len(lines):,} lines, longer than {config.max_tokens} {_PLURAL[unit]} "
            f"(--set data.max_tokens)"
        )
    return text_data(config.name, sentences, config.vocabulary, say, unit)


_PLURAL: dict[Unit, str] = {"word": "words", "char": "characters"}
_LONG = 20  # characters: words longer than this in the mean are no words
# Kana and Han; Thai and Lao; Burmese; Khmer: written without spaces between words.
_UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")


def _unit_of(lines: Sequence[str]) -> tuple[Unit, str]:
    """What a token of these lines is, and, if a character, why."""
    filled = [words for line in lines if (words := line.split())]
    words = [word for each in filled for word in each]
    letters = "".join(words)
    if len(_UNSPACED.findall(letters)) > len(letters) / 2:
        return "char", "most of the text is in a script without spaces between words"
    if len(letters) > _LONG * len(words):
        return "char", f"words have {len(letters) / len(words):.0f} characters in the mean"
    if 2 * sum(len(each) == 1 for each in filled) > len(filled):
        return "char", "most lines are a single word"
    return "word", ""


def _decoded(path: Path, most: Most) -> str:
    with opened(path) as file:
        most.check(str(path), file_size(file))
        content = file.read()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}, byte {error.start}: 0x{content[error.start]:02x} is not UTF-8 "
            f"({error.reason})"
        ) from error


# --- docstrings

SHORTEST, LONGEST = 5, 20  # tokens
FEWEST_SENTENCES = 500  # sentences below which there is nothing to learn a language from

_FORMAT = 1  # of the cache file, raised when the extraction changes
_TOKEN = re.compile(r"[^\W\d_]+(?:'[a-z]+)?|\d+|[^\w\s]")
_SENTENCE = re.compile(r".+?[.!?](?=\s|$)")


def load_docstrings(config: DataConfig, say: Callable[[str], None]) -> Data:
    """The data set ``docstrings``; ``synthetic-text`` where the installation has no sources."""
    root = Path(sysconfig.get_path("stdlib"))
    sentences = _cached(root, say)
    if len(sentences) < FEWEST_SENTENCES:
        say(
            f"found {len(sentences)} docstring sentences under {root}, fewer than {FEWEST_SENTENCES}: this "
            f"Python is installed without sources; using synthetic-text instead"
        )
        return load_synthetic_text(config, say)
    return text_data("docstrings", [sentence.split(" ") for sentence in sentences], config.vocabulary, say)


def read_sentences(root: Path) -> list[str]:
    """The unique first sentences of 5 to 20 tokens under ``root``, tokens joined by spaces, in order of file
    and line."""
    found: dict[str, None] = {}
    for path in tracked(sorted(root.rglob("*.py")), "reading docstrings"):
        if not {"site-packages", "dist-packages"}.isdisjoint(path.relative_to(root).parts):
            continue
        for docstring in _docstrings(path):
            tokens = tokenize(first_sentence(docstring))
            if SHORTEST <= len(tokens) <= LONGEST:
                found.setdefault(" ".join(tokens))
    return list(found)


def first_sentence(docstring: str) -> str:
    """The first sentence of the first paragraph, on one line."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    match = _SENTENCE.match(paragraph)
    return match.group() if match else paragraph


def tokenize(sentence: str) -> list[str]:
    """Lower-case words, numbers and single punctuation marks."""
    return _TOKEN.findall(sentence.lower())


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library's own tests hold invalid escapes on purpose
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return  # the library's own tests hold files that do not parse on purpose
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            if docstring:
                yield docstring
        # Definitions are statements, so expressions need no visit; this halves the time of ast.walk.
        for name in ("handlers", "finalbody", "orelse", "body"):
            children = getattr(node, name, None)
            if isinstance(children, list):
                pending.extend(reversed(children))


def cache_dir() -> Path | None:
    """Where this user's caches are, by the custom of the system; None where there is no such place."""
    base: str | Path | None
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches")
    else:
        base = user_cache()
    return None if base is None else Path(base) / "vaekernels"


def _cached(root: Path, say: Callable[[str], None]) -> list[str]:
    place = hashlib.sha256(os.fsencode(root)).hexdigest()[:8]
    folder = cache_dir()
    path = None if folder is None else folder / f"docstrings-{platform.python_version()}-{place}.json"
    sentences = None if path is None else _read_cache(path)
    if sentences is None:
        say(f"reading the docstrings under {root} (once, some 10 seconds) ...")
        sentences = read_sentences(root)
        if path is None:
            say(f"{NO_CACHE}; the next run reads them again")
            return sentences
        try:
            _write_cache(path, sentences)
        except OSError as error:
            say(f"cannot keep them in {path}: {error.strerror}; the next run reads them again")
    return sentences


def _hash(sentences: list[str]) -> str:
    return hashlib.sha256("\n".join(sentences).encode()).hexdigest()


def _read_cache(path: Path) -> list[str] | None:
    """The sentences, or None where the file is absent, damaged or of another format: they are then read
    again."""
    try:
        with open_regular(path) as file:
            stored = json.loads(file.read())
        sentences = stored["sentences"]
        whole = stored["format"] == _FORMAT and stored["sha256"] == _hash(sentences)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return sentences if whole else None


def _write_cache(path: Path, sentences: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"format": _FORMAT, "sha256": _hash(sentences), "sentences": sentences}
    write_atomically(path, json.dumps(content, ensure_ascii=False, indent=0))
