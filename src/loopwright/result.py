"""What fit returns."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from loopwright.errors import ConfigError, counted
from loopwright.metrics import of_one_layer
from loopwright.pictures import figure_class, save_figure
from loopwright.state import Progress

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_Curve: TypeAlias = dict[float, float]  # from epoch to value
_Panel: TypeAlias = dict[str, _Curve]  # the curves of one metric: "train", "val", or "" where it has no stage

_COLORS = {"train": "#2f6db3", "val": "#d9731a", "": "#4d4d4d"}  # told apart by colour-blind eyes too
_BROKEN = "#b3261e"


@dataclass(frozen=True, repr=False)
class Result:
    """What a fit came to.

    Attributes:
        history: A row for every epoch: ``"epoch"`` counted from 1, ``"step"``, and the newest value of
            every name logged in it. A partial last epoch has its row too.
        stop_reason: ``"epochs"``, ``"steps"``, or the words of the callback that stopped the run.
        progress: How far the run has come.
        restored_epoch: The epoch whose weights the model now holds, if
            ``EarlyStopping(restore_best=True)`` put them back; else None, and they are the last ones.

    Examples:
        >>> result = Trainer(model, optimizer, loss).fit(train_loader, val_loader, epochs=2)
        >>> [(row["epoch"], row["step"]) for row in result.history]
        [(1, 4), (2, 8)]
        >>> sorted(result.history[0])
        ['epoch', 'step', 'train/loss', 'val/loss']
        >>> Trainer(model, optimizer, loss).fit(train_loader, epochs=2)  # doctest: +ELLIPSIS
        Result(2 epochs, 8 steps, stop_reason='epochs', train/loss=...)
    """

    history: list[dict[str, float]]
    stop_reason: str
    progress: Progress = field(default_factory=Progress)
    restored_epoch: int | None = None

    def __repr__(self) -> str:
        """One line: how far the run has come, why it ended, and the losses of its last row."""
        done, last = self.progress, self.history[-1] if self.history else {}
        facts = [counted(done.epoch, "epoch"), counted(done.step, "step"), f"stop_reason={self.stop_reason!r}"]
        if done.batch:
            facts.insert(1, f"{counted(done.batch, 'batch', 'batches')} of the next")
        if self.restored_epoch is not None:
            facts.append(f"restored_epoch={self.restored_epoch}")
        facts += [f"{name}={last[name]:.6g}" for name in ("train/loss", "val/loss") if name in last]
        return f"Result({', '.join(facts)})"

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the learning curves into a picture: a panel a metric, its train and val values together.

        A panel has a logarithmic axis where all of its values are above zero and a curve has moved, from
        its first to its last, by more than a factor of 100. Values that are NaN or infinite leave a gap,
        and a cross at the foot of the panel. A dotted line stands at the epoch whose weights were restored.

        Args:
            path: The file to write. Its suffix says the format, such as ``.png``, ``.svg`` or ``.pdf``;
                without one, ``.png`` is added. Its folder is made if need be.

        Raises:
            ConfigError: matplotlib is not installed, cannot write this format, or there is nothing to draw.

        Examples:
            >>> result = Trainer(model, optimizer, loss).fit(train_loader, val_loader, epochs=3)
            >>> result.plot("runs/curves.png")
        """
        figure_of = figure_class("learning curves")
        panels = _panels(self.history)
        if not panels:
            raise ConfigError(
                "there are no learning curves to draw",
                why="a curve needs at least one epoch in which something was logged",
                fix="plot the result of a fit that trained",
            )
        columns = {1: 1, 2: 2, 4: 2}.get(len(panels), 3)
        rows = math.ceil(len(panels) / columns)
        width = 5.6 if columns == 1 else 4.2 * columns
        figure = figure_of(figsize=(width, 3.1 * rows + 0.5), dpi=150)
        figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for ax, (name, panel) in zip(axes, panels.items(), strict=False):
            _draw(ax, name, panel, self.restored_epoch)
        for ax in axes[len(panels) :]:
            ax.remove()
        _legend(figure)
        save_figure(figure, path)


def _panels(history: list[dict[str, float]]) -> dict[str, _Panel]:
    panels: dict[str, _Panel] = {}
    for row in history:
        for name, value in row.items():
            if name in ("epoch", "step") or of_one_layer(name):
                continue
            stage, _, rest = name.partition("/")
            panel, curve = (rest, stage) if rest and stage in ("train", "val") else (name, "")
            panels.setdefault(panel, {}).setdefault(curve, {})[row["epoch"]] = value
    return panels


def _draw(ax: Axes, name: str, panel: _Panel, restored_epoch: int | None) -> None:
    from matplotlib.ticker import MaxNLocator

    for stage, curve in sorted(panel.items()):
        values = [y if math.isfinite(y) else math.nan for y in curve.values()]
        # A point between two gaps has no line to be seen by: the dots stay, and shrink where they are many.
        size = 4.5 if len(curve) <= 30 else 2.0
        color, label = _COLORS[stage], stage or None
        ax.plot(list(curve), values, "o-", color=color, markersize=size, linewidth=1.6, label=label)
    if restored_epoch is not None:
        label = f"restored: epoch {restored_epoch}"
        ax.axvline(restored_epoch, color="0.35", linestyle=":", linewidth=1.4, label=label)
    broken = sorted({x for curve in panel.values() for x, y in curve.items() if not math.isfinite(y)})
    if broken:
        foot = ax.get_xaxis_transform()  # epochs across, a share of the panel's height upwards
        height = [0.03] * len(broken)
        ax.plot(broken, height, "x", color=_BROKEN, transform=foot, label="not finite", zorder=3)

    finite = [[y for y in curve.values() if math.isfinite(y)] for curve in panel.values()]
    drawn = [values for values in finite if values]
    if not drawn:
        ax.set_yticks([])
    elif min(map(min, drawn)) > 0 and any(not 0.01 <= values[-1] / values[0] <= 100 for values in drawn):
        ax.set_yscale("log")
    epochs = [epoch for curve in panel.values() for epoch in curve]
    first, last = min(epochs), max(epochs)
    margin = max(0.5, 0.03 * (last - first))
    ax.set_xlim(first - min(margin, 0.9), last + margin)  # there is no epoch 0
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    ax.set_title(name, fontsize=11, parse_math=False)  # a name may hold dollar signs
    ax.set_xlabel("epoch")
    ax.grid(color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure) -> None:
    """One legend for all panels, with each label once."""
    found: dict[str, Artist] = {}
    for ax in figure.axes:
        lines, labels = ax.get_legend_handles_labels()
        found.update(zip(labels, lines, strict=True))
    if found:
        style = {"ncols": len(found), "frameon": False, "fontsize": 9, "columnspacing": 1.5}
        figure.legend(list(found.values()), list(found), loc="outside upper center", **style)
