"""A cross-entropy over a single class, which is 0 whatever the model puts out."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # its name everywhere

from loopwright.errors import ConfigError
from loopwright.mismatch.losses import for_one_class

ONE_CLASS = "the cross-entropy is over one class"


def is_softmax(loss_fn: object) -> bool:
    """Whether a loss is torch's own cross-entropy, and no subclass that computes something else."""
    if not isinstance(loss_fn, nn.CrossEntropyLoss):
        return loss_fn is F.cross_entropy
    kind = type(loss_fn)
    itself = kind.forward is nn.CrossEntropyLoss.forward and kind.__call__ is nn.Module.__call__
    return itself and "forward" not in vars(loss_fn)


def check_classes(predictions: Tensor, targets: Tensor) -> None:
    """Raise ConfigError where the dimension of the classes, the second or the only one, is 1."""
    if predictions.ndim == 0 or predictions.shape[1 if predictions.ndim > 1 else 0] != 1:
        return
    raise ConfigError(
        f"{ONE_CLASS}: the prediction has shape {tuple(predictions.shape)}, the target {tuple(targets.shape)}",
        why="the softmax of one number is always 1, so that loss and gradient are 0 whatever the model puts out, "
        "and nothing is trained",
        fix=for_one_class(predictions, targets) or "as many outputs at the end of the model as there are classes",
    )
