"""What libFuzzer calls with bytes; started by `tests/fuzz`, which sets the environment.

The folder of the package that is fuzzed and that of the findings, then libFuzzer's options, or files to run.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
from pathlib import Path

import atheris
import torch

# Its own code is counted too, but for the reference's.
with atheris.instrument_imports(include=["vaekernels.ops", "vaekernels._checks", "vaekernels._dispatch"]):
    importlib.import_module("vaekernels")

from fuzz import one_input
from fuzz.judge import Finding

from vaekernels import _native

PACKAGE, FINDINGS = Path(sys.argv[1]), Path(sys.argv[2])
seen: set[str] = set()


def test(data: bytes) -> None:
    """A finding is written down, one of a kind, and the fuzzing goes on; a crash ends it."""
    try:
        one_input.check(data)
    except Finding as finding:
        kind = re.sub(r"[-+\d.einfa]+", "", str(finding).split("[")[0])
        if kind in seen:
            return
        seen.add(kind)
        name = f"finding-{hashlib.sha256(data).hexdigest()[:12]}"
        (FINDINGS / name).write_bytes(data)
        text = f"{finding}\n\n{one_input.text(data)}\n"
        (FINDINGS / f"{name}.txt").write_text(text, encoding="utf-8")
        print(f"FINDING {name}: {finding}", flush=True)


def main() -> None:
    if _native.C is None or not Path(str(_native.C.__file__)).is_relative_to(PACKAGE):
        sys.exit(f"not the instrumented kernels: {_native.explain() or _native.C}")
    torch.set_num_threads(1)
    files = [Path(a) for a in sys.argv[3:] if Path(a).is_file()]
    for file in files:
        data = file.read_bytes()
        print(f"{file.name}: {one_input.text(data)}", flush=True)
        print(f"{file.name}: {one_input.check(data)}", flush=True)
    if not files:
        atheris.Setup([sys.argv[0], *sys.argv[3:]], test)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
