"""Blocks in which something holds for a while, through which an error of any kind passes as it is.

``contextlib.contextmanager`` writes to an error's ``__traceback__``. An error that refuses that, as a frozen dataclass
does, would be replaced by its refusal.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from types import TracebackType
from typing import Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Scope(Generic[T]):
    """A generator as a context manager: what stands before its ``yield``, and what stands behind it.

    Args:
        body: The generator. An error in the block is raised at its ``yield``, and has to leave it.
    """

    def __init__(self, body: Generator[T]) -> None:
        self._body = body

    def __enter__(self) -> T:
        return next(self._body)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                next(self._body)
            else:
                self._body.throw(error)
        except StopIteration as end:
            if error is not None and end is not error:
                raise RuntimeError("a scope has kept an error to itself") from error
        except BaseException as raised:
            # A StopIteration comes out of a generator as the cause of another error.
            if raised is not error and not (isinstance(error, StopIteration) and raised.__cause__ is error):
                raise
        if error is not None:
            BaseException.with_traceback(error, trace)  # without the frames that it passed through here


def scope(body: Callable[P, Generator[T]]) -> Callable[P, Scope[T]]:
    """Make a context manager of a function that yields once."""

    @functools.wraps(body)
    def begin(*args: P.args, **kwargs: P.kwargs) -> Scope[T]:
        return Scope(body(*args, **kwargs))

    return begin
