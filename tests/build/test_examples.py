"""The examples: the one in plain PyTorch is run here, those of other libraries in tests/integrations."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from libraries import EXAMPLES, run_example

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("arguments", "verdict"), [(["--steps", "500"], "informative"), (["--beta", "8"], "collapsed")]
)
def test_the_minimal_vae_learns_and_is_diagnosed(arguments: list[str], verdict: str) -> None:
    pytest.importorskip("sklearn", reason="the example needs vaekernels[train]")
    out = run_example("minimal_vae.py", *arguments)
    losses = [float(nll) for nll in re.findall(r"^step .* NLL +([\d.]+) nats", out, re.MULTILINE)]
    assert len(losses) == 11 and losses[-1] < 0.75 * losses[0]
    assert re.search(rf"^{verdict}\b", out, re.MULTILINE), out


def test_every_example_is_run_by_a_test() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py"))
    assert {p.name for p in EXAMPLES.glob("*.py") if f'"{p.name}"' not in tests} == set()
