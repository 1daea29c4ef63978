"""What helps to test a callback: the very tools that loopwright's own tests use.

``two_step_fit`` runs the real loop on a tiny model, ``tiny_state`` is for calling one hook by hand, ``HookRecorder``
writes down which hooks fired, and ``check_callback`` puts any callback through the contract that all keep.
"""

from loopwright.testing.contract import check_callback
from loopwright.testing.tiny import Call, HookRecorder, tiny_data, tiny_model, tiny_state, two_step_fit

__all__ = ["Call", "HookRecorder", "check_callback", "tiny_data", "tiny_model", "tiny_state", "two_step_fit"]
