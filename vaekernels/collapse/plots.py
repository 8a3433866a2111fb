"""The plots of a report, drawn with matplotlib without its global state. Light background, 900 px wide."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from vaekernels.collapse.estimate import Estimate
from vaekernels.collapse.extras import Curve, Samples
from vaekernels.collapse.verdict import EPS_INFO, EPS_USE, Dim, State

__all__ = [
    "COLOURS",
    "aggregate_posterior",
    "bars",
    "curves",
    "image_grid",
    "likelihoods",
    "plane",
    "use_against_rate",
]

# Okabe & Ito's colours, told apart with every common colour blindness; in `use_against_rate` shapes differ
# too.
COLOURS: dict[State, str] = {
    "active": "#0072B2",
    "low-rate": "#56B4E9",
    "pruned": "#999999",
    "rate-only": "#E69F00",
    "encoder-only": "#D55E00",
    "memorised": "#CC79A7",
    "undetermined": "#F0E442",
}
_SHAPES: dict[State, str] = {
    "active": "o",
    "low-rate": "v",
    "pruned": "s",
    "rate-only": "D",
    "encoder-only": "^",
    "memorised": "P",
    "undetermined": "X",
}
_LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLES = ("-", "--", "-.", ":")
_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "svg.hashsalt": "vaekernels",  # the same picture has the same bytes
}
_WIDTH = 8.6  # inches; at 100 dots each they fit a page of 900 px with its margins
_BARS = 64
_GRID_DPI = 100


def bars(dims: Sequence[Dim]) -> str:
    """Rate, information and use of every dimension, coloured by state; of many, those with the highest
    rates."""
    shown = sorted(sorted(dims, key=lambda dim: -dim.rate.value)[:_BARS], key=lambda dim: dim.index)
    rows: list[tuple[str, float, list[Estimate | None]]] = [
        ("rate $r_d$", EPS_INFO, [dim.rate for dim in shown]),
        ("information $I_d$", EPS_INFO, [dim.information for dim in shown]),
        ("use $s_d$", EPS_USE, [dim.use for dim in shown]),
    ]
    rows = [row for row in rows if any(each is not None for each in row[2])]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 1.75 * len(rows) + 0.7), layout="constrained")
        axes = figure.subplots(len(rows), sharex=True, squeeze=False)[:, 0]
        places = range(len(shown))
        for axis, (label, threshold, estimates) in zip(axes, rows, strict=True):
            known = [each for each in estimates if each is not None]
            axis.bar(
                places,
                [each.value for each in known],
                color=[COLOURS[dim.state] for dim in shown],
                edgecolor="#444444",
                linewidth=0.6,
                yerr=_whiskers(known),
                error_kw={"elinewidth": 0.9, "ecolor": "#222222", "capsize": 2 if len(shown) <= 32 else 0},
            )
            axis.axhline(0, color="#222222", linewidth=0.8)
            axis.axhline(threshold, color="#555555", linestyle=":", linewidth=1)
            # What is far below the threshold must not look like something.
            axis.set_ylim(*_limits(known, threshold))
            axis.set_ylabel(f"{label}, nats")
        step = math.ceil(len(shown) / 32)
        axes[-1].set_xticks(places[::step], [str(dim.index) for dim in shown[::step]])
        axes[-1].set_xlabel("latent dimension")
        axes[-1].grid(axis="x", visible=False)
        states = [state for state in COLOURS if any(dim.state == state for dim in shown)]
        handles = [Patch(facecolor=COLOURS[state], edgecolor="#444444", label=state) for state in states]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
        return _svg(figure)


def use_against_rate(dims: Sequence[Dim]) -> str:
    """r_d against s_d with their intervals, both on a scale that is linear up to the thresholds."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 4.6), layout="constrained")
        axis = figure.subplots()
        for state, colour in COLOURS.items():
            some = [(dim.rate, dim.use, dim.index) for dim in dims if dim.state == state and dim.use]
            if not some:
                continue
            rates, uses = [rate for rate, _, _ in some], [use for _, use, _ in some]
            axis.errorbar(
                [rate.value for rate in rates],
                [use.value for use in uses],
                xerr=_whiskers(rates),
                yerr=_whiskers(uses),
                fmt=_SHAPES[state],
                color=colour,
                markeredgecolor="#333333",
                ecolor="#888888",
                elinewidth=0.8,
                markersize=7,
                label=state,
            )
        axis.set_xscale("symlog", linthresh=EPS_INFO)
        axis.set_yscale("symlog", linthresh=EPS_USE)
        low, high = _limits([dim.rate for dim in dims], EPS_INFO)
        axis.set_xlim(low, max(1.5 * high, 20 * EPS_INFO))
        low, high = _limits([dim.use for dim in dims if dim.use is not None], EPS_USE)
        axis.set_ylim(low, max(1.5 * high, 20 * EPS_USE))
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter("{x:g}")
        if len(dims) <= _BARS:
            _number(axis, dims)
        axis.axvline(EPS_INFO, color="#555555", linestyle=":", linewidth=1)
        axis.axhline(EPS_USE, color="#555555", linestyle=":", linewidth=1)
        axis.set_xlabel(f"rate $r_d$, nats (dotted: {EPS_INFO:g})")
        axis.set_ylabel(f"use $s_d$, nats (dotted: {EPS_USE:g})")
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
        return _svg(figure)


def _number(axis: Axes, dims: Sequence[Dim]) -> None:
    """The index beside every point; points that cover each other share a label."""
    labels: list[tuple[float, float, list[int]]] = []
    for dim in dims:
        if dim.use is None:
            continue
        x, y = axis.transData.transform((dim.rate.value, dim.use.value))
        for left, low, indices in labels:
            if abs(x - left) < 14 and abs(y - low) < 10:
                indices.append(dim.index)
                break
        else:
            labels.append((x, y, [dim.index]))
    for x, y, indices in labels:
        more = ", ..." if len(indices) > 6 else ""
        left, low = axis.transData.inverted().transform((x, y)).tolist()
        text = ", ".join(map(str, indices[:6])) + more
        axis.annotate(text, (left, low), xytext=(6, 5), textcoords="offset points", size=8)


def plane(
    points: Mapping[str, tuple[float, float]],
    others: Mapping[str, tuple[float, float]],
    *,
    unused: Collection[str] = (),
) -> str:
    """Rate against reconstruction NLL, with lines of equal NELBO, and a ring around the models that are
    ``unused``, whose decoder does not look at z."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 4.4), layout="constrained")
        axis = figure.subplots()
        for number, (name, (rate, nll)) in enumerate({**points, **others}.items()):
            mine = name in points
            axis.plot(
                rate,
                nll,
                marker="o^sDPX"[number % 6],
                color=_LINES[number % len(_LINES)],
                markeredgecolor="#333333",
                markersize=9 if mine else 7,
                linestyle="",
                label=f"{name}: {rate:.2f} + {nll:.1f} = {rate + nll:.1f}",
            )
            if name in unused:
                axis.plot(
                    rate,
                    nll,
                    marker="o",
                    color="none",
                    markeredgecolor="#D55E00",
                    markeredgewidth=2,
                    markersize=18,
                    linestyle="",
                    clip_on=False,
                )
                axis.annotate(
                    "z is not used", (rate, nll), xytext=(12, 10), textcoords="offset points", color="#D55E00"
                )
        _iso_elbo(axis, [*points.values(), *others.values()])
        axis.set_xlabel("rate, nats")
        axis.set_ylabel("NLL given z, nats")
        axis.legend(title="rate + NLL = NELBO", loc="center left", bbox_to_anchor=(1.02, 0.5))
        return _svg(figure)


def _iso_elbo(axis: Axes, points: Sequence[tuple[float, float]]) -> None:
    rates, nlls = zip(*points, strict=True)
    width = max(max(rates) * 1.15, 0.5)
    margin = max((max(nlls) - min(nlls)) * 0.2, 0.5 * width)
    low, high = min(nlls) - margin, max(nlls) + margin
    axis.set_xlim(-0.04 * width, width)
    axis.set_ylim(low, high)
    for nelbo in MaxNLocator(8).tick_values(low, high + width):
        axis.plot([0, width], [nelbo, nelbo - width], color="#bbbbbb", linewidth=0.8, zorder=0)
        rate = max(0.0, nelbo - high)
        if low < nelbo - rate - 0.03 * (high - low) and rate < 0.9 * width:
            axis.annotate(
                f"{nelbo:.4g}",
                (rate, nelbo - rate),
                xytext=(3, -10),
                textcoords="offset points",
                size=7,
                color="#777777",
            )


def likelihoods(samples: Samples) -> str:
    """Histograms of NLL with the example's own z, a shuffled one and one of the prior."""
    labels = {"own": "own z", "shuffled": "another example's z", "prior": "z from the prior"}
    shown = {labels[name]: samples.nll[name] for name in labels if name in samples.nll}
    every = torch.cat(list(shown.values()))
    low, high = torch.quantile(every, torch.tensor([0.002, 0.995], dtype=every.dtype)).tolist()
    span = max(high - low, 1e-6)
    edges = torch.linspace(low - 0.02 * span, high + 0.02 * span, 61).tolist()
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 3.4), layout="constrained")
        axis = figure.subplots()
        for (label, values), colour, style in zip(shown.items(), _LINES, _STYLES, strict=False):
            axis.hist(
                values.clamp(edges[0], edges[-1]).tolist(),
                bins=edges,
                histtype="step",
                color=colour,
                linestyle=style,
                linewidth=1.6,
                label=f"{label}, mean {values.mean().item():.2f}",
            )
        axis.set_xlabel("NLL, nats per example (the outermost bars hold what lies beyond)")
        axis.set_ylabel("examples")
        axis.legend()
        return _svg(figure)


def aggregate_posterior(samples: Samples, dims: Sequence[Dim]) -> str:
    """The distribution of z_d over examples beside N(0, 1)."""
    columns = min(4, len(samples.shown))
    rows = math.ceil(len(samples.shown) / columns)
    edges = torch.linspace(-4, 4, 41)
    centres = torch.linspace(-4, 4, 161)
    normal = torch.exp(-0.5 * centres.square()) / math.sqrt(2 * math.pi)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 1.5 * rows + 0.6), layout="constrained")
        axes = figure.subplots(rows, columns, sharex=True, squeeze=False)
        for place, axis in enumerate(axes.flat):
            if place >= len(samples.shown):
                axis.set_visible(False)
                continue
            index = samples.shown[place]
            axis.hist(
                samples.z[:, place].clamp(-3.999, 3.999).tolist(),
                bins=edges.tolist(),
                density=True,
                histtype="stepfilled",  # one shape instead of one for each bar: half the time of the page
                color=COLOURS[dims[index].state],
                alpha=0.75,
            )
            axis.plot(centres.tolist(), normal.tolist(), color="#111111", linewidth=1)
            axis.set_title(f"dim {index}: {dims[index].state}", size=9)
            axis.set_yticks([])
            axis.grid(visible=False)
        figure.supxlabel("$z_d$ (line: the prior; the outermost bars hold what lies beyond)", size=9)
        return _svg(figure)


def curves(panels: Mapping[str, Mapping[str, Curve]]) -> str:
    """One panel a title, two in a row."""
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 2.1 * rows + 0.4), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        titled = list(panels.items())
        for place, axis in enumerate(axes.flat):
            if place >= len(titled):
                axis.set_visible(False)
                continue
            title, lines = titled[place]
            for number, (name, line) in enumerate(lines.items()):
                axis.plot(
                    list(line.steps),
                    list(line.values),
                    color=_LINES[number % len(_LINES)],
                    linestyle=_STYLES[number % len(_STYLES)],
                    label=name,
                    marker="." if len(line.values) < 40 else "",
                )
            axis.set_title(title)
            axis.set_xlabel("step")
            if len(lines) > 1 or (lines and "" not in lines):
                axis.legend(fontsize=8)
        return _svg(figure)


def image_grid(title: str, grid: Tensor) -> str:
    """[rows, columns, H, W] or [rows, columns, C, H, W], values in [0, 1]; a PNG."""
    if grid.dim() == 4:
        grid = grid.unsqueeze(2)
    if grid.dim() != 5 or grid.shape[2] not in (1, 3) or 0 in grid.shape:
        raise ValueError(
            f"images[{title!r}] must be [rows, columns, H, W] or [rows, columns, C, H, W] with C 1 or 3, got "
            f"{list(grid.shape)}"
        )
    rows, columns, _, height, width = grid.shape
    gap = max(1, height // 14)
    # White between the images, and every pixel at least two wide, so that small ones can be seen.
    sheet = torch.ones(3, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for row in range(rows):
        for column in range(columns):
            top, left = row * (height + gap), column * (width + gap)
            sheet[:, top : top + height, left : left + width] = grid[row, column].float().cpu().clamp(0, 1)
    zoom = max(1, min(6, int(860 / sheet.shape[2])))
    sheet = sheet.repeat_interleave(zoom, dim=1).repeat_interleave(zoom, dim=2)
    figure = Figure(
        figsize=(sheet.shape[2] / _GRID_DPI, sheet.shape[1] / _GRID_DPI), dpi=_GRID_DPI, frameon=False
    )
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis("off")
    axis.imshow(sheet.permute(1, 2, 0).tolist(), interpolation="nearest", aspect="auto")
    return _encoded(figure, "png")


def _limits(estimates: Sequence[Estimate], threshold: float) -> tuple[float, float]:
    """Of an axis with all intervals and the threshold on it."""
    low, high = min(each.low for each in estimates), max(each.high for each in estimates)
    high = max(1.06 * high, 2 * threshold)
    return min(1.06 * low, -0.01 * high, -0.2 * threshold), high


def _whiskers(estimates: Sequence[Estimate]) -> Any:
    """How far the ends lie from the estimates, never negative."""
    return [
        [max(0.0, each.value - each.low) for each in estimates],
        [max(0.0, each.high - each.value) for each in estimates],
    ]


def _svg(figure: Figure) -> str:
    return _encoded(figure, "svg")


def _encoded(figure: Figure, kind: str) -> str:
    """As the address of an image inside a page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    mime = {"svg": "image/svg+xml", "png": "image/png"}[kind]
    return f"data:{mime};base64,{base64.b64encode(buffer.getvalue()).decode()}"
