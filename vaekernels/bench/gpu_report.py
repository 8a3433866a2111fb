"""From measurements on a GPU to a Markdown page and a plot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vaekernels.bench.gpu import COPY, GpuRow

OURS, EAGER, COMPILED, TUNED, TRITON = (
    "vaekernels", "eager", "torch.compile", "torch.compile max-autotune", "triton",
)  # fmt: skip
CONTENDERS = [OURS, EAGER, COMPILED, TUNED, TRITON, COPY]
COLORS = dict(
    zip(CONTENDERS, ["#0072B2", "#D55E00", "#009E73", "#56B4E9", "#CC79A7", "#7F7F7F"], strict=True)
)
HEADINGS = {"both": "forward + backward", "forward": "forward", "backward": "backward"}
CLOCKS = {
    ("graph", "cold"): "Device time, CUDA graph, cold cache",
    ("graph", "hot"): "Device time, CUDA graph, hot cache",
    ("queue", "cold"): "Device time, plain calls, cold cache",
    ("wall", "hot"): "Wall time of plain calls",
}
MUCH_TRAFFIC = 64 * 2**20


class Goal(NamedTuple):
    asked: str
    found: str
    met: bool | None  # None: not measured


def chosen(rows: Iterable[GpuRow], **fields: Any) -> list[GpuRow]:
    return [row for row in rows if all(getattr(row, name) == value for name, value in fields.items())]


def compared(rows: Iterable[GpuRow]) -> list[GpuRow]:
    """The measurements to compare two runs by: graphs, whose clock is the device's, with a cold cache."""
    return chosen(rows, clock="graph", cache="cold")


def label(row: GpuRow) -> str:
    return ("" if row.op == "sample_kl" else f"{row.op} ") + row.case


def microseconds(time: float) -> str:
    return f"{time:,.0f}" if time >= 100 else f"{time:.1f}"


# ---- text ------------------------------------------------------------------------------------------------


def table(rows: Sequence[GpuRow], direction: str, clock: str, cache: str) -> str:
    """Markdown: microseconds; ours with the share of the copy's bandwidth, others with how many times ours.

    Bold: faster than ours.
    """
    found = chosen(rows, direction=direction, clock=clock, cache=cache)
    names = [name for name in CONTENDERS if any(row.contender == name for row in found)]
    times = {(label(row), row.contender): row for row in found}
    lines = [f"| {HEADINGS[direction]} | " + " | ".join(f"{name} (µs)" for name in names) + " |"]
    lines.append("| --- |" + " ---: |" * len(names))
    for case in dict.fromkeys(label(row) for row in found):
        ours = times.get((case, OURS))
        cells = []
        for name in names:
            row = times.get((case, name))
            if row is None:
                cells.append("")
            elif name == OURS:
                share = "" if row.copy_percent is None else f" ({row.copy_percent:.0f} % of copy)"
                cells.append(microseconds(row.median) + share)
            elif name == COPY or ours is None:
                cells.append(microseconds(row.median))
            else:
                cell = f"{microseconds(row.median)} ({row.median / ours.median:.1f}x)"
                cells.append(f"**{cell}**" if row.median < ours.median else cell)
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def facts_table(rows: Sequence[GpuRow]) -> str:
    """Launches forward and backward, and the peak of memory above the inputs."""
    found = [row for row in chosen(rows, clock="wall") if row.contender != COPY]
    names = [name for name in CONTENDERS if any(row.contender == name for row in found)]
    by = {(label(row), row.contender, row.direction): row for row in found}
    lines = ["| launches forward + backward; peak MiB | " + " | ".join(names) + " |"]
    lines.append("| --- |" + " ---: |" * len(names))
    for case in dict.fromkeys(label(row) for row in found):
        cells = []
        for name in names:
            each = [by.get((case, name, d)) for d in ("forward", "backward", "both")]
            counts = ["?" if row is None or row.launches is None else str(row.launches) for row in each[:2]]
            peak = each[2].peak_bytes if each[2] is not None else None
            cells.append(" + ".join(counts) + ("" if peak is None else f"; {peak / 2**20:,.1f}"))
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def quotients(
    rows: Sequence[GpuRow], others: Sequence[str], direction: str, clock: str, cache: str
) -> dict[str, float]:
    """For each case, how many times our time the fastest of `others` takes."""
    found = chosen(rows, direction=direction, clock=clock, cache=cache)
    ours = {label(row): row.median for row in found if row.contender == OURS}
    best: dict[str, float] = {}
    for row in found:
        if row.contender in others and label(row) in ours:
            factor = row.median / ours[label(row)]
            best[label(row)] = min(factor, best.get(label(row), factor))
    return best


def _least(asked: str, found: dict[str, float], limit: float, unit: str) -> Goal:
    if not found:
        return Goal(asked, "not measured", None)
    case = min(found, key=found.__getitem__)
    return Goal(asked, f"{found[case]:.2f}{unit} at {case}", found[case] >= limit)


def goals(rows: Sequence[GpuRow]) -> list[Goal]:
    """What the kernels are meant to reach, and the worst case found."""
    shares = {
        f"{label(row)}, {row.direction}": row.copy_percent
        for row in rows
        if row.contender == OURS and row.clock == "queue" and row.direction != "both"
        and row.bytes_moved >= MUCH_TRAFFIC and row.copy_percent is not None
    }  # fmt: skip
    million = {label(row) for row in rows if row.numel >= 10**6}
    compiled = quotients(rows, (COMPILED, TUNED), "both", "graph", "cold")
    eager = quotients(rows, (EAGER,), "both", "graph", "cold")
    walls = {
        f"{case}, {direction}": factor
        for direction in ("forward", "both")
        for case, factor in quotients(rows, (EAGER,), direction, "wall", "hot").items()
        if case.startswith("128x32 ")
    }
    launches = {
        f"{label(row)}, {row.direction}": row.launches
        for row in rows
        if row.contender == OURS and row.direction != "both" and row.launches is not None
    }
    several = {case: n for case, n in launches.items() if n != 1}
    if not launches:
        one = Goal("one kernel forward and one backward", "not measured", None)
    else:
        first = next((f"{n} at {case}" for case, n in several.items()), "1 everywhere")
        one = Goal("one kernel forward and one backward", first, not several)
    return [
        _least("92 % of the copy's bandwidth where 64 MiB or more move", shares, 92, " %"),
        _least(
            "1.6 times torch.compile forward + backward from a million elements on",
            {case: factor for case, factor in compiled.items() if case in million}, 1.6, "x",
        ),
        _least("3 times eager forward + backward at every size", eager, 3, "x"),
        _least("a plain call of 128x32 in half of eager's wall time", walls, 2, "x"),
        one,
    ]  # fmt: skip


def goals_table(found: Sequence[Goal]) -> str:
    words = {True: "yes", False: "no", None: "not measured"}
    lines = ["| asked | worst found | reached |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {g.asked} | {g.found} | {words[g.met]} |" for g in found)])


def page(rows: Sequence[GpuRow], described: dict[str, str], left_out: Sequence[str]) -> str:
    """The whole report, with the table for the README first."""
    parts = [", ".join(f"{key} {value}" for key, value in described.items() if value)]
    for (clock, cache), title in CLOCKS.items():
        tables = [
            table(rows, direction, clock, cache)
            for direction in HEADINGS
            if chosen(rows, direction=direction, clock=clock, cache=cache)
        ]
        if tables:
            parts += [f"## {title}", *tables]
    if rows:
        parts += ["## Launches and memory", facts_table(rows), "## Goals", goals_table(goals(rows))]
    if left_out:
        parts += ["## Left out", "\n".join(f"- {line}" for line in left_out)]
    return "\n\n".join(parts) + "\n"


# ---- plot ------------------------------------------------------------------------------------------------


def plot(rows: Sequence[GpuRow], path: Path, described: dict[str, str]) -> None:
    """Times of the contenders over ours, and the share of the copy's bandwidth. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    height = 1.6 + 0.55 * max(len({label(r) for r in rows if r.dtype == d}) for d in dtypes)
    figure, grid = pyplot.subplots(
        2, len(dtypes), figsize=(7.5 * len(dtypes), 1.6 * height), squeeze=False, layout="constrained",
        gridspec_kw={"height_ratios": [1.0, 0.6]},
    )  # fmt: skip
    for column, dtype in enumerate(dtypes):
        of = chosen(rows, dtype=dtype, cache="cold")
        _bars(grid[0][column], dtype, chosen(of, direction="both", clock="graph"))
        _shares(grid[1][column], chosen(of, contender=OURS, clock="queue"))
    found: dict[str, Any] = {}
    for axes in grid[0]:
        handles, names = axes.get_legend_handles_labels()
        found |= dict(zip(names, handles, strict=True))
    if found:
        figure.legend(list(found.values()), list(found), loc="outside upper center", ncols=5, frameon=False)
    figure.supxlabel(", ".join(filter(None, described.values())), fontsize=7, color="#555555")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _cases(axes: Any, rows: Sequence[GpuRow], dtype: str) -> list[str]:
    cases = list(dict.fromkeys(label(row) for row in rows))
    axes.set_yticks(range(len(cases)), [case.replace(f" {dtype}", "") for case in cases], fontsize=8)
    axes.invert_yaxis()
    axes.grid(True, axis="x", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return cases


def _bars(axes: Any, dtype: str, rows: Sequence[GpuRow]) -> None:
    cases = _cases(axes, rows, dtype)
    ours = {label(row): row.median for row in rows if row.contender == OURS}
    names = [name for name in CONTENDERS[1:] if any(row.contender == name for row in rows)]
    height = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        known = {label(row): row.median for row in rows if row.contender == name and label(row) in ours}
        places = [cases.index(case) + (i - (len(names) - 1) / 2) * height for case in known]
        factors = [known[case] / ours[case] for case in known]
        axes.barh(places, factors, height=height, color=COLORS[name], label=name)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks(ticks := [0.5, 1, 2, 5, 10, 20, 50], [f"{tick:g}" for tick in ticks])
    axes.set_xlim(left=0.4)
    axes.set_title(f"{dtype}, forward + backward", fontsize=10)
    axes.set_xlabel("device time over vaekernels' (left of 1: faster)", fontsize=9)


def _shares(axes: Any, rows: Sequence[GpuRow]) -> None:
    cases = _cases(axes, rows, rows[0].dtype if rows else "")
    for i, (direction, color) in enumerate((("forward", "#0072B2"), ("backward", "#56B4E9"))):
        known = {label(r): r.copy_percent for r in rows if r.direction == direction and r.copy_percent}
        places = [cases.index(case) + (i - 0.5) * 0.4 for case in known]
        axes.barh(places, list(known.values()), height=0.4, color=color)
    axes.axvline(100, color="black", linewidth=1)
    axes.axvline(92, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("vaekernels, forward (dark) and backward (light): % of a copy's bandwidth", fontsize=9)
