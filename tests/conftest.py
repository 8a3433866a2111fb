"""Fixtures: every test that takes `backend` runs on the compiled kernels and on the plain PyTorch reference.

--device DEVICE           the tests that take a device run on this one, and no others run (default: all; cpu)
VAEKERNELS_REQUIRE_NATIVE 1: a test that needs compiled kernels fails where there are none, and is not skipped
"""

from __future__ import annotations

import os
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator

import libraries
import pytest
import shim_build
import torch

import vaekernels as vk
from vaekernels import _native
from vaekernels.bench.report import machine

# Tests of threads set their own number. Two threads, on a machine that other work shares, can take ten times
# as long as one.
torch.set_num_threads(1)

# A shell starts what runs in the background with Ctrl-C ignored; so would be the commands that tests stop.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

BACKENDS = ["kernels", "reference"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", help="run the tests that take a device, on this one, and no others")


def device_of(config: pytest.Config) -> str:
    return config.getoption("device") or "cpu"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = device_of(metafunc.config)
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", [device])
    if "backend" in metafunc.fixturenames:
        # Marked `shim`, a third backend: the CUDA kernels, run on the CPU by the host shim.
        shim = ["shim"] if metafunc.definition.get_closest_marker("shim") and device == "cpu" else []
        metafunc.parametrize("backend", BACKENDS + shim, indirect=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`make test` runs every fourth case of each test on the shim, and none of ten million numbers."""
    if config.getoption("device"):
        takes = [takes_device(item) for item in items]
        config.hook.pytest_deselected(items=[item for item, one in zip(items, takes, strict=True) if not one])
        items[:] = [item for item, one in zip(items, takes, strict=True) if one]
        if why := absent(device_of(config)):
            for item in items:
                item.add_marker(pytest.mark.skip(reason=why))
    cases: Counter[str] = Counter()
    for item in items:
        if isinstance(item, pytest.Function) and is_shim(item):
            test = item.nodeid.partition("[")[0]
            if cases[test] % 4 != 0 or "ten_million" in item.fixturenames:
                item.add_marker(pytest.mark.slow)
            cases[test] += 1


def absent(device: str) -> str:
    """Why torch cannot use the device; empty where it can."""
    if torch.device(device).type != "cuda" or torch.cuda.is_available():
        return ""
    return f"torch has no CUDA: {torch.__version__}" if torch.version.cuda is None else "torch sees no GPU"


def takes_device(item: pytest.Item) -> bool:
    if not isinstance(item, pytest.Function):
        return False
    if item.get_closest_marker("default_device"):
        return "backend" in item.fixturenames
    return bool({"device", "cuda"} & set(item.fixturenames))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for what, why in sorted(libraries.ABSENT.items()):
        terminalreporter.write_line(f"SKIPPED {what}: {why}", yellow=True)


def is_shim(item: pytest.Function) -> bool:
    return hasattr(item, "callspec") and item.callspec.params.get("backend") == "shim"


def require_kernels(device: str) -> None:
    """Skips, or fails where the run demands kernels, with the reason why the device has none."""
    kind = torch.device(device).type
    if _native.has_kernels(kind):
        return
    reason = f"no kernels for {kind}: {_native.explain(kind)}"
    if os.environ.get("VAEKERNELS_REQUIRE_NATIVE") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    device = device_of(request.config)
    if device != "cpu" and request.node.get_closest_marker("default_device"):
        with torch.device(device):
            yield from _backend(request.param, device, monkeypatch)
    else:
        yield from _backend(request.param, device, monkeypatch)


def _backend(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if name == "kernels":
        require_kernels(device)
        yield "kernels"
        return
    if name == "shim":
        require_kernels("cpu")  # whose schemas and autograd the shim's kernels serve
        shim_build.require()
        if torch.device(device).type != "cpu":
            pytest.skip("the shim serves tensors on the CPU")
        with shim_build.library().used():
            yield "shim"
        return
    monkeypatch.setattr(_native, "has_kernels", lambda device_type: False)
    monkeypatch.setattr(_native, "C", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", vk.FallbackWarning)
        yield "reference"


@pytest.fixture
def kernels() -> None:
    """For tests of the compiled library itself, on the CPU."""
    require_kernels("cpu")


@pytest.fixture
def cuda() -> str:
    """For tests that nothing but a GPU can run."""
    if why := absent("cuda"):
        pytest.skip(why)
    require_kernels("cuda")
    return "cuda"


@pytest.fixture(scope="session", autouse=True)
def described(record_testsuite_property: Callable[[str, object], None]) -> None:
    """Verdicts from a machine with a GPU (--junitxml) say which one it was."""
    if torch.cuda.is_available():
        facts = machine(torch.device("cuda")) | {"cuda": torch.version.cuda or ""}
        # A copy without git names its commit in the environment.
        facts["commit"] = os.environ.get("COMMIT") or facts["commit"]
        for name, value in facts.items():
            record_testsuite_property(name, value)


@pytest.fixture(autouse=True)
def same_start() -> None:
    torch.manual_seed(0)
