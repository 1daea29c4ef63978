"""The contract that every callback keeps, and what puts one through it."""

from __future__ import annotations

import contextlib
import math
import pickle
import random
import tempfile
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loopwright.callback import Callback, comes_last
from loopwright.callbacks.checkpoint import Checkpoint
from loopwright.callbacks.early_stopping import restoring
from loopwright.checkpoint import latest_checkpoint
from loopwright.errors import CheckpointError
from loopwright.plain import decode, encode, from_json, to_json
from loopwright.randomness import seed_everything
from loopwright.result import Result
from loopwright.schedule import Every
from loopwright.state import State
from loopwright.testing.tiny import HookRecorder, tiny_data, tiny_trainer, two_step_fit

Make = Callable[[], Callback[Any]]
Seen = list[tuple[str, dict[str, bytes]]]


def check_callback(make: Callable[[], Callback[Any]]) -> None:
    """Put a callback through the contract that every callback keeps.

    It leaves weights, gradients, modes and random generators alone in every hook; its state is plain data and tensors,
    and a new instance takes it over; a run that goes on from a checkpoint with a new instance comes to the same history
    and the same end as one that was never broken off; it goes on in a second fit; an error of somebody else's comes
    through it unchanged; it can be pickled before and after; it leaves no thread behind.

    Args:
        make: Makes a new instance at each call.

    Raises:
        AssertionError: It breaks the contract; the message says where.

    Examples:
        >>> check_callback(HookRecorder)
    """
    threads = set(threading.enumerate())
    for run in (_fit, _failing_fit, _evaluation):
        _check_leaves_alone(make, run)
    _check_state(make)
    _check_goes_on(make)
    _check_resumes(make)
    _check_error_passes(make)
    _check_pickles(make)
    left = set(threading.enumerate()) - threads
    assert not left, f"it leaves threads running: {sorted(thread.name for thread in left)}"


class _Probe(HookRecorder):
    """Takes down what a callback has to leave alone: weights, gradients, modes and random generators.

    One stands on either side of the callback, so that the second entry of each hook is of after it in ``teardown`` too.
    """

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def record(self, hook: str, state: State) -> None:
        parameters = list(state.model.parameters())
        what = {
            "weights": pickle.dumps([value.numpy().tobytes() for value in state.model.state_dict().values()]),
            "gradients": pickle.dumps([None if p.grad is None else p.grad.numpy().tobytes() for p in parameters]),
            "modes": bytes(module.training for module in state.model.modules()),
            "gradient mode": bytes([torch.is_grad_enabled()]),
            "torch's random state": torch.get_rng_state().numpy().tobytes(),
            "python's random state": pickle.dumps(random.getstate()),
            "numpy's random state": pickle.dumps(np.random.get_state()),
        }
        self.seen.append((hook, what))


class _Planted(Exception):  # noqa: N818  # it is no error of anybody's
    pass


class _Failure(Callback[Any]):
    """Raises once there are so many steps, or as the run ends before."""

    def __init__(self, steps: int = 1) -> None:
        self.steps = steps
        self.error = _Planted("planted", steps)
        self.ended = False  # whether the run came to its end before

    def on_batch_start(self, state: State, batch: object) -> None:
        if state.progress.step >= self.steps:
            raise self.error

    def on_fit_end(self, state: State) -> None:
        self.ended = True
        raise self.error


def _fit(*callbacks: Callback[Any]) -> None:
    two_step_fit(*callbacks, epochs=2)


def _failing_fit(*callbacks: Callback[Any]) -> None:
    with contextlib.suppress(_Planted):
        two_step_fit(*callbacks, _Failure(), epochs=2)


def _evaluation(*callbacks: Callback[Any]) -> None:
    trainer = tiny_trainer(callbacks)
    seed_everything(0)  # as only a fit does
    trainer.evaluate(tiny_data())


def _check_leaves_alone(make: Make, run: Callable[..., None]) -> None:
    alone: Seen = []
    beside: Seen = []
    run(_Probe(alone), _Probe(alone))
    callback = make()
    run(_Probe(beside), callback, _Probe(beside))
    restores, together = restoring((callback,)) is not None, True
    for index, (hook, after) in enumerate(beside):
        together = together and index < len(alone) and alone[index][0] == hook
        if not together:  # one that stops the run ends it earlier, and nothing is trained any more
            there = alone[index][0] if index < len(alone) else "the end"
            ends = hook in ("on_fit_end", "on_exception", "teardown")
            assert ends, f"call {index // 2 + 1} is {hook} with it, and {there} without"
        before = alone[index][1] if together else beside[index - 1][1]
        if restores and hook == "teardown":  # the loop has put the best weights back just before
            before = before | {"weights": beside[index - 1][1]["weights"] if index % 2 else after["weights"]}
        changed = sorted(what for what in before if before[what] != after[what])
        assert not changed, f"{_where(callback, beside, index)} it has changed: {', '.join(changed)}"


def _where(callback: Callback[Any], seen: Seen, index: int) -> str:
    """Between which two entries something has changed, in words."""
    hook, number = seen[index][0], index // 2 + 1
    if index % 2:
        return f"by {hook} (call {number})"
    if index == 0:
        return f"before {hook}"
    earlier = seen[index - 1][0]
    if comes_last(callback, earlier):  # after the second probe's, too
        return f"by {earlier} (call {number - 1})"
    return f"between {earlier} and {hook} (call {number})"


def _check_state(make: Make) -> None:
    trained = make()
    two_step_fit(trained)
    saved = trained.state_dict()
    try:
        tree, tensors = encode(saved, "state_dict()")
        written = to_json(tree)
    except CheckpointError as error:
        raise AssertionError(f"{error.what}: {error.why}") from error
    other = make()
    other.load_state_dict(decode(from_json(written), {name: tensor.clone() for name, tensor in tensors.items()}))
    _check_equal(saved, other.state_dict(), "state_dict()")


def _check_goes_on(make: Make) -> None:
    trainer, first = two_step_fit(make())
    second = trainer.fit(tiny_data(shuffle=True), tiny_data(), epochs=2)
    rows = [row for row in first.history if row["epoch"] <= first.progress.epoch]  # an unfinished epoch's is replaced
    _check_equal(rows, second.history[: len(rows)], "after a second fit, result.history of the first")


def _check_resumes(make: Make) -> None:
    """A run that is broken off, and goes on with a new instance, is the same run; but for clocks and the like."""
    unbroken, again = (_outcome(two_step_fit(make(), epochs=3)[1]) for _ in range(2))
    steady = {what: value for what, value in unbroken.items() if what in again and _same(value, again[what])}
    for steps in (1, 2):  # within an epoch, and at its end
        resumed = _resumed(make, steps)
        if resumed is None:
            continue
        for what, value in steady.items():
            assert _same(value, resumed.get(what)), (
                f"in a run that goes on from its checkpoint of step {steps}, {what} is {resumed.get(what)!r}, and "
                f"{value!r} in one that was not broken off: what it counts on from belongs into its state_dict"
            )


def _resumed(make: Make, steps: int) -> dict[str, object] | None:
    """What becomes of a run that fails after so many steps, and goes on; None where it had ended before."""
    failure = _Failure(steps)
    with tempfile.TemporaryDirectory() as folder:
        try:
            with contextlib.suppress(_Planted):
                two_step_fit(make(), Checkpoint(folder, every=Every(steps=steps)), failure, epochs=3)
            if failure.ended:
                return None
            trainer, path = tiny_trainer([make()]), latest_checkpoint(folder)
            return _outcome(trainer.fit(tiny_data(shuffle=True), tiny_data(), epochs=3, resume=path))
        except CheckpointError as error:
            raise AssertionError(f"a run with it cannot go on from a checkpoint: {error}") from error


def _outcome(result: Result) -> dict[str, object]:
    found: dict[str, object] = {"result.stop_reason": result.stop_reason}
    found |= {f"result.progress.{name}": value for name, value in vars(result.progress).items()}
    return found | {f"{name} of epoch {row['epoch']}": value for row in result.history for name, value in row.items()}


def _check_error_passes(make: Make) -> None:
    for first in (True, False):
        callback, failure = make(), _Failure()
        error, caught = failure.error, None
        before = _parts(error)
        try:
            two_step_fit(*((callback, failure) if first else (failure, callback)))
        except BaseException as another:
            caught = another
        assert caught is error, f"the caller of fit got {caught!r} in place of another callback's error"
        changed = [what for what, part in _parts(error).items() if part != before[what]]
        assert not changed, f"it has changed another callback's error: {', '.join(changed)}"
        trace = caught.__traceback__
        while trace is not None and trace.tb_frame.f_locals.get("self") is not failure:
            trace = trace.tb_next
        assert trace is not None, "it has taken the traceback from another callback's error"
        name = type(callback).__qualname__  # a note of its own making is nobody's harm
        failed = [note for note in caught.__notes__ if note.startswith(f"{name}.") and " then raised " in note]
        assert not failed, f"it failed as well: {failed}"
        two_step_fit(callback)


def _parts(error: BaseException) -> dict[str, object]:
    own = {name: value for name, value in vars(error).items() if name != "__notes__"}
    return {"args": error.args, "__cause__": error.__cause__, "attributes": own}


def _check_pickles(make: Make) -> None:
    callback = make()
    _pickled(callback, "before a fit")
    two_step_fit(callback)
    data = _pickled(callback, "after a fit")
    try:
        twin = pickle.loads(data)
    except Exception as error:
        raise AssertionError(f"what it was pickled to cannot be read: {error!r}") from error
    _check_equal(callback.state_dict(), twin.state_dict(), "state_dict() of a copy")


def _pickled(callback: Callback[Any], when: str) -> bytes:
    error = _not_pickled(callback)
    if error is None:
        return pickle.dumps(callback)
    why = f"{type(error).__name__}: {error}"
    if _not_pickled(type(callback)) is not None:
        why = "its class has to stand at the top of a module"
    else:
        for name, value in vars(callback).items():
            if (own := _not_pickled(value)) is not None:
                why = (
                    f"its attribute {name!r} cannot ({own}); let go of it in teardown, or leave it out in __getstate__"
                )
                break
    raise AssertionError(f"{when} it cannot be pickled: {why}") from error


def _not_pickled(value: object) -> Exception | None:
    try:
        pickle.dumps(value)
    except Exception as error:
        return error
    return None


def _check_equal(one: Any, other: Any, path: str) -> None:
    if isinstance(one, Tensor):
        assert isinstance(other, Tensor), f"{path} is no longer a tensor"
        assert _bits(one) == _bits(other), f"{path} has changed"
    elif isinstance(one, Mapping):
        assert isinstance(other, Mapping), f"{path} is {other!r}"
        assert one.keys() == other.keys(), f"{path} has other keys"
        for key in one:
            _check_equal(one[key], other[key], f"{path}[{key!r}]")
    elif isinstance(one, (list, tuple)):
        assert isinstance(other, (list, tuple)), f"{path} is {other!r}"
        assert len(one) == len(other), f"{path} has another length"
        for index, pair in enumerate(zip(one, other, strict=True)):
            _check_equal(*pair, f"{path}[{index}]")
    else:
        assert _same(one, other), f"{path} was {one!r} and is {other!r}"


def _bits(tensor: Tensor) -> list[tuple[object, ...]]:
    """A tensor's type, shape and bytes; of each part, where it is sparse."""
    parts = encode(tensor)[1].items()
    return [
        (name, part.dtype, part.shape, part.cpu().contiguous().flatten().view(torch.uint8).tolist())
        for name, part in parts
    ]


def _same(one: object, other: object) -> bool:
    both_nan = isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other)
    return both_nan or one == other
