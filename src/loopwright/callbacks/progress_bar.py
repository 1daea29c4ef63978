"""How far the run is, on the terminal, in a notebook or as plain lines."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Iterable, Mapping
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TextIO

import torch
from tqdm import tqdm

from loopwright.callback import Callback

if TYPE_CHECKING:
    from loopwright.state import Plan, State
    from loopwright.step import Output

    Tqdm = tqdm[NoReturn]
else:
    Tqdm = tqdm

_PAUSE = 0.1  # seconds between two drawings of the bar
_MOST = 8  # values that are shown at once

logger = logging.getLogger("loopwright")


class _Bar(Tqdm):
    monitor_interval = 0  # no thread beside the loop: it is drawn from the hooks alone


class ProgressBar(Callback[Any]):
    """Shows how far the run is: epoch, rate, time left and the newest metrics.

    On a terminal it is one tqdm bar for the whole fit, redrawn about ten times a second. Between two redraws a batch
    costs it one look at the clock, and metrics are read only to be drawn. The rate and the time left are taken from
    all of the fit so far, validation included. In a notebook the bar is a widget, or text where there is no
    ipywidgets. Everywhere else, as in a log file or under ``TERM=dumb``, it is one plain line for each epoch:
    ``epoch 3/10  step 30  train/loss 0.1234  val/loss 0.2345  812 samples/s``, where the rate is that of training
    alone. ``evaluate`` gets a bar or a line too.

    No colour is ever used. The environment variable ``TQDM_DISABLE=1`` silences it, and of several processes only rank 0
    shows anything. At most eight values are shown, ``train/`` and ``val/`` first. To print while the bar is up, use
    ``tqdm.write``.

    Args:
        file: Where to write; by default what ``sys.stderr`` is when fit is called.

    Example:
        >>> trainer = Trainer(model, optimizer, loss, callbacks=[ProgressBar(file=sys.stdout)])
        >>> result = trainer.fit(train_loader, epochs=2)
        epoch 1/2  step 10  train/loss 0.8513  41520 samples/s
        epoch 2/2  step 20  train/loss 0.5219  55103 samples/s
    """
