"""Arguments that there are none of: what was meant by them, which Python itself says from 3.13 on only.

And functions that do not take what they are going to be given.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from loopwright.errors import ConfigError, nearest

_OF_THE_OPTIMIZER = ("learning_rate", "lr", "momentum", "weight_decay")
# What others call it.
_ELSEWHERE: Mapping[str, str] = {
    "accelerator": "device",
    "accumulate_grad_batches": "accumulate",
    "amp": "precision",
    "check_val_every_n_epoch": "validate",
    "criterion": "loss",
    "gradient_accumulation_steps": "accumulate",
    "gradient_clip_val": "clip_norm",
    "grad_clip": "clip_norm",
    "loss_fn": "loss",
    "lr_scheduler": "schedule",
    "max_epochs": "epochs",
    "max_grad_norm": "clip_norm",
    "max_steps": "steps",
    "mixed_precision": "precision",
    "n_epochs": "epochs",
    "nb_epochs": "epochs",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "num_workers": "workers",
    "optim": "optimizer",
    "restore_best_weights": "restore_best",
    "resume_from_checkpoint": "resume",
    "save_top_k": "keep",
    "scheduler": "schedule",
    "training_step": "step",
    "val_check_interval": "validate",
    "validation_data": "val",
}


class _Signature:
    """What ``inspect.signature`` and ``help`` say of a class: the arguments that it is made with."""

    def __get__(self, made: object, cls: type[Any]) -> inspect.Signature:
        if made is not None:  # which may be called, and that is another signature
            raise AttributeError("__signature__")
        for base in cls.__mro__:
            if base is NamedArguments or base is object:  # which take what the others do
                continue
            if "__init__" in vars(base):
                return inspect.signature(MethodType(cls.__init__, cls))
            if isinstance(made_by := vars(base).get("__new__"), staticmethod):  # not one of C's
                return inspect.signature(MethodType(made_by.__func__, cls))
        return inspect.Signature()


class NamedArguments:
    """A class whose constructor says what was meant by an argument that it does not have.

    It looks at the names before ``__init__`` is called: a wrapper around that would stand in every traceback, and
    between the signature and a type checker.
    """

    if not TYPE_CHECKING:  # what may be given is what __init__ says
        __signature__ = _Signature()

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            """Look at the names; ``__init__`` takes the values."""
            if kwargs:
                _check_names(cls, kwargs)
            made = super().__new__
            if made is not object.__new__:
                return made(cls, *args, **kwargs)
            if (args or kwargs) and cls.__init__ is object.__init__:  # which leaves this to object.__new__
                raise TypeError(f"{cls.__name__}() takes no arguments")
            return made(cls)


def _check_names(cls: type, given: Iterable[str]) -> None:
    """Raise a TypeError where a name is none of the constructor's, so far as it says which ones it has."""
    known = _names(cls, "__init__")
    if known is None:
        return
    for name in given:
        if name not in known:
            raise TypeError(
                f"{cls.__name__} has no argument {name!r}{_meant(name, known, _names(cls, 'fit') or ())}\n"
                f"  its arguments are: {', '.join(known) or 'none'}"
            )


def _names(cls: type, method: str) -> tuple[str, ...] | None:
    """What a method can be given by name, or None where that may be anything."""
    code = getattr(getattr(cls, method, None), "__code__", None)
    if code is None or code.co_flags & inspect.CO_VARKEYWORDS:
        return None
    first, last = max(1, code.co_posonlyargcount), code.co_argcount + code.co_kwonlyargcount
    names: tuple[str, ...] = code.co_varnames[first:last]
    return names


def _meant(name: str, known: tuple[str, ...], of_fit: tuple[str, ...]) -> str:
    if name in _OF_THE_OPTIMIZER and "optimizer" in known:
        return "; it is one of the optimizer's"
    ours = _ELSEWHERE.get(name, name)
    if ours in of_fit:
        return "; it is one of fit's" if ours == name else f"; it is one of fit's, {ours!r}"
    meant = nearest(ours if ours in known else name, known)
    return f"; {meant}" if meant else ""


def check_takes(name: str, function: Callable[..., object], *given: str) -> None:
    """Raise ConfigError where a function is certain not to be callable with these arguments, by position.

    Nothing is certain of what is no function of Python's in the end, nor where a signature was written by hand. A
    decorator may show the signature of what it wraps, and take something else: it is asked for its own.
    """
    called: Any = function
    while type(called) is functools.partial:
        called = called.func
    if type(called) is MethodType:
        called = called.__func__
    elif type(called) is not FunctionType:
        called = inspect.getattr_static(type(called), "__call__", None)
    if type(called) is not FunctionType or hasattr(called, "__signature__") or hasattr(function, "__signature__"):
        return
    signature = inspect.signature(function, follow_wrapped=False)
    try:
        signature.bind(*given)
    except TypeError as error:
        shown = type(function).__name__ if called.__name__ == "__call__" else called.__name__
        defined = called.__name__ if called.__name__.isidentifier() else name
        own = [] if called is function or type(function) is functools.partial else ["self"]
        raise ConfigError(
            f"{name} is {shown}{_bare(signature)}, which cannot be called with {' and '.join(given)}: {error}",
            why=f"the loop calls {name}({', '.join(given)})",
            fix=f"def {defined}({', '.join([*own, *given])}), and functools.partial for what else it takes",
        ) from None


def _bare(signature: inspect.Signature) -> str:
    """The names of the parameters alone."""
    empty = inspect.Parameter.empty
    names = [parameter.replace(annotation=empty, default=empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=names, return_annotation=empty))
