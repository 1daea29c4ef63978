"""The rules about sizes: of gradients along the depth and over the steps, of updates, and of activations."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence

from loopwright.inspecting.diagnosis import MODEL, Evidence, Finding, Layer, finding_of

DECADES = 3.0  # by which gradients fall from the last layer to the first
GROWTH, GROWING = 2.5, 2.0  # decades by which they grow, at the first inspection and at later ones
ALIGNED = 0.8  # correlation of log norm and depth
DEEP = 4  # layers that are needed to speak of depth
LARGE, SMALL = 1e-1, 1e-6  # update ratios; the rule of thumb is 1e-3
AT_FIRST = 2.0  # the same within the first three inspections, for half of the layers
EARLY = 10  # steps before which a large update may still be the way to small ones
SATURATED = 0.5  # share of an activation's outputs
DEAD = 0.5  # share of a layer's units
DYING = 0.3  # of the first update without a gradient, at later ones: a momentum
FEW = 16  # elements: the norm of fewer may well be near 0
UNDERFLOW = 1e-25  # norms below this have neighbours that float32 cannot hold
SPIKE = 10.0  # times the median of the five norms before
STUCK = 20  # attempts at one step
CLIPPED, CLIPPED_BY = 0.9, 3.0  # share of the inspections, and norm over the limit


def exploding(evidence: Evidence) -> Iterator[Finding]:
    """The error grows from the last layer to the first, by decades, from the first inspection on."""
    layers = _deep(evidence)
    if len(layers) < DEEP:
        return
    # With weights too large, inputs grow as the error shrinks, and only the biases' gradient shows the error alone.
    kinds: dict[str, list[Sequence[float]]] = {
        "gradient": [[n.grad for n in la.numbers] for la in layers],
        "biases' gradient": [evidence.signal(la) for la in layers],
    }
    for what, series in kinds.items():
        growth = [-_trend([row[t] for row in series]) for t in range(len(evidence.inspections))]
        # Training makes up for some of it, so that less will do later on.
        if growth and growth[0] >= GROWTH and evidence.persists(g >= GROWING for g in growth[-8:]):
            decades = statistics.median(growth[-8:])
            yield finding_of(
                "exploding",
                [layers[0].name],
                f"{_back(layers)} the {what} grows by a factor of 10^{decades:.1f}",
                "each layer passes on more than it gets: weights too large at the start",
                "initialise by He's or Glorot's rule, and put normalisations or residual connections between",
                decades=decades,
                depth=len(layers),
            )
            return


def too_large(evidence: Evidence) -> Iterator[Finding]:
    """Each step changes a layer by more than a tenth of itself, or a first one half of the layers by far more."""
    if not evidence.died and (not evidence.inspections or evidence.inspections[-1].step < EARLY):
        return
    tiny = all(la.size < FEW for la in evidence.layers if la.held)
    ratios = {
        la.name: statistics.median([n.ratio for n in la.recent if not math.isnan(n.ratio)] or [0.0])
        for la in evidence.layers
        if la.held
        and (evidence.died or _has_scale(la, tiny=tiny))
        and evidence.persists(_larger_than_usual(evidence, la))
    }
    # Later the weights have grown so that the ratio looks usual. A layer alone may begin near zero on purpose.
    mixing = [la for la in evidence.layers if la.held and la.matrix and la.size >= FEW]
    first = {la.name: max([n.ratio for n in la.numbers[:3] if not math.isnan(n.ratio)] or [0.0]) for la in mixing}
    thrown = {name: ratio for name, ratio in first.items() if ratio > AT_FIRST}
    if not ratios and thrown and 2 * len(thrown) >= len(mixing):
        ratios = thrown
    if ratios:
        names = sorted(ratios, key=lambda name: -ratios[name])
        yield finding_of(
            "updates too large",
            names,
            f"the norm of its update is {ratios[names[0]]:.2g} times that of its weights; about 0.001 is usual",
            "the learning rate is too large for it, or targets and losses are of a large scale",
            "a learning rate ten times smaller, targets of unit scale, or clip_norm=1.0",
            ratio=ratios[names[0]],
        )


def _has_scale(layer: Layer, *, tiny: bool) -> bool:
    """Whether the norm of its weights is a scale for their updates.

    What mixes nothing (a bias, a gate, a temperature) may belong near 0, as may a few elements of any kind, and go to
    and fro there by more than a tenth of itself, however small the steps. Not so where it stays as large as it began.
    """
    if any(p.matrix for p in layer.parameters) and (tiny or layer.size >= FEW):
        return True
    norms = [n.weight for n in layer.numbers]
    return max(norms) <= 2 * norms[0] <= 4 * min(norms) and norms[0] > 0


def _larger_than_usual(evidence: Evidence, layer: Layer) -> Iterator[bool]:
    """Whether its update was too large in each of the recent inspections.

    Weights that begin at 0, as the last scale of a residual block, gates and tokens do, are the sum of their updates.
    After t steps alike the next one is 1/t of them, and up to 2/t while a momentum builds up, whatever its size.
    """
    made = [t for t, n in enumerate(layer.numbers) if n.update >= 0]
    start = evidence.inspections[made[0]].step if made else 0
    at_first = layer.numbers[made[0]].weight if made else 0.0
    for one, n in zip(evidence.recent, layer.recent, strict=True):
        from_zero = one.step > start and n.weight > 2 * at_first
        yield n.ratio > (max(LARGE, 2 / (one.step - start)) if from_zero else LARGE)


def saturated(evidence: Evidence) -> Iterator[Finding]:
    """Activations at their limits, where their slope is nearly zero."""
    shares = _at_limits(evidence)
    if shares:
        names = sorted(shares, key=lambda name: -shares[name])
        yield finding_of(
            "saturated",
            names,
            f"{shares[names[0]]:.0%} of its outputs lie where the slope is under 5 % of its steepest",
            "its inputs are far too large: weights too large at the start, inputs that are not normalised, "
            "or steps too large",
            "normalise the inputs, initialise by nn.init.xavier_uniform_, or put a normalisation before it",
            share=shares[names[0]],
        )


def _at_limits(evidence: Evidence) -> dict[str, float]:
    """The activations that are saturated, and what share of their outputs is."""
    shares: dict[str, float] = {}
    for name in evidence.inspections[-1].saturated if evidence.inspections else ():
        own = [one.saturated[name] for one in evidence.recent if name in one.saturated]
        if evidence.persists(share > SATURATED for share in own):
            shares[name] = statistics.median(own)
    return shares


def vanishing(evidence: Evidence) -> Iterator[Finding]:
    """The gradient falls from the last layer to the first, by decades."""
    layers = _deep(evidence)
    if len(layers) < DEEP:
        return
    recent = range(max(0, len(evidence.inspections) - 8), len(evidence.inspections))
    loss = [_trend([la.numbers[t].grad for la in layers]) for t in recent]
    if loss and evidence.persists(d >= DECADES for d in loss):
        decades = statistics.median(loss)
        yield finding_of(
            "vanishing",
            [layers[0].name],
            f"{_back(layers)} the gradient falls by a factor of 10^{decades:.1f}",
            "each layer passes on a part of what it gets: sigmoid or tanh in depth, or weights too small at the start",
            "ReLU or GELU with He's initialisation, residual connections, or normalisations between the layers",
            decades=decades,
            depth=len(layers),
        )


def dead(evidence: Evidence) -> Iterator[Finding]:
    """Units that put out zero, or pass no gradient, whatever the batch."""
    if not any(n.grad > 0 for la in evidence.layers for n in la.recent[-1:]):
        # Later on it may be a loss of 0, which is reached; from the first inspection on nothing was learned.
        if len(evidence.inspections) >= 3 and evidence.flat_since == evidence.inspections[0].step:
            yield finding_of(
                "dead units",
                [MODEL],
                f"every gradient was exactly zero in each of {len(evidence.inspections)} inspections",
                "the loss does not change with any weight: a last ReLU or clamp cuts every output off, what follows is "
                "multiplied by zero, or the loss was 0 from the start",
                "look at the end of the model and at the loss: no ReLU after the last layer, or a usual initialisation",
                share=1.0,
            )
        return
    # Before a saturated activation the gradient is zero where its slope is, which another rule says.
    before = max((evidence.turns.get(name, -1) for name in _at_limits(evidence)), default=-1)
    others = [
        la
        for la in evidence.layers
        if la.held and (before < 0 or la.parameters[0].turn > before) and not _trained_between(la)
    ]
    found = [la for la in others if la.dead >= DEAD and len(la.numbers) >= 3]
    silent = [la for la in others if evidence.persists(n.grad == 0 and n.zero == 1 for n in la.recent)]
    if min(n.grad for la in evidence.layers for n in la.recent[-1:] if n.grad > 0) < UNDERFLOW:
        silent = []  # it has become too small for its format on the way, which is another fault
    partly = [la for la in found if la not in silent]
    # Behind a layer that says the same to every input, units are on or off for all inputs too.
    for layers in ([silent[-1]],) if silent else (partly,):
        if not layers:
            continue
        whole = layers is not partly
        worst = max(layers, key=lambda la: la.dead)
        share = 1.0 if whole else worst.dead
        times = "the last inspections" if whole else f"each of the last {worst.silence} inspections or more"
        earlier = f"; {len(silent) - 1} layers before it get none either" if whole and len(silent) > 1 else ""
        yield finding_of(
            "dead units",
            [worst.name, *(la.name for la in layers if la is not worst)],
            f"the gradient of {share:.0%} of its units was exactly zero in {times}{earlier}",
            "what follows passes no gradient, such as a ReLU that is off for every input (a step too large, or a bias "
            "far below zero), sign, round, or a product with zero; or the loss never looks at them",
            "where it is a ReLU, a smaller learning rate and a usual initialisation, or LeakyReLU or GELU in its place",
            share=share,
        )


def _trained_between(layer: Layer) -> bool:
    """Whether a layer without a gradient in the inspected steps got one in others, as a head on every other batch.

    Of a dead layer the weights stand still, or shrink under weight decay, once a momentum from before has died away.
    """
    silent = [n for n in layer.recent if n.grad == 0]
    if len(silent) < 2:
        return False
    rose = any(b.weight > a.weight * (1 + 1e-6) for a, b in itertools.pairwise(silent))
    later = statistics.median(n.update for n in silent[1:])
    return rose and later >= DYING * max(silent[0].update, 0.0)


def spikes(evidence: Evidence) -> Iterator[Finding]:
    """The norm of the gradient jumps, and comes back, more than once."""
    norms = [one.total for one in evidence.inspections]
    start = statistics.median([n for n in norms[:3] if math.isfinite(n)] or [0.0])  # one of them may be a spike
    jumps = [
        t
        for t in range(3, len(norms))
        if norms[t] > SPIKE * statistics.median(norms[max(0, t - 5) : t]) and norms[t] > start
    ]
    if len(jumps) < 2:
        return
    worst = max(jumps, key=lambda t: norms[t])
    usual = statistics.median(norms[max(0, worst - 5) : worst])
    largest = max(evidence.layers, key=lambda la: la.numbers[worst].grad)
    yield finding_of(
        "spikes",
        [largest.name],
        f"the norm of all gradients was {norms[worst]:.3g} at step {evidence.inspections[worst].step}, "
        f"{norms[worst] / usual:.0f} times that of before, and jumped so in {len(jumps)} of {len(norms)} inspections",
        "single batches with outliers in their data or targets, or a learning rate at the edge of stability",
        "look at those batches, and set clip_norm near the usual norm",
        jumps=len(jumps),
        factor=norms[worst] / usual,
    )


def not_finite(evidence: Evidence) -> Iterator[Finding]:
    """NaN or infinite elements in a gradient, again and again."""
    found = {}
    for layer in evidence.layers:
        bad = [n.bad > 0 for n in layer.recent]
        stuck = bool(evidence.inspections) and evidence.inspections[-1].attempts >= STUCK and bad[-1]
        if stuck or evidence.persists(bad):
            found[layer.name] = max(n.bad for n in layer.recent)
    if found:
        names = list(found)[::-1]  # it goes from the loss backwards: the last layer is nearest to where it arose
        yield finding_of(
            "not finite",
            names,
            f"{found[names[0]]:.0%} of its gradient is NaN or infinite",
            "a derivative without a value, at this layer or after it: sqrt or norm at 0, log of 0, a division by 0, "
            "or a number too large for the format",
            "add a small number under the root, the log and the division; torch.autograd.set_detect_anomaly(True) "
            "names the operation",
            share=found[names[0]],
        )


def too_small(evidence: Evidence) -> Iterator[Finding]:
    """No step changes a layer by more than a millionth of itself, from the start on."""
    found: dict[str, float] = {}
    for layer in evidence.layers:
        ratios = [n.ratio for n in layer.numbers if not math.isnan(n.ratio)]
        if not layer.held or not layer.matrix or len(ratios) < 3 or not 0 < max(ratios) < SMALL:
            continue
        group = layer.held[0].group
        rates = [one.rates[group] for one in evidence.recent if group < len(one.rates)]
        if rates and rates[-1] <= min(rates):  # else a warm-up is under way
            found[layer.name] = max(ratios)
    if found:
        worst = min(found, key=found.__getitem__)
        yield finding_of(
            "updates too small",
            [worst, *(name for name in found if name != worst)],
            f"the norm of its update was never above {found[worst]:.1g} times that of its weights; 0.001 is usual",
            "the learning rate is too small for it, or the loss is of a tiny scale",
            "a learning rate ten times larger, and again, until the ratio is near 0.001",
            ratio=found[worst],
        )


def clipping(evidence: Evidence) -> Iterator[Finding]:
    """The norm is far above the limit at nearly every step, so that the limit is the step size."""
    limited = [one for one in evidence.inspections if one.clip_norm is not None and math.isfinite(one.total)]
    factors = [one.total / one.clip_norm for one in limited if one.clip_norm]
    if len(factors) < 4 or sum(f > 1 for f in factors) < CLIPPED * len(factors):
        return
    factor = statistics.median(factors)
    if factor >= CLIPPED_BY:
        yield finding_of(
            "always clipped",
            [MODEL],
            f"in {sum(f > 1 for f in factors)} of {len(factors)} inspections the norm was above clip_norm, "
            f"at the median {factor:.3g} times",
            "clip_norm is below the usual norm: all steps get one length, and the learning rate means something else",
            f"clip_norm near {_rounded(statistics.median(one.total for one in limited))}, the usual norm, or above",
            factor=factor,
        )


def _rounded(value: float) -> float:
    return float(f"{value:.1g}")


def _deep(evidence: Evidence) -> list[Layer]:
    """The layers that make up the depth: those that mix their inputs, and learn."""
    return [la for la in evidence.layers if la.matrix and la.held and any(n.grad > 0 for n in la.numbers)]


def _back(layers: Sequence[Layer]) -> str:
    return f"from layer {layers[-1].name} back to layer {layers[0].name}"


def _trend(norms: Sequence[float]) -> float:
    """By how many decades the norms rise from the first layer to the last, where they follow a line; else 0."""
    points = [(i, math.log10(n)) for i, n in enumerate(norms) if 0 < n < math.inf]
    if len(points) < DEEP:
        return 0.0
    if len({y for _, y in points}) == 1:
        return 0.0
    xs, ys = zip(*points, strict=True)
    slope = statistics.linear_regression(xs, ys).slope
    rise = slope * (xs[-1] - xs[0])
    return rise if abs(statistics.correlation(xs, ys)) >= ALIGNED else 0.0
