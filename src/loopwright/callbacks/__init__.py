"""The callbacks that come with loopwright."""

from loopwright.callbacks.checkpoint import Checkpoint
from loopwright.callbacks.csv_logger import CSVLogger
from loopwright.callbacks.early_stopping import EarlyStopping
from loopwright.callbacks.gradient_inspector import GradientInspector
from loopwright.callbacks.learning_rate_monitor import LearningRateMonitor
from loopwright.callbacks.progress_bar import ProgressBar
from loopwright.callbacks.tensorboard_logger import TensorBoardLogger
from loopwright.inspecting.diagnosis import Finding
from loopwright.logger import Logger

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
