"""From measurements to what people look at: CSV, Markdown, pictures, and the change since another run."""

from __future__ import annotations

import csv
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

import vaekernels as vk
from vaekernels.bench.measure import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["compare", "machine", "plot", "read_csv", "table", "write_csv"]

OURS = "vaekernels"
COLORS = {
    OURS: "#0072B2",
    "eager": "#D55E00",
    "torch.compile": "#009E73",
    "torch.distributions": "#CC79A7",
    "diffusers": "#E69F00",
    "copy": "#7F7F7F",
}


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


def write_csv(path: Path, rows: Sequence[Row], described: dict[str, str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*(f.name for f in fields(rows[0] if rows else Row)), *described])
        writer.writeheader()
        for row in rows:
            values = {k: round(v, 2) if isinstance(v, float) else v for k, v in asdict(row).items()}
            writer.writerow(values | described)


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
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [name for name in columns if name not in (reader.fieldnames or [])]
        if missing:
            raise ValueError(f"{path} has no column {missing[0]!r}; it must be a file written by --csv")
        rows = []
        for line, cells in enumerate(reader, start=2):
            try:
                rows.append(kind(**{name: cell(cells[name]) for name, cell in columns.items()}))
            except ValueError as error:
                raise ValueError(f"{path}, line {line}: {error}") from error
    return rows


# ---- text ------------------------------------------------------------------------------------------------


def table(rows: Iterable[Row], direction: str = "both") -> str:
    """Markdown: microseconds, and in brackets how many times ours that is. Bold: faster than ours."""
    chosen = [r for r in rows if r.direction == direction]
    names = [n for n in COLORS if any(r.contender == n for r in chosen)]
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
                entries.append(f"**{entry}**" if time < ours and name != "copy" else entry)
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


# ---- pictures --------------------------------------------------------------------------------------------


def plot(rows: Sequence[Row], folder: Path, described: dict[str, str]) -> list[Path]:
    """Writes the pictures that the rows suffice for and returns their files. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    most = max(r.threads for r in rows)
    pictures = {
        "time-against-size": (_plot_sizes, [r for r in rows if not r.model and r.threads == most]),
        "speedup": (_plot_speedups, [r for r in rows if r.direction == "both" and r.threads == most]),
        "threads": (_plot_threads, [r for r in rows if r.direction == "both"]),
    }
    for name, (draw, chosen) in pictures.items():
        if name == "threads" and len({r.threads for r in chosen}) < 2:
            continue
        if not chosen:
            continue
        figure = draw(chosen)
        figure.text(0.01, 0.005, ", ".join(filter(None, described.values())), fontsize=7, color="#555555")
        path = folder / f"{name}.svg"
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
        pyplot.close(figure)
        written.append(path)
    return written


def _style(axes: Axes) -> None:
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _plot_sizes(rows: list[Row]) -> Any:
    from matplotlib import pyplot

    panels = [
        (op, dtype)
        for op in ("sample_kl", "reparameterize", "gaussian_kl")
        for dtype in ("float32", "bfloat16")
        if len({r.numel for r in rows if r.op == op and r.dtype == dtype and r.direction == "both"}) >= 3
    ]
    if not panels:
        panels = [(rows[0].op, rows[0].dtype)]
    figure, grid = pyplot.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 3.8), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (op, dtype) in zip(grid[0], panels, strict=True):
        _style(axes)
        for name, color in COLORS.items():
            points = sorted(
                {r.numel: r for r in rows if r.contender == name and r.op == op and r.dtype == dtype
                 and r.direction == "both"}.items()
            )  # fmt: skip
            if not points:
                continue
            x = [numel for numel, _ in points]
            axes.plot(
                x,
                [r.median for _, r in points],
                color=color,
                label="copy of the same bytes (floor)" if name == "copy" else name,
                marker="o",
                markersize=3,
                linestyle=":" if name == "copy" else "-",
                linewidth=2.2 if name == OURS else 1.4,
            )
            axes.fill_between(
                x, [r.p20 for _, r in points], [r.p80 for _, r in points], color=color, alpha=0.15, lw=0
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(f"{op}, {dtype}", fontsize=10)
        axes.set_xlabel("latent elements")
    grid[0][0].set_ylabel("forward + backward (µs)")
    grid[0][0].legend(fontsize=8, frameon=False)
    return figure


def _plot_speedups(rows: list[Row]) -> Any:
    from matplotlib import pyplot

    labels = list(dict.fromkeys(_label(r) for r in rows))
    times = {(_label(r), r.contender): r.median for r in rows}
    names = [n for n in COLORS if n not in (OURS, "copy") and any(r.contender == n for r in rows)]
    figure, axes = pyplot.subplots(figsize=(8, 0.34 * len(labels) + 1.2), layout="constrained")
    _style(axes)
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        known = [(y, times[label, name] / times[label, OURS]) for y, label in enumerate(labels)
                 if (label, name) in times]  # fmt: skip
        axes.barh(
            [y + (i - (len(names) - 1) / 2) * height for y, _ in known],
            [factor for _, factor in known],
            height=height,
            color=COLORS[name],
            label=name,
        )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("times slower than vaekernels, forward + backward (left of 1: faster)")
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    return figure


def _plot_threads(rows: list[Row]) -> Any:
    from matplotlib import pyplot

    counts = sorted({r.threads for r in rows})
    figure, axes = pyplot.subplots(figsize=(5.2, 3.8), layout="constrained")
    _style(axes)
    sizes = sorted({(r.numel, r.case) for r in rows if r.contender == OURS})
    shades = pyplot.get_cmap("viridis")
    for i, (numel, case) in enumerate(sizes):
        times = {r.threads: r.median for r in rows if r.case == case and r.contender == OURS}
        if set(times) != set(counts):
            continue
        color = shades(0.9 * i / max(1, len(sizes) - 1))
        axes.plot(counts, [times[counts[0]] / times[c] for c in counts], marker="o", color=color,
                  label=f"{case} ({numel:,})")  # fmt: skip
    axes.plot(counts, [c / counts[0] for c in counts], color="#999999", linestyle=":", label="linear")
    axes.set_xticks(counts)
    axes.set_xlabel("threads")
    axes.set_ylabel("speedup over one thread")
    axes.legend(fontsize=8, frameon=False)
    return figure
