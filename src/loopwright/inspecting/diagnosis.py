"""From inspections to findings: what the rules are given, what they return, and how it is said."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from loopwright.errors import counted
from loopwright.inspecting.inspection import (
    MISSING,
    Inspection,
    LayerNumbers,
    Parameter,
    Record,
    layer_numbers,
    layers_of,
)

MODEL = "the model"  # the layer of a finding that is about all of them
_RECENT = 8  # the newest inspections, in which a fault has to persist
_MOST = 0.9  # share of the living units whose silences are looked at


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, and where.

    Attributes:
        rule: The rule's name, such as ``"vanishing"``; the documentation has a section on each.
        layer: The layer that tells most, or ``"the model"``.
        seen: What was measured, in words.
        cause: The likely cause.
        remedy: What to try first.
        evidence: The numbers behind ``seen``, by name.
        others: More layers of which the same is true.

    Examples:
        >>> inspector = GradientInspector()
        >>> trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.0), nn.MSELoss(), callbacks=[inspector])
        >>> result = trainer.fit(train_loader, epochs=10)
        >>> [finding.rule for finding in inspector.findings]
        ['not moving']
    """

    rule: str
    layer: str
    seen: str
    cause: str
    remedy: str
    evidence: Mapping[str, float] = field(default_factory=dict)
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.head}: {self.seen}\n  likely cause: {self.cause}\n  first remedy: {self.remedy}"

    @property
    def head(self) -> str:
        """The rule and the layer."""
        return f"{self.rule} in {self.layer if self.layer == MODEL else f'layer {self.layer}'}"


@dataclass(slots=True)
class Layer:
    """One layer, over all inspections of the record.

    Attributes:
        name: Its name.
        kind: Its class.
        parameters: Its parameters.
        numbers: What was measured, inspection by inspection.
        places: Those of its parameters in the inspections.
        dead: The share of its units whose gradient has been zero for so long that they hardly come back.
        silence: For how many inspections that is.
        recent: The newest of the numbers.
        held: The parameters that require a gradient and are in the optimizer.
    """

    name: str
    kind: str
    parameters: tuple[Parameter, ...]
    numbers: tuple[LayerNumbers, ...]
    places: tuple[int, ...]
    dead: float
    silence: int
    recent: tuple[LayerNumbers, ...]
    held: tuple[Parameter, ...]

    @property
    def size(self) -> int:
        """The number of its elements."""
        return sum(p.size for p in self.parameters)

    @property
    def matrix(self) -> bool:
        """Whether it mixes its inputs: it has a weight of two dimensions or more, and is no table of embeddings."""
        return any(p.matrix for p in self.parameters) and not self.kind.startswith("Embedding")


@dataclass(frozen=True)
class Evidence:
    """What the rules judge by.

    Attributes:
        layers: In the order of the forward pass, as far as it is known.
        inspections: All that the record has kept.
        parameters: In the order of the inspections' numbers.
        turns: When each layer and each watched activation was called in the first inspected forward pass.
        died: Whether the run was ended by a value that is not finite, so that no more inspections will come.
    """

    layers: tuple[Layer, ...]
    inspections: tuple[Inspection, ...]
    parameters: tuple[Parameter, ...]
    turns: Mapping[str, int]
    died: bool = False

    @property
    def recent(self) -> tuple[Inspection, ...]:
        """The newest inspections."""
        return self.inspections[-_RECENT:]

    def signal(self, layer: Layer) -> list[float]:
        """The mean size of a gradient element of a layer's vectors (biases), or ``MISSING``, at each inspection.

        It says how strong the error is that arrives there, whatever the layer's inputs.
        """
        vectors = [i for i in layer.places if not self.parameters[i].matrix]
        return [_signal(one, vectors, self.parameters) for one in self.inspections]

    @property
    def flat_since(self) -> int | None:
        """The first step from which on every gradient was exactly zero at each inspection, or None."""
        since = None
        for one in reversed(self.inspections):
            there = [norm for norm in one.grad if norm != MISSING]
            if not there or any(norm != 0 for norm in there):
                break
            since = one.step
        return since

    def persists(self, flags: Iterable[bool]) -> bool:
        """Whether something was so in three of four inspections, and in three at least.

        Where the run has died there may be no more than one, and half of them are enough.
        """
        found = list(flags)
        needed = max(1, math.ceil(len(found) / 2)) if self.died else max(3, math.ceil(0.75 * len(found)))
        return sum(found) >= needed


def evidence_of(record: Record, turns: Mapping[str, int], *, died: bool = False) -> Evidence:
    """What the record holds, layer by layer."""
    parameters, inspections = record.parameters, record.inspections
    layers = []
    for name, places in layers_of(parameters).items():
        own = tuple(parameters[i] for i in places)
        sizes = [p.size for p in own]
        numbers = tuple([layer_numbers(one, places, sizes) for one in inspections])
        dead, silence = _dead(record, own) if record.quiet else (0.0, 0)
        layers.append(
            Layer(
                name=name,
                kind=own[0].kind,
                parameters=own,
                numbers=numbers,
                places=tuple(places),
                dead=dead,
                silence=silence,
                recent=numbers[-_RECENT:],
                held=tuple([p for p in own if p.trainable and p.group >= 0]),
            )
        )
    return Evidence(tuple(layers), tuple(inspections), tuple(parameters), turns, died)


def _signal(one: Inspection, places: Sequence[int], parameters: Sequence[Parameter]) -> float:
    found = [(one.grad[i], parameters[i].size) for i in places if one.grad[i] != MISSING]
    size = sum(size for _, size in found)
    return math.sqrt(sum(g * g for g, _ in found) / size) if size else MISSING


def _dead(record: Record, parameters: Iterable[Parameter]) -> tuple[float, int]:
    """The share of a layer's units that are dead, and for how many inspections they have been silent at least.

    Where the batch chooses the units, as by the action taken or the labels there are, those of one inspection were
    silent at those before. How long nine in ten of them were tells how long a silence says nothing in this layer:
    twice that much is needed. One unit that came back after long does not speak for all.
    """
    for parameter in parameters:
        if (quiet := record.quiet.get(parameter.name)) is not None:
            living = quiet[1][quiet[0] < 3].float()
            longest = float(living.sort().values[int(_MOST * len(living))]) if len(living) else 0.0
            needed = max(3, 2 * int(longest) + 1)
            return float((quiet[0] >= needed).float().mean()), needed
    return 0.0, 0


def report_of(evidence: Evidence, findings: Sequence[Finding]) -> str:
    """The findings as text; one line where there are none."""
    if not evidence.inspections:
        return "gradients: nothing was inspected"
    first, last = evidence.inspections[0].step, evidence.inspections[-1].step
    steps = f"step {first}" if first == last else f"steps {first} to {last}"
    if findings:
        count = f"{len(findings)} finding{'s' if len(findings) > 1 else ''}"
        return "\n".join([f"gradients, {steps}: {count}", *map(str, findings)])
    judged, since = len(evidence.inspections) >= 3, evidence.flat_since
    ratios = [n.ratio for layer in evidence.layers for n in layer.recent if n.ratio > 0]
    between = f"; update ratios {min(ratios):.1g} to {max(ratios):.1g}" if ratios else ""
    word = "healthy" if judged else "nothing wrong, though fewer than three inspections say little"
    flat = "" if since is None else f"; every gradient is exactly zero from step {since} on, as where a loss reaches 0"
    layers = counted(len(evidence.layers), "layer")
    return f"gradients, {steps}: {word}, {layers}{between}{flat}"


def finding_of(rule: str, layers: Sequence[str], seen: str, cause: str, remedy: str, **evidence: float) -> Finding:
    """A finding about these layers, of which the first tells most."""
    first, *others = layers
    more = f" (and in {listed(others)})" if others else ""
    return Finding(rule, first, seen + more, cause, remedy, evidence, tuple(others))


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many there are more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
