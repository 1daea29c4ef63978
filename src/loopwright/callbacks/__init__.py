"""The callbacks that come with loopwright."""

from typing import TYPE_CHECKING, Any

from loopwright.callbacks.checkpoint import Checkpoint
from loopwright.callbacks.csv_logger import CSVLogger
from loopwright.callbacks.early_stopping import EarlyStopping
from loopwright.callbacks.learning_rate_monitor import LearningRateMonitor
from loopwright.callbacks.progress_bar import ProgressBar
from loopwright.callbacks.tensorboard_logger import TensorBoardLogger
from loopwright.logger import Logger

if TYPE_CHECKING:
    from loopwright.callbacks.gradient_inspector import GradientInspector
    from loopwright.inspecting.diagnosis import Finding

__all__ = [
    "CSVLogger",
    "Checkpoint",
    "EarlyStopping",
    "Finding",
    "GradientInspector",
    "LearningRateMonitor",
    "Logger",
    "ProgressBar",
    "TensorBoardLogger",
]


def __getattr__(name: str) -> Any:
    """What takes a third of the time to import all the rest is imported where it is used."""
    if name == "GradientInspector":
        from loopwright.callbacks.gradient_inspector import GradientInspector

        return GradientInspector
    if name == "Finding":
        from loopwright.inspecting.diagnosis import Finding

        return Finding
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
