"""Libraries that tests/integrations needs and `make test` does not install.

A module whose library is absent is skipped, and the last lines of the run say which and why; where
VAEKERNELS_REQUIRE_INTEGRATIONS=1, as in `make test-integrations`, it fails.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

import vaekernels as vk

EXAMPLES = Path(__file__).parents[1] / "examples"
ABSENT: dict[str, str] = {}
"""What is skipped, and why."""


def skip(what: str, why: str) -> NoReturn:
    """Skips the whole module; the summary says so."""
    ABSENT[what] = why
    pytest.skip(why, allow_module_level=True)


def need(name: str) -> Any:
    """The library, or a skip of the whole module that is remembered for the summary."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if os.environ.get("VAEKERNELS_REQUIRE_INTEGRATIONS") == "1":
            raise
        skip(f"the integration of {name}", f"{error}; `make test-integrations` installs it")


def noise_of_seed(seed: int, like: Tensor) -> Tensor:
    """The normals that the first draw in `like`'s shape after `torch.manual_seed(seed)` uses; seeds anew."""
    torch.manual_seed(seed)
    zero = torch.zeros_like(like)
    eps = vk.reparameterize(zero, zero)
    torch.manual_seed(seed)
    return eps.detach()


def within_rounding(ours: Tensor, theirs: Tensor, times: float = 64.0) -> None:
    """Equal up to the rounding of sums: a multiple of eps on the scale of the largest element."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    scale = theirs.abs().max().item()
    error = (ours - theirs).abs().max().item()
    assert error <= times * torch.finfo(ours.dtype).eps * scale, (error, scale)


def same_gradients(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """On the scale of the largest gradient of the model: those of biases before a norm are pure rounding."""
    pairs = list(zip(ours.named_parameters(), theirs.named_parameters(), strict=True))
    scale = max(b.grad.abs().max().item() for _, (_, b) in pairs if b.grad is not None)
    compared = 0
    for (name, a), (_, b) in pairs:
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            error = (a.grad - b.grad).abs().max().item()
            assert error <= 256 * torch.finfo(a.dtype).eps * scale, (name, error, scale)
            compared += 1
    assert compared and scale > 0


def load_example(name: str) -> Any:
    """The module, to use what it defines."""
    spec = importlib.util.spec_from_file_location(name.removesuffix(".py"), EXAMPLES / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_example(name: str, *arguments: str) -> str:
    """What the script prints; without arguments, two steps of training."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *(arguments or ("--steps", "2"))],
        cwd=EXAMPLES.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
