"""What all pictures have in common: the library that draws them, and the file that they go to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loopwright.errors import ConfigError
from loopwright.paths import PathLike, path_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure_class(what: str) -> type[Figure]:
    """The class of figures, imported where something is drawn.

    Args:
        what: What is to be drawn.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        # Not pyplot, which would choose a backend for the whole process and keep the figure alive.
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the {what} cannot be drawn: matplotlib is not installed",
            why="only pictures need it, so that it comes with the extra plot",
            fix='pip install "loopwright[plot]"',
        ) from error
    return Figure


def save_figure(figure: Figure, path: PathLike) -> None:
    """Write a figure to a file, whose suffix says the format, and whose folder is made if need be.

    Raises:
        ConfigError: It is no path, or of a format that matplotlib does not write.
    """
    target = path_of("path", path, 'a file, such as "runs/curves.png"')
    formats = figure.canvas.get_supported_filetypes()
    suffix = target.suffix.removeprefix(".").lower()
    if suffix and suffix not in formats:
        raise ConfigError(
            f"{str(path)!r} ends in .{suffix}, which is no format that matplotlib writes",
            why="the suffix of the file says which format is meant",
            fix=f"one of {', '.join(sorted(formats))}",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)
