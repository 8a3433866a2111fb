"""The benchmark's plots, at the width of a README.

Colours: Okabe and Ito's, which colour-blind readers tell apart; the markers' shapes say the same in grey.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vaekernels.bench.cases import COPY, NAMES, OURS
from vaekernels.bench.measure import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot"]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#7F7F7F")
LOOKS = dict(zip(NAMES, zip(COLORS, ("o", "s", "^", "D", "v", ""), strict=True), strict=True))
WIDTH = 8.8  # inches; at 96 dots an inch about what a README has
TEXT = 8


def plot(rows: Sequence[Row], folder: Path, described: dict[str, str]) -> list[Path]:
    """Draws the plots that the rows suffice for and returns their files. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    most = max(r.threads for r in rows)
    both = [r for r in rows if r.direction == "both"]
    now = [r for r in both if r.threads == most]
    every: dict[str, tuple[Callable[[list[Row]], Figure], list[Row]]] = {
        "time-against-size": (_sizes, _series(now)),
        # Bars for the shapes of real models; of a quick run, which has none of these, for all.
        "speedup": (_speedups, [r for r in now if r.model] or now),
        "threads": (_threads, both if len({r.threads for r in both}) > 1 else []),
    }
    written = []
    for name, (draw, chosen) in every.items():
        if not chosen:
            continue
        with pyplot.rc_context({"font.size": TEXT, "svg.hashsalt": name}):
            figure = draw(chosen)
            figure.supxlabel(
                ", ".join(f"{key} {value}" for key, value in described.items() if value),
                fontsize=TEXT - 1.5,
                color="#555555",
                x=0.01,
                ha="left",
            )
            path = folder / f"{name}.svg"
            figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
        written.append(path)
    return written


def _figure(
    rows: int, columns: int, width: float, height: float, names: Sequence[str]
) -> tuple[Figure, list[list[Axes]]]:
    """Panels that share their axes, and above them the legend of the contenders, where it hides nothing."""
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    figure, grid = pyplot.subplots(
        rows, columns, figsize=(width, height), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axes in grid.flat:
        axes.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    handles = [Line2D([], [], label=_legend(name), **_line(name)) for name in names]
    if handles:
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    return figure, [list(line) for line in grid]


def _line(name: str) -> dict[str, Any]:
    color, marker = LOOKS[name]
    return {
        "color": color,
        "marker": marker,
        "markersize": 3.5,
        "linestyle": ":" if name == COPY else "-",
        "linewidth": 2.0 if name == OURS else 1.2,
    }


def _legend(name: str) -> str:
    return "copy of the same bytes (floor)" if name == COPY else name


def _names(rows: Sequence[Row]) -> list[str]:
    present = {r.contender for r in rows}
    return [name for name in NAMES if name in present]


def _panel(row: Row) -> tuple[str, str]:
    """Column and row: the op, and the dtype."""
    return row.op + (", packed" if "packed" in row.case else ""), row.dtype


def _series(rows: list[Row]) -> list[Row]:
    """What makes a line: panels of three sizes at least."""
    plain = [r for r in rows if not r.model]
    return [r for r in plain if len({o.numel for o in plain if _panel(o) == _panel(r)}) >= 3]


def _sizes(rows: list[Row]) -> Figure:
    columns = list(dict.fromkeys(_panel(r)[0] for r in rows))
    lines = list(dict.fromkeys(r.dtype for r in rows))
    names = _names(rows)
    figure, grid = _figure(len(lines), len(columns), WIDTH, 0.9 + 2.3 * max(len(lines), 1.4), names)
    for i, dtype in enumerate(lines):
        for j, column in enumerate(columns):
            axes = grid[i][j]
            chosen = [r for r in rows if _panel(r) == (column, dtype)]
            for name in names:
                points = sorted({r.numel: r for r in chosen if r.contender == name}.items())
                x = [numel for numel, _ in points]
                axes.plot(x, [r.median for _, r in points], **_line(name))
                low, high = [r.p20 for _, r in points], [r.p80 for _, r in points]
                axes.fill_between(x, low, high, color=LOOKS[name][0], alpha=0.15, linewidth=0)
            if i == 0:
                axes.set_title(column, fontsize=TEXT + 1)
            if i == len(lines) - 1:
                axes.set_xlabel("latent elements")
            if j == 0:
                axes.set_ylabel(f"{dtype}\nforward + backward (µs)")
    grid[0][0].set_xscale("log", base=2)
    grid[0][0].set_yscale("log")
    return figure


def _speedups(rows: list[Row]) -> Figure:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    dtypes = list(dict.fromkeys(r.dtype for r in rows))
    labels = list(dict.fromkeys(_bar(r) for r in rows))
    names = [name for name in _names(rows) if name not in (OURS, COPY)]
    figure, grid = _figure(1, len(dtypes), WIDTH, 0.36 * len(labels) + 1.3, [])
    height = 0.8 / len(names)
    for axes, dtype in zip(grid[0], dtypes, strict=True):
        times = {(_bar(r), r.contender): r.median for r in rows if r.dtype == dtype}
        for i, name in enumerate(names):
            factors = {y: times[label, name] / times[label, OURS] for y, label in enumerate(labels)
                       if (label, name) in times}  # fmt: skip
            # From 1, to the right where it is slower than ours and to the left where it is faster.
            axes.barh(
                [y + (i - (len(names) - 1) / 2) * height for y in factors],
                [factor - 1 for factor in factors.values()],
                left=1,
                height=0.9 * height,
                color=LOOKS[name][0],
                label=name,
            )
        axes.axvline(1, color="black", linewidth=1)
        axes.set_xscale("log")
        ticks = [0.2, 0.5, 1, 2, 5, 10, 20, 50]
        axes.set_xticks(ticks)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(dtype, fontsize=TEXT + 1)
        axes.set_xlabel("times as long as vaekernels takes\n(forward + backward; left of 1x: faster)")
        axes.grid(False, axis="y")
    lengths = [r.median / times for r in rows for times in [_ours(rows, r)] if r.contender in names]
    grid[0][0].set_xlim(min(0.9, 0.9 * min(lengths)), 1.15 * max(lengths))
    grid[0][0].set_yticks(range(len(labels)), labels)
    grid[0][0].set_ylim(len(labels) - 0.5, -0.5)
    handles, texts = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper center", ncols=len(names), frameon=False)
    return figure


def _ours(rows: Sequence[Row], row: Row) -> float:
    return next(r.median for r in rows if (r.op, r.case, r.contender) == (row.op, row.case, OURS))


def _bar(row: Row) -> str:
    """Without the dtype, which has a panel of its own."""
    case = row.case.replace(f" {row.dtype}", "")
    lines = [row.model, case if row.op == "sample_kl" else f"{row.op} {case}"]
    return "\n".join(filter(None, lines))


def _threads(rows: list[Row]) -> Figure:
    from matplotlib import pyplot

    counts = sorted({r.threads for r in rows})
    figure, grid = _figure(1, 1, WIDTH, 3.6, [])
    axes = grid[0][0]
    ours = [r for r in rows if r.contender == OURS]
    shades = pyplot.get_cmap("viridis")
    complete = [
        (numel, case)
        for numel, case in sorted({(r.numel, r.case) for r in ours if r.op == "sample_kl"})
        if {r.threads for r in ours if (r.case, r.op) == (case, "sample_kl")} == set(counts)
    ]
    for i, (numel, case) in enumerate(complete):
        times = {r.threads: r.median for r in ours if (r.case, r.op) == (case, "sample_kl")}
        axes.plot(
            counts,
            [times[counts[0]] / times[count] for count in counts],
            marker="os^Dv"[i % 5],
            color=shades(0.9 * i / max(1, len(complete) - 1)),
            label=f"{case} ({numel:,} elements)",
        )
    axes.plot(counts, [count / counts[0] for count in counts], color="#7F7F7F", linestyle=":", label="linear")
    axes.set_xticks(counts)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("threads")
    axes.set_ylabel("speedup over one thread\n(forward + backward)")
    figure.legend(loc="outside right center", frameon=False)
    return figure
