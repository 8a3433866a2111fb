"""The CUDA kernels' machine code for sm_90, counted: what the gate in test_sass.py holds to its budget.

`make sass` runs this file, which prints the table and rewrites benchmarks/results/sass.csv. Takes nvcc and
NVIDIA's disassembler, from PyPI (nvidia-cuda-nvdisasm, nvidia-cuda-cuobjdump) or from a toolkit; no GPU.
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
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from vaekernels import _build

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "benchmarks" / "results" / "sass.csv"
OBJECTS = ROOT / "build" / "cuda-objects"  # what `make cuda-objects` leaves
OWN_OBJECTS = ROOT / "build" / "sass"
ARCH = "sm_90"


class Missing(Exception):
    """What this machine lacks to compile or to disassemble."""


# ---- the listing -----------------------------------------------------------------------------------------

SECTION = re.compile(r"\.text\.(\S+):$")
LABEL = re.compile(r"(\.L_\w+|\S+):$")
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?P<text>[^;]*[^;\s])\s*;")
GUARD = re.compile(r"@(?P<guard>!?U?P(\d|T))\s+")
TARGET = re.compile(r"`\((?P<label>\.L_\w+)\)")
# Jumps whose target only the machine knows: a loop could hide behind one.
UNKNOWN_JUMPS = {"BRX", "BRXU", "JMX", "JMXU", "JMP"}
FLOAT64 = re.compile(r"D(ADD|MUL|FMA|SETP|MNMX|MMA)\b|.*\.F64\b|MUFU\.\w+64H")


@dataclass(frozen=True)
class Instruction:
    text: str

    @property
    def opcode(self) -> str:
        """With its modifiers and without a guard: "LDG.E.128"."""
        return GUARD.sub("", self.text, count=1).split()[0]

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def conditional(self) -> bool:
        """Whether a jump may not be taken: a guard before it or a predicate among its operands."""
        rest = GUARD.sub("", self.text, count=1)
        guard = GUARD.match(self.text)
        if guard is not None and guard["guard"] not in ("PT", "UPT"):
            return True
        return re.search(r"\s!?U?P\d\s*,", rest) is not None

    @property
    def target(self) -> str | None:
        found = TARGET.search(self.text)
        return found["label"] if found else None


@dataclass
class Block:
    """Instructions that run one after the other, and the blocks that may follow."""

    instructions: list[Instruction] = field(default_factory=list)
    next: list[int] = field(default_factory=list)


def functions(listing: str) -> dict[str, list[Instruction | str]]:
    """The instructions and labels of each kernel in nvdisasm's output."""
    found: dict[str, list[Instruction | str]] = {}
    body: list[Instruction | str] | None = None
    for line in listing.splitlines():
        if section := SECTION.match(line):
            body = found.setdefault(section[1], [])
        elif line.startswith(".section") or line.startswith("\t.section"):
            body = None
        elif body is None:
            continue
        elif instruction := INSTRUCTION.match(line):
            body.append(Instruction(instruction["text"]))
        elif label := LABEL.match(line):
            body.append(label[1])
    return found


def blocks(body: list[Instruction | str]) -> list[Block]:
    """The control flow. A call comes back; what is called is reached by no jump and stands for itself."""
    made = [Block()]
    labels: dict[str, int] = {}
    for item in body:
        if isinstance(item, str):
            if made[-1].instructions:
                made.append(Block())
            labels[item] = len(made) - 1
            continue
        made[-1].instructions.append(item)
        if item.name in UNKNOWN_JUMPS:
            raise ValueError(f"cannot follow {item.text!r}")
        if item.name in ("BRA", "EXIT", "RET"):
            made.append(Block())
    for i, block in enumerate(made):
        last = block.instructions[-1] if block.instructions else None
        jumps = last is not None and last.name in ("BRA", "EXIT", "RET")
        if last is not None and last.name == "BRA":
            if last.target not in labels:
                raise ValueError(f"no target for {last.text!r}")
            block.next.append(labels[last.target])
        if i + 1 < len(made) and (not jumps or (last is not None and last.conditional)):
            block.next.append(i + 1)
    return made


def loops(flow: list[Block]) -> dict[int, set[int]]:
    """The natural loops by their first block: all blocks from which a jump back is reached."""
    before: list[set[int]] = [set() for _ in flow]
    for i, block in enumerate(flow):
        for following in block.next:
            before[following].add(i)
    # The blocks that every way from the entry, or from a function that is called, passes through.
    everything = set(range(len(flow)))
    dominators = [{i} if not before[i] else set(everything) for i in range(len(flow))]
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for i in range(1, len(flow)):
            if before[i]:
                common = set.intersection(*(dominators[b] for b in before[i])) | {i}
                changed, dominators[i] = changed or common != dominators[i], common
    found: dict[int, set[int]] = {}
    for i, block in enumerate(flow):
        for first in block.next:
            if first in dominators[i]:
                body = found.setdefault(first, {first})
                waiting = [i]
                while waiting:
                    if (at := waiting.pop()) not in body:
                        body.add(at)
                        waiting += before[at]
    return found


@dataclass(frozen=True)
class Loop:
    instructions: int
    loads: int  # of 16 bytes
    stores: int
    narrow: int  # accesses to global memory that are smaller


def _count(instructions: list[Instruction], pattern: str) -> int:
    return sum(re.match(pattern, i.opcode) is not None for i in instructions)


def vector_loops(flow: list[Block]) -> list[Loop]:
    """The innermost loops that load 16 bytes at a time, the leanest first.

    Not those that add up what other blocks have written, whose loads are strong.
    """
    every = loops(flow)
    found = []
    for first, body in every.items():
        if any(other != first and other in body for other in every):
            continue
        inside = [i for b in sorted(body) for i in flow[b].instructions if i.name != "NOP"]
        loads = _count(inside, r"LDG\..*\b128\b")
        if loads == 0 or _count(inside, r"LDG\..*\bSTRONG\b"):
            continue
        stores = _count(inside, r"STG\..*\b128\b")
        narrow = _count(inside, r"(LDG|STG|LD|ST)\b") - loads - stores
        found.append(Loop(len(inside), loads, stores, narrow))
    return sorted(found, key=lambda loop: loop.instructions)


# ---- the table -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A kernel. `scale`: what the scale tensors hold, logarithms (log) or standard deviations (sd). `loop`:
    the instructions of the main loop, which handles `elements` elements at a time; `special`: the same of
    the loop for calls with weights, bounds, log_std or balance; `softplus`: of the loop for softplus.
    General kernels have none of these. Those of the aggregate posterior have in place of `tiling` how many
    rows a block owns, and in place of `kl` which results are wanted or have gradients."""

    kernel: str
    dtype: str
    tiling: str
    scale: str
    kl: str
    sample: str
    registers: int
    stack: int
    local: int  # instructions that access local memory
    float64: int  # instructions of float64 arithmetic
    division64: int  # functions that divide signed 64-bit integers, in some 100 instructions
    instructions: int
    elements: int | None = None
    loop: int | None = None
    per_element: float | None = None
    special_per_element: float | None = None
    softplus_per_element: float | None = None
    loads: int | None = None
    stores: int | None = None
    narrow: int | None = None

    @property
    def plain(self) -> bool:
        return "plain" in self.kernel

    @property
    def label(self) -> str:
        return " ".join(
            filter(None, (self.kernel, self.dtype, self.tiling, self.scale, self.kl, self.sample))
        )

    def cells(self) -> list[str]:
        values = (getattr(self, f.name) for f in fields(self))
        return ["" if v is None else f"{v:.2f}" if isinstance(v, float) else str(v) for v in values]


DTYPES = {
    "f": "float32",
    "d": "float64",
    "__nv_bfloat16": "bfloat16",
    "__half": "float16",
    "AnyFloat": "any float",
}


def enumerators() -> dict[str, list[str]]:
    """The values of the enumerations that kernels are instantiated over, from the headers."""
    source = "\n".join(p.read_text(encoding="utf-8") for p in sorted((ROOT / "csrc" / "cuda").glob("*.*h")))
    found = re.findall(r"enum class (\w+)(?: : \w+)? \{([^}]*)\}", source)
    return {name: re.findall(r"\w+", values) for name, values in found}


def template_arguments(mangled: str, names: dict[str, list[str]]) -> tuple[str, list[str]]:
    """The plain name of a kernel and its template arguments: types, booleans and enumerators."""
    head = re.search(r"\d([a-z_]+_kernel)(?:I(.*?)EEv|E)", mangled)
    if head is None:
        return mangled, []
    arguments = []
    token = re.compile(
        r"Lb(?P<flag>[01])E"
        r"|LN\w*?_?\d+(?P<kind>[A-Za-z]+)E(?P<value>\d+)E"
        r"|(?:N\w*?_)?\d+(?P<type>AnyFloat|__nv_bfloat16|__half)E?"
        r"|(?P<builtin>[fd])"
    )
    text, at = (head[2] or "") + "E", 0
    while at < len(text) - 1:
        found = token.match(text, at)
        if found is None:
            raise ValueError(f"cannot read {text[at:]!r} of {mangled}")
        if found["flag"]:
            arguments.append("true" if found["flag"] == "1" else "false")
        elif found["kind"]:
            arguments.append(f"{found['kind']}::{names[found['kind']][int(found['value'])]}")
        else:
            arguments.append(found["type"] or found["builtin"])
        at = found.end()
    return head[1], arguments


def row(
    mangled: str, body: list[Instruction | str], usage: dict[str, int], names: dict[str, list[str]]
) -> Row:
    kernel, arguments = template_arguments(mangled, names)
    values = dict(a.split("::") for a in arguments if "::" in a)
    dtype = next((DTYPES[a] for a in arguments if a in DTYPES), "")
    flags = [a == "true" for a in arguments if a in ("true", "false")]
    if "Terms" in values:
        kl, sample = values["Terms"], None
    elif "Kl" in values:
        kl, sample = values["Kl"], flags[0]
    elif len(flags) == 2:
        kl, sample = ("any" if flags[0] else "none"), flags[1]
    else:
        kl, sample = "", None
    instructions = [i for i in body if isinstance(i, Instruction) and i.name != "NOP"]
    made = Row(
        kernel=kernel.removesuffix("_kernel"),
        dtype=dtype,
        tiling=values.get("Tiling", values.get("Rows", "")),
        scale=values.get("Holds", ""),
        kl={"none": "", "": ""}.get(kl, f"{'terms' if 'Terms' in values else 'kl'} {kl}"),
        sample="z" if sample else "",
        registers=usage["REG"],
        stack=usage["STACK"] + usage["LOCAL"],
        local=_count(instructions, r"(LDL|STL)\b"),
        float64=_count(instructions, FLOAT64.pattern),
        division64=sum(isinstance(i, str) and i.endswith("_div_s64") for i in body),
        instructions=len(instructions),
    )
    if not made.plain:
        return made
    found = vector_loops(blocks(body))
    # Forward, the blocks of the samples after the first have loops of their own, without the KL. Loops
    # with the KL to a prior have more loads. The others, the leanest first: those without the KL (plain,
    # special), those with it, and for softplus without and with it.
    if made.kl == "kl prior":
        found = [loop for loop in found if loop.loads == max(loop.loads for loop in found)]
    with_kl = {2: [0, 1], 3: [0, 1, 2], 4: [2, 3], 6: [2, 3, 5]}.get(len(found), [])
    if len(with_kl) != (3 if made.scale == "sd" else 2):
        raise ValueError(f"{made.label}: {len(found)} loops load 16 bytes at a time")
    main, special, *softplus = (found[i] for i in with_kl)
    elements = 16 // (4 if dtype == "float32" else 2)
    return replace(
        made,
        elements=elements,
        loop=main.instructions,
        per_element=main.instructions / elements,
        special_per_element=special.instructions / elements,
        softplus_per_element=softplus[0].instructions / elements if softplus else None,
        loads=main.loads,
        stores=main.stores,
        narrow=main.narrow,
    )


# ---- compiling and disassembling -------------------------------------------------------------------------


def tool(name: str) -> str:
    """The program from the wheel that PyPI carries, or from a toolkit."""
    for entry in map(Path, sys.path):
        for found in sorted(entry.glob(f"nvidia/cu*/bin/{name}"), reverse=True):
            if os.access(found, os.X_OK):
                return str(found)
    nvcc = _build.find_nvcc()
    beside = shutil.which(str(Path(nvcc).parent / name)) if nvcc else None
    if path := beside or shutil.which(name):
        return path
    raise Missing(f"{name} was not found: pip install nvidia-cuda-{name}")


def compiler() -> str:
    """nvcc's version, or why there is none."""
    nvcc = _build.find_nvcc()
    if nvcc is None:
        raise Missing("nvcc was not found: put it on PATH or set CUDA_HOME")
    return _build.nvcc_version(nvcc)


def objects() -> list[Path]:
    """An object of each .cu: those that `make cuda-objects` left, if nothing changed since, or new ones."""
    sources = _build._sources("cuda/*.cu")
    # Twelve hexadecimal digits follow the name: forward-0123456789ab.o is not of forward_plain.cu.
    found = [sorted(OBJECTS.glob(f"{source.stem}-{'[0-9a-f]' * 12}.o")) for source in sources]
    if all(len(made) == 1 and _build._up_to_date(made[0], made[0].with_suffix(".d")) for made in found):
        return [made[0] for made in found]
    nvcc = _build.find_nvcc()
    assert nvcc is not None
    OWN_OBJECTS.mkdir(parents=True, exist_ok=True)
    arch = _build._gencode(ARCH.removeprefix("sm_"), ptx=False)
    csrc = _build.source_dir()
    command = [nvcc, *_build.NVCC_FLAGS, f"-I{csrc}", *arch]
    return _build.compile_sources([(source, command) for source in sources], OWN_OBJECTS, print)


def _output(command: list[str], folder: str) -> str:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr.strip()}")
    return result.stdout


def usage_of(report: str) -> dict[str, dict[str, int]]:
    """What cuobjdump --dump-resource-usage says of each function: registers, stack, local memory."""
    found = {}
    for name, numbers in re.findall(r"Function (\S+):\s*\n\s*(.*)", report):
        found[name] = {key: int(value) for key, value in re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", numbers)}
    return found


def cubins(made: Path, folder: str) -> Iterator[Path]:
    _output([tool("cuobjdump"), "-xelf", "all", "-arch", ARCH, str(made)], folder)
    yield from sorted(Path(folder).glob("*.cubin"))


def table() -> list[Row]:
    """Every kernel of csrc/cuda, as compiled for sm_90."""
    compiler()
    names = enumerators()
    rows = []
    for made in objects():
        with tempfile.TemporaryDirectory() as folder:
            for cubin in cubins(made, folder):
                usage = usage_of(_output([tool("cuobjdump"), "-res-usage", str(cubin)], folder))
                listing = _output([tool("nvdisasm"), "-c", str(cubin)], folder)
                rows += [row(name, body, usage[name], names) for name, body in functions(listing).items()]
    order = list(DTYPES.values())
    return sorted(rows, key=lambda r: (r.kernel, order.index(r.dtype) if r.dtype else -1, r.label))


def head() -> list[str]:
    return ["nvcc", *(f.name for f in fields(Row))]


def write(rows: list[Row]) -> None:
    version = compiler()
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(head())
        out.writerows([version, *r.cells()] for r in rows)


def committed() -> list[list[str]]:
    with TABLE.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def show(rows: list[Row]) -> str:
    """The table for people: instructions per element and their like, plain kernels first."""
    head = (
        "kernel",
        "per element",
        "special",
        "softplus",
        "16-byte loads, stores",
        "registers",
        "local",
        "float64",
    )
    cells = [head]
    for r in sorted(rows, key=lambda r: not r.plain):
        number = "" if r.per_element is None else f"{r.per_element:.2f}"
        special = "" if r.special_per_element is None else f"{r.special_per_element:.2f}"
        softplus = "" if r.softplus_per_element is None else f"{r.softplus_per_element:.2f}"
        access = "" if r.loads is None else f"{r.loads}, {r.stores}"
        cells.append(
            (r.label, number, special, softplus, access, str(r.registers), str(r.local), str(r.float64))
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def main() -> int:
    try:
        rows = table()
    except Missing as missing:
        print(f"sass: {missing}", file=sys.stderr)
        return 1
    print(show(rows))
    write(rows)
    print(f"{len(rows)} kernels for {ARCH}, nvcc {compiler()}: {TABLE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
