"""The exceptions: each says what happened, why, and what to do about it.

Each class carries a stable ``id`` that opens its message, so that a message can be searched for.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path


class LoopwrightError(Exception):
    """The base of every error that loopwright raises on its own account.

    **Cause.** Never raised itself: ``except LoopwrightError`` catches whatever loopwright raises on its own account.
    An error that is yours, in the model, the data or a callback, comes through as it is.

    Args:
        what: What is wrong, naming the value at fault.
        why: Why it cannot be allowed; may be empty.
        fix: What to type instead; may be empty.

    Attributes:
        id: What opens the message of the class, and does not change.
        what: As given.
        why: As given.
        fix: As given.

    Examples:
        >>> try:
        ...     Trainer(model, optimizer, loss, accumulate=0)
        ... except LoopwrightError as error:
        ...     print(error.id, error.what, sep=": ")
        config: accumulate is 0
    """

    id: ClassVar[str] = "loopwright"

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        self.what: str = what
        self.why: str = why
        self.fix: str = fix
        super().__init__(_composed(self))

    def __reduce__(self) -> tuple[object, ...]:
        # The message is composed by __init__; composing it a second time on unpickling would nest it.
        state = self.__dict__
        if isinstance(self, OSError):  # whose own fields are not in there
            state = state | {"errno": self.errno, "strerror": self.strerror, "filename": self.filename}
        return _rebuild, (type(self), self.args), state

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would show the repr of its message


def _composed(error: LoopwrightError) -> str:
    lines = [f"[{error.id}] {error.what}", error.why and f"  why: {error.why}", error.fix and f"  fix: {error.fix}"]
    return "\n".join(line for line in lines if line)


def _rebuild(kind: type[LoopwrightError], args: tuple[object, ...]) -> LoopwrightError:
    error = kind.__new__(kind, *args)
    error.args = args
    return error


class ConfigError(LoopwrightError, ValueError):
    """A setting, or a combination of settings, that cannot work.

    **Cause.** A class where an instance belongs, a value that is not one of the choices, two settings that contradict
    each other, a loss without a gradient, a package that is not installed. It comes when the trainer is made, or
    before the first step, wherever it can be known then.

    **Cure.** The last line of the message, after ``fix:``, says what to type.

    Examples:
        >>> Trainer(model, optimizer, nn.MSELoss)
        Traceback (most recent call last):
        loopwright.errors.ConfigError: [config] loss is the class MSELoss
          why: calling a class makes an object, and no loss
          fix: loss=MSELoss(), an instance
    """

    id = "config"


class NonFiniteError(LoopwrightError, FloatingPointError):
    """A loss, a gradient norm or a parameter became NaN or infinite under ``on_nonfinite="raise"``.

    **Cause.** A bad sample, a ``log(0)``, a derivative at a place where it has no value, or a learning rate that is
    far too high. Under ``"skip"`` it comes where nothing is left: with ``steps=`` as the only target, after a whole
    epoch in which every step was skipped; in data without a length, after a thousand skipped steps in a row.

    **Cure.** The message says which of these it is, as far as it can be found out, and the fix that goes with it; the
    attributes say the same to a program.

    What was found out is in the message and in these attributes; each is None, or empty, where it is not known.

    Args:
        what: What is not finite, and where.
        why: Where it comes from.
        fix: What to do about it.
        found: What was not finite, as in the attribute.

    Attributes:
        found: What was not finite: ``"loss"``, ``"gradient"`` or ``"parameters"``.
        epoch: Where, counted from 1.
        batch: Where in the epoch, counted from 1.
        step: The optimizer step that it would have become, counted from 1.
        cause: Where it comes from: ``"input"``, ``"weights"``, ``"forward"`` (an operation in the model, or in a
            module's hook), ``"loss"`` (one in the loss or the step, outside of the model), ``"backward"`` (a gradient
            of finite numbers, or what a hook made of one), or ``"update"`` (the optimizer's step, or whoever else wrote
            to the weights).
        module: The name of the innermost module with the first operation that went wrong, as ``named_modules`` has
            it; empty for the model itself.
        operation: The name of that operation, such as ``"log"``.
        samples: The dataset's indices of the batch's samples.
        bad_samples: Those of them in whose rows the first number that is not finite stands; empty where a
            ``collate_fn``, or other code that is not torch's, may have put the samples in another order.
        inputs: All tensors of the batch that are not finite, such as ``"batch[0]"``; the message begins with the one
            that was used first.
        parameters: The names of the parameters that are not finite, or whose gradients are not.
        terms: The step's own metrics that were not finite.
        checkpoint: The newest checkpoint that can be gone on from.
        inexact: Why the search may not have seen what happened: it runs the batch once more.
        details: The lines of the message between what was found and why.
        searched: Whether the source has been looked for.

    Examples:
        >>> batches = [(torch.ones(2, 3), torch.ones(2, 1)), (torch.ones(2, 3) / 0, torch.ones(2, 1))]
        >>> try:
        ...     Trainer(model, optimizer, loss).fit(batches, epochs=1)
        ... except NonFiniteError as error:
        ...     print(error.cause, error.inputs, error.place)
        input ['batch[0]'] epoch 1, batch 2
    """

    id = "non-finite"

    def __init__(self, what: str, *, why: str = "", fix: str = "", found: str | None = None) -> None:
        super().__init__(what, why=why, fix=fix)
        self.found: str | None = found
        self.epoch: int | None = None
        self.batch: int | None = None
        self.step: int | None = None
        self.cause: str | None = None
        self.module: str | None = None
        self.operation: str | None = None
        self.samples: list[Any] | None = None
        self.bad_samples: list[Any] = []
        self.inputs: list[str] = []
        self.parameters: list[str] = []
        self.terms: list[str] = []
        self.checkpoint: Path | None = None
        self.inexact: list[str] = []
        self.details: list[str] = []
        self.searched: bool = False

    @property
    def place(self) -> str:
        """Where it was found, in words; empty where that is not known."""
        return "" if self.batch is None else f"epoch {self.epoch}, batch {self.batch}"

    def compose(self) -> None:
        """Make the message anew, of what the attributes now say."""
        why, fix = self.why and f"why: {self.why}", self.fix and f"fix: {self.fix}"
        lines = [line for line in (*self.details, why, fix) if line]
        self.args: tuple[Any, ...] = ("\n  ".join([f"[{self.id}] {self.what}", *lines]),)


class ShapeMismatchError(LoopwrightError, ValueError):
    """Prediction and target have different shapes that would silently broadcast.

    **Cause.** With ``loss=``, prediction and target are floating numbers of different shapes that torch would
    broadcast. ``(N, 1)`` against ``(N,)`` makes N times N differences; the loss is a number all the same, and the
    model learns to predict the mean.

    **Cure.** One shape for both: ``targets.unsqueeze(-1)`` in the dataset, or ``squeeze(-1)`` at the end of the model.
    Where broadcasting is meant, a ``step=`` computes what it likes.

    Examples:
        >>> try:
        ...     Trainer(model, optimizer, loss).fit([(torch.ones(2, 3), torch.ones(2))], epochs=1)
        ... except ShapeMismatchError as error:
        ...     print(error.what)
        the prediction has shape (2, 1), the target (2,)
    """

    id = "shape-mismatch"


class UnknownMetricError(LoopwrightError, KeyError):
    """A metric was asked for by a name that nothing has logged.

    **Cause.** A name was read from ``state.metrics``, or is monitored, and nothing has logged it. A monitored name is
    looked for when it is first judged: at the end of an epoch or of a validation.

    **Cure.** The message lists the names that there are, and the nearest. A metric of the validation begins with
    ``val/``.

    Examples:
        >>> try:
        ...     Trainer(model, optimizer, loss).state.metrics["train/loss"]
        ... except UnknownMetricError as error:
        ...     print(error.what)
        there is no metric 'train/loss'
    """

    id = "unknown-metric"


class DataError(LoopwrightError):
    """The data given cannot be trained on: empty, or of an unexpected form.

    **Cause.** The data gave no batch; a batch is not a pair of inputs and targets, and ``loss=`` is used; the size of
    a batch is not clear; or, where a run goes on within an epoch, the data gives fewer batches than are done.

    **Cure.** For no batch: the message says how large the dataset and the batches are, and whether ``drop_last``
    dropped the only one; an iterator, such as a generator, can be read only once, so pass a list or a ``DataLoader``.
    For batches of another kind: ``step=``, a function of model and batch. For an unclear size: return ``Output(loss,
    weight=...)`` from it.

    Examples:
        >>> try:
        ...     Trainer(model, optimizer, loss).fit([], epochs=1)
        ... except DataError as error:
        ...     print(error.what)
        the training data gave no batch: it is an empty list
    """

    id = "data"


class CheckpointError(LoopwrightError):
    """A checkpoint that is missing, damaged, or of another run.

    **Cause.** On a resume: the checkpoint is missing or not whole, or it is of another model, optimizer or schedule;
    the trainer is then as it was before. With ``resume="auto"``: there are checkpoints, and none is whole. Before the
    first step or at a save: a callback's state holds what a checkpoint cannot hold.

    **Cure.** For one that is not whole: ``python -m loopwright inspect FOLDER`` says which are; ``resume=`` with the
    path of one, or ``resume=None``, which sets them all aside. For one of another run: build model, optimizer and
    schedule as they were when it was saved, or take its weights alone, with ``load_weights``. For a state: plain data
    and tensors in ``state_dict``.

    Examples:
        >>> try:
        ...     load_weights("runs/step-000000120", model)
        ... except CheckpointError as error:
        ...     print(error.id)
        checkpoint
    """

    id = "checkpoint"


_MENDS: Mapping[int, str] = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "get leave to write there, or take another folder"),
    errno.ENAMETOOLONG: "take a folder with a shorter name",
}


class SaveError(CheckpointError, OSError):
    """A checkpoint could not be written; ``errno`` and ``filename`` say where the system refused.

    **Cause.** The system refused: the disk is full or fails, the folder may not be written to, there is no support for
    locks. Writing happens while the training goes on, so the error is raised at the optimizer step after, or at the
    end of ``fit``.

    **Cure.** Older checkpoints are untouched: mend what the system says, and go on from the newest with
    ``resume="auto"``.

    Examples:
        >>> _ = Path("taken").write_text("no folder")
        >>> trainer = Trainer(model, optimizer, loss, callbacks=[Checkpoint("taken")])
        >>> try:
        ...     trainer.fit(train_loader, epochs=1)
        ... except SaveError as error:
        ...     print(error.strerror)
        Not a directory
    """

    id = "save"

    @classmethod
    def of(cls, error: OSError, path: object) -> SaveError:
        """The error for what the system said about ``path``.

        Args:
            error: What the system raised.
            path: What was to be written.

        Returns:
            The error, with the system's ``errno``, ``strerror`` and the path as ``filename``.
        """
        own = cls(
            f"{path} could not be saved: {error.strerror or error} (errno {error.errno})",
            why="older checkpoints are untouched",
            fix=_MENDS.get(error.errno or 0, "mend what the system says") + ', and go on with resume="auto"',
        )
        own.errno, own.strerror, own.filename = error.errno, error.strerror, str(path)
        return own

    @classmethod
    @contextlib.contextmanager
    def on(cls, path: object) -> Iterator[None]:
        """Turn what the system refuses within the block into an error of this class.

        Args:
            path: What is written in the block.

        Returns:
            A context manager.
        """
        try:
            yield
        except cls:
            raise
        except OSError as error:
            raise cls.of(error, path) from error


class LockedError(LoopwrightError):
    """Another process is writing to the same checkpoint folder.

    **Cause.** Another process, or another ``fit`` that is running in this one, saves into the same folder. It is
    refused before it trains. The lock ends with the process that holds it, however that ends.

    **Cure.** A folder for each run; or wait until the other one has ended.

    Examples:
        >>> class Second(Callback):
        ...     def on_fit_start(self, state: State) -> None:
        ...         Trainer(model, optimizer, loss, callbacks=[Checkpoint("run")]).fit(train_loader, epochs=1)
        >>> try:
        ...     Trainer(model, optimizer, loss, callbacks=[Checkpoint("run"), Second()]).fit(train_loader, epochs=1)
        ... except LockedError as error:
        ...     print(error.id)
        locked
    """

    id = "locked"


def note(error: BaseException, text: str) -> None:
    """Add a note to an error, also to one that refuses new attributes, as a frozen dataclass does."""
    notes = [*getattr(error, "__notes__", ()), text]
    BaseException.__setattr__(error, "__notes__", notes)


def advise(error: LoopwrightError, fix: str, *, instead: bool = False) -> None:
    """Give an error a fix, where it has none yet, or in place of the one that it has."""
    if instead or not error.fix:
        error.fix = fix
        error.args = (_composed(error),)


def nearest(name: str, names: Iterable[str], *, called: Mapping[str, str] | None = None) -> str:
    """The sentence ``did you mean 'x'?`` for the closest of ``names``, or an empty string.

    Args:
        name: What there is none of.
        names: What there is.
        called: What to call each of ``names``, if not by itself.
    """
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"did you mean {(called[close[0]] if called else close[0])!r}?" if close else ""


def counted(number: int, one: str, several: str | None = None) -> str:
    """A number with its noun, which is ``one`` of them, or ``several``; without that, an s makes the plural."""
    return f"{number} {one if number == 1 else several or one + 's'}"
