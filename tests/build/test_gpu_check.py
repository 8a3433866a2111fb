"""`make gpu-check`, as far as it goes without a GPU."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import gpu_build
import pytest
import torch


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_the_build_says_that_torch_has_no_cuda(capsys):
    assert gpu_build.main() == gpu_build.NOT_POSSIBLE
    assert capsys.readouterr().out.strip() == f"torch {torch.__version__} was built without CUDA"


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_the_tests_of_the_host_code_say_that_torch_has_no_cuda():
    command = [sys.executable, str(Path(__file__).parents[1] / "cuda_host")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"make test-cuda-host: it needs a torch built with CUDA 13; {torch.__version__} has CUDA None"
    )


def test_torch_has_what_the_tools_use():
    """So that an upgrade of torch shows here, and not on a GPU."""
    assert {"pool", "stream"} <= set(inspect.signature(torch.cuda.graph.__init__).parameters)
    assert {"device", "priority"} <= set(inspect.signature(torch.cuda.Stream.__new__).parameters)
    assert "enable_timing" in inspect.signature(torch.cuda.Event.__new__).parameters
    for name in ("CUDAGraph", "make_graphed_callables", "set_stream", "default_stream", "current_stream",
                 "set_sync_debug_mode", "mem_get_info", "is_current_stream_capturing",
                 "get_device_properties", "empty_cache", "_sleep"):  # fmt: skip
        assert callable(getattr(torch.cuda, name)), name
    for name in ("replay", "pool"):
        assert callable(getattr(torch.cuda.CUDAGraph, name))
    assert callable(torch.Generator.get_offset)
    assert issubclass(torch.AcceleratorError, RuntimeError)
    assert "max-autotune-no-cudagraphs" in torch._inductor.list_mode_options()


# ---- the rules of the Makefile ---------------------------------------------------------------------------

TESTS = Path(__file__).parents[1]


def make(*arguments: str, out: Path, limit: float = 100) -> subprocess.CompletedProcess[str]:
    if shutil.which("make") is None or shutil.which("timeout") is None:
        pytest.skip("this machine lacks make or timeout")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", *arguments, f"PYTHON={sys.executable}", f"OUT={out}"]
    folder = gpu_build.ROOT
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=limit)


def test_every_file_has_a_part(tmp_path):
    done = make("-n", "gpu-check", out=tmp_path)
    assert done.returncode == 0, done.stderr
    for file in (gpu_build.ROOT / "tests" / "gpu").glob("test_*.py"):
        assert f"tests/gpu/{file.name} " in done.stdout
    assert (
        "--device=cuda --continue-on-collection-errors tests/ops" in done.stdout
        and "gpu_build.py" in done.stdout
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")
def test_without_a_gpu_every_test_is_skipped_with_the_reason(tmp_path):
    done = make("gpu-check-streams", out=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = list(ElementTree.parse(tmp_path / "check" / "streams.xml").getroot().iter("testcase"))
    reasons = {skip.get("message") for case in cases for skip in case.iter("skipped")}
    assert cases and reasons <= {f"torch has no CUDA: {torch.__version__}", "torch sees no GPU"} and reasons


@pytest.mark.parametrize(
    "body, words",
    [
        ("assert 1 == 2", "1 failed"),
        ("import os; os.abort()", "Aborted"),
        ("import time; time.sleep(60)", 'test_it.py", line 2'),  # where it hung
    ],
)
def test_a_part_that_fails_crashes_or_hangs_is_a_failure(body, words, tmp_path):
    file = tmp_path / "test_it.py"
    file.write_text(f"def test_it():\n    {body}\n")
    given = [f"GPU_FILES={file} --rootdir={tmp_path}", "LIMIT=20", "TEST_LIMIT=8"]
    done = make("gpu-check-it", *given, out=tmp_path)
    assert done.returncode != 0
    assert words in (tmp_path / "check" / "it.log").read_text()


@pytest.mark.parametrize("kind, skipped", [("cuda", not torch.cuda.is_available()), ("cpu", False)])
def test_only_tests_that_take_a_device_run_on_one(kind, skipped, tmp_path):
    file = tmp_path / "test_it.py"
    file.write_text(
        "import pytest\n"
        "def test_plain(): raise ValueError\n"
        "def test_device(device): pass\n"
        "@pytest.mark.default_device\ndef test_made(backend): pass\n"
    )
    shutil.copy(TESTS / "conftest.py", tmp_path)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(gpu_build.ROOT)])}
    command = [sys.executable, "-m", "pytest", str(file), "-q", f"--device={kind}", f"--rootdir={tmp_path}",
               "-o", "markers=default_device\nshim\nslow"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ("3 skipped" if skipped else "3 passed") in done.stdout, done.stdout + done.stderr
    assert "1 deselected" in done.stdout
