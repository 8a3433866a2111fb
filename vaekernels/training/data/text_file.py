"""Text files of one sentence per line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vaekernels._files import lines_of
from vaekernels.training.config import DataConfig
from vaekernels.training.data.base import FEWEST, Data
from vaekernels.training.data.files import Most, file_size, opened
from vaekernels.training.data.vocabulary import text_data
from vaekernels.training.errors import DataError

__all__ = ["load_text"]


def load_text(config: DataConfig, say: Callable[[str], None]) -> Data:
    """``text:PATH``: a UTF-8 file, one sentence per line, words separated by white space; ``<unk>`` in it is
    the unknown token. Only a newline ends a line. Empty lines are passed over; lines of more than
    ``config.max_tokens`` words are left out, and ``say`` is told how many."""
    path = Path(config.name.partition(":")[2])
    lines = [line.split() for line in lines_of(_decoded(path, Most(config)))]
    sentences = [words for words in lines if 0 < len(words) <= config.max_tokens]
    if len(sentences) < FEWEST:
        raise DataError(
            f"{path}: {len(sentences)} of {len(lines)} line{'' if len(lines) == 1 else 's'} hold a sentence "
            f"of 1 to {config.max_tokens} words; at least {FEWEST} are needed, one sentence per line"
        )
    left_out = sum(len(words) > config.max_tokens for words in lines)
    if left_out:
        say(
            f"left out {left_out} of {len(lines)} lines, longer than {config.max_tokens} words "
            f"(--set data.max_tokens)"
        )
    return text_data(config.name, sentences, config.vocabulary)


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
