"""The values that a run has logged, read as floats, and the names that they may have."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from loopwright.errors import ConfigError, UnknownMetricError, nearest
from loopwright.mismatch.layers import shape_of

_NOTHING: Mapping[str, float | Tensor] = {}
_MOST_PUT_OFF = 1000  # so that what waits takes no more memory in a long run
TURNS = threading.RLock()  # held by whoever works out what was put off: another thread may read what one is training


class Metrics(Mapping[str, float]):
    """The newest value of every name that was logged, as floats.

    A value may still be on the accelerator, or not be worked out yet: reading it here is what waits. Any thread may.
    """

    __slots__ = ("_at_work", "_held", "_later", "_mark", "_marks", "_prefix", "_values", "reads", "validated")

    def __init__(self) -> None:
        self._values: dict[str, float | Tensor] = {}
        self._marks: dict[str, int] = {}
        self._mark = 0
        self._prefix, self._held = "", _NOTHING  # a step's values, as they came: most are replaced before anyone asks
        self._at_work = False  # on those
        self._later: list[Callable[[], None]] = []  # what is put off until somebody asks, in its order
        self.reads: int = 0  # how often a value was fetched from a tensor
        self.validated: bool = False  # whether the present call has validation data, which a missing name may await

    def hold(self, prefix: str, values: Mapping[str, float | Tensor]) -> None:
        """Store the newest values of several names under one prefix."""
        with TURNS:
            if len(self._held) > 1 and self._held.keys() != values.keys():
                self._let_go()
            self._prefix, self._held = prefix, values

    def record(self, name: str, value: float | Tensor) -> None:
        """Store the newest value of a name that is known to be good. Callbacks call ``State.log``."""
        with TURNS:
            if self._held:
                self._let_go()
            if self._later:
                self._put_off(partial(self._store, {name: value}))
            else:
                self._mark = self._marks[name] = self._mark + 1
                self._values[name] = value

    def record_later(self, work_out: Callable[[], Mapping[str, float]]) -> None:
        """Store the newest values of names that are known to be good, which are worked out when somebody reads."""
        with TURNS:
            if self._held:
                self._let_go()
            self._put_off(lambda: self._store(work_out()))  # never copied: see __getstate__

    def afterwards(self, act: Callable[[], None]) -> None:
        """Do something that reads what was logged so far, and nothing newer: at once, unless some of it is put off."""
        with TURNS:
            if not self._later:
                act()
                return
            if self._held:
                self._let_go()
            self._put_off(act)

    def _put_off(self, act: Callable[[], None]) -> None:
        self._later.append(act)
        if len(self._later) >= _MOST_PUT_OFF:
            self.catch_up()

    def _store(self, values: Mapping[str, float | Tensor]) -> None:
        for name, value in values.items():
            self._mark = self._marks[name] = self._mark + 1
            self._values[name] = value

    def _let_go(self) -> None:
        """Store a step's values under their names, or put that off as well where something before them is."""
        held, self._held = self._held, _NOTHING
        for name, value in held.items():
            self.record(f"{self._prefix}/{name}", value)

    def catch_up(self) -> None:
        """Do all that was put off, in its order. Who reads from another thread meanwhile waits for it."""
        with TURNS:
            if self._at_work:  # what is being done reads what came before it
                return
            if self._held:
                self._let_go()
            self._at_work, done = True, 0
            try:
                while done < len(self._later):
                    self._later[done]()
                    done += 1
            except Exception:  # what comes after it is not lost
                done += 1
                raise
            finally:  # nor is it, where somebody has broken it off
                self._later, self._at_work = self._later[done:], False

    def __getstate__(self) -> tuple[None, dict[str, object]]:
        """What is copied or pickled: nothing is put off there, as it would be done by, and to, what was copied."""
        self.catch_up()
        return None, {name: getattr(self, name) for name in self.__slots__}

    @property
    def mark(self) -> int:
        """Grows with every value logged: "fresh" is whatever has a later mark."""
        if self._held or self._later:
            self.catch_up()
        return self._mark

    def __getitem__(self, name: str) -> float:
        if self._held or self._later:
            self.catch_up()
        try:
            value = self._values[name]
        except KeyError:
            raise unknown_metric(name, self._values, *self._awaited(name)) from None
        if isinstance(value, Tensor):
            self.reads += 1
            number = float(value.item())
            with TURNS:
                if self._values.get(name) is value:  # else another thread has stored a newer one meanwhile
                    self._values[name] = number
            return number
        return value

    def _awaited(self, name: str) -> tuple[str, str]:
        """Why a name of the validation is not there yet, and where to read it; or how to log any other."""
        own = of_stage(name)
        if not self.validated or own is None or own[0] != "val" or any(k.startswith("val/") for k in self._values):
            return "", f"log it with state.log({name!r}, value) before it is read"
        return (
            "it is the validation that logs such a name, and there has been none yet; ",
            f"read 'val/{own[1]}' in on_eval_end, or in on_epoch_end after a validation",
        )

    def __contains__(self, name: object) -> bool:
        if self._held or self._later:
            self.catch_up()
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        if self._held or self._later:
            self.catch_up()
        return iter(list(self._values))  # a copy, as another thread may be training

    def __len__(self) -> int:
        if self._held or self._later:
            self.catch_up()
        return len(self._values)

    def __repr__(self) -> str:
        return f"Metrics({dict(self)!r})"

    def mark_of(self, name: str) -> int:
        """The mark at which the run last logged ``name``: 0 if it never did, -1 if a test pass has done so since."""
        if self._held or self._later:
            self.catch_up()
        return self._marks.get(name, 0)

    def since(self, mark: int) -> dict[str, float]:
        """The values logged after ``mark``, in the order in which their names first appeared."""
        if self._held or self._later:
            self.catch_up()
        return {name: self[name] for name, marked in list(self._marks.items()) if marked > mark}

    def marks(self) -> dict[str, int]:
        """The mark of every name, as it is now."""
        if self._held or self._later:
            self.catch_up()
        return dict(self._marks)

    def settle(self, before: Mapping[str, int]) -> None:
        """Keep what a test pass has logged since these marks, but let nothing take it for a value of the run's."""
        if self._held or self._later:
            self.catch_up()
        for name, mark in self._marks.items():
            if mark != before.get(name, 0):
                self._marks[name] = -1 if before.get(name, 0) else 0

    def state_dict(self) -> dict[str, Any]:
        """The values, read, and when each was logged."""
        return {"mark": self.mark, "values": {name: self[name] for name in self._values}, "marks": dict(self._marks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""
        self._values, self._marks, self._mark = dict(state["values"]), dict(state["marks"]), state["mark"]
        self._held, self._later = _NOTHING, []


def unknown_metric(name: str, known: Mapping[str, object], why: str = "", fix: str = "") -> UnknownMetricError:
    """The error for a metric that does not exist, naming those that do and the nearest."""
    listed = ", ".join(sorted(known)) or "none yet"
    return UnknownMetricError(
        f"there is no metric {name!r}",
        why=f"{why}the names logged so far are: {listed}",
        fix=_likeliest(name, known) or fix,
    )


_STAGED = re.compile(r"(train|val|test)[/_](.+)")


def of_stage(name: object) -> tuple[str, str] | None:
    """The stage and the rest of a name such as ``val/loss``, or ``val_loss`` as others write it; else None."""
    found = _STAGED.fullmatch(name) if isinstance(name, str) else None
    return None if found is None else (found[1], found[2])


def _likeliest(name: str, known: Mapping[str, object]) -> str:
    """The nearest of the known names; a name of one stage is not taken for one of another."""
    own = of_stage(name)
    if own is None:
        return nearest(name, known)
    alike = {other[1]: key for key in known if (other := of_stage(key)) is not None and other[0] == own[0]}
    return nearest(own[1], alike, called=alike)


_NAME = re.compile(r"[^\W_][^\\]*")


def check_name(name: object) -> str:
    """Return ``name`` if it is fit to be a metric's: a column, a tag and a path below the run's folder.

    Raises:
        ConfigError: It is not a string, is empty or over 200 characters, does not begin with a letter
            or digit, ends in a space, holds what cannot be printed, backslashes or a ``..`` part, or is
            one of the two columns that every record has, ``epoch`` and ``step``.
    """
    if (
        isinstance(name, str)
        and len(name) <= 200
        and name.isprintable()
        and _NAME.fullmatch(name)
        and name == name.strip()
        and not {"", ".", ".."} & set(name.split("/"))
        and name not in ("epoch", "step")
    ):
        return name
    raise ConfigError(
        f"{name!r} cannot be the name of a metric",
        why="a name is a column, a tag and a path below the run's folder: 1 to 200 printable characters "
        "that begin with a letter or digit, no backslash, no '..' part, and not 'epoch' or 'step'",
        fix="for example 'train/accuracy'",
    )


def of_one_layer(name: str) -> bool:
    """Whether a metric is about a single layer, one of so many that bars and learning curves leave them out."""
    return name.count("/") > 1 and name.startswith(("grad/", "update/", "weight/"))


def scalar(name: str, value: object) -> float | Tensor:
    """The value as a float, or as a detached copy of a tensor of one element; no device is waited for.

    Raises:
        ConfigError: It is not one real number.
    """
    if isinstance(value, Tensor):
        if value.numel() == 1 and not value.is_complex():
            return value.detach().reshape(()).clone()
        raise ConfigError(
            f"the value of {name!r} is a {value.dtype} tensor of shape {shape_of(value)}",
            why="a metric is one real number",
            fix="log its mean(), or one name for each element",
        )
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError  # float would take its word for it
        return float(value)  # type: ignore[arg-type]  # whatever converts is a number: numpy's scalars do
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(
            f"the value of {name!r} is {value!r}",
            why="a metric is one real number",
            fix="log a float or a tensor",
        ) from None
