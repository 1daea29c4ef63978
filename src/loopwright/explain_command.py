"""What ``python -m loopwright explain`` does: finds a trainer by its name, and writes its loop to a file."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import pkgutil
import sys
import traceback
from pathlib import Path
from typing import Any

from loopwright import Trainer
from loopwright.errors import ConfigError, nearest

_HEAD = "# Written by `python -m loopwright explain`, which writes it anew as long as nobody has changed it:"
_HASH = "# SHA-256 of what follows: "


class MisnamedError(ConfigError):
    """What was named on the command line is not there, or is no trainer."""


def find_trainer(named: str) -> Trainer[Any, Any]:
    """The trainer that ``MODULE:OBJECT`` names: itself, or what a function without arguments returns.

    What the module and the function print goes to the error stream.

    Raises:
        MisnamedError: There is none of this name.
        ConfigError: The module or the function raised an error, which has been printed with its traceback.
    """
    module_name, colon, path = named.partition(":")
    if not (colon and module_name and path):
        raise MisnamedError(f"{named!r} is not MODULE:OBJECT", fix="for example my_script:make_trainer")
    with contextlib.redirect_stdout(sys.stderr):
        found = _import(module_name)
        for name in path.split("."):
            if not hasattr(found, name):
                owner = getattr(found, "__name__", type(found).__name__)
                raise MisnamedError(f"{owner} has no attribute {name!r}", fix=nearest(name, _public(found)))
            found = getattr(found, name)
        if not isinstance(found, Trainer) and callable(found):
            found = _call(named, found)
    if not isinstance(found, Trainer):
        raise MisnamedError(
            f"{named} is an object of type {type(found).__name__}",
            why="a Trainer can be explained, or what a function without arguments returns, if that is one",
            fix=_trainers(sys.modules[module_name]),
        )
    return found


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            close = nearest(error.name, (module.name for module in pkgutil.iter_modules()))
            raise MisnamedError(
                f"there is no module {error.name!r}", fix=close or "run it where the module is"
            ) from None
        raise _failed(f"importing {name}", error) from error
    except (Exception, SystemExit) as error:
        raise _failed(f"importing {name}", error) from error


def _call(named: str, function: Any) -> Any:
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise MisnamedError(
            f"{named} cannot be called without arguments: {error}", fix="name a function that can"
        ) from None
    except ValueError:  # it has no signature to look at
        pass
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise _failed(f"calling {named}", error) from error


def _failed(doing: str, error: BaseException) -> ConfigError:
    traceback.print_exception(error)
    return ConfigError(f"{doing} raised {type(error).__name__}")


def _public(owner: Any) -> list[str]:
    return [name for name in dir(owner) if not name.startswith("_")]


def _trainers(module: Any) -> str:
    """The trainers that a module does hold."""
    names = [name for name, value in vars(module).items() if isinstance(value, Trainer)]
    return f"{module.__name__}:{names[0]} is one" if names else ""


def write(path: Path, text: str) -> None:
    """Write the loop to a file, with a head by which a later call knows it.

    Raises:
        ConfigError: There is a file that this has not written, or that was changed since.
        OSError: The system refuses.
    """
    if path.exists() and not _is_own(path):
        raise ConfigError(
            f"{path} is there already",
            why="it is not what this command has written, or was changed since",
            fix="another name, or remove it first",
        )
    digest = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(f"{_HEAD}\n{_HASH}{digest}\n{text}", encoding="utf-8")


def _is_own(path: Path) -> bool:
    head, _, rest = path.read_bytes().partition(b"\n")
    line, _, text = rest.partition(b"\n")
    return head == _HEAD.encode() and line == f"{_HASH}{hashlib.sha256(text).hexdigest()}".encode()
