"""The loop: fit, its epochs, its batches, and the passes over data that train nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any, Generic

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import TypeVar

from loopwright.arguments import NamedArguments, check_takes
from loopwright.averages import Averages
from loopwright.batches import Pass, evaluated
from loopwright.callback import Callback, Hooks
from loopwright.callbacks.checkpoint import Checkpoint
from loopwright.callbacks.early_stopping import EarlyStopping, restoring
from loopwright.device import check_values, map_tensors, move, mover, place, resolve_device
from loopwright.errors import ConfigError, NonFiniteError
from loopwright.guard import LOSS, NORM, Guard, NonFinitePolicy, Weights, all_finite
from loopwright.metric_calls import compute_metric, named_scores, reset_metric, together, update_metric
from loopwright.metrics import check_name
from loopwright.mismatch import explain_in_note
from loopwright.modes import compiled, evaluating
from loopwright.monitor import check_validated, unvalidated
from loopwright.nonfinite.culprit import Culprit
from loopwright.nonfinite.rerun import Replay
from loopwright.nonfinite.skips import Skips
from loopwright.planning import check_loader, check_passes, length_of, no_batches, plan_fit, unused_cadence
from loopwright.precision import Precision, autocast, grad_scaler, unscale
from loopwright.preflight import Preflight
from loopwright.randomness import deterministic_kernels, seed_everything
from loopwright.result import Result
from loopwright.run import Run
from loopwright.saving import Saving
from loopwright.schedule import Every, Schedule
from loopwright.scheduling import check_lasts, explain_end
from loopwright.scopes import scope
from loopwright.settings import (
    Settings,
    check_callbacks,
    check_metrics,
    check_model,
    check_step,
    sparse_clipping,
)
from loopwright.sizes import weigh
from loopwright.state import Plan, Stage, State, written_to
from loopwright.step import (
    LossFn,
    Metric,
    Output,
    Step,
    as_output,
    inputs_of,
    predictions_of,
    supervised_step,
    values_of,
)
from loopwright.unrecorded import step_of, zero_grad_of
from loopwright.weights import copied, holds, parameters_of, snapshot
from loopwright.window import Window

Model = TypeVar("Model", bound=nn.Module, default=nn.Module)
Batch = TypeVar("Batch", default=Any)

logger: logging.Logger = logging.getLogger("loopwright")


class Trainer(NamedArguments, Generic[Model, Batch]):
    """Trains a model: the loop you would have written by hand, with the same bits.

    Args:
        model: Any ``nn.Module``. It stays plain torch.
        optimizer: An optimizer of ``torch.optim``'s kind over the model's parameters.
        loss: A loss function; batches are then ``(inputs, targets)``. Give exactly one of ``loss`` and ``step``.
        step: A function of model and batch that returns the loss, or an Output.
        schedule: A learning-rate scheduler, and when it moves.
        metrics: Names to metrics, computed over every evaluation pass: torchmetrics, or anything with ``update``,
            ``compute`` and ``reset``.
        callbacks: What watches the run. Each hook is called in the order of the list, ``teardown`` in the reverse; a
            ProgressBar's ``on_eval_end`` and ``on_epoch_end`` come after those of the others wherever it stands.
        device: ``"auto"`` takes CUDA, else Apple's GPU, else the CPU.
        precision: ``"bf16"`` and ``"fp16"`` run the step under autocast, fp16 with a gradient scaler.
        accumulate: Batches to one optimizer step, whose gradient is that of their weighted mean.
        clip_norm: The largest norm that the gradients of one step may have.
        compile: Compile the model in place while it is fitted.
        seed: Seeds python, numpy and torch when a fresh run begins. The model's first weights were drawn before.
        deterministic: Use deterministic kernels, and fail where there are none.
        on_nonfinite: ``"raise"`` stops at a NaN or infinite loss with an error that says where; ``"skip"`` drops the
            window with such a loss or gradient; ``"ignore"`` checks nothing.

    Attributes:
        state: What the run knows; callbacks are given it.

    Raises:
        ConfigError: Settings that cannot work, alone or together.

    Examples:
        >>> trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.01), nn.MSELoss())
        >>> result = trainer.fit(train_loader, epochs=2)
        >>> result.stop_reason
        'epochs'
    """

    state: State[Model]
    _read_each_step: bool | None = None  # None: where it is free. Tests set False for an accelerator's cadence.

    def __init__(
        self,
        model: Model,
        optimizer: Optimizer,
        loss: LossFn | None = None,
        *,
        step: Step[Model, Batch] | None = None,
        schedule: Schedule | None = None,
        metrics: Mapping[str, Metric] | None = None,
        callbacks: Iterable[Callback[Any, Any]] = (),
        device: torch.device | str = "auto",
        precision: Precision = "fp32",
        accumulate: int = 1,
        clip_norm: float | None = None,
        compile: bool = False,
        seed: int | None = None,
        deterministic: bool = False,
        on_nonfinite: NonFinitePolicy = "raise",
    ) -> None:
        check_model(model, optimizer)
        check_step(loss, step)
        self._settings = Settings(
            schedule=schedule,
            metrics=check_metrics({} if metrics is None else metrics),
            callbacks=check_callbacks(callbacks),
            precision=precision,
            accumulate=accumulate,
            clip_norm=clip_norm,
            compile=compile,
            seed=seed,
            deterministic=deterministic,
            on_nonfinite=on_nonfinite,
        )
        self._settings.check_schedule(optimizer)
        self._settings.check_sparse(model, optimizer)
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        self._takes_closure = closure is not None and closure.default is inspect.Parameter.empty
        if self._takes_closure:
            self._settings.check_closure(optimizer)
        self._stopper = restoring(self._settings.callbacks)

        self.state = State(model, optimizer, resolve_device(device))
        self._move = mover(self.state.device)
        self._loss = loss
        self._custom_step = step is not None
        self._step: Callable[[Model, Any], Output | Tensor] = step if step is not None else supervised_step(loss)  # type: ignore[arg-type]  # check_step: one of them is there
        self._autocast = autocast(precision, self.state.device)
        self._scaler = grad_scaler(precision, self.state.device)
        # Values are read at every step where that is free, or where the next step depends on them.
        self._may_skip = self._scaler is not None or on_nonfinite == "skip"
        needed = self._may_skip or self._takes_closure
        free = self.state.device.type == "cpu" if self._read_each_step is None else self._read_each_step
        self._eager = free or needed

        # What the loop itself remembers from one fit to the next.
        self._run = Run(self.state, self._settings.callbacks, schedule, self._scaler, eager=self._eager)
        self._followers: list[tuple[str, str | None]] = [
            (type(c).__name__, c.monitor)
            for c in self._settings.callbacks
            if isinstance(c, (Checkpoint, EarlyStopping))
        ]
        if self._run.plateau is not None:
            self._followers.append(("the schedule", self._run.plateau.name))
        self._callback_states: list[dict[str, Any]] | None = None
        self._last_weights: dict[str, Any] | None = None  # set while the model holds restored ones instead
        self._restored_epoch: int | None = None
        self._fitted: Plan | None = None  # the latest fit's
        self._warned: set[str] = set()
        self._doubts: Callable[[], list[str]] | None = functools.partial(self._settings.doubts, model, optimizer, loss)
        if not self._doubts():
            self._doubts = None  # so that no fit need look

        # What holds while a call runs.
        self._running = False
        self._guard = Guard(on_nonfinite, eager=self._eager)
        self._saving = self._savers()
        self._replay = Replay(self.state.device)
        folders = [callback.folder for callback in self._settings.callbacks if isinstance(callback, Checkpoint)]
        self._culprit = Culprit(
            self.state,
            self._step,
            loss,
            self._autocast,
            self._run.data,
            folders,
            self._replay,
            eager=self._eager,
            closure=self._takes_closure,
            settle=self._settle,
        )
        self._skips = Skips(self.state, self._culprit, on_nonfinite, self._scaler)
        self._single = Window(1) if accumulate == 1 else None  # the same one for each batch
        self._in_hand: int | None = None  # the samples of a batch whose step is made, and that is not counted yet
        self._output_wanted = False
        self._held: list[int] = []  # what the optimizer held when it was looked up which parameters these are
        self._parameters: list[Tensor] = []  # the optimizer's, in the model's order
        self._zero_grad: Callable[[], None] = optimizer.zero_grad  # and what the model has beside them
        self._step_optimizer: Callable[[], object] = optimizer.step  # made anew by each fit, as a copy needs its own

    def __repr__(self) -> str:
        state = self.state
        return f"Trainer({type(state.model).__name__}, {type(state.optimizer).__name__}, {state.progress})"

    def fit(
        self,
        train: Iterable[Batch],
        val: Iterable[Batch] | None = None,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        validate: Every = Every(epochs=1),  # noqa: B008  # it is frozen
        resume: str | os.PathLike[str] | None = None,
        preflight: bool = False,
    ) -> Result:
        """Train until a target is reached or a callback stops the run.

        In short:

            for each epoch:
                for batch in train:
                    zero_grad; loss = step(model, batch); loss.backward(); (clip); optimizer.step()
                    (validate, where a number of steps is due)
                (validate, where a number of epochs is due)

        The targets are absolute: ``fit(epochs=20)`` after ``fit(epochs=10)`` trains ten more, as the same run.

        Args:
            train: The training data: an iterable of batches, iterated over once an epoch.
            val: The validation data.
            epochs: How many epochs the run is to have. Give this or ``steps``, or both: the first reached ends it.
            steps: How many optimizer steps the run is to have.
            validate: How often to validate on ``val``. Without ``val`` it has no effect, and the log says so once.
            resume: ``"auto"`` goes on from the newest whole checkpoint of the one ``Checkpoint`` in the list, or
                starts afresh where its folder holds none; a path goes on from that checkpoint.
            preflight: Whether to call ``preflight`` before a fresh run begins, and to train only where no check fails.
                A run that goes on, in this process or from a checkpoint, is not checked again.

        Returns:
            The history, the reason for the end, and how far the run has come.

        Raises:
            ConfigError: No target, data that is no loader, a schedule that ends before the fit does, weights that are
                float16 themselves under ``precision="fp16"``, or a check of the preflight failed.
            DataError: The data is empty, or can be read once and is needed again, or a batch's size is not clear.
            CheckpointError: There is nothing whole to resume from, it is of another run, or a save has failed.
            NonFiniteError: A loss, or what became of the weights, is NaN or infinite, under ``"raise"``.
            ShapeMismatchError: With ``loss=``, predictions and targets would broadcast.
            KeyboardInterrupt: Ctrl-C, once the batch in hand is finished, so that another ``fit`` goes on exactly from
                there. A second Ctrl-C raises it at once.
        """
        state = self.state
        settings = self._settings
        restores = resume is not None and (resume != "auto" or state.progress.fresh)
        plan = plan_fit(
            train,
            val,
            epochs,
            steps,
            validate,
            accumulate=settings.accumulate,
            clip_norm=settings.clip_norm,
            preflight=preflight,
            progress=None if restores else state.progress,
            measures=settings.metrics,
            skips=self._may_skip,
        )
        self._check_idle("train")
        settings.check_half(state.optimizer)
        if settings.schedule is not None and not restores:
            self._check_schedule(plan)
        self._fitted = plan
        self._run.history.catch_up(state)
        in_order = self._saving.obeyed or self._run.ended  # no error has left the window that may be open
        saving = self._saving = self._savers()
        saving.check(resume)
        # Where a fit was broken off within an epoch, what is due at its target is still to come.
        over = self._run.ended or not (self._run.unfinished or state.progress.batch)
        if not restores and over and (reason := plan.reached(state.progress)) is not None:
            self._say_nothing_to_train(reason)
            return self._as_it_ended(reason)
        if preflight and state.progress.fresh and not saving.goes_on(resume):
            self.preflight(train, val).raise_failures()
        if val is None and validate.epochs != 1:  # not the default
            self._warn_once("cadence", unused_cadence(validate))
        with self._prepared("train", plan), saving:
            restored = self._begin_run(resume, train, val, keep_window=in_order)
            reason = state.stop_reason or plan.reached(state.progress)
            if reason is not None and restored and not self._run.unfinished:
                self._say_nothing_to_train(reason)
                if self._run.ended:  # else it was left between its last save and its end
                    return self._as_it_ended(reason)
            self._run.ended = False
            with Hooks(settings.callbacks, state) as hooks, torch.enable_grad(), self._culprit.searching():
                self._start(hooks, train, val)
                while (reason := state.stop_reason or plan.reached(state.progress)) is None:
                    self._train_epoch(hooks, train, val)
                self._end(hooks)
        return self._result(reason)

    def _begin_run(
        self,
        resume: str | os.PathLike[str] | None,
        train: Iterable[Batch],
        val: Iterable[Batch] | None,
        *,
        keep_window: bool,
    ) -> bool:
        """Begin a fresh run, go on with this one, or restore one: whether one was restored."""
        state = self.state
        root_trains = state.model.training  # else _begin sets every flag
        modes = [] if root_trains else [(module, module.training) for module in state.model.modules()]
        self._begin(keep_window=keep_window)
        try:
            restored = self._saving.begin(resume, train, val)
            if resume is not None:  # else it is done before anything begins
                check_passes(state.plan, state.progress, train, val, skips=self._may_skip)
                self._check_schedule(state.plan)
        except BaseException:
            for module, training in modes:
                module.training = training
            raise
        return restored

    def _start(self, hooks: Hooks, train: Iterable[Batch], val: Iterable[Batch] | None) -> None:
        """The first hook, and what was due when the run was left."""
        self._output_wanted = hooks.want_output("on_backward_end", "on_batch_end")
        for callback, saved in self._run.regained:
            if type(callback).setup is not Callback.setup:  # which may have made all anew
                callback.load_state_dict(saved)
        hooks.on_fit_start(self.state)
        if self._followers:
            for about, words in unvalidated(self._followers, self.state, skips=self._may_skip).items():
                self._warn_once(about, words)
        self._saving.rehearse()
        self._catch_up(hooks, train, val)

    def _say_nothing_to_train(self, reason: str) -> None:
        logger.warning(
            "nothing to train: targets are absolute, and the run has ended already: %s (%s); "
            "raise the target to train more, or make a new model, optimizer and Trainer to begin again",
            reason,
            self.state.progress,
        )

    def _as_it_ended(self, reason: str) -> Result:
        """What there is to return where the targets are reached already."""
        self._guard.parameters(self.state.model)
        self._restore_best()
        return self._result(reason)

    def _catch_up(self, hooks: Hooks, train: Iterable[Batch], val: Iterable[Batch] | None) -> None:
        """What was due when the run was left."""
        state, run = self.state, self._run
        if val is not None and run.validation_due:
            self._evaluate(hooks, val, "val", "val")
            self._saving.heed()
            if not run.epoch_over:
                self._saving.at_step()
        run.validation_due = False
        over = state.stop_reason is not None or state.plan.reached(state.progress) is not None
        if over and run.window is None and state.progress.batch == state.plan.batches and not run.epoch_over:
            if not isinstance(train, Iterator):
                for _ in self._saving.until_asked(run.data.batches(train, state.progress.epoch, state.progress.batch)):
                    break  # there is none: a sampler may draw once more at its end
                self._saving.heed_cut()
            self._log_means()  # it was the epoch's last batch, after which the run was left
            self._close_data()
            if run.validation_due:
                self._evaluate(hooks, val, "val", "val")
            self._saving.heed()
        if run.epoch_over:
            self._end_epoch(hooks, (state.progress.step, state.progress.skipped))

    def _train_epoch(self, hooks: Hooks, train: Iterable[Batch], val: Iterable[Batch] | None) -> None:
        """The rest of the present epoch, or as much of it as the targets and the callbacks allow."""
        state, progress, plan, run, saving = self.state, self.state.progress, self.state.plan, self._run, self._saving
        before, steps = (progress.step, progress.skipped), math.inf if plan.steps is None else plan.steps
        signals, epoch = saving.signals, progress.epoch
        saves, owed = saving.active, False  # owed: the save of the last step, which waits for the epoch's validation
        last = False
        hooks.on_epoch_start(state)
        if state.stop_reason is not None:
            return
        if (batches := length_of(train)) != plan.batches:  # a sampler may make as many as each epoch needs
            plan = state.plan = dataclasses.replace(plan, batches=batches)
        if progress.batch == 0:
            self._run.averages = Averages(eager=self._eager)
        self._guard.begin(state)
        self._replay.begin(wanted=self._eager and self._settings.on_nonfinite == "raise")
        for batch in self._saving.until_asked(self._run.data.batches(train, progress.epoch, progress.batch)):
            if last:
                break
            step = progress.step
            try:
                self._train_batch(hooks, batch)
            except NonFiniteError as error:  # here the batch is still in hand
                self._look_into(error, hooks, batch)
                raise
            if signals.asked is not None:
                saving.obey()
            if run.window is not None:
                continue  # what follows waits for the window's optimizer step
            if progress.step != step:
                if run.validation_due:
                    self._evaluate(hooks, val, "val", "val")
                    saving.heed()
                owed = saves and progress.batch == plan.batches
                if saves and not owed:
                    saving.at_step()
            if state.stop_reason is not None or progress.step >= steps:
                if progress.batch != plan.batches:
                    self._run.data.leave(progress.batch)
                    return
                if isinstance(train, Iterator):
                    break  # it was the last batch, so the epoch gets its end as well
                last = True  # and the data, too, comes to its end, at which a sampler may draw once more
        saving.heed_cut()
        if progress.batch == 0:
            raise no_batches("the training data", train)
        if run.window is not None:  # a short one, where only the end of the data could tell
            self._optimizer_step(hooks, run.window)
            owed = saves
        self._log_means()
        self._close_data()
        if run.validation_due:
            self._evaluate(hooks, val, "val", "val")
        saving.heed()
        if owed:
            self._saving.at_step()
        if progress.epoch != epoch:
            raise written_to(progress, epoch)
        self._end_epoch(hooks, before)

    def _look_into(self, error: NonFiniteError, hooks: Hooks, batch: Batch) -> None:
        """Have the source of what is not finite looked for, in the batch in hand."""
        moved = self._move(batch) if self._eager else None  # else it was found some steps after its batch
        if moved is not None and moved is not batch and hooks.want_output("on_batch_start"):
            error.inexact.append("the batch was moved anew, without what on_batch_start may have done to it")
        self._culprit.look(error, moved)

    def _train_batch(self, hooks: Hooks, batch: Batch) -> None:
        """One batch: the canonical step, with what is due around it."""
        state = self.state
        batch = self._move(batch)
        hooks.on_batch_start(state, batch)
        window = self._run.window
        if window is None:
            window = self._run.window = self._single or self._open_window()
            self._zero_grad()
        if self._replay.due:
            self._replay.note()
        if self._takes_closure:
            first: list[tuple[Output, int]] = []
            state.optimizer.step(self._closure(hooks, window, batch, first))  # type: ignore[arg-type]  # typed as float, but LBFGS calls float() on it itself
            output, samples = self._closure_stepped(hooks, window, first)
        else:
            if self._autocast is None:
                returned = self._step(state.model, batch)
            else:
                with self._autocast:
                    returned = self._step(state.model, batch)
            output = returned if type(returned) is Output else as_output(returned)
            loss, usable = output.loss, False
            value: float | Tensor = 0.0
            weight, samples = weigh(output, batch, read=self._eager)
            if window.size > 1 and not isinstance(weight, Tensor) and weight == 0:
                self._guard.leave_out()  # it counts for nothing, even if its loss is NaN
            else:
                value, usable = self._guard.loss(state, loss)
                if not usable:
                    window.finite = False
                    self._skips.found(self._guard.found(state, LOSS, value), batch)
            window.add(values_of(output, value) if output.metrics else {"loss": value}, weight)
            if self._output_wanted:
                output = output.detached()
            if usable:
                if window.size > 1:
                    loss = loss / window.divisor(weight, loss.dtype)
                if self._scaler is not None:
                    loss = self._scaler.scale(loss)
                loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotation there
                hooks.on_backward_end(state, output)
            if window.size == 1 or window.full:
                self._in_hand = samples
                self._optimizer_step(hooks, window)
        self._in_hand = None
        progress = state.progress
        progress.batch += 1
        progress.samples += samples
        hooks.on_batch_end(state, output)
        if not self._eager:
            self._guard.weight(state, weight)
            self._guard.look_if_read(state)

    def _optimizer_step(self, hooks: Hooks, window: Window) -> None:
        """The end of a window: its gradients averaged and clipped, and the optimizer's step."""
        state, optimizer, scaler = self.state, self.state.optimizer, self._scaler
        if not window.finite or (window.size > 1 and window.empty):
            self._run.window = None
            self._skips.count("weights" if window.finite else "losses")
            if not window.finite:
                window.finite = True  # for the next batch
                self._guard.parameters(state.model)  # with ruined weights every later step would be skipped too
            return
        if scaler is not None:
            unscale(scaler, optimizer)
        if window.size > 1 and (correction := window.correction()) is not None:
            for parameter in self._trained():
                if parameter.grad is not None:
                    parameter.grad.div_(correction)
        hooks.on_before_step(state)
        if self._settings.clip_norm is not None:
            self._clip(self._settings.clip_norm)
        if scaler is not None:
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            skipped = scaler.get_scale() < scale
        elif self._settings.on_nonfinite == "skip" and not all_finite(
            parameter.grad for parameter in self._trained() if parameter.grad is not None
        ):
            skipped = True
            self._skips.found(self._guard.found(state, NORM, None))
        else:
            self._step_optimizer()
            skipped = False
        self._run.window = None
        if skipped:
            self._skips.count("gradients" if scaler is None else "scale")
            if self._settings.on_nonfinite == "skip":
                self._guard.parameters(state.model)
            else:
                # Its losses are sound: it was the scale that was too large.
                state.metrics.hold("train", window.commit(self._run.averages))
        else:
            self._stepped(hooks, window)

    def _closure(
        self, hooks: Hooks, window: Window, batch: Batch, first: list[tuple[Output, int]]
    ) -> Callable[[], Tensor]:
        """What an optimizer such as LBFGS calls to evaluate the loss; its first output and size go into ``first``."""
        state, optimizer = self.state, self.state.optimizer

        def closure() -> Tensor:
            optimizer.zero_grad()
            if self._replay.due:
                self._replay.note()
            with self._autocast or contextlib.nullcontext():
                output = as_output(self._step(state.model, batch))
            loss = output.loss
            value, _ = self._guard.loss(state, loss)
            output = output.detached()
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotation there
            hooks.on_backward_end(state, output)
            if not first:
                weight, samples = weigh(output, batch, read=True)
                window.add(values_of(output, value), weight)
                first.append((output, samples))
                self._in_hand = samples
                hooks.on_before_step(state)
            if self._settings.clip_norm is not None:  # at each, or the line search would compare unlike gradients
                self._clip(self._settings.clip_norm)
            return loss.detach()

        return closure

    def _closure_stepped(self, hooks: Hooks, window: Window, first: list[tuple[Output, int]]) -> tuple[Output, int]:
        """After a step through a closure: the first output, and its size."""
        if not first:
            raise ConfigError(
                f"{type(self.state.optimizer).__name__}.step did not call its closure",
                why="the closure is where the batch's loss and gradients come from",
                fix="call it in step; an optimizer that can do without declares step(self, closure=None)",
            )
        self._run.window = None
        self._stepped(hooks, window)
        return first[0]

    def _clip(self, largest: float) -> None:
        # What clip_grad_norm_ does, with a look at the norm before it turns every gradient into NaN.
        trained = self._trained()
        try:
            norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        except NotImplementedError:
            if sparse := [n for n, p in self.state.model.named_parameters() if p.grad is not None and p.grad.is_sparse]:
                raise sparse_clipping(sparse) from None  # torch's own words are a hundred lines about other things
            raise
        if self._scaler is None:  # under fp16 an infinite norm is the scaler's to handle
            self._guard.norm(self.state, norm)
        nn.utils.clip_grads_with_norm_(trained, largest, norm)

    def _trained(self) -> list[Tensor]:
        """What the optimizer holds, in the model's order. A callback that thaws layers step by step adds to it."""
        held = [id(p) for group in self.state.optimizer.param_groups for p in group["params"]]
        if held != self._held:
            there = set(held)
            every = parameters_of(self.state.model, self.state.optimizer)
            self._held, self._parameters = held, [p for p in every if id(p) in there]
        return self._parameters

    def _stepped(self, hooks: Hooks, window: Window) -> None:
        """After an optimizer step: counters, metrics, hooks, schedule."""
        state, run = self.state, self._run
        state.progress.step += 1
        state.metrics.hold("train", window.commit(run.averages))
        validate = state.plan.validate
        run.validation_due = validate is not None and validate.due_at_step(state.progress)
        hooks.on_step_end(state)
        if self._settings.schedule is not None:
            self._move_schedule("step")

    def _move_schedule(self, each: str) -> None:
        schedule = self._settings.schedule
        if schedule is None or schedule.each != each:
            return
        if self._run.plateau is None:
            try:
                schedule.lr_scheduler.step()
            except ValueError as error:
                explain_end(error, schedule, self.state.plan)
                raise
        elif (value := self._run.plateau.fresh(self.state)) is not None:
            step: Callable[[float], object] = schedule.lr_scheduler.step  # type: ignore[assignment]  # Schedule saw to it
            step(value)

    def _check_schedule(self, plan: Plan) -> None:
        """Raise ConfigError where the schedule is certain to end before the fit, and warn where it may."""
        schedule, in_hand = self._settings.schedule, self._in_hand is not None
        if schedule is not None:
            doubt = check_lasts(schedule, plan, self.state.progress, in_hand=in_hand, skips=self._may_skip)
            if doubt is not None:
                self._warn_once("schedule", doubt)

    def _open_window(self) -> Window:
        """The window that begins here. It will hold fewer batches at the end of an epoch of known length."""
        accumulate, plan, progress = self._settings.accumulate, self.state.plan, self.state.progress
        left = accumulate if plan.batches is None else plan.batches - progress.batch
        return Window(min(accumulate, left) if left > 0 else accumulate, (progress.batch, progress.samples))

    def _log_means(self) -> None:
        """The epoch's means, after its last step."""
        state, progress, plan = self.state, self.state.progress, self.state.plan
        self._guard.look(state)
        if plan.batches is not None and progress.batch < plan.batches:
            self._warn_once(
                "length",
                f"the training data has a length of {plan.batches} batches, but gave only {progress.batch}",
            )
        for name, mean in (self._run.averages.means() or {"loss": math.nan}).items():
            state.metrics.record(f"train/{name}", mean)

    def _close_data(self) -> None:
        """The epoch's data has been gone through; from here on its end can be made up for.

        Before it nothing may be saved once the data has come to its end: a loader that keeps its own place is at the
        next epoch then.
        """
        validate, run = self.state.plan.validate, self._run
        run.epoch_over = True
        if validate is not None and validate.due_at_epoch(self.state.progress.epoch + 1):
            run.validation_due = True

    def _end_epoch(self, hooks: Hooks, before: tuple[int, int]) -> None:
        """After the epoch's validation: its schedule, its count, its row."""
        state, progress, plan = self.state, self.state.progress, self.state.plan
        number = progress.epoch + 1
        if progress.step != self._run.history.steps_by(progress.epoch):  # else every step of the epoch was skipped
            self._move_schedule("epoch")
        progress.epoch, progress.batch = number, 0
        self._run.epoch_over = False
        hooks.on_epoch_end(state)
        if progress.epoch != number:
            raise written_to(progress, number)
        self._run.history.finish_epoch(state)
        self._saving.at_epoch()
        all_skipped = progress.step == before[0] and progress.skipped > before[1]
        if all_skipped and plan.epochs is None and (self._scaler is None or self._scaler.get_scale() < 1):
            raise NonFiniteError(
                f"not one optimizer step was made in epoch {number}: every one was skipped",
                why="with steps= as the only target, the run would never end",
                fix="look at the data, take a smaller learning rate, or give epochs= as well",
            )

    def _begin(self, *, keep_window: bool) -> None:
        """Begin the run, or go on where the last fit ended."""
        state, settings, model = self.state, self._settings, self.state.model
        if state.stop_reason is not None:
            state.stop_reason = None
        if (window := self._run.window) is not None and not keep_window:  # an error left it open
            if window is not self._single:  # its batches made no step, and get their turn again
                state.progress.batch, state.progress.samples = window.begins
            self._run.window = None
        elif self._in_hand is not None:  # an error came between its step and its count
            state.progress.batch += 1
            state.progress.samples += self._in_hand
        self._in_hand = None
        if state.progress.fresh and settings.seed is not None:
            seed_everything(settings.seed)
        self._skips.begin()
        if self._doubts is not None:
            for doubt in self._doubts():
                logger.warning(doubt)
            self._doubts = None
        self._run.regained = []
        if self._callback_states is not None:
            self._run.regained = list(zip(settings.callbacks, self._callback_states, strict=True))
            for callback, saved in self._run.regained:
                callback.load_state_dict(saved)
            self._callback_states = None
        if self._last_weights is not None:
            if self._stopper is not None and holds(model, self._stopper.best_weights or {}):
                model.load_state_dict(self._last_weights)
            self._last_weights = self._restored_epoch = None
        if not model.training:
            model.train()
            logger.info("the model was in eval mode; it has been put in training mode, with all of its submodules")
        if self._run.plateau is not None:
            check_validated(self._run.plateau.name, state)
        trained = {id(p) for p in self._trained()}
        self._step_optimizer = step_of(state.optimizer)
        self._zero_grad = zero_grad_of(state.optimizer, [p for p in model.parameters() if id(p) not in trained])

    def _end(self, hooks: Hooks) -> None:
        """The end of a fit that went well."""
        state = self.state
        self._guard.look(state)
        if state.progress.batch:
            self._run.history.leave_epoch(state, self._run.averages.means())
        self._guard.parameters(state.model)
        hooks.on_fit_end(state)
        self._run.ended = True
        self._skips.end()
        self._saving.at_end()
        # Copies: another trainer may use the same callbacks before the next fit.
        self._callback_states = [copied(callback.state_dict()) for callback in self._settings.callbacks]
        self._restore_best()

    def _restore_best(self) -> None:
        if self._last_weights is None and self._stopper is not None and self._stopper.best_weights is not None:
            self._last_weights = snapshot(self.state.model)
            self.state.model.load_state_dict(self._stopper.best_weights)
            self._restored_epoch = self._stopper.best_epoch

    def _result(self, reason: str) -> Result:
        progress = dataclasses.replace(self.state.progress)
        return Result(self._run.history.rows(), reason, progress, self._restored_epoch)

    def evaluate(self, data: Iterable[Batch], *, name: str = "test") -> dict[str, float]:
        """The loss and the metrics over ``data``, in eval mode and without gradients.

        Fires ``setup``, the ``on_eval_...`` hooks and ``teardown``; ``state.stage`` is ``"test"``.

        Args:
            data: An iterable of batches such as ``fit`` takes.
            name: The prefix of the metrics' names.

        Returns:
            For example ``{"test/loss": 0.0101}``: means weighted by samples, or by the step's own weight.

        Raises:
            DataError: There is no batch, or a batch's size is not clear.
        """
        check_name(name)
        check_loader("data", data)
        marks = self.state.metrics.marks()
        with self._prepared("test", Plan(val_batches=length_of(data))):
            try:
                with Hooks(self._settings.callbacks, self.state) as hooks:
                    return self._evaluate(hooks, data, name, "test")
            finally:
                self.state.metrics.settle(marks)  # the run's history and records are not about test data

    def _evaluate(self, hooks: Hooks, data: Iterable[Batch] | None, name: str, stage: Stage) -> dict[str, float]:
        """One pass over evaluation data; the scores, which are logged as well. A validation given up stays due."""
        assert data is not None  # a validation is due only where there is data for it
        state, metrics = self.state, self._settings.metrics
        if stage == "val":
            self._guard.look(state)
        averages, wanted, batches = Averages(eager=self._eager), hooks.want_output("on_eval_batch_end"), 0
        weights = Weights()  # on the device, to be looked at with the means
        for metric_name, metric in metrics.items():
            reset_metric(metric_name, metric)
        before, state.stage = state.stage, stage
        called = f"{'validation' if stage == 'val' else name} data"
        passing = Pass(data, self._run.data if stage == "val" else None)
        with passing, evaluating(state.model):
            hooks.on_eval_start(state)
            # No name for the iterator: a traceback would keep it, and its workers, alive.
            for batch in self._saving.until_asked(evaluated(data, called, passing.start)):
                batches += 1
                batch = self._move(batch)
                with self._autocast or contextlib.nullcontext():
                    output = as_output(self._step(state.model, batch))
                output = output.detached() if wanted or metrics else output
                weight, _ = weigh(output, batch, read=self._eager)
                averages.add(values_of(output, output.loss.detach()), weight)
                if not self._eager and isinstance(weight, Tensor):
                    weights.add(batches, weight)
                for metric_name, metric in metrics.items():
                    update_metric(metric_name, metric, output)
                hooks.on_eval_batch_end(state, output)
                del output  # else it would live on beside the next one
                if stage == "val" and self._saving.asked:
                    break
            if stage == "val" and self._saving.asked:  # given up: its sums and draws are undone, and it stays due
                passing.undo()
                return {}
            if not batches:
                raise no_batches(f"the {called}", data)
            weights.check(f"batch {{}} of the {called}")
            scores = {f"{name}/{key}": value for key, value in averages.means().items()}
            for metric_name, metric in metrics.items():
                computed = compute_metric(metric_name, metric)
                scores = together(scores, named_scores(f"{name}/{metric_name}", computed))
            for key, value in scores.items():
                state.metrics.record(key, value)
                if stage == "val" and not math.isfinite(value):
                    self._warn_once(key, f"{key} is {value}; it counts as no improvement")
            hooks.on_eval_end(state)
        state.stage = before  # an error leaves it, so that on_exception sees where it arose
        if stage == "val":
            self._run.validation_due = False
        return scores

    def predict(self, data: Iterable[Any], *, forward: Callable[[Model, Any], Any] | None = None) -> list[Any]:
        """The model's output for each batch, on the CPU, in eval mode and without gradients. No hook is called.

        Args:
            data: An iterable of batches. The model gets the batch, or its first element where the batch is a tuple or
                a list. With ``step=`` the step is called, and the ``predictions`` of its Output are taken.
            forward: A function of model and batch to call in place of both.

        Returns:
            A list with an item for each batch: ``torch.cat`` joins them where they are tensors.

        Raises:
            ConfigError: The step returned no predictions.
        """
        check_loader("data", data)
        if forward is not None:
            check_takes("forward", forward, "model", "batch")
        outputs: list[Any] = []
        with self._prepared("predict", Plan(batches=length_of(data))), evaluating(self.state.model):
            for batch in evaluated(data, "data to predict", None):
                batch = self._move(batch)
                with self._autocast or contextlib.nullcontext():
                    if forward is not None:
                        output = forward(self.state.model, batch)
                    elif self._custom_step:
                        output = predictions_of(as_output(self._step(self.state.model, batch)))
                    else:
                        output = self.state.model(inputs_of(batch))
                outputs.append(move(map_tensors(Tensor.detach, output), torch.device("cpu")))
                del output
        return outputs

    def explain(self, *, callbacks: bool = False) -> str:
        """The source text of the plain PyTorch loop that this trainer is: a function ``train``, and what it needs.

        It imports torch, and nothing of this library. Given the same model, optimizer, loss or step, data and random
        state it comes to the same losses and weights, bit for bit, and returns the rows of ``result.history``. Only the
        lines that this configuration needs are there. After a fit, these are those of its targets, its validation and
        its data; before any, ``epochs`` and the validation data are left to the caller, and batches are taken for pairs
        of tensors.

        Args:
            callbacks: Also show in comments which callback's hook runs where. The hooks themselves are not written out.

        Returns:
            The text, as ruff formats it. It differs from fit to fit only where targets, validation or data do.

        Examples:
            >>> trainer = Trainer(model, optimizer, nn.MSELoss(), clip_norm=1.0, device="cpu")
            >>> result = trainer.fit(train_loader, epochs=2)
            >>> trainer.explain().splitlines()[5]
            'def train(model, optimizer, loss_fn, train_loader, *, epochs=2, clip_norm=1.0):'
        """
        from loopwright.explain import explain  # which no run needs

        shown = self._run.callbacks if callbacks else None
        return explain(
            self.state,
            self._settings,
            loss=None if self._custom_step else self._loss,
            closure=self._takes_closure,
            plan=self._fitted,
            layout=self._run.data.layout,
            restored_epoch=self._restored_epoch,
            callbacks=shown,
        )

    def preflight(self, train: Iterable[Batch], val: Iterable[Batch] | None = None, *, steps: int = 3) -> Preflight:
        """Look for what would go wrong, in a few steps on copies of model and optimizer, before training begins.

        Weights, buffers, gradients, modes, the optimizer, random generators and the loaders' places are afterwards
        what they were; so are modules, optimizers and generators in the closure of the step, among the globals that it
        names, or bound to it, and its plain tensors, arrays, lists, dicts, sets and variables there. What hangs on
        other objects is not put back, nor is what is written to files. No hook is called, nothing is compiled, and no
        file is written.

        Args:
            train: The training data that ``fit`` will get. Data that can be read only once is not read.
            val: Its validation data.
            steps: How many training batches to look at, and to make a step on, each by itself.

        Returns:
            The checks, each passed, failed or not applicable; ``str`` of it is a table.

        Raises:
            ConfigError: Data that is no loader, or a model on the meta device. What the model, the step or the data
                raise is a failed check.
        """
        from loopwright.checks import preflight  # here, for most runs need none of it
        from loopwright.checks.rehearsal import Subject

        self._check_idle("train")
        state, settings = self.state, self._settings
        check_values(state.model, state.device)
        subject = Subject(
            state.model,
            state.optimizer,
            self._loss,
            self._step,
            settings.metrics,
            state.device,
            settings.precision,
            settings.clip_norm,
            self._takes_closure,
            settings.accumulate,
        )
        self._running = True
        try:
            return preflight(subject, train, val, steps=steps, deterministic=settings.deterministic)
        finally:
            self._running = False

    def _check_idle(self, stage: Stage) -> None:
        if self._running:
            raise ConfigError(
                f"a call for {stage!r} was made while the trainer is at work on {self.state.stage!r}",
                why="both would use the same state",
                fix="call it after fit has returned; validation data is fit's second argument",
            )

    @scope
    def _prepared(self, stage: Stage, plan: Plan) -> Generator[None]:
        """Everything on its device and in its mode while a call runs; all of it undone after."""
        state = self.state
        if self._running:
            self._check_idle(stage)
        self._running = True
        state.plan = plan
        if state.stage != stage:  # each write is looked at
            state.stage = stage
        state.metrics.validated = plan.validate is not None
        try:
            place(state.model, state.optimizer, (self._loss, *self._settings.metrics.values()), state.device)
            with contextlib.ExitStack() as stack:
                if self._settings.deterministic:
                    stack.enter_context(deterministic_kernels())
                if self._settings.compile and stage == "train":
                    stack.enter_context(compiled(state.model))
                yield
        except Exception as error:
            explain_in_note(error)
            raise
        finally:
            self._running = False
            if state.stage != "train":
                state.stage = "train"

    def _settle(self) -> None:
        self._saving.settle()

    def _savers(self) -> Saving:
        checkpoints = [callback for callback in self._settings.callbacks if isinstance(callback, Checkpoint)]
        return Saving(self._run, checkpoints, self._guard, checked=self._settings.on_nonfinite != "ignore")

    def _warn_once(self, about: str, message: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            logger.warning(message)
