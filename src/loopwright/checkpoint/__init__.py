"""Checkpoints on the disk: written whole or not at all, read only where every byte is what was written.

What is public of them is here. Below it is, from top to bottom::

    writing, reading    a checkpoint as a whole
    manifest, tensors   the bytes of its files, for both
    folder, lock        where checkpoints are: their names, which are kept, and who may write
    files, format       the system calls; what a checkpoint is
"""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from loopwright.checkpoint.folder import list_checkpoints
from loopwright.checkpoint.manifest import read_manifest
from loopwright.checkpoint.reading import read_checkpoint, read_weights
from loopwright.errors import CheckpointError, advise
from loopwright.paths import PathLike, located
from loopwright.weights import plain_module

__all__ = ["best_checkpoint", "latest_checkpoint", "load_weights"]

logger: logging.Logger = logging.getLogger("loopwright")


def latest_checkpoint(folder: PathLike) -> Path | None:
    """The newest checkpoint in a folder that is whole, or None. Damaged ones are passed over with a warning.

    Args:
        folder: The folder that ``Checkpoint`` was given.

    Returns:
        The path of the checkpoint's own folder, every byte of it verified.

    Examples:
        >>> trainer = Trainer(model, optimizer, loss, callbacks=[Checkpoint("runs/line")])
        >>> result = trainer.fit(train_loader, epochs=1)
        >>> latest_checkpoint("runs/line").name
        'step-000000004'
        >>> latest_checkpoint("runs/none") is None
        True
    """
    for path in reversed(list_checkpoints(folder)):
        try:
            read_checkpoint(path)
        except CheckpointError as error:
            logger.warning("checkpoint refused: %s", error)
        else:
            return path
    return None


def best_checkpoint(folder: PathLike) -> Path | None:
    """The checkpoint with the best monitored score in a folder, or None where none has one.

    Where the metric that ``Checkpoint`` monitors has changed on the way, it is the best by the newest one.

    Args:
        folder: The folder that ``Checkpoint(folder, monitor=..., mode=...)`` was given.

    Returns:
        The path of the checkpoint's own folder, its manifest verified; among equal scores, the oldest.

    Examples:
        >>> saving = Checkpoint("runs/line", monitor="train/loss", mode="min")
        >>> result = Trainer(model, optimizer, loss, callbacks=[saving]).fit(train_loader, epochs=1)
        >>> best_checkpoint("runs/line").name
        'step-000000004'
        >>> best_checkpoint("runs/none") is None
        True
    """
    best: tuple[float, Path] | None = None
    judged: tuple[object, object] | None = None
    for path in reversed(list_checkpoints(folder)):
        try:
            facts = read_manifest(path)["facts"]
        except CheckpointError as error:
            logger.warning("checkpoint refused: %s", error)
            continue
        score, sign = facts.get("score"), {"min": -1.0, "max": 1.0}.get(str(facts.get("mode")))
        if not (isinstance(score, float) and math.isfinite(score) and sign):
            continue
        judged = judged or (facts.get("monitor"), facts.get("mode"))
        same = judged == (facts.get("monitor"), facts.get("mode"))
        if same and (best is None or sign * score >= best[0]):
            best = (sign * score, path)
    return None if best is None else best[1]


def load_weights(path: PathLike, model: nn.Module, *, strict: bool = True) -> None:
    """Load the weights of a checkpoint into a model, verified.

    Args:
        path: The checkpoint's folder.
        model: A module of the same architecture.
        strict: Whether the names have to be the same; otherwise those that both have are loaded.

    Raises:
        CheckpointError: The checkpoint is damaged, or does not fit the model, which is left as it was.

    Examples:
        >>> trainer = Trainer(model, optimizer, loss, callbacks=[Checkpoint("runs/line")])
        >>> result = trainer.fit(train_loader, epochs=1)
        >>> load_weights(latest_checkpoint("runs/line"), model)
    """
    if path is None:
        raise CheckpointError(
            "there is no checkpoint to load from: the path is None",
            why="latest_checkpoint and best_checkpoint return that where a folder holds none",
            fix="look at what they return before",
        )
    folder = located(path)
    model = plain_module(model)
    try:
        weights: dict[str, Any] = dict(read_weights(folder))
        lacks = model.state_dict().keys() - weights.keys()  # what safetensors cannot hold is with the rest of the state
        state = read_checkpoint(folder).state if lacks else None
    except CheckpointError as error:
        advise(error, "another checkpoint: latest_checkpoint(folder) gives the newest that is whole")
        raise
    if lacks:
        extra = state.get("model", {}).get("extra") if isinstance(state, dict) else None
        weights |= extra if isinstance(extra, dict) else {}
    before = {
        name: value.to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
        for name, value in model.state_dict().items()
    }
    try:
        model.load_state_dict(weights, strict=strict)
    except Exception as error:  # torch's, about names and shapes, or what a module of the user's own raises
        model.load_state_dict(before)  # torch has loaded what did fit
        raise CheckpointError(
            f"the weights in {folder} do not fit this {type(model).__name__}",
            why=str(error),
            fix="build the model as it was when they were saved; strict=False leaves out names that one of them lacks",
        ) from error
