"""Metrics as a CSV file: a row at each log point."""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypedDict

from loopwright.errors import ConfigError
from loopwright.forms import Count, check_form
from loopwright.logger import Logger
from loopwright.metrics import check_name
from loopwright.paths import file_behind, file_in_the_way, numbered, path_of
from loopwright.schedule import Every

if TYPE_CHECKING:
    from loopwright.state import State

_BUFFERED = 1.0  # seconds that rows may wait in memory: with a row a step, handing on each would cost more than it

logger: logging.Logger = logging.getLogger("loopwright")


class _Saved(TypedDict):
    written: Count
    begun: bool
    names: list[str]
    rows: Count
    epoch: Count
    step: Count
    values: dict[str, float]


class CSVLogger(Logger):
    """Writes the metrics into a CSV file, a row at each log point and one at the last step.

    The columns are ``epoch``, ``step`` and then every name in the order in which it first appeared. A name that
    comes late gets its column, and the rows before it have empty cells there; a cell is also empty where its name
    has no fresh value. A number is written so that reading it gives the same float; ``nan``, ``inf`` and ``-inf``
    stand as such. There are no timestamps: two runs that do the same write the same bytes.

    A fresh run begins a new file, and one that is already there is set aside as ``metrics-1.csv``,
    ``metrics-2.csv`` and so on. A second ``fit`` of the same trainer continues its file. Folders are made as needed.
    Where the path is a link, all of this is done to the file behind it, and beside that.

    A column that somebody adds to the right, for notes, stays with its cells when the run goes on.

    Args:
        path: The file, for example ``"runs/line/metrics.csv"``.
        every: How often to write a row.

    Raises:
        ConfigError: In fit, before the first step: the path is no regular file, or leads through ``/dev`` or
            ``/proc``, as one to the standard output does; or the run would go on in a file that it has not written.
            From ``Trainer``: another CSVLogger in the list has the same path.
        OSError: In fit: the file cannot be made or written.

    Examples:
        >>> trainer = Trainer(model, optimizer, loss, callbacks=[CSVLogger("runs/line/metrics.csv")])
        >>> result = trainer.fit(train_loader, epochs=2)
        >>> print(Path("runs/line/metrics.csv").read_text().splitlines()[0])
        epoch,step,train/loss
    """

    def __init__(self, path: str | os.PathLike[str], *, every: Every = Every(epochs=1)) -> None:  # noqa: B008
        super().__init__(every=every)
        self.path: Path = path_of("path", path, 'CSVLogger("runs/line/metrics.csv")')
        self._target = self.path  # the file behind it, where it is a link
        self._file: BinaryIO | None = None
        self._flushed = 0.0  # the time at which the file was last flushed
        self._forget()

    def _forget(self) -> None:
        self._names: list[str] = []  # the columns after epoch and step
        self._beside: list[str] = []  # the columns after those, which somebody has added by hand
        self._tail = b""  # the cells of the last row in them
        self._rows = 0
        # The last row, as long as more can be added to it, and the offsets at which it begins and ends.
        self._epoch = self._step = self._offset = self._end = 0
        self._values: dict[str, float] = {}
        self._unsure: list[bytes] = []  # the newest rows, which the system may not have taken yet

    def open(self, state: State, *, fresh: bool) -> None:
        """Begin a new file, or go on after the rows that this run has written."""
        if (other := file_in_the_way(self.path.parent)) is not None:
            raise ConfigError(
                f"CSVLogger is to write {str(self.path)!r}, and {str(other)!r} is a file",
                why="what is written is to be in a folder of that name",
                fix="another path, for example CSVLogger('runs/line/metrics.csv')",
            )
        target, exists = file_behind(self.path), self.path.exists()
        if target is None or (exists and not target.is_file()):
            folder = self.path.is_dir()
            raise ConfigError(
                f"CSVLogger is to write {str(self.path)!r}, which is {'a folder' if folder else 'no regular file'}",
                why="its records are lines of a file that it can go on with",
                fix=f"for example CSVLogger({str(self.path / 'metrics.csv' if folder else Path('metrics.csv'))!r})",
            )
        self._target = target
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            self._forget()
            if exists:
                self._set_aside()
            self._create()
        elif exists:
            try:
                self._go_on()
            except csv.Error as error:
                raise self._not_ours(f"it cannot be read: {error}") from error
        else:
            logger.warning("%s is gone, with the %d rows written so far; a new file goes on", self.path, self._rows)
            self._rows, self._values, self._beside = 0, {}, []
            self._create()

    def write(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """Write one row, or add to the last one if it is of this step."""
        try:
            self._write(epoch, step, values)
        except OSError as error:
            raise self._where(error) from error

    def _write(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        file = self._file
        assert file is not None, "open comes before write"
        again = bool(self._values) and step == self._step
        row = {**self._values, **values} if again else dict(values)
        names = self._names
        if not values.keys() <= set(names):
            names = list(dict.fromkeys((*names, *values)))
        tail = self._tail if again else b"," * len(self._beside)
        line = _row(epoch, step, names, row, tail)
        wider = len(names) > len(self._names)
        if wider:
            self._widen(names, line, above=self._rows - again)
        # Noted before it is written, so that a disk that is full does not lose it.
        self._epoch, self._step, self._values, self._tail = epoch, step, row, tail
        self._rows += not again
        if again and not wider:
            self._unsure[-1:] = [line]
            self._end = self._offset + len(line)
            # Over the old line, and only then cut: whenever the process is killed, the row is there.
            file.seek(self._offset)
            file.write(line)
            file.truncate()
        elif not wider:
            self._unsure.append(line)
            self._offset, self._end = self._end, self._end + len(line)  # to ask the file would be a system call
            file.write(line)
        if time.monotonic() - self._flushed > _BUFFERED:
            self.flush()

    def flush(self) -> None:
        """Hand the rows on to the system, so that others see them and a kill does not lose them."""
        if self._file is not None:
            try:
                self._file.flush()
            except OSError as error:
                raise self._where(error) from error
            self._unsure = []
            self._flushed = time.monotonic()

    def _where(self, error: OSError) -> OSError:
        """The same error with the file's path, which a buffer does not know."""
        return OSError(error.errno, error.strerror, error.filename or str(self._target))

    def on_eval_start(self, state: State) -> None:
        """Let the rows be seen during a long evaluation."""
        self.flush()

    def _destination(self) -> Path:
        return self.path

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            try:
                self.flush()
            finally:
                file, self._file = self._file, None
                with contextlib.suppress(OSError):  # where flushing has failed: it is closed all the same
                    file.close()

    def state_dict(self) -> dict[str, Any]:
        """How far the file goes: its columns, the number of its rows, and the last of them."""
        self.flush()  # the file holds what is said here
        return {
            **super().state_dict(),
            "names": list(self._names),
            "rows": self._rows,
            "epoch": self._epoch,
            "step": self._step,
            "values": dict(self._values),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the rows of which ``state_dict`` told; what was written later is cut off."""
        check_form(state, _Saved)
        super().load_state_dict(state)
        self._names = [check_name(name) for name in state["names"]]
        self._rows, self._epoch, self._step = state["rows"], state["epoch"], state["step"]
        self._values, self._unsure = dict(state["values"]), []

    def _set_aside(self) -> None:
        with self._target.open("rb") as file:
            if file.read(64) in (b"", _line(_columns([]))):
                return  # it holds no row: the run that made it ended before its first
        aside = numbered(self._target)
        self._target.rename(aside)
        logger.info("%s was there from an earlier run, and is now %s", self._target, aside)

    def _create(self) -> None:
        self._file = self._target.open("w+b")
        self._end = self._file.write(_line(_columns(self._names)))
        self.flush()

    def _go_on(self) -> None:
        """Open the file where the last row ends, with what was written later cut off."""
        self._file = file = self._target.open("r+b")
        rows = _rows_in(file)
        header, columns = next(rows, (b"", []))
        own = len(_columns(self._names))
        if columns[:own] != _columns(self._names):
            shown = ", ".join(columns).encode(errors="replace").decode()  # it may be in any encoding
            raise self._not_ours(f"its columns are {shown or 'missing'}")
        where = [str(self._epoch), str(self._step)]  # what the last row begins with
        found, begin, end, last, filled = 0, 0, len(header), list[str](), set[int]()
        for line, cells in islice(rows, self._rows):
            again = bool(self._values) and found + 1 == self._rows  # the last, which is written again
            if not line.endswith(b"\n") and not (again and cells[:2] == where):
                break
            found, begin, end, last = found + 1, end, end + len(line), cells
            # What it holds to the right may be a value that came after the saved state, in a column of its own.
            filled.update(i for i in range(own, len(cells)) if cells[i] and not (again and _is_number(cells[i])))
        if 0 < self._rows - found <= len(self._unsure):  # a disk that was full had no room for them
            file.seek(end)
            file.write(b"".join(self._unsure[found - self._rows :]))
            file.truncate()
            self.close()
            self._go_on()
            return
        if found < self._rows:
            logger.warning("%s holds %d of the %d rows written to it; it goes on", self._target, found, self._rows)
            self._rows, self._values = found, {}
        elif self._values and last[:2] != where:
            raise self._not_ours(f"its row {found} is not that of epoch {self._epoch}, step {self._step}")
        if file.seek(0, os.SEEK_END) > end:
            logger.info("%s: what follows row %d is cut off, to be written again", self._target, found)
        beside = sorted(filled)
        self._beside, line = _taken(columns, beside), b""
        if self._values:
            # As it was recorded: something may have been added to it since.
            end, found = begin, found - 1
            self._tail = _line(["", *_taken(last, beside)])[:-1] if beside else b""
            line = _row(self._epoch, self._step, self._names, self._values, self._tail)
        if own + len(beside) != len(columns):
            self._rewrite(line, above=found, take=[*range(own), *beside])
        else:
            file.seek(end)
            self._offset, self._end = end, end + len(line)
            file.write(line)
            file.truncate()

    def _widen(self, names: list[str], line: bytes, *, above: int) -> None:
        """Give new names their columns: a new header, the rows ``above``, and then ``line``."""
        file, old = self._file, len(_columns(self._names))
        assert file is not None
        before, self._names = self._names, names
        if above:
            take = [*range(old), *[None] * (len(names) - len(before)), *range(old, old + len(self._beside))]
            try:
                self._rewrite(line, above=above, take=take)
            except OSError:
                self._names = before  # as the file has it
                raise
            return
        header = _line([*_columns(names), *self._beside])  # there is nothing to lose yet
        file.seek(0)
        file.write(header + line)
        file.truncate()
        self._offset, self._end = len(header), len(header) + len(line)

    def _rewrite(self, last: bytes, *, above: int, take: Sequence[int | None]) -> None:
        """Put a file with the present columns in place of the old one.

        Args:
            last: The last row.
            above: How many of the old rows come before it.
            take: Which of the old columns each of the present ones is; None for one that is new.
        """
        assert self._file is not None
        self.flush()
        target = self._target
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            with target.open("rb") as old, temporary.open("wb") as new:
                new.write(_line([*_columns(self._names), *self._beside]))
                for _, cells in islice(_rows_in(old), 1, 1 + above):
                    new.write(_line(_taken(cells, take)))
                self._offset = new.tell()
                new.write(last)
                new.flush()
                os.fsync(new.fileno())  # else a crash of the machine could leave the new name with an empty file
            self.close()
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        self._file = target.open("r+b")
        self._end = self._file.seek(0, os.SEEK_END)

    def _not_ours(self, why: str) -> ConfigError:
        return ConfigError(
            f"{str(self.path)!r} is not the file that this run has written so far",
            why=why,
            fix="put that file back, or move this one away",
        )


def _columns(names: Iterable[str]) -> list[str]:
    return ["epoch", "step", *names]


def _row(epoch: int, step: int, names: Iterable[str], values: Mapping[str, float], tail: bytes) -> bytes:
    """A line of numbers, which need none of the care that names do, and the cells beside them."""
    cells = [repr(float(values[name])) if name in values else "" for name in names]
    return ",".join([str(epoch), str(step), *cells]).encode() + tail + b"\n"


def _line(cells: Iterable[object]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode(errors="surrogateescape")


def _rows_in(file: BinaryIO) -> Iterator[tuple[bytes, list[str]]]:
    """Each row of a file: its bytes, and its cells. What somebody wrote may hold line breaks, in any encoding."""
    taken: list[bytes] = []

    def lines() -> Iterator[str]:
        for line in file:
            taken.append(line)
            yield line.decode(errors="surrogateescape")

    for cells in csv.reader(lines()):
        yield b"".join(taken), cells
        taken.clear()


def _taken(cells: Sequence[str], take: Iterable[int | None]) -> list[str]:
    """These of a row's cells; empty ones where it has none."""
    return [cells[i] if i is not None and i < len(cells) else "" for i in take]


def _is_number(cell: str) -> bool:
    """Whether a cell is written as the numbers of a run are."""
    try:
        return repr(float(cell)) == cell
    except ValueError:
        return False
