"""The rules by which inspections are judged, in the order of the report, and where each comes from.

A rule is a function from the evidence to findings. To add one, write it in ``rules_of_setup`` or ``rules_of_size``,
with its limits at the top there, and name it in ``RULES``: ``unless`` names the rules whose findings explain what this
one would say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from loopwright.inspecting.diagnosis import Evidence, Finding
from loopwright.inspecting.rules_of_setup import frozen, not_in_optimizer, rounded_away, stopped, unused
from loopwright.inspecting.rules_of_size import (
    clipping,
    dead,
    exploding,
    not_finite,
    saturated,
    spikes,
    too_large,
    too_small,
    vanishing,
)


@dataclass(frozen=True)
class Rule:
    """A rule, and what it rests on.

    Attributes:
        name: What its findings are called. Two rules may share one, where other findings explain but one of them.
        find: The function.
        source: Where the rule and its limits come from.
        unless: The rules whose findings explain what this one would say.
    """

    name: str
    find: Callable[[Evidence], Iterable[Finding]]
    source: str
    unless: tuple[str, ...] = ()


_FACT = "a fact, without a threshold"
RULES: tuple[Rule, ...] = (
    Rule("not in the optimizer", not_in_optimizer, _FACT),
    Rule("frozen", frozen, "half of what the optimizer holds: our choice"),
    Rule("no gradient", unused, _FACT),
    Rule("not moving", stopped, _FACT),
    Rule("not moving", rounded_away, _FACT, ("vanishing", "saturated")),
    Rule("exploding", exploding, "Pascanu et al. 2013, arXiv:1211.5063; 2.5 decades: our choice", ("saturated",)),
    Rule("updates too large", too_large, "Karpathy's CS231n notes: about 1e-3; two decades above", ("exploding",)),
    Rule("saturated", saturated, "Glorot and Bengio 2010; a slope under 5 % in half of the outputs: our choice"),
    Rule("vanishing", vanishing, "Hochreiter 1991; Glorot and Bengio 2010; three decades: our choice", ("saturated",)),
    Rule("dead units", dead, "Lu et al. 2019, arXiv:1903.06733; half of a layer: our choice", ("vanishing",)),
    Rule("spikes", spikes, "ten times the median before: our choice", ("exploding", "updates too large")),
    Rule("not finite", not_finite, _FACT, ("exploding", "updates too large")),
    Rule(
        "updates too small",
        too_small,
        "Karpathy's CS231n notes: about 1e-3; three decades below",
        ("vanishing", "dead units", "saturated", "not moving", "always clipped"),
    ),
    Rule("always clipped", clipping, "Pascanu et al. 2013: a limit of half to ten times the mean norm"),
)


def diagnose(evidence: Evidence) -> list[Finding]:
    """What the rules find, in their order, but for what other findings explain."""
    found = [(rule, list(rule.find(evidence))) for rule in RULES]
    names = {rule.name for rule, findings in found if findings}
    return [finding for rule, findings in found if names.isdisjoint(rule.unless) for finding in findings]
