"""Result.plot: what is in the picture, and what is refused."""

from __future__ import annotations

import math
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from helpers import small_trainer, some_batches
from loopwright import ConfigError, Progress, Result
from loopwright.callbacks import EarlyStopping


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved, as it was when it was saved."""
    saved: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, path: str) -> None:
        save(figure, path)
        saved.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def result_of(*rows: dict[str, float], restored_epoch: int | None = None) -> Result:
    """A result with these rows, as epochs 1, 2, ..."""
    history = [{"epoch": number, "step": 10 * number, **row} for number, row in enumerate(rows, 1)]
    return Result(history, "epochs", restored_epoch=restored_epoch)


def drawn(figure: Figure) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Panel to label to the points of that line."""
    return {
        ax.get_title(): {
            str(line.get_label()): [(float(x), float(y)) for x, y in np.asarray(line.get_xydata()).tolist()]
            for line in ax.get_lines()
        }
        for ax in figure.axes
    }


def test_a_result_prints_as_one_line_without_its_history() -> None:
    rows = [{"epoch": 1, "step": 4, "train/loss": 2.0}, {"epoch": 2, "step": 6, "train/loss": 0.5, "val/loss": 0.25}]
    result = Result(rows, "steps", Progress(epoch=1, batch=2, step=6))
    losses = "train/loss=0.5, val/loss=0.25"
    assert str(result) == f"Result(1 epoch, 2 batches of the next, 6 steps, stop_reason='steps', {losses})"
    restored = Result(rows, "enough", Progress(epoch=2, step=1), restored_epoch=1)
    assert repr(restored) == f"Result(2 epochs, 1 step, stop_reason='enough', restored_epoch=1, {losses})"
    assert repr(Result([], "epochs")) == "Result(0 epochs, 0 steps, stop_reason='epochs')"
    assert restored == Result(list(rows), "enough", Progress(epoch=2, step=1), restored_epoch=1)
    assert restored != result


def test_each_metric_has_a_panel_with_its_train_and_val_values(figures: list[Figure], tmp_path: Path) -> None:
    rows = [{"train/loss": 3.0, "val/loss": 4.0, "val/mae": 7.0}, {"train/loss": 2.0, "val/loss": 5.0, "val/mae": 6.0}]
    result_of(*rows).plot(tmp_path / "curves.png")
    assert drawn(figures[0]) == {
        "loss": {"train": [(1, 3), (2, 2)], "val": [(1, 4), (2, 5)]},
        "mae": {"val": [(1, 7), (2, 6)]},
    }
    assert {ax.get_xlabel() for ax in figures[0].axes} == {"epoch"}
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["train", "val"]


def test_a_run_with_validation_and_early_stopping_is_drawn_into_a_png(figures: list[Figure], tmp_path: Path) -> None:
    stopping = EarlyStopping("val/loss", mode="min", restore_best=True)
    result = small_trainer(stopping, seed=0).fit(some_batches(), some_batches(2, seed=1), epochs=4)
    result.plot(tmp_path / "curves.png")
    picture = imread(tmp_path / "curves.png")
    assert picture.shape[0] > 300
    assert picture.shape[1] > 600
    lines = drawn(figures[0])["loss"]
    assert lines["train"] == [(row["epoch"], row["train/loss"]) for row in result.history]
    assert lines["val"] == [(row["epoch"], row["val/loss"]) for row in result.history]
    assert lines[f"restored: epoch {result.restored_epoch}"][0][0] == result.restored_epoch


def test_the_longest_legend_fits_above_a_single_panel(figures: list[Figure], tmp_path: Path) -> None:
    rows = [{"train/loss": math.nan, "val/loss": 1.0}] * 1000
    result_of(*rows, restored_epoch=1000).plot(tmp_path / "curves.png")
    (legend,), (ax,) = figures[0].legends, figures[0].axes
    assert len(legend.get_texts()) == 4
    box = legend.get_window_extent()
    assert figures[0].bbox.x0 <= box.x0 < box.x1 <= figures[0].bbox.x1
    assert box.y0 >= ax.get_window_extent().y1


def test_a_name_without_train_or_val_has_a_panel_of_its_own(figures: list[Figure], tmp_path: Path) -> None:
    rows = [{"lr": 0.5, "layer/norm": 1.0, "train/layer/norm": 2.0, "train": 3.0}]
    result_of(*rows).plot(tmp_path / "curves.png")
    assert {title: len(lines) for title, lines in drawn(figures[0]).items()} == {"lr": 1, "layer/norm": 2, "train": 1}


def test_a_name_that_looks_like_a_formula_is_drawn_as_it_is(figures: list[Figure], tmp_path: Path) -> None:
    result_of({r"val/$\frac$": 1.0}).plot(tmp_path / "curves.png")
    assert list(drawn(figures[0])) == [r"$\frac$"]


def test_one_epoch_is_a_point_with_a_whole_number_under_it(figures: list[Figure], tmp_path: Path) -> None:
    result_of({"train/loss": 0.5, "val/loss": 0.6}).plot(tmp_path / "curves.png")
    (ax,) = figures[0].axes
    low, high = ax.get_xlim()
    assert low < 1 < high
    assert [tick for tick in ax.get_xticks() if low <= tick <= high] == [1]
    assert all(line.get_marker() == "o" for line in ax.get_lines())


def test_the_ticks_are_whole_epochs_and_epoch_0_is_not_one(figures: list[Figure], tmp_path: Path) -> None:
    for epochs in (2, 5, 60, 1000):
        result_of(*[{"train/loss": 1.0}] * epochs).plot(tmp_path / "curves.png")
        (ax,) = figures[-1].axes
        low, high = ax.get_xlim()
        ticks = [tick for tick in ax.get_xticks() if low <= tick <= high]
        assert ticks
        assert all(tick == int(tick) >= 1 for tick in ticks)


def test_values_that_are_not_finite_leave_a_gap_and_a_cross(figures: list[Figure], tmp_path: Path) -> None:
    losses = [1.0, math.nan, 2.0, math.inf, -math.inf]
    result_of(*({"train/loss": loss} for loss in losses)).plot(tmp_path / "curves.png")
    lines = drawn(figures[0])["loss"]
    assert [epoch for epoch, _ in lines["not finite"]] == [2, 4, 5]
    np.testing.assert_equal([loss for _, loss in lines["train"]], [1.0, math.nan, 2.0, math.nan, math.nan])
    low, high = figures[0].axes[0].get_ylim()
    assert -1 < low < 1 < 2 < high < 4


def test_a_metric_that_was_never_finite_is_a_panel_of_crosses(figures: list[Figure], tmp_path: Path) -> None:
    result_of({"train/loss": math.nan}, {"train/loss": math.nan}).plot(tmp_path / "curves.png")
    assert [epoch for epoch, _ in drawn(figures[0])["loss"]["not finite"]] == [1, 2]
    assert list(figures[0].axes[0].get_yticks()) == []


def test_a_metric_that_was_not_logged_in_every_epoch_is_a_line_over_those_it_was(
    figures: list[Figure], tmp_path: Path
) -> None:
    rows = [{"train/loss": 4.0}, {"train/loss": 3.0, "val/loss": 9.0}, {"train/loss": 2.0}, {"val/loss": 8.0}]
    result_of(*rows).plot(tmp_path / "curves.png")
    assert drawn(figures[0])["loss"] == {"train": [(1, 4), (2, 3), (3, 2)], "val": [(2, 9), (4, 8)]}


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 13])
def test_any_number_of_metrics_gets_as_many_panels(figures: list[Figure], tmp_path: Path, count: int) -> None:
    result_of(*[{f"val/m{i}": float(i) for i in range(count)}] * 3).plot(tmp_path / "curves.png")
    assert list(drawn(figures[0])) == [f"m{i}" for i in range(count)]
    width, height = figures[0].get_size_inches()
    assert width <= 13
    assert height <= 3.6 * math.ceil(count / min(count, 2 if count == 4 else 3))


@pytest.mark.parametrize(
    ("losses", "scale"),
    [
        ([100.0, 10.0, 0.5], "log"),  # it came down by more than a factor of 100
        ([1.0, 200.0], "log"),  # or went up
        ([1.0, 200.0, 1.5], "linear"),  # one outlier is no movement
        ([100.0, 10.0, 2.0], "linear"),
        ([100.0, 10.0, 0.0], "linear"),
        ([100.0, -1.0, 0.5], "linear"),
        ([math.nan, 100.0, math.inf, 0.5, math.nan], "log"),
    ],
)
def test_the_axis_is_logarithmic_where_positive_values_moved_by_more_than_a_factor_of_100(
    figures: list[Figure], tmp_path: Path, losses: list[float], scale: str
) -> None:
    result_of(*({"train/loss": loss} for loss in losses)).plot(tmp_path / "curves.png")
    assert figures[0].axes[0].get_yscale() == scale


def test_the_folder_is_made_and_the_suffix_says_the_format(tmp_path: Path) -> None:
    result = result_of({"train/loss": 1.0})
    for name, start in (("a.png", b"\x89PNG"), ("b.svg", b"<?xml"), ("c.pdf", b"%PDF")):
        result.plot(str(tmp_path / "runs" / "deep" / name))
        assert (tmp_path / "runs" / "deep" / name).read_bytes().startswith(start)
    result.plot(tmp_path / "none")
    assert (tmp_path / "none.png").exists()


def test_an_unknown_format_is_an_error_that_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ends in \.curve(.|\n)*png") as caught:
        result_of({"train/loss": 1.0}).plot(tmp_path / "folder" / "loss.curve")
    assert "svg" in str(caught.value)
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("rows", [[], [{}]])
def test_a_result_without_any_value_is_an_error(rows: list[dict[str, float]], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no learning curves"):
        result_of(*rows).plot(tmp_path / "curves.png")


def test_without_matplotlib_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r'pip install "loopwright\[plot\]"'):
        result_of({"train/loss": 1.0}).plot(tmp_path / "curves.png")


def test_neither_the_import_nor_a_plot_touches_pyplot_or_a_backend_and_only_a_plot_imports_matplotlib(
    tmp_path: Path,
) -> None:
    script = """
import sys, loopwright, loopwright.callbacks
assert "matplotlib" not in sys.modules
loopwright.Result([{"epoch": 1, "step": 1, "train/loss": 1.0}], "epochs").plot("curves.png")
assert "matplotlib.figure" in sys.modules
assert "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], cwd=tmp_path, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curves.png").exists()


def test_plotting_draws_no_random_number(tmp_path: Path) -> None:
    before = pickle.dumps((random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()))
    result_of({"train/loss": 1.0}).plot(tmp_path / "curves.png")
    assert pickle.dumps((random.getstate(), np.random.get_state(), torch.get_rng_state().tolist())) == before
