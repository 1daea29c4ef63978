"""The user's step: what it takes, what it returns, and the one made from a loss function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # its name everywhere
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import TypeVar

from loopwright.device import map_tensors
from loopwright.errors import ConfigError, DataError, ShapeMismatchError
from loopwright.metrics import check_name, scalar
from loopwright.mismatch.layers import shape_of
from loopwright.mismatch.losses import of_classes, of_two
from loopwright.mismatch.one_class import check_classes, is_softmax

Model = TypeVar("Model", bound=nn.Module, default=nn.Module)
Batch = TypeVar("Batch", default=Any)


@dataclass(frozen=True, slots=True)
class Output:
    """What a step returns. Callbacks get it with every tensor detached.

    Attributes:
        loss: The scalar to minimise, a mean over the batch.
        weight: How much this batch counts in means and in an accumulated window, for example its number of
            valid tokens; None stands for the batch's size.
        predictions: What metrics get as predictions.
        targets: What metrics get as targets.
        metrics: Further values, logged as weighted means like the loss.

    Examples:
        >>> def step(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> Output:
        ...     x, y = batch
        ...     error = (model(x) - y).abs()
        ...     return Output(error.mean(), weight=len(x), metrics={"worst": error.detach().max()})
        >>> row = Trainer(model, optimizer, step=step).fit(train_loader, epochs=1).history[0]
        >>> sorted(row)
        ['epoch', 'step', 'train/loss', 'train/worst']
    """

    loss: Tensor
    weight: float | Tensor | None = None
    predictions: Any = None
    targets: Any = None
    metrics: Mapping[str, float | Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if type(self.metrics) is not dict:  # one is made for each batch
            _check_named(self.metrics)

    def detached(self) -> Output:
        """The same output with every tensor detached from the graph.

        Returns:
            An output of the same class.
        """
        if type(self) is not Output:  # it may have fields of its own
            return map_tensors(Tensor.detach, self)  # type: ignore[no-any-return]  # it keeps the type
        return Output(
            self.loss.detach(),
            None if self.weight is None else _detached(self.weight),
            _detached(self.predictions),
            _detached(self.targets),
            _detached(self.metrics) if self.metrics else self.metrics,
        )


def _check_named(metrics: object) -> None:
    """Raise ConfigError unless the values that a step measured have names."""
    if metrics is not None and not isinstance(metrics, Mapping):
        raise ConfigError(
            f"metrics of the Output is {describe(metrics)}",
            why="each value needs a name to be logged by",
            fix='Output(loss, metrics={"name": value})',
        )


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach() if value.requires_grad else value
    return map_tensors(Tensor.detach, value)


LossFn: TypeAlias = Callable[[Any, Any], Tensor]
"""A loss function: predictions and targets to a scalar tensor, such as ``nn.MSELoss()``."""

Step: TypeAlias = Callable[[Model, Batch], Output | Tensor]
"""A step: model and batch to an Output, or to just the loss."""


@runtime_checkable
class Metric(Protocol):
    """A metric over a whole evaluation pass, as torchmetrics has them.

    Examples:
        >>> class Worst:
        ...     def reset(self) -> None:
        ...         self.worst = 0.0
        ...     def update(self, predictions: torch.Tensor, targets: torch.Tensor) -> None:
        ...         self.worst = max(self.worst, float((predictions - targets).abs().max()))
        ...     def compute(self) -> float:
        ...         return self.worst
        >>> isinstance(Worst(), Metric)
        True
        >>> sorted(Trainer(model, optimizer, loss, metrics={"worst": Worst()}).evaluate(val_loader))
        ['test/loss', 'test/worst']
    """

    def update(self, predictions: Any, targets: Any, /) -> object:
        """Take in one batch.

        Args:
            predictions: The step's, or the model's output.
            targets: The step's, or the batch's second element.

        Returns:
            Anything; nobody looks at it.
        """
        ...

    def compute(self) -> Any:
        """The value over all batches since ``reset``.

        Returns:
            A number, a tensor of one, or a mapping from names to these.
        """
        ...

    def reset(self) -> object:
        """Forget all batches.

        Returns:
            Anything; nobody looks at it.
        """
        ...


def supervised_step(loss_fn: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Output]:
    """The step for batches of ``(inputs, targets)``: ``loss_fn(model(inputs), targets)``."""
    ignore_index = getattr(loss_fn, "ignore_index", None)
    by_index = isinstance(loss_fn, _BY_INDEX) or any(loss_fn is function for function in _BY_INDEX_FUNCTIONS)
    explained = next((look for look, kinds in _EXPLAINED if _is_of(loss_fn, kinds)), None)
    unseen = is_softmax(loss_fn)  # the first predictions tell how many classes there are

    def supervised(model: nn.Module, batch: Any) -> Output:
        nonlocal unseen
        # What could be taken apart, but is no pair. The first test spares the common kinds the second, which is slow.
        if type(batch) not in _PAIRS and isinstance(batch, (Mapping, Tensor, str)):
            raise _not_a_pair(batch)
        try:
            inputs, targets = batch
        except (TypeError, ValueError):
            raise _not_a_pair(batch) from None
        predictions = model(inputs)
        if isinstance(predictions, Tensor) and isinstance(targets, Tensor):
            if unseen:
                check_classes(predictions, targets)
                unseen = False
            try:
                alike = predictions.shape == targets.shape
            except RuntimeError:  # a nested tensor that is strided has no shape, and is broadcast against nothing
                alike = True
            if not alike:
                _check_shapes(predictions, targets, by_index=by_index, explained=explained)
            if ignore_index is not None and not targets.is_floating_point():
                valid = (targets != ignore_index).sum()
                return Output(loss_fn(predictions, targets), valid, predictions, targets)
        return Output(loss_fn(predictions, targets), None, predictions, targets)

    return supervised


_PAIRS = (list, tuple)


def _not_a_pair(batch: Any) -> DataError:
    bare = "DataLoader(TensorDataset(inputs, targets), batch_size=32), if these are the tensors themselves; else "
    return DataError(
        f"a batch is {describe(batch)}, and not a pair of inputs and targets",
        why="with loss= the trainer calls loss(model(inputs), targets)",
        fix=(bare if isinstance(batch, Tensor) else "")
        + "give the trainer step=, a function of model and batch, in place of loss=",
    )


# The losses whose integer targets are indices of classes: the shapes differ by right.
_BY_INDEX = (nn.CrossEntropyLoss, nn.NLLLoss, nn.MultiMarginLoss, nn.MultiLabelMarginLoss)
_BY_INDEX_FUNCTIONS = (F.cross_entropy, F.nll_loss, F.multi_margin_loss, F.multilabel_margin_loss)


_Explained: TypeAlias = Callable[[str, Tensor, Tensor, Mapping[str, Any]], tuple[str, str] | None]
# The losses that do not broadcast, and what says what they take.
_EXPLAINED: tuple[tuple[_Explained, tuple[Any, ...]], ...] = (
    (of_classes, (nn.CrossEntropyLoss, nn.NLLLoss, F.cross_entropy, F.nll_loss)),
    (of_two, (nn.BCEWithLogitsLoss, nn.BCELoss, F.binary_cross_entropy_with_logits, F.binary_cross_entropy)),
)


def _is_of(loss_fn: object, kinds: tuple[Any, ...]) -> bool:
    return any(isinstance(loss_fn, kind) if isinstance(kind, type) else loss_fn is kind for kind in kinds)


def _check_shapes(predictions: Tensor, targets: Tensor, *, by_index: bool, explained: _Explained | None) -> None:
    """Refuse predictions and targets of different shapes that torch would broadcast.

    Integer targets may be indices of classes in a loss of the user's own too; there only a column of
    predictions against a row of targets is certain to be a mistake.
    """
    if not predictions.is_floating_point() or (by_index and not targets.is_floating_point()):
        return
    if targets.is_floating_point():
        pairs = zip(reversed(predictions.shape), reversed(targets.shape), strict=False)
        broadcast = all(a == b or 1 in (a, b) for a, b in pairs)
    else:
        broadcast = predictions.ndim > 0 and predictions.shape[-1] == 1 and predictions.shape[:-1] == targets.shape
    if broadcast:
        what = f"the prediction has shape {tuple(predictions.shape)}, the target {tuple(targets.shape)}"
        if explained is not None and (found := explained("the loss", predictions, targets, {})) is not None:
            raise ShapeMismatchError(what, why=found[0], fix=found[1])
        raise ShapeMismatchError(
            what,
            why="they would be broadcast against each other, and every prediction compared with every target",
            fix="give both one shape, for example targets.unsqueeze(-1) in the dataset or squeeze(-1) at the end of "
            "the model; where broadcasting is meant, write a step= that does it",
        )


def describe(value: Any) -> str:
    """A few words that say what an object is: its type, and its shape, keys or length."""
    name = type(value).__name__
    if isinstance(value, Tensor):
        return f"a tensor of shape {shape_of(value)}"
    if isinstance(value, Mapping):
        return f"a {name} with the keys {', '.join(map(repr, value))}"
    if isinstance(value, (list, tuple)):
        listed = ", ".join(type(item).__name__ for item in value[:4]) + (", ..." if len(value) > 4 else "")
        return f"a {name} of {len(value)}: ({listed})" if value else f"an empty {name}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return "None" if value is None else f"an object of type {name}"


def as_output(returned: Any) -> Output:
    """What a step returned, as an Output.

    Raises:
        ConfigError: It returned something else.
    """
    output = Output(returned) if isinstance(returned, Tensor) else returned
    if not isinstance(output, Output):
        raise ConfigError(
            f"the step returned {describe(returned)}",
            why="a step returns the loss, a tensor, or an Output that holds it",
            fix="return loss, or return Output(loss, predictions=..., targets=...)",
        )
    check_loss(output.loss)
    return output


def check_loss(loss: object) -> None:
    """Raise ConfigError unless it is one real floating number."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        what = f"{describe(loss)} and {loss.dtype}" if isinstance(loss, Tensor) else describe(loss)
        whole = isinstance(loss, Tensor) and not loss.is_floating_point()
        raise ConfigError(
            f"the loss is {what}",
            why="backward starts from one real number"
            + ("" if isinstance(loss, Tensor) else ", a tensor that knows what it was computed from"),
            fix="compute it from the model's output as it is, for neither whole numbers nor booleans have a gradient; "
            "targets.float(), where the loss takes them as numbers"
            if whole
            else 'take its mean(), or build the loss function with reduction="mean"'
            if isinstance(loss, Tensor)
            else "return the tensor that the loss was computed as, without .item(), float() or numpy()",
        )


def check_trainable(loss: Tensor) -> None:
    """Raise ConfigError unless backward can start from it."""
    check_loss(loss)
    if not loss.requires_grad:
        raise ConfigError(
            "the loss does not depend on any trainable parameter",
            why="it was computed under torch.no_grad(), detached, rebuilt from numbers, or every parameter "
            "has requires_grad=False",
            fix="compute it from the model's output with torch operations, and leave something to train",
        )


def values_of(output: Output, loss: float | Tensor) -> dict[str, float | Tensor]:
    """The values of one batch that are averaged: its loss, and what else the step measured.

    Raises:
        ConfigError: A metric of the step's has a bad name, or is not one real number.
    """
    values: dict[str, float | Tensor] = {"loss": loss}
    if not output.metrics:
        return values
    for name, value in output.metrics.items():
        if name == "loss":
            raise ConfigError(
                "the step returned a metric named 'loss'", why="that is the loss itself", fix="another name"
            )
        values[check_name(name)] = scalar(name, value)
    return values


def predictions_of(output: Output) -> Any:
    """The predictions of a step.

    Raises:
        ConfigError: It returned none.
    """
    if output.predictions is None:
        raise ConfigError(
            "the step returned no predictions",
            why="predict returns what the step calls its predictions",
            fix="return Output(loss, predictions=...), or predict(data, forward=lambda model, batch: ...)",
        )
    return output.predictions


def inputs_of(batch: Any) -> Any:
    """What a model is given to predict from: the batch, or its first element where it is a tuple or a list."""
    return batch[0] if isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence) else batch
