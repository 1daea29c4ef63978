"""What a checkpoint is on the disk.

It is a folder, ``step-000000120`` for step 120 and ``step-000000120-2`` for a second one at that step::

    model.safetensors   the weights, under the plain module's own names
    state.safetensors   every other tensor: the optimizer's, the random generators', the callbacks'
    state.json          everything else, as plain data
    manifest.json       the format's version, size and SHA-256 of each file; its last line hashes all before it

It appears by a rename, after everything in it is on the disk.
"""

from __future__ import annotations

import re

FORMAT, VERSION = "loopwright checkpoint", 1
MODEL, STATE_TENSORS, STATE, MANIFEST = "model.safetensors", "state.safetensors", "state.json", "manifest.json"
FILES = (MODEL, STATE_TENSORS, STATE)
NAME = re.compile(r"step-([0-9]{9}|[1-9][0-9]{9,17})(?:-([2-9]|[1-9][0-9]{1,8}))?")  # of the folder
