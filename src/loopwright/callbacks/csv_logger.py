"""Metrics as a CSV file: a row at each log point, the same bytes whether or not the run was interrupted."""

from __future__ import annotations

import csv
import io
import logging
import os
import time
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from loopwright.errors import ConfigError
from loopwright.logger import Logger, numbered
from loopwright.schedule import Every
from loopwright.state import check_name

if TYPE_CHECKING:
    from loopwright.state import State

_BUFFERED = 1.0  # seconds for which a row may wait in memory: with a row a step, writing each would cost more

logger = logging.getLogger("loopwright")


class CSVLogger(Logger):
    """Writes the metrics into a CSV file, a row at each log point and one at the last step.

    The columns are ``epoch``, ``step`` and then every name in the order in which it first appeared; one that comes
    late gets its column, and the rows before have empty cells there. A cell is also empty where the name has no
    fresh value. Numbers are written so that reading them gives the same float; ``nan``, ``inf`` and ``-inf`` are
    written as such.

    A fresh run begins a new file: one that is already there is set aside as ``metrics-1.csv``, ``metrics-2.csv``
    and so on. A second ``fit`` of the same trainer continues its file. Folders are made as needed.

    Args:
        path: The file, for example ``"runs/line/metrics.csv"``.
        every: How often to write a row.

    Raises:
        ConfigError: In fit, before the first step: the path is no regular file, or the run is to go on in a file
            that it has not written.
        OSError: In fit: the file cannot be made or written.

    Example:
        >>> trainer = Trainer(model, optimizer, loss, callbacks=[CSVLogger("runs/line/metrics.csv")])
        >>> result = trainer.fit(train_loader, epochs=2)
        >>> print(open("runs/line/metrics.csv").readline().strip())
        epoch,step,train/loss
    """

    def __init__(self, path: str | os.PathLike[str], *, every: Every = Every(epochs=1)) -> None:  # noqa: B008
        super().__init__(every=every)
        self.path = Path(path)
        self._file: BinaryIO | None = None
        self._forget()

    def _forget(self) -> None:
        self._names: list[str] = []  # the columns after epoch and step
        self._rows = 0
        # The last row, for as long as more can be added to it, and the offset at which it begins.
        self._epoch = self._step = self._offset = 0
        self._values: dict[str, float] = {}
        self._flushed = 0.0  # when the file was last flushed

    def open(self, state: State, *, fresh: bool) -> None:
        """Begin a new file, or go on after the rows that this run has written."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and not self.path.is_file():
            raise ConfigError(
                f"CSVLogger is to write into {str(self.path)!r}, which is "
                + ("a folder" if self.path.is_dir() else "no regular file"),
                fix=f"CSVLogger({str(self.path / 'metrics.csv')!r})" if self.path.is_dir() else "another path",
            )
        if fresh:
            self._forget()
            self._set_aside()
            self._create()
        elif self.path.exists():
            self._go_on()
        else:
            logger.warning("%s is gone, and the %d rows that it held: a new file goes on", self.path, self._rows)
            self._rows = 0
            self._create()

    def _set_aside(self) -> None:
        if not self.path.exists() or self.path.read_bytes()[:64] in (b"", _line(self._header)):
            return  # it holds no row: the run that made it ended before its first
        aside = numbered(self.path)
        self.path.rename(aside)
        logger.info("%s is from an earlier run, and has been set aside as %s", self.path, aside)

    def _create(self) -> None:
        self._file = self.path.open("w+b")
        self._file.write(_line(self._header))
        self._file.flush()

    def _go_on(self) -> None:
        """Open the file at the last row that was recorded; what comes after it is cut off."""
        self._file = self.path.open("r+b")
        header = self._file.readline()
        columns = next(csv.reader([header.decode(errors="replace")]), [])
        if columns[: len(self._header)] != self._header:
            raise self._not_ours(f"it begins with the columns {', '.join(columns) or '(none)'}")
        lines = [line for line in islice(self._file, self._rows) if line.endswith(b"\n")]
        if len(lines) < self._rows:
            logger.warning("%s holds only %d of the %d rows written to it", self.path, len(lines), self._rows)
            self._rows = len(lines)
            self._step = -1  # so that the next record is a row of its own
            self._offset = end = len(header) + sum(map(len, lines))
        else:
            self._offset = len(header) + sum(map(len, lines[:-1]))
            end = self._file.tell()
            if lines and lines[-1].split(b",", 2)[:2] != [b"%d" % self._epoch, b"%d" % self._step]:
                raise self._not_ours(f"row {self._rows} is not that of epoch {self._epoch} and step {self._step}")
        beyond = self._file.seek(0, os.SEEK_END) - end
        if beyond:
            logger.info("%s: what follows row %d is cut off, and written again", self.path, self._rows)
        ...

    def _not_ours(self, why: str) -> ConfigError:
        return ConfigError(
            f"{str(self.path)!r} is not the file that this run has written so far",
            why=why,
            fix="put that file back, move this one away, or give CSVLogger another path in a new trainer",
        )
