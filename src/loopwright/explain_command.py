"""What ``python -m loopwright explain`` does: finds a trainer by its name, and writes its loop to a file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
import traceback
from collections.abc import Iterator
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
        raise MisnamedError(f"{named!r} is not MODULE:OBJECT", fix=_objects(named))
    _refuse_path(module_name, path)
    with contextlib.redirect_stdout(sys.stderr):
        found = _import(module_name)
        for name in path.split("."):
            if not hasattr(found, name):
                owner = getattr(found, "__name__", type(found).__name__)
                fixes = (nearest(name, _candidates(found)), _trainers(sys.modules[module_name]))
                raise MisnamedError(f"{owner} has no attribute {name!r}", fix=" ".join(filter(None, fixes)))
            found = getattr(found, name)
        made_by = found
        if not isinstance(found, Trainer) and callable(found):
            found = _call(named, found)
    if not isinstance(found, Trainer):
        raise MisnamedError(
            f"{named} {_no_trainer(found, made_by)}",
            why="a Trainer can be explained, or what a function without arguments returns, if that is one",
            fix=_trainers(sys.modules[module_name]),
        )
    return found


def _no_trainer(found: Any, made_by: Any) -> str:
    if isinstance(made_by, type):
        return "is a class, and calling it makes no Trainer"
    called = "is" if found is made_by else "returned"
    return f"{called} None" if found is None else f"{called} an object of type {type(found).__name__}"


def _refuse_path(module: str, path: str) -> None:
    """Say of a file's path what its module is called, in place of what ``import`` makes of it."""
    separated = any(mark in module for mark in (os.sep, os.altsep) if mark)
    if not (separated or module.endswith(".py") or module.startswith(".")):
        return
    stem = module.removesuffix(".py")
    parts = Path(os.path.relpath(stem if separated else stem.lstrip("."))).parts or ("",)
    if all(part.isidentifier() for part in parts):
        fix = f"{'.'.join(parts)}:{path}"
    elif parts[-1].isidentifier():
        fix = f"{parts[-1]}:{path}, from the folder {Path(*parts).parent}"
    else:
        fix = "MODULE:OBJECT, for example my_script:make_trainer"
    what = "path" if separated or module.endswith(".py") else "relative name"
    raise MisnamedError(f"{module!r} is a {what}", why="a module is named as import takes it", fix=fix)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            close = nearest(error.name, _modules_near(error.name))
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
        what = f"{named} is a class, and cannot" if isinstance(function, type) else f"{named} cannot"
        raise MisnamedError(
            f"{what} be called without arguments: {error}", fix="name a Trainer, or a function that can"
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


def _candidates(owner: Any) -> list[str]:
    """The names in it that may be meant; of a module trainers, and functions and objects of its own making."""
    names = [name for name in dir(owner) if not name.startswith("_")]
    if not inspect.ismodule(owner):
        return names
    return [name for name in names if _may_be_meant(inspect.getattr_static(owner, name), owner.__name__)]


def _may_be_meant(value: Any, home: str) -> bool:
    if isinstance(value, type):
        return issubclass(value, Trainer) and value.__module__ == home
    made_by = value if inspect.isroutine(value) else type(value)
    return isinstance(value, Trainer) or getattr(made_by, "__module__", None) == home


def _modules_near(name: str) -> Iterator[str]:
    """The modules of this folder, and of the package in it that the name begins with."""
    package = name.rpartition(".")[0]
    yield from (module.name for module in pkgutil.iter_modules([str(Path.cwd())]))
    if package:
        folder = Path.cwd().joinpath(*package.split("."))
        yield from (module.name for module in pkgutil.iter_modules([str(folder)], f"{package}."))


def _objects(named: str) -> str:
    """What to name, where no object was named: what the module holds, if there is one, or an example."""
    name = named.removesuffix(":")
    with contextlib.suppress(MisnamedError, ValueError, ImportError):  # then there is no such module to look into
        if ":" not in name and importlib.util.find_spec(name) is not None:
            with contextlib.redirect_stdout(sys.stderr):
                module = _import(name)
            return _trainers(module) or f"{name}:make_trainer, a function that returns one"
    return "for example my_script:make_trainer"


def _trainers(module: Any) -> str:
    """The trainers that a module does hold, and its own functions that can be called and promise one."""
    names = [name for name, value in vars(module).items() if isinstance(value, Trainer) or _makes_one(module, value)]
    first, *others = [f"{module.__name__}:{name}" for name in names] or [""]
    more = f", and so {'are' if others[1:] else 'is'} {', '.join(others[:8])}{', ...' if others[8:] else ''}"
    return f"{first} is one{more if others else ''}" if first else ""


def _makes_one(module: Any, value: Any) -> bool:
    if not inspect.isfunction(value) or value.__module__ != module.__name__:
        return False
    returns = value.__annotations__.get("return", "")
    promises = "Trainer" in (returns if isinstance(returns, str) else repr(returns)) or "trainer" in value.__name__
    parameters = inspect.signature(value).parameters.values()
    return promises and all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def write(path: Path, text: str) -> None:
    """Write the loop to a file, with a head by which a later call knows it.

    Raises:
        ConfigError: There is a file that this has not written, or that was changed since.
        OSError: The system refuses.
    """
    check_writable(path)
    digest = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(f"{_HEAD}\n{_HASH}{digest}\n{text}", encoding="utf-8")


def check_writable(path: Path) -> None:
    """Refuse a file that ``write`` would not write, without writing.

    Raises:
        ConfigError: There is a file that this has not written, or that was changed since.
        OSError: The system would refuse.
    """
    if path.exists():
        if not _is_own(path):
            raise ConfigError(
                f"{path} is there already",
                why="it is not what this command has written, or was changed since",
                fix="another name, or remove it first",
            )
        asked = path
    else:
        asked = path.resolve().parent  # of what a link leads to
        if not asked.is_dir():
            code = errno.ENOTDIR if asked.exists() else errno.ENOENT
            raise OSError(code, os.strerror(code), str(path))
    if not os.access(asked, os.W_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def _is_own(path: Path) -> bool:
    head, _, rest = path.read_bytes().partition(b"\n")
    line, _, text = rest.partition(b"\n")
    return head == _HEAD.encode() and line == f"{_HASH}{hashlib.sha256(text).hexdigest()}".encode()
