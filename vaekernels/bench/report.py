"""From measurements to what people look at: CSV, Markdown, and the change since another run."""

from __future__ import annotations

import csv
import io
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

import vaekernels as vk
from vaekernels._files import open_regular, write_atomically
from vaekernels.bench.cases import COPY, NAMES, OURS
from vaekernels.bench.measure import Row

__all__ = ["compare", "machine", "memory", "read_csv", "table", "write_csv"]


def machine(device: torch.device) -> dict[str, str]:
    """What a timing depends on besides the code."""
    driver = ""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        driver = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    else:
        name = _cpu_name() or platform.processor() or platform.machine()
    folder = Path(__file__).resolve().parent
    kernels = vk._native.C.build_info()["cpu_isa"] if vk._native.C is not None else "reference"
    return {
        "device": name,
        "driver": driver,
        "kernels": kernels,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "vaekernels": vk.__version__,
        "commit": _output(["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]) or "unknown",
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


# ---- CSV -------------------------------------------------------------------------------------------------


def write_csv(path: Path, rows: Sequence[Any], described: dict[str, str]) -> None:
    """A line for each row, a `Row` or another dataclass, and behind it what the timings depend on."""
    text = io.StringIO()
    writer = csv.DictWriter(
        text, [*(f.name for f in fields(rows[0] if rows else Row)), *described], lineterminator="\n"
    )
    writer.writeheader()
    for row in rows:
        values = {k: round(v, 2) if isinstance(v, float) else v for k, v in asdict(row).items()}
        writer.writerow(values | described)
    write_atomically(path, text.getvalue())


R = TypeVar("R", bound=Row)
# The types that fields of a row have, as their annotations are written.
_CELLS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "int | None": lambda cell: int(cell) if cell else None,
    "float | None": lambda cell: float(cell) if cell else None,
}


def read_csv(path: Path, kind: type[R] = Row) -> list[R]:  # type: ignore[assignment]
    """The rows of a file that `write_csv` wrote. ValueError names what is wrong with another one."""
    columns = {f.name: _CELLS[str(f.type)] for f in fields(kind)}
    with open_regular(path) as opened, io.TextIOWrapper(opened, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in columns if name not in (reader.fieldnames or [])]
        if missing:
            raise ValueError(f"{path} has no column {missing[0]!r}; it must be a file written by --csv")
        rows = []
        for line, cells in enumerate(reader, start=2):
            try:
                rows.append(kind(**{name: cell(cells[name]) for name, cell in columns.items()}))
            except (ValueError, TypeError) as error:  # TypeError: of a line that is too short
                raise ValueError(f"{path}, line {line}: {error}") from error
    return rows


# ---- text ------------------------------------------------------------------------------------------------


def table(rows: Iterable[Row], direction: str = "both") -> str:
    """Markdown: microseconds, and in brackets how many times ours that is. Bold: faster than ours."""
    chosen = [r for r in rows if r.direction == direction]
    names = [n for n in NAMES if any(r.contender == n for r in chosen)]
    cells = {(_label(r), r.contender): r.median for r in chosen}
    heading = {"both": "forward + backward"}.get(direction, direction)
    lines = [f"| {heading} | " + " | ".join(f"{name} (µs)" for name in names) + " |"]
    lines.append("| --- |" + " ---: |" * len(names))
    for label in dict.fromkeys(_label(r) for r in chosen):
        ours = cells[label, OURS]
        entries = []
        for name in names:
            time = cells.get((label, name))
            if time is None:
                entries.append("")
            elif name == OURS:
                entries.append(f"{time:,.0f}")
            else:
                entry = f"{time:,.0f} ({time / ours:.1f}x)"
                entries.append(f"**{entry}**" if time < ours and name != COPY else entry)
        lines.append(f"| {label} | " + " | ".join(entries) + " |")
    return "\n".join(lines)


def memory(rows: Iterable[Row]) -> str:
    """Markdown: bytes per latent element, at the peak above the inputs; in brackets, kept for backward."""
    chosen = [r for r in rows if r.direction == "both" and r.peak_bytes is not None]
    names = [n for n in NAMES if any(r.contender == n for r in chosen)]
    cells = {(_label(r), r.contender): r for r in chosen}
    lines = ["| bytes per element: peak (saved) | " + " | ".join(names) + " |"]
    lines.append("| --- |" + " ---: |" * len(names))
    for label in dict.fromkeys(_label(r) for r in chosen):
        entries = []
        for name in names:
            row = cells.get((label, name))
            if row is None or row.peak_bytes is None or row.saved_bytes is None:
                entries.append("")
            else:
                entries.append(f"{row.peak_bytes / row.numel:.1f} ({row.saved_bytes / row.numel:.1f})")
        lines.append(f"| {label} | " + " | ".join(entries) + " |")
    return "\n".join(lines)


def _label(row: Row) -> str:
    op = "" if row.op == "sample_kl" else f"{row.op} "
    return f"{op}{row.case}" + (f" ({row.model})" if row.model else "")


def compare(rows: Sequence[Row], earlier: Sequence[Row]) -> str:
    """How the medians of our own layers moved since `earlier`, measured against eager in the same run.

    The machine's speed drops out of the quotient ours / eager, so that runs on different days compare.
    """

    def relative(found: Sequence[Row]) -> dict[tuple[str, ...], float]:
        eager = {(r.op, r.case, r.direction, r.threads): r.median for r in found if r.contender == "eager"}
        return {
            (r.op, r.case, r.direction, str(r.threads)): r.median
            / eager[r.op, r.case, r.direction, r.threads]
            for r in found
            if r.contender == OURS and (r.op, r.case, r.direction, r.threads) in eager
        }

    now, then = relative(rows), relative(earlier)
    shared = [key for key in now if key in then]
    if not shared:
        return "no measurement in common with the earlier file"
    lines = ["| time over eager's | earlier | now | change |", "| --- | ---: | ---: | ---: |"]
    for key in shared:
        change = now[key] / then[key] - 1
        lines.append(f"| {' '.join(key[:3])} | {then[key]:.3f} | {now[key]:.3f} | {100 * change:+.0f} % |")
    middle = statistics.median(now[key] / then[key] for key in shared)
    lines.append(f"| median of {len(shared)} | | | {100 * (middle - 1):+.0f} % |")
    return "\n".join(lines)
