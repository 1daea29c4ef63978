"""The PyTorch training loop you would have written by hand: the same bits, less work."""

from loopwright.callback import Callback
from loopwright.checkpoint import best_checkpoint, latest_checkpoint, load_weights
from loopwright.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LockedError,
    LoopwrightError,
    NonFiniteError,
    SaveError,
    ShapeMismatchError,
    UnknownMetricError,
)
from loopwright.preflight import Check, Preflight
from loopwright.result import Result
from loopwright.schedule import Every, Schedule
from loopwright.state import Progress, State
from loopwright.step import LossFn, Metric, Output, Step
from loopwright.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "Callback",
    "Check",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Every",
    "LockedError",
    "LoopwrightError",
    "LossFn",
    "Metric",
    "NonFiniteError",
    "Output",
    "Preflight",
    "Progress",
    "Result",
    "SaveError",
    "Schedule",
    "ShapeMismatchError",
    "State",
    "Step",
    "Trainer",
    "UnknownMetricError",
    "best_checkpoint",
    "latest_checkpoint",
    "load_weights",
]
