"""`make test-peers`: the comparison of a library's own tests without and with the fused classes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parents[1] / "peers" / "run.py"
SUITE = """
import torch
def test_a_sample(): assert torch.distributions.Normal(torch.zeros(3), 1.0).sample().shape == (3,)
def test_the_class(): assert torch.distributions.Normal.__module__ == "torch.distributions.normal"
def test_what_always_fails(): assert False
"""


@pytest.mark.slow  # four runs of pytest
def test_what_fails_only_with_the_fused_classes_is_named(tmp_path):
    suite = tmp_path / "pytorch" / "test" / "distributions" / "test_distributions.py"
    suite.parent.mkdir(parents=True)
    suite.write_text(SUITE)

    def run():
        return subprocess.run(
            [sys.executable, str(RUN), str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    done = run()
    assert done.returncode == 1, done.stderr
    assert "pytorch     |     3 |              1 |            2 | 1" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1].endswith("::test_the_class")
    suite.write_text(SUITE.replace('"torch.distributions.normal"', "torch.distributions.Normal.__module__"))
    assert run().returncode == 0
