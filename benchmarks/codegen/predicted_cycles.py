"""What llvm-mca expects of the CPU kernels' loops on processors that are not here: `make predicted-cycles`.

Takes the loops from the built library with objdump and asks llvm-mca how many cycles an iteration takes with
all data in the first-level cache. A model, not a measurement. LLVM 16 or later knows all of the processors;
LLVM_MCA may name its program.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from instruction_counts import compiler_version

from vaekernels import _native

FILE = Path(__file__).parents[1] / "results" / "predicted-cycles.csv"
MCA = os.environ.get("LLVM_MCA", "llvm-mca")
COLUMNS = [
    "clone",
    "processor",
    "part",
    "instructions_per_element",
    "cycles_per_element",
    "compiler",
    "model",
]
# The clone, how its names end, the numbers in a vector, the vectors' names, and processors that run it.
CLONES = [
    ("avx2", "x86_64_v3", 8, "ymm", ["znver3", "skylake", "alderlake"]),
    ("avx512", "x86_64_v4", 16, "zmm", ["skylake-avx512", "icelake-server", "znver4"]),
]
# In the mangled names of the tiles: logvar, the KL to N(0, I), with z, all log-variances near.
TILE = r"_tileILNS_5ParamE0ELNS0_4ModeE1ELb1ELNS0_4LoopE0EfE"
# Part, function, an instruction that only its loop has, and how many vectors the loop stores for W elements.
PARTS = [
    ("Philox", r"normals_{clone}", "vpmuludq", 1),
    ("Box-Muller", r"normals_{clone}", "vsqrtps", 1),
    ("tile, forward", rf"forward{TILE}.*{{suffix}}>", "vfmsub", 2),
    ("tile, backward", rf"backward{TILE}.*{{suffix}}>", "vfnmadd", 2),
    ("sums over rows", r"add_scaledIfE.*{suffix}>", "vfmadd", 1),
]


def functions(library: str) -> dict[str, list[tuple[int, str]]]:
    """The instructions of each function with their addresses."""
    command = ["objdump", "-d", "--no-show-raw-insn", library]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, list[tuple[int, str]]] = {}
    for block in listing.split("\n\n"):
        head, *lines = block.strip().splitlines()
        if head.endswith(">:"):
            code = [line.split("\t") for line in lines if "\t" in line]
            found[head] = [(int(at.strip(" :"), 16), text.split("#")[0].strip()) for at, text in code]
    return found


def innermost_loop(code: list[tuple[int, str]], marker: str) -> list[str]:
    """The shortest loop with at least one `marker`."""
    index = {at: i for i, (at, _) in enumerate(code)}
    loops = []
    for i, (_, text) in enumerate(code):
        jump = re.match(r"j(?!mp)\w+\s+([0-9a-f]+)", text)
        start = index.get(int(jump[1], 16), i) if jump else i
        if start < i and any(marker in t for _, t in code[start:i]):
            loops.append([t for _, t in code[start : i + 1]])
    return min(loops, key=len)


def cycles(loop: list[str], cpu: str, folder: Path) -> float:
    """Of an iteration."""
    lines = [re.sub(r"<[^>]*>", "", text) for text in loop]
    lines[-1] = lines[-1].split()[0] + " .L0"
    source = folder / "loop.s"
    source.write_text(".L0:\n" + "\n".join(lines) + "\n")
    command = [MCA, f"-mcpu={cpu}", "-iterations=200", "-mtriple=x86_64-linux-gnu", str(source)]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    total = re.search(r"Total Cycles:\s+(\d+)", said)
    assert total, said
    return int(total[1]) / 200


@dataclass(frozen=True)
class Loop:
    clone: str
    processors: list[str]
    part: str
    lines: list[str]
    elements: float  # of an iteration

    @property
    def instructions(self) -> float:
        """Per element."""
        return len(self.lines) / self.elements


def loops(library: str) -> Iterator[Loop]:
    code = functions(library)
    for clone, suffix, width, register, processors in CLONES:
        for part, pattern, marker, streams in PARTS:
            wanted = re.compile(pattern.format(clone=clone, suffix=suffix))
            found = [code[name] for name in code if wanted.search(name)]
            assert found, f"{library} has no function {wanted.pattern}"
            lines = innermost_loop(found[0], marker)
            # those to the stack are none of the results'
            stores = [text for text in lines if re.search(rf"%{register}\d+,[^%]*\((?!%rsp)", text)]
            yield Loop(clone, processors, part, lines, len(stores) * width / streams)


def main() -> int:
    if _native.C is None or shutil.which(MCA) is None or shutil.which("objdump") is None:
        print("needs the compiled library, objdump (binutils) and llvm-mca (LLVM)", file=sys.stderr)
        return 2
    version = subprocess.run([MCA, "--version"], capture_output=True, text=True, check=True).stdout
    model = re.search(r"LLVM version (\S+)", version)
    assert model, version
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for loop in loops(_native.C.__file__):
            for cpu in loop.processors:
                predicted = cycles(loop.lines, cpu, Path(folder)) / loop.elements
                rows.append((loop.clone, cpu, loop.part, f"{loop.instructions:.2f}", f"{predicted:.2f}"))
    with open(FILE, "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        versions = (compiler_version(), f"llvm-mca {model[1]}")
        table.writerows((*row, *versions) for row in rows)
    for row in rows:
        print("{:8} {:16} {:16} {:>6} {:>6}".format(*row))
    print(f"written to {FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
