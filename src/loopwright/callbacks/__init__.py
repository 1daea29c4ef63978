"""The callbacks that come with loopwright."""

from loopwright.callbacks.early_stopping import EarlyStopping
from loopwright.callbacks.learning_rate_monitor import LearningRateMonitor
from loopwright.logger import Logger

__all__ = ["EarlyStopping", "LearningRateMonitor", "Logger"]
