"""The rules about what is trained at all: what the optimizer holds, what gets a gradient, what moves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from loopwright.inspecting.diagnosis import Evidence, Finding, Layer, finding_of, listed
from loopwright.inspecting.inspection import MISSING, Inspection, layer_numbers

HELD_FROZEN = 0.5  # share of the optimizer's elements that are frozen


def not_in_optimizer(evidence: Evidence) -> Iterator[Finding]:
    """A parameter wants a gradient, and no optimizer holds it."""
    outside = {la.name: [p for p in la.parameters if p.trainable and p.group < 0] for la in evidence.layers}
    found = {name: parameters for name, parameters in outside.items() if parameters}
    if not found:
        return
    names = [p.name for parameters in found.values() for p in parameters]
    size = sum(p.size for parameters in found.values() for p in parameters)
    yield finding_of(
        "not in the optimizer",
        list(found),
        f"{listed(names)} ({size} elements) require a gradient, and no parameter group holds them",
        "the optimizer was built before the layer was made, or from a part of the model",
        "build it from model.parameters() after the model is whole; if it is on purpose, requires_grad_(False)",
        parameters=len(names),
        elements=size,
    )


def frozen(evidence: Evidence) -> Iterator[Finding]:
    """Most of what the optimizer holds is frozen, or a normalisation has never seen a batch and sees none."""
    held = [p for p in evidence.parameters if p.group >= 0]
    still = [p for p in held if not p.trainable]
    share = sum(p.size for p in still) / max(1, sum(p.size for p in held))
    if share >= HELD_FROZEN:
        yield finding_of(
            "frozen",
            list(dict.fromkeys(p.layer for p in still)),
            f"{share:.0%} of the elements that the optimizer holds have requires_grad=False: "
            f"{listed([p.name for p in still])}",
            "requires_grad_(False) reached more than it was meant for; the optimizer was told to train them",
            "requires_grad_(True) on what is to learn; if it is on purpose, give the optimizer the others only",
            share=share,
        )
    layers = [la for la in evidence.layers if any(p.fresh for p in la.held)]
    if layers:
        yield finding_of(
            "frozen",
            [la.name for la in layers],
            f"{layers[0].kind} is in eval mode, and its running statistics have never seen a batch",
            "model.eval() reached it, and nothing put it back; its mean 0 and variance 1 are no statistics of the data",
            "model.train() before the fit, or load the statistics that it is to keep",
            count=len(layers),
        )


def unused(evidence: Evidence) -> Iterator[Finding]:
    """A parameter wants a gradient, is in the optimizer, and never gets one."""
    seen = evidence.inspections
    if len(seen) < 3:
        return
    idle = [p for i, p in enumerate(evidence.parameters) if p.trainable and p.group >= 0 and _untouched(seen, i)]
    if not idle:
        return
    layers = [la.name for la in evidence.layers if any(p.layer == la.name for p in idle)]
    last = next(la for la in evidence.layers if la.name == layers[-1])
    cause, remedy = _cut(last, seen[0].step, known=any(p.turn >= 0 for p in evidence.parameters))
    yield finding_of(
        "no gradient",
        layers[::-1],  # what cuts one layer off cuts off all before it: the last of them is nearest to the cut
        f"{listed([p.name for p in idle])} got no gradient in {len(seen)} inspections, and did not change in between",
        cause,
        remedy,
        parameters=len(idle),
        inspections=len(seen),
    )


def _untouched(seen: Sequence[Inspection], place: int) -> bool:
    """Whether a parameter got a gradient neither in an inspected step nor, as its weights tell, in one between.

    Heads, experts and blocks take turns, and a cadence may meet the same one each time. Optimizers leave what has no
    gradient alone, momentum and weight decay included, so that a norm keeps its bits.
    """
    norms = {one.weight[place] for one in seen if one.weight[place] != MISSING}
    return len(norms) == 1 and all(one.grad[place] == MISSING for one in seen)


def _cut(layer: Layer, step: int, *, known: bool) -> tuple[str, str]:
    """Why a layer, or a part of it, gets no gradient, as far as is known, and what to do."""
    if any(n.grad != MISSING for n in layer.numbers):
        return (
            "the layer's others do: forward does not use these, or cuts them off by detach(), .data or no_grad()",
            "use them in forward, or take them out of the layer",
        )
    if layer.parameters[0].turn >= 0:
        return (
            f"in step {step} it was called, and its output did not reach the loss: "
            "detach(), .data, no_grad() or numpy() on the way, or nothing used it",
            "take the detach() away; where it is meant, as in a teacher that stays, requires_grad_(False) on these",
        )
    return (
        f"in step {step} the forward pass did not call it"
        if known
        else "forward does not call it, or its output does not reach the loss: detach(), .data or no_grad() on the way",
        "call it in forward, or take it out of the model; experts that a router passes by need a balancing loss",
    )


def stopped(evidence: Evidence) -> Iterator[Finding]:
    """A gradient arrives, a step is made at a learning rate of 0, and the weights stay as they are."""
    found = [name for name, rate in _still(evidence).items() if rate == 0]
    if found:
        yield finding_of(
            "not moving",
            found,
            f"{_STILL}; the learning rate is 0",
            "the learning rate is 0: a schedule has run out, or a parameter group got the wrong one",
            "look at the schedule's length and the group's lr",
            rate=0.0,
            count=len(found),
        )


def rounded_away(evidence: Evidence) -> Iterator[Finding]:
    """A gradient arrives, a step is made, and its update is too small for the weights to change."""
    found = {name: rate for name, rate in _still(evidence).items() if rate != 0}
    if found:
        rate = next(iter(found.values()))
        yield finding_of(
            "not moving",
            list(found),
            f"{_STILL}; the learning rate is {rate:g}",
            "the update is smaller than the distance between two numbers of the weights' format",
            "a larger learning rate; bfloat16 or float16 weights in float32, with precision='bf16' to compute",
            rate=rate,
            count=len(found),
        )


_STILL = "the gradient is not zero, and the weights did not change by a bit"


def _still(evidence: Evidence) -> dict[str, float]:
    """The layers of which what one parameter group holds does not move, and the learning rate there."""
    found: dict[str, float] = {}
    if not any(0 in one.update for one in evidence.recent):  # nothing stood still, as nearly always
        return found
    for layer in evidence.layers:
        groups: dict[int, list[int]] = {}  # a parameter that no group holds, or that is frozen, tells nothing here
        for i in layer.places:
            if evidence.parameters[i].trainable and evidence.parameters[i].group >= 0:
                groups.setdefault(evidence.parameters[i].group, []).append(i)
        for group, places in groups.items():
            sizes = [evidence.parameters[i].size for i in places]
            numbers = [layer_numbers(one, places, sizes) for one in evidence.inspections]
            rates = [one.rates[group] for one in evidence.recent if group < len(one.rates)]
            still = [n.grad > 0 and n.update == 0 and n.weight > 0 for n in numbers[-len(evidence.recent) :]]
            never = all(n.update <= 0 for n in numbers)  # a run that has converged did move
            out = len(still) >= 3 and all(still[-3:]) and max(rates[-3:]) == 0
            if (never and evidence.persists(still)) or out:
                found.setdefault(layer.name, rates[-1] if rates else math.nan)
    return found
