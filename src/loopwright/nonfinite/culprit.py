"""Looks for where a value that is not finite comes from, once one has been found, and says it in the error."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from loopwright.batches import EpochData
from loopwright.checkpoint import latest_checkpoint
from loopwright.checkpoint.manifest import read_manifest
from loopwright.device import move
from loopwright.errors import NonFiniteError
from loopwright.nonfinite.census import Census, census, joined, span, tensors_in
from loopwright.nonfinite.reasons import SOFTMAXES, backward_reason, forward_reason
from loopwright.nonfinite.rerun import Replay, Seen, run_again
from loopwright.nonfinite.watch import Event, is_constant
from loopwright.nonfinite.words import listed, made_by, named
from loopwright.scopes import scope
from loopwright.sizes import batch_size
from loopwright.state import State
from loopwright.step import Output
from loopwright.weights import plain_module

_GROWN = 1e6  # a weight that no training at a sound learning rate comes to


class Culprit:
    """Finds the source of what is not finite: the input, the weights, an operation, its gradient, or the update.

    Args:
        state: The run's.
        step: The step.
        loss: The loss, where the step is made of one.
        autocast: The context that the step runs in, if there is one.
        data: The run's place in its data, which knows the samples of a batch.
        folders: Where checkpoints are saved.
        replay: Where the random generators were as the newest step began.
        eager: Whether values are looked at as they come.
        closure: Whether the optimizer's step evaluates the loss several times.
        settle: Returns when no save is on its way any more.
    """

    def __init__(
        self,
        state: State[Any],
        step: Callable[[Any, Any], Any],
        loss: object,
        autocast: contextlib.AbstractContextManager[object] | None,
        data: EpochData,
        folders: Sequence[Path],
        replay: Replay,
        *,
        eager: bool,
        closure: bool = False,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        self._eager, self._closure, self._settle = eager, closure, settle
        self._state, self._step, self._loss, self._autocast = state, step, loss, autocast
        self._data, self._folders, self._replay = data, folders, replay

    @scope
    def searching(self) -> Generator[None]:
        """What is found within the block, and whose batch is gone, is looked into as far as that allows."""
        try:
            yield
        except NonFiniteError as error:
            self.look(error)
            raise

    def look(self, error: NonFiniteError, batch: Any = None, *, again: bool = True) -> None:
        """Say in the error what can be found out. Nothing that the search itself runs into hides the error.

        Args:
            error: Raised by the loop. One that has been looked into stays as it is, and so does one of the user's.
            batch: The batch, on its device, where it is still there.
            again: Whether it may be run once more.
        """
        if error.found is None or error.searched:
            return
        error.searched = True
        try:
            self._search(error, batch, again=again)
        except Exception as problem:
            error.inexact.append(f"the search for the source failed: {type(problem).__name__}: {problem}")
        if self._closure and error.cause != "input":
            self._of_closure(error)
        if error.inexact:
            error.details.append(f"note: {'; '.join(error.inexact)}")
        with contextlib.suppress(Exception):  # whatever is wrong with the folder is another error's matter
            self._settle()
            error.checkpoint = self._newest()
        if error.checkpoint is not None:
            error.details.append(
                f"saved: {error.checkpoint} is the newest checkpoint with finite weights; resume= takes that path"
            )
        error.compose()

    def _newest(self) -> Path | None:
        found = [path for path in map(latest_checkpoint, self._folders) if path is not None]
        checked = [(read_manifest(path)["facts"], path) for path in found]
        return max(((f["step"], p) for f, p in checked if f["checked"]), default=(0, None))[1]

    def _search(self, error: NonFiniteError, batch: Any, *, again: bool) -> None:
        if error.found == "parameters":
            self._of_parameters(error)
            return
        number = self._state.progress.batch if batch is not None else (error.batch or 1) - 1
        error.samples = self._data.samples(number)
        if error.found == "gradient":
            error.parameters = _names(self._state, _gradient)
        if error.found == "gradient" and self._state.plan.accumulate > 1 and batch is None:
            error.samples = None  # they would be those of one batch of several
        if error.found == "gradient" and (not again or (batch is None and self._eager)):
            error.cause = "backward"
            error.details.append(f"gradients: not finite are those of {joined(error.parameters)}; the loss is finite")
            if error.samples:
                error.details.append(f"samples: {listed(error.samples)}")
            return
        weights = _names(self._state, lambda parameter: parameter)
        there = self._data.again(number) if batch is None else batch
        inputs = {path: found for path, tensor in tensors_in(there, "batch") if (found := census(tensor)) is not None}
        error.inputs = list(inputs)
        if batch is None:
            self._of_one_gone(error, inputs, weights, there is not None)
        elif error.found == "loss" and batch_size(batch) == 0:
            error.cause, error.samples = "input", None
            error.why = "the batch is empty, and a mean over nothing is NaN"
            error.fix = "leave out such batches: look at how the dataset, the sampler or collate_fn makes them"
        elif weights:
            self._of_weights(error, weights)
        elif not again:
            self._of_inputs(error, inputs)
        elif error.found == "gradient":
            if error.parameters:  # known whatever the search runs into
                error.details.append(
                    f"gradients: not finite are those of {joined(error.parameters)}; the loss is finite"
                )
            self._of_gradient(error, self._seen(batch, backward=True), inputs, batch)
        else:
            self._of_loss(error, *self._seen_anew(error, batch, inputs, number))
        if error.samples and not error.bad_samples:
            error.details.append(f"samples: {listed(error.samples)}")

    def _seen(self, batch: Any, *, backward: bool) -> Seen:
        model = plain_module(self._state.model)

        def step() -> Any:
            with self._autocast or contextlib.nullcontext():
                return self._step(model, batch)

        return run_again(step, model, batch, self._replay, (self._loss,), with_backward=backward)

    def _seen_anew(
        self, error: NonFiniteError, batch: Any, inputs: dict[str, Census], number: int
    ) -> tuple[Seen, dict[str, Census], Any]:
        """What the batch's second run shows, what of it is not finite, and the batch.

        A step, or a hook, may have written to the batch in hand. Where another can be had, and that one is finite, it
        is the one to run.
        """
        try:
            seen = self._seen(batch, backward=False)
            if not inputs:
                return seen, inputs, batch
        except Exception as problem:
            fresh = self._fresh(number)
            if fresh is not None and _paths(fresh) != _paths(batch):  # the step has taken something out of it
                return self._seen(fresh, backward=False), {}, fresh
            self._of_inputs(error, inputs)  # known all the same
            if isinstance(problem, LookupError):
                error.inexact.append("the step may have taken something out of its batch")
            raise
        if (fresh := self._fresh(number)) is None:
            return seen, inputs, batch
        again = self._seen(fresh, backward=False)
        if again.chain:
            error.details.append("input: fetched once more, the batch is finite: it is the step that writes to it")
            error.inputs = []
            return again, {}, fresh
        error.inexact.append("fetched once more, the batch is finite: a hook may have written to it")
        return seen, inputs, batch

    def _fresh(self, number: int) -> Any:
        """The batch, fetched once more, where it is to be had and is finite; else None."""
        fresh = move(self._data.again(number), self._state.device)
        return fresh if all(census(tensor) is None for _, tensor in tensors_in(fresh, "")) else None

    def _of_closure(self, error: NonFiniteError) -> None:
        """What is advised for other optimizers would not help one that evaluates the loss several times."""
        name, clip = type(self._state.optimizer).__name__, self._state.plan.clip_norm
        if "clip_norm" in error.fix:
            error.fix = "a smaller learning rate" + (", or line_search_fn='strong_wolfe'" if name == "LBFGS" else "")
        if clip is not None and "learning rate" in error.fix:
            error.fix = f"no clip_norm, for {name} takes the clipped gradients for those of the loss; {error.fix}"

    def _of_parameters(self, error: NonFiniteError) -> None:
        """They were found at a save or at the end: what did the last step's gradients look like?"""
        gradients, step = _names(self._state, _gradient), self._state.progress.step
        progress, plan = self._state.progress, self._state.plan
        error.step = step or None
        if step and progress.batch and plan.accumulate == 1:
            error.epoch, error.batch = progress.epoch + 1, progress.batch
        elif step and progress.epoch and plan.batches and plan.accumulate == 1 and not progress.skipped:
            error.epoch, error.batch = progress.epoch, plan.batches  # the epoch's last
        where = f", of {error.place}," if error.place else ""
        if gradients:
            error.cause = "backward"
            error.samples = None if error.batch is None else self._data.samples(error.batch - 1)
            error.details.append(f"where: the gradients of step {step}{where} are not finite: {joined(gradients)}")
            if error.samples:
                error.details.append(f"samples: {listed(error.samples)}")
            error.why = "so it was that step, the last one, which ruined the weights; its loss was finite"
        elif step:
            error.cause = "update"
            error.details.append(f"where: the gradients of step {step}, the last one{where or ','} are finite")
            error.why = "so it was the optimizer's update that was too large, or somebody else wrote to the weights"

    def _of_weights(self, error: NonFiniteError, weights: list[str]) -> None:
        error.cause, error.parameters = "weights", weights
        total, before = sum(1 for _ in self._state.model.parameters()), self._state.progress.step
        error.details.append(f"where: {len(weights)} of {total} parameters are not finite: {joined(weights)}")
        error.fix = (
            "a smaller learning rate, or clip_norm=1.0, which also checks the gradients of every step and so names "
            "the one that is not finite"
        )
        if self._closure:
            error.why = "they were so before this evaluation of the loss: one before it, in this step or an earlier one"
        elif before:
            error.why = f"they were so before this batch: step {before}, or something before it, has ruined them"
        else:
            error.why, error.fix = "they were so before the first step", "a look at how the model was built or loaded"

    def _of_one_gone(self, error: NonFiniteError, inputs: dict[str, Census], weights: list[str], there: bool) -> None:
        """It was found some steps later, on an accelerator."""
        if inputs:
            self._of_inputs(error, inputs)
        else:
            error.details.append(
                "where: values are read some steps later here, so the place above is exact, but the batch is gone"
                + ("; fetched once more, it is finite" if there else "")
            )
            error.fix += '; with device="cpu" each step is looked at as it is made, and the source is searched for'
        if weights:
            error.parameters = error.parameters or weights
            error.details.append(f"now: {len(weights)} parameters are not finite by now: {joined(weights)}")

    def _of_loss(self, error: NonFiniteError, seen: Seen, inputs: dict[str, Census], batch: Any) -> None:
        error.inexact += seen.inexact
        error.terms = _terms(error, seen.output)
        if not seen.chain:
            error.details.insert(0, f"where: run once more, the batch gave a finite loss, {seen.loss:.4g}")
            error.why = "what made it does not come back: it depends on randomness, on state, or on the order of sums"
            error.fix = 'a smaller learning rate, or clip_norm=1.0; on_nonfinite="skip" drops such batches'
            if inputs:
                self._of_inputs(error, inputs)
            return
        origin, rest = _origin(seen.chain)
        sources = [source for source in origin.sources if source in inputs]
        error.operation, error.module = origin.facts.operation or None, origin.place.module
        rows = self._rows(error, origin.found, batch)
        turned = next((event for event in rest if event.found.nan), None)
        if sources and not _masked(origin, seen.chain):
            rows = self._rows(error, inputs[sources[0]], batch)
            self._of_inputs(error, {source: inputs[source] for source in sources}, rows, first=named(origin.place))
            if also := {path: found for path, found in inputs.items() if path not in sources}:
                error.details.insert(1, f"input: {_inputs(also)} too")
            return
        error.cause = "loss" if origin.place.module is None else "forward"
        where = f"where: first in {named(origin.place)}: {origin.found}{rows}"
        if turned is not None and not origin.found.nan:
            where += f"; NaN since {named(turned.place)}"
        if is_constant(seen.chain[0]) and origin is not seen.chain[0]:
            where += f"; the infinity that went in is that of {named(seen.chain[0].place)}"
        others = {source: found for source, found in origin.sources.items() if source not in inputs}
        words = [source if found is None else f"{source}, which holds {found}" for source, found in others.items()]
        error.details.insert(0, where + (f"; what went in: {joined(words)}" if words else ""))
        error.why, error.fix = forward_reason(origin.facts)
        if not origin.found.nan and (largest := _largest(self._state)) > _GROWN:
            error.why += f"; the weights have grown to {largest:.4g}"
        if others and not _masked(origin, seen.chain):
            error.why = f"{joined(list(others))} {'were' if len(others) > 1 else 'was'} not finite before it"
            error.fix = "a look at where that is made or written to"
            known = {f"parameter {name}": name for name, _ in plain_module(self._state.model).named_parameters()}
            error.parameters = [known[source] for source in others if source in known]
            if error.parameters:
                error.cause = "weights"  # of a frozen part: the others have been looked at
                error.fix = "a look at how it was made or loaded: it is frozen, so that no step has changed it"
        if sources:
            error.details.append(f"input: {_inputs({source: inputs[source] for source in sources})}")

    def _of_gradient(self, error: NonFiniteError, seen: Seen, inputs: dict[str, Census], batch: Any) -> None:
        error.inexact += seen.inexact
        state, accumulate = self._state, self._state.plan.accumulate
        first, here = state.progress.batch // accumulate * accumulate + 1, state.progress.batch + 1
        if accumulate > 1 and not seen.bad_gradients:
            error.samples = None  # another batch of the window is at fault
        elif first < here:  # its last batch is, whichever others may be
            error.what = error.what.replace(f"batch {error.batch},", f"batch {here},")
            error.what += f", in the window of batches {first} to {here}"
            error.batch = here
        if not error.parameters:
            error.details.append("where: every gradient is finite by itself, but the sum of their squares is not")
            error.why = "the gradients are too large for their number format"
        elif seen.backward is not None:
            made, place = seen.backward, seen.backward.place
            error.cause, error.module = "backward", place.module
            error.operation = place.operation if made.maker in ("operation", "own") else None
            rows = "" if made.parameter else self._rows(error, made.found, batch)
            error.details.insert(0, f"where: first in {made_by(made)}{rows}")
            error.why, error.fix = backward_reason(place.operation, made.maker)
            if inputs:
                error.details.insert(1, f"input: {_inputs(inputs)}")
            if made.maker == "operation" and any(found.nan for found in inputs.values()):
                error.why = "NaN in the batch that torch.where hides from the loss is in the gradient: 0 * NaN is NaN"
                error.fix = "fill it in before anything is computed from it: torch.nan_to_num, and then torch.where"
        elif accumulate > 1 and not seen.bad_gradients and first < here:
            error.details.append(
                f"where: in one of the batches {first} to {here - 1} of the window; run once more, batch {here} gave "
                "finite gradients"
            )
        elif seen.gradients and not seen.bad_gradients:
            error.details.append("where: run once more, the batch gave finite gradients; a hook may change them")
            error.why = (
                "backward did not make it: a callback's on_backward_end or on_before_step, or a parameter's own hook, "
                "may have written it, or the step is not the same each time"
            )
            error.fix = "a look at what writes to the gradients"

    def _of_inputs(
        self, error: NonFiniteError, inputs: dict[str, Census], rows: str | None = None, first: str | None = None
    ) -> None:
        if not inputs:
            return
        if first is None and all(not (found.nan or found.above) for found in inputs.values()):
            error.details.append(f"input: {_inputs(inputs)}, which a mask may mean")
            return
        error.cause = "input"
        if rows is None:
            rows = self._rows(error, next(iter(inputs.values())), None)
        used = "" if first is None else f"; first used by {first}"
        error.details.insert(0, f"where: in the data: {_inputs(inputs)}{rows}{used}")
        error.why = "the batch was so before anything was computed from it"
        look = f"a look at sample{'s' if len(error.bad_samples) > 1 else ''} {listed(error.bad_samples)}"
        error.fix = (
            f"{look if error.bad_samples else 'a look at the data of that batch'}: leave it out, or fill in what is "
            'missing; on_nonfinite="skip" drops such batches'
        )

    def _rows(self, error: NonFiniteError, found: Census, batch: Any) -> str:
        """The rows of the batch, as words, and the samples that they are, where that is known."""
        samples = error.samples
        size = len(samples) if samples is not None else None if batch is None else batch_size(batch)
        if size is None or found.length != size or not found.rows or (size > 1 and len(found.rows) == size):
            return ""
        several = "s" if len(found.rows) > 1 else ""
        rows = f"row{several} {listed([row + 1 for row in found.rows])} of {size}"
        if samples is None:
            return f", {rows}"
        if size > 1 and not self._data.in_rows():
            return f", {rows}, which may be any of the samples: the loader makes batches in a way of its own"
        error.bad_samples = [samples[row] for row in found.rows]
        return f", {rows}: sample{several} {listed(error.bad_samples)}"


def _paths(batch: Any) -> list[str]:
    return [path for path, _ in tensors_in(batch, "")]


def _largest(state: State[Any]) -> float:
    """The largest absolute value of a weight."""
    spans = [found for p in state.model.parameters() if (found := span(p)) is not None]
    return max((max(-low, high) for low, high in spans), default=0.0)


def _gradient(parameter: Tensor) -> Tensor | None:
    return parameter.grad


def _names(state: State[Any], of: Callable[[Tensor], Tensor | None]) -> list[str]:
    """The parameters for which this tensor is not finite, those that the model does not name by their place."""
    named = list(plain_module(state.model).named_parameters())
    known = {id(parameter) for _, parameter in named}
    held = [p for group in state.optimizer.param_groups for p in group["params"] if id(p) not in known]
    named += [(f"number {index} of the optimizer's others", p) for index, p in enumerate(held)]
    found = []
    for name, parameter in named:
        tensor = of(parameter) if parameter.requires_grad or parameter.grad is not None else None
        if tensor is not None and census(tensor) is not None:
            found.append(name)
    return found


def _origin(chain: Sequence[Event]) -> tuple[Event, Sequence[Event]]:
    """The event to blame, and those after it: masks, whose infinities are meant, are passed over."""
    meant = _meant(chain)
    for index, event in enumerate(chain):
        if event.order not in meant or index == len(chain) - 1:
            return event, chain[index + 1 :]
    raise AssertionError("a chain has an end")


def _meant(chain: Sequence[Event]) -> set[int]:
    """The numbers of the events whose infinities somebody wrote down, or which only carry those on to a softmax."""
    known: dict[int, Event] = {}
    waiting = list(chain)
    while waiting:
        event = waiting.pop()
        if event.order not in known:
            known[event.order] = event
            waiting += event.parents
    masks = any(event.facts.operation in SOFTMAXES for event in chain)
    meant: set[int] = set()
    for order, event in sorted(known.items()):
        carried = masks and not event.found.above and bool(event.parents) and not event.sources
        carried = carried and all(parent.order in meant for parent in event.parents)
        if is_constant(event) or (not event.found.nan and (carried or _masked(event, chain))):
            meant.add(order)
    return meant


def _masked(event: Event, chain: Sequence[Event]) -> bool:
    """Whether all that went in and is not finite is -inf, on the way to a softmax: what masks are for."""
    found = list(event.sources.values())
    meant = bool(found) and all(c is not None and not (c.nan or c.above) for c in found)
    return meant and any(other.facts.operation in SOFTMAXES for other in chain)


def _inputs(inputs: dict[str, Census]) -> str:
    return joined([f"{path} holds {found}" for path, found in inputs.items()])


def _terms(error: NonFiniteError, output: Output) -> list[str]:
    """What the step measured beside its loss; the names of those that are not finite."""
    bad, words = [], []
    for name, value in output.metrics.items():
        number = float(value)
        words.append(f"{name} is {number:.4g}")
        if not math.isfinite(number):
            bad.append(name)
    if not words:
        for name, value in (("predictions", output.predictions), ("targets", output.targets)):
            found = [c for _, tensor in tensors_in(value, name) if (c := census(tensor)) is not None]
            if value is not None:
                words.append(f"the {name} hold {found[0]}" if found else f"the {name} are finite")
    if words:
        error.details.append(f"terms: {'; '.join(words)}")
    return bad
