"""The picture of what the gradients tell: their flow by depth, and the update ratios over the steps."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loopwright.errors import ConfigError
from loopwright.inspecting.rules_of_size import LARGE
from loopwright.pictures import figure_class, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

    from loopwright.inspecting.diagnosis import Evidence, Finding, Layer

_USUAL = 1e-3, 1e-4, 1e-2  # the rule of thumb for update ratios, and a decade to either side
_LINES = 6  # inspections that are drawn by depth
_WRONG = "#b3261e"
_NAMED = 24  # layers whose names fit under the axis
_LEGEND: Mapping[str, Any] = {"fontsize": 8, "framealpha": 0.8, "edgecolor": "none"}  # pale where it lies over a line


def draw(evidence: Evidence, findings: Sequence[Finding], path: str | os.PathLike[str]) -> None:
    """Draw the picture into a file.

    Args:
        evidence: The inspections.
        findings: What is wrong; it is marked, and said under the picture.
        path: The file. Its suffix says the format; without one, ``.png`` is added. Its folder is made if need be.

    Raises:
        ConfigError: matplotlib is not installed, cannot write this format, or there is nothing to draw.
    """
    figure_of = figure_class("gradients")
    from matplotlib import colormaps

    layers = [la for la in evidence.layers if any(p.trainable or p.group >= 0 for p in la.parameters)]
    if not layers or not evidence.inspections:
        raise ConfigError(
            "there are no gradients to draw",
            why="no step was inspected, or nothing in the model got a gradient",
            fix="plot after a fit with the inspector in callbacks=",
        )
    said = _said(findings)
    figure = figure_of(figsize=(11, 4.4 + 0.2 * said.count("\n")), dpi=110)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.08)
    wrong = {name for finding in findings for name in (finding.layer, *finding.others)}
    grows = any(finding.rule == "exploding" for finding in findings)
    left, right = figure.subplots(1, 2, width_ratios=[1.1, 1.0])
    signals = [evidence.signal(layer)[0] for layer in layers]
    steps = [one.step for one in evidence.inspections]
    _flow(left, layers, steps, wrong, colormaps["Blues"], signals=signals if grows else [])
    _ratios(right, layers, steps, wrong, colormaps["viridis"])
    figure.supxlabel(said, x=0.01, ha="left", fontsize=9, color=_WRONG if findings else "#3f9b57", parse_math=False)
    save_figure(figure, path)


def _said(findings: Sequence[Finding]) -> str:
    if not findings:
        return "no finding"
    lines = [textwrap.wrap(f"{f.head}: {f.seen}", 150)[:2] for f in findings[:3]]
    more = [f"and {len(findings) - 3} more"] if len(findings) > 3 else []
    return "\n".join([line for found in lines for line in found] + more)


def _flow(
    ax: Axes,
    layers: Sequence[Layer],
    steps: Sequence[int],
    wrong: set[str],
    colors: Colormap,
    *,
    signals: Sequence[float],
) -> None:
    """The gradient's norm by depth, a line for each of some inspections, the newest the darkest."""
    count = len(steps)
    drawn = sorted({round(k * (count - 1) / max(1, _LINES - 1)) for k in range(_LINES)})
    places = range(len(layers))
    none = set()
    for number, t in enumerate(drawn):
        norms = [_positive(la.numbers[t].grad) for la in layers]
        none |= {i for i, norm in enumerate(norms) if math.isnan(norm)} if t == drawn[-1] else set()
        color = colors(0.3 + 0.65 * number / max(1, len(drawn) - 1))
        ax.plot(places, norms, "o-", color=color, markersize=4.0, linewidth=1.5, label=f"step {steps[t]}")
    if none:
        height = [0.02] * len(none)
        ax.plot(
            sorted(none),
            height,
            "x",
            color=_WRONG,
            transform=ax.get_xaxis_transform(),
            label="none, zero or not finite",
        )
    arriving = [_positive(size) for size in signals]
    if sum(not math.isnan(size) for size in arriving) > 1:
        label = f"one bias's share, step {steps[0]}"
        ax.plot(places, arriving, "s:", color=_WRONG, markersize=3.5, linewidth=1.5, label=label)
    for i, layer in enumerate(layers):
        if layer.name in wrong:
            ax.axvspan(i - 0.4, i + 0.4, color=_WRONG, alpha=0.08, linewidth=0)
    ax.set_yscale("log")
    ax.set_title("gradient norm by depth", fontsize=11)
    ax.set_xlabel("layer, in the order of the forward pass")
    if len(layers) <= _NAMED:
        ax.set_xticks(list(places), [_short(la.name) for la in layers], rotation=55, ha="right", fontsize=8)
    _plain(ax)
    ax.legend(**_LEGEND, ncols=2)


def _ratios(ax: Axes, layers: Sequence[Layer], steps: Sequence[int], wrong: set[str], colors: Colormap) -> None:
    """The update ratio of each layer over the steps, coloured by depth, and the range that is usual."""
    from matplotlib.ticker import MaxNLocator

    usual, low, high = _USUAL
    ax.axhspan(low, high, color="#3f9b57", alpha=0.1, linewidth=0)
    ax.axhline(usual, color="#3f9b57", linewidth=1.0, linestyle="--")
    ratios: list[float] = []
    for i, layer in enumerate(layers):
        own = [_positive(n.ratio) for n in layer.numbers]
        ratios += [r for r in own if not math.isnan(r)]
        bad = layer.name in wrong
        color = _WRONG if bad else colors(0.05 + 0.85 * i / max(1, len(layers) - 1))
        named = f"layer {_short(layer.name)}" if i in (0, len(layers) - 1) or (bad and len(wrong) <= 3) else None
        width = 2.0 if bad else 1.3
        ax.plot(steps, own, "o-", color=color, markersize=3.0, linewidth=width, label=named, alpha=0.9)
    still = [t for i, t in enumerate(steps) if any(la.numbers[i].update == 0 for la in layers)]
    if still:
        foot = ax.get_xaxis_transform()
        ax.plot(still, [0.02] * len(still), "x", color=_WRONG, transform=foot, label="a layer did not move")
    ax.set_xlim(steps[0] - 0.03 * (steps[-1] - steps[0] + 1), steps[-1] + 0.03 * (steps[-1] - steps[0] + 1))
    ax.set_yscale("log")
    if ratios and max(ratios) > LARGE:
        ax.axhline(LARGE, color=_WRONG, linewidth=1.0, linestyle=":")
    ax.set_ylim(min([*ratios, low]) / 2, max([*ratios, high]) * 2)
    ax.set_title("update over weight, by step (green: the usual range)", fontsize=11)
    ax.set_xlabel("optimizer step")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    _plain(ax)
    ax.legend(**_LEGEND)


def _plain(ax: Axes) -> None:
    ax.grid(color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _positive(value: float) -> float:
    return value if 0 < value < math.inf else math.nan


def _short(name: str) -> str:
    shown = name if len(name) <= 22 else f"...{name[-19:]}"
    return shown.replace("$", r"\$")
