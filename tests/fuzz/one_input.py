"""What one input of the fuzzer does: a call of a public function, or of an operator."""

from __future__ import annotations

from fuzz import judge, operators
from fuzz.problem import decode


def _is_operator(data: bytes) -> bool:
    return len(data) > 0 and data[0] % 4 == 3


def check(data: bytes) -> str:
    """Raises `judge.Finding`; returns what was seen in a word."""
    return operators.check(data[1:]) if _is_operator(data) else judge.check(decode(data[1:]))


def text(data: bytes) -> str:
    """What `check` runs, as Python."""
    return str(operators.Call(data[1:]) if _is_operator(data) else decode(data[1:]))
