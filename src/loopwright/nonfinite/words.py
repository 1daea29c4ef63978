"""Where something that is not finite was made, in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from loopwright.nonfinite.gradients import Backward
from loopwright.nonfinite.watch import Place

_LISTED = 10  # rows and samples in a message


def named(place: Place) -> str:
    """Where, in words."""
    line = "" if place.line is None else f" ({place.line})"
    kind = f" {place.kind}" if place.kind else ""
    if place.module is None:
        inside = f"the loss,{kind}" if kind else "the loss or the step, outside of the model"
    elif place.hook:
        inside = f"the module {place.module!r},{kind}" if place.module else f"the model itself,{kind}"
    else:
        inside = f"the module {place.module!r},{kind}" if place.module else f"the model's own forward,{kind}"
    inside = f"{place.hook} of {inside}" if place.hook else inside
    return f"{place.operation} in {inside}{line}" if place.operation else f"{inside}{line}"


def made_by(made: Backward) -> str:
    """What made a gradient that is not finite, in words."""
    if made.maker in ("operation", "own"):
        return f"the backward of {named(made.place)}"
    if made.maker == "module's hook":
        return named(dataclasses.replace(made.place, hook="a backward hook"))
    if made.maker == "parameter's hook":
        return f"a hook on the parameter {made.parameter}"
    of = f"the parameter {made.parameter}" if made.parameter else f"what {named(made.place)} gave"
    return f"a hook on {of}" if made.maker == "tensor's hook" else f"the sum of several gradients of {of}"


def listed(numbers: Iterable[Any]) -> str:
    """The first of them, and how many there are where that is not all."""
    listed = [str(number) for number in numbers]
    more = f", ... ({len(listed)} in all)" if len(listed) > _LISTED else ""
    return ", ".join(listed[:_LISTED]) + more
