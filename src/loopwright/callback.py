"""The hooks, and how the loop calls them."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self

from torch import nn
from typing_extensions import TypeVar

from loopwright.arguments import NamedArguments
from loopwright.errors import counted, note
from loopwright.hook_names import respelt, suggestion

if TYPE_CHECKING:
    from loopwright.state import State
    from loopwright.step import Output

Batch = TypeVar("Batch", default=Any, contravariant=True)
Model = TypeVar("Model", bound=nn.Module, default=Any, contravariant=True)

TWICE = "backward through the graph a second time"  # torch's words
WHY_TWICE = (
    "the trainer calls backward on the loss that a step returns: a step that calls it itself leaves no graph for that, "
    "and what a step keeps for the next batch, such as a hidden state, has to be detached"
)

logger: logging.Logger = logging.getLogger("loopwright")


class Callback(NamedArguments, Generic[Batch, Model]):
    """Something that watches a run. Subclass it and override the hooks you need.

    Every hook is declared here, in the order of a run, as a method that does nothing. A method whose name begins
    with ``on_`` and is none of them is a ``TypeError`` as soon as the class is created. So is one that is a hook's name
    but for capitals and underscores, such as ``setUp`` and ``onEpochEnd``, unless the class has that hook as well. What
    a second base, which is no callback, calls its own methods is free.

    The hooks are given ``state``, what the run knows; ``batch``, as the loader gave it and on the device;
    ``output``, what the step made of it, detached; and ``error``, the exception on its way.

    To a type checker it may be of a batch and a model: in a ``Callback[dict[str, Tensor], Net]`` the hooks are declared
    with ``batch: dict[str, Tensor]`` and ``state: State[Net]``. Without them it is of any.

    A callback reads ``state``; the one thing it may order is ``state.stop(reason)``. Whether the weights come
    out right never depends on one.

    Examples:
        >>> class PrintLoss(Callback):
        ...     def on_epoch_end(self, state: State) -> None:
        ...         print(f"epoch {state.progress.epoch}: loss {state.metrics['train/loss']:.4f}")
    """

    def setup(self, state: State[Model]) -> None:
        """First. The model is on its device. Whoever was set up is torn down once, whatever happens."""

    def on_fit_start(self, state: State[Model]) -> None:
        """The fit begins, and everything that goes on from before has been restored."""

    def on_epoch_start(self, state: State[Model]) -> None:
        """An epoch begins, or goes on; the loader's iterator is not made yet."""

    def on_batch_start(self, state: State[Model], batch: Batch) -> None:
        """The batch is on the device; the gradients of a new window are not zeroed yet."""

    def on_backward_end(self, state: State[Model], output: Output) -> None:
        """After each backward: this window's gradients so far, still scaled under fp16."""

    def on_before_step(self, state: State[Model]) -> None:
        """Once an optimizer step: the whole window's gradients, unscaled, averaged, not yet clipped."""

    def on_step_end(self, state: State[Model]) -> None:
        """After ``optimizer.step()``: new weights, and still the gradients that made them."""

    def on_batch_end(self, state: State[Model], output: Output) -> None:
        """After each batch: its output, detached; gradients stay until the next window begins."""

    def on_eval_start(self, state: State[Model]) -> None:
        """A pass over validation or test data begins; ``state.stage`` says which."""

    def on_eval_batch_end(self, state: State[Model], output: Output) -> None:
        """After each batch of an evaluation: its output, detached."""

    def on_eval_end(self, state: State[Model]) -> None:
        """The evaluation's metrics are in ``state.metrics``."""

    def on_epoch_end(self, state: State[Model]) -> None:
        """The epoch is over, after the validation that is due: train and validation metrics."""

    def on_fit_end(self, state: State[Model]) -> None:
        """The run has ended without an error: final metrics."""

    def on_exception(self, state: State[Model], error: BaseException) -> None:
        """An exception is on its way to the caller."""

    def teardown(self, state: State[Model]) -> None:
        """Last, always: close what was opened."""

    def state_dict(self) -> dict[str, Any]:
        """What has to survive a resume: plain data and tensors. By default nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in _own_names(cls):
            _check_name(cls, name)
        for name, value in vars(cls).items():
            if name in HOOKS and inspect.isfunction(value):
                _check_signature(cls, name, value)


HOOKS: tuple[str, ...] = tuple(
    name for name in vars(Callback) if name.startswith("on_") or name in ("setup", "teardown")
)


def _own_names(cls: type[Callback[Any, Any]]) -> list[str]:
    """What a class and those callbacks that it derives from define beside the hooks.

    A name that a base which is no callback has is that base's, such as ``setUp`` of ``unittest.TestCase``, and stays so
    where the class overrides it; unless it is a method for callbacks, as its first argument tells.
    """
    callbacks = [base for base in cls.__mro__ if issubclass(base, Callback)]
    others = {
        name: value for base in cls.__mro__ if not issubclass(base, Callback) for name, value in vars(base).items()
    }
    own = {name for base in callbacks for name in vars(base)}.difference(others, HOOKS)
    meant = {
        name for name, value in others.items() if name.startswith("on_") and name not in HOOKS and _of_state(value)
    }
    return sorted(own | meant)


def _of_state(method: object) -> bool:
    return inspect.isfunction(method) and method.__code__.co_varnames[1 : method.__code__.co_argcount][:1] == ("state",)


def _check_name(cls: type[Callback[Any, Any]], name: str) -> None:
    """Raise TypeError for a method that is meant for a hook, and is none."""
    hook = respelt(name, HOOKS)
    if name.startswith("on_"):
        if not callable(getattr(cls, name)):
            return
        what, mend = f"is not a hook and would never be called; {suggestion(name, HOOKS)}", "take 'on_' off the name"
    else:
        if hook is None or not inspect.isroutine(getattr(cls, name)):  # a class, for example
            return
        if getattr(cls, hook) is not getattr(Callback, hook):  # beside the hook it is a helper
            return
        what, mend = f"is not a hook and would never be called as one; did you mean {hook!r}?", "change the name"
    raise TypeError(
        f"{cls.__name__}.{name} {what}\n"
        f"  the hooks are: {', '.join(HOOKS)}\n"
        f"  fix: correct the name, or {mend} of a method of your own"
    )


def _check_signature(cls: type[Callback[Any, Any]], name: str, method: Callable[..., Any]) -> None:
    declared = list(inspect.signature(getattr(Callback, name)).parameters)
    if inspect.iscoroutinefunction(method) or inspect.isgeneratorfunction(method) or inspect.isasyncgenfunction(method):
        raise TypeError(
            f"{cls.__name__}.{name} is a coroutine or a generator, and calling it would run nothing of it\n"
            f"  fix: def {name}({', '.join(declared)}) -> None, without async and yield"
        )
    try:
        inspect.signature(method).bind(*declared)
    except TypeError as error:
        raise TypeError(
            f"{cls.__name__}.{name} cannot be called as the loop calls it: {error}\n"
            f"  fix: def {name}({', '.join(declared)}) -> None"
        ) from None


Hook = TypeVar("Hook", bound=Callable[..., None])
_WITHOUT_OUTPUT: list[Callable[..., None]] = []


def without_output(hook: Hook) -> Hook:
    """Mark a hook that looks at nothing of the output it is given, so that the loop need not detach one for it."""
    _WITHOUT_OUTPUT.append(hook)
    return hook


_LAST: list[Callable[..., None]] = []


def after_the_others(hook: Hook) -> Hook:
    """Mark a hook that only shows what the others have logged, to be called after theirs wherever it stands.

    So is what a subclass has in its place: it may still call this one, and then shows no less.
    """
    _LAST.append(hook)
    return hook


def comes_last(callback: Callback[Any], hook: str) -> bool:
    """Whether a callback's hook is called after those of all that have none marked so."""
    return any(_is_among(_LAST, vars(base).get(hook)) for base in type(callback).__mro__)


def _is_among(marked: Sequence[Callable[..., None]], method: object) -> bool:
    function = getattr(method, "__func__", method)
    return any(function is one for one in marked)


class Hooks(Callback[Any]):
    """All the callbacks of one run as one, with every hook bound when the run begins.

    A hook that nobody overrides is an empty function here; one that a single callback overrides is that method
    itself; only where several do is there a loop over them. As a context manager it sets the callbacks up and
    tears them down: once each, in reverse, whatever happens.
    """

    def __init__(self, callbacks: Sequence[Callback[Any]], state: State) -> None:
        self._callbacks = callbacks
        self._state = state
        self._set_up: list[Callback[Any]] = []
        self._with_output: set[str] = set()
        for hook in HOOKS:
            fire, looks_at_it = _bind(hook, callbacks)
            setattr(self, hook, fire)
            if looks_at_it:
                self._with_output.add(hook)

    def want_output(self, *hooks: str) -> bool:
        """Whether any callback has a use for the output that one of these hooks is given."""
        return not self._with_output.isdisjoint(hooks)

    def __enter__(self) -> Self:
        for callback in self._callbacks:
            try:
                callback.setup(self._state)
            except BaseException as error:
                note(error, f"raised by {_name(callback)} in its hook setup")
                self._unwind(error)
                raise
            self._set_up.append(callback)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            progress = self._state.progress
            note(
                error,
                f"finished by then: {counted(progress.epoch, 'epoch')}, "
                f"{counted(progress.batch, 'batch', 'batches')} of the next, "
                f"{counted(progress.step, 'optimizer step')} (stage {self._state.stage!r})",
            )
            if (origin := _origin(error, self._callbacks)) is not None:
                note(error, f"raised by {_name(origin[0])} in its hook {origin[1]}")
            if isinstance(error, RuntimeError) and TWICE in str(error):
                note(error, WHY_TWICE)
        failed = self._unwind(error)
        if error is None and failed is not None:
            raise failed

    def _unwind(self, error: BaseException | None) -> BaseException | None:
        """Announce the error, tear down in reverse; the first error that a teardown raises itself, if any."""
        first: BaseException | None = None
        if error is not None:
            for callback in self._set_up:
                try:
                    callback.on_exception(self._state, error)
                except BaseException as another:
                    _report(another, callback, "on_exception", error)
        while self._set_up:
            callback = self._set_up.pop()
            try:
                callback.teardown(self._state)
            except BaseException as another:
                _report(another, callback, "teardown", first if error is None else error)
                first = another if first is None else first
        return first


def _report(another: BaseException, callback: Callback[Any], hook: str, error: BaseException | None) -> None:
    """Keep a further error from hiding the first: it goes into the log and into a note of the first."""
    note(another, f"raised by {_name(callback)} in its hook {hook}")
    if error is not None:
        note(error, f"{_name(callback)}.{hook} then raised {another!r} as well; the log has its traceback")
        trace = type(another), another, another.__traceback__  # not another itself, which may be false
        logger.error("%s.%s raised while another error was on its way", _name(callback), hook, exc_info=trace)


def _bind(hook: str, callbacks: Sequence[Callback[Any]]) -> tuple[Callable[..., None], bool]:
    """What calls the hook of all the callbacks, and whether any of them looks at what the hook is given."""
    empty = getattr(Callback, hook)
    bound: list[Callable[..., None]] = []
    last: list[Callable[..., None]] = []
    looks_at_it = False
    for callback in callbacks:
        method = getattr(callback, hook)
        function = getattr(method, "__func__", method)
        if function is empty:
            continue
        looks_at_it = looks_at_it or not _is_among(_WITHOUT_OUTPUT, method)
        code = getattr(function, "__code__", None)
        plain = getattr(method, "__self__", None) is callback and code is not None and code.co_name == hook
        row = last if comes_last(callback, hook) else bound
        row.append(method if plain else _relay(callback, hook, method))
    bound += last
    if not bound:
        return _nothing, False
    if len(bound) == 1:
        return bound[0], looks_at_it
    every = tuple(bound)
    # Spelled out, since packing and unpacking of arguments would cost as much as a short hook.
    if empty.__code__.co_argcount == 2:  # itself and the state

        def fire(state: Any) -> None:
            for method in every:
                method(state)

        return fire, looks_at_it

    def fire_with(state: Any, what: Any) -> None:
        for method in every:
            method(state, what)

    return fire_with, looks_at_it


def _nothing(state: Any, what: Any = None) -> None: ...


def _relay(callback: Callback[Any], hook: str, method: Callable[..., None]) -> Callable[..., None]:
    """Call a hook that is no plain method, through a frame in which ``_origin`` finds whose it is."""

    def relay(*args: Any) -> None:
        relayed = (callback, hook)  # read from the frame by _origin
        method(*args)
        del relayed

    return relay


def _origin(error: BaseException, callbacks: Sequence[Callback[Any]]) -> tuple[Callback[Any], str] | None:
    """The callback and the hook in which the error arose, found in its traceback.

    Looking there, instead of catching around every call, is what lets the loop call a hook directly.
    """
    trace = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        if "relayed" in frame.f_locals and frame.f_code.co_name == "relay":
            callback, hook = frame.f_locals["relayed"]
            return callback, hook
        if frame.f_code.co_name in HOOKS and frame.f_code.co_argcount:
            owner = frame.f_locals.get(frame.f_code.co_varnames[0])
            found = [callback for callback in callbacks if callback is owner]
            if found:
                return found[0], frame.f_code.co_name
        trace = trace.tb_next
    return None


def _name(callback: Callback[Any]) -> str:
    return type(callback).__qualname__
