"""What the gradients tell: measured at a cadence, logged, and judged in words."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

from torch import Tensor

from loopwright.callback import Callback
from loopwright.errors import ConfigError
from loopwright.forms import Count, check_form
from loopwright.inspecting.agenda import NEVER, Agenda
from loopwright.inspecting.diagnosis import Evidence, Finding, evidence_of, report_of
from loopwright.inspecting.inspection import MISSING, LayerNumbers, Record, layer_numbers, layers_of
from loopwright.inspecting.probe import Probe
from loopwright.inspecting.rules import diagnose
from loopwright.logger import Histograms
from loopwright.metrics import TURNS, check_name
from loopwright.schedule import Every, check_count, check_every

if TYPE_CHECKING:
    from loopwright.inspecting.inspection import Inspection
    from loopwright.inspecting.taken import Taken
    from loopwright.state import State

_MOST_WAITING = 32  # inspections

# Of a layer: the places and the sizes of its parameters, what it is logged as, and the names of its shares.
_Named: TypeAlias = tuple[list[int], list[int], tuple[str, ...], tuple[str, ...] | None]

logger: logging.Logger = logging.getLogger("loopwright")


class _Saved(TypedDict):
    record: dict[str, Any]
    chosen: Count
    began: Count
    length: Count
    samples: dict[str, Tensor]
    turns: dict[str, Count]
    seen: list[str]
    died: bool


class GradientInspector(Callback[Any]):
    """Measures gradients, weights and updates at a cadence, and says in words what is wrong.

    It looks at a step's whole gradient, unscaled and before clipping, and at what the optimizer made of it. For each
    layer it logs, of what is trained of it, ``grad/<layer>/norm``, ``grad/<layer>/cosine`` (with the gradient of the
    step before: near 1 where batches agree, near 0 where noise prevails), ``weight/<layer>/norm`` and
    ``update/<layer>/ratio``, the norm of the change over that of the weights; from the first time on at which they are
    not zero, the shares ``grad/<layer>/zero``, ``grad/<layer>/nonfinite`` and ``grad/<layer>/dead``; and ``grad/norm``
    and ``update/ratio`` of the whole model.

    When the fit ends the report goes to the logger ``loopwright``: one line at INFO where all is well, else the
    findings at WARNING. A finding takes three inspections at least. Between inspections it does nothing, and it
    changes nothing.

    Args:
        every: How often to inspect. The first step is inspected as well; a run that is known to be too short for
            four inspections gets four, and there, or where the length is not known, the steps 4 and 16 too.
            With ``epochs`` it is the second step of the first epoch and of every so many after it, or their only one.
        layers: At most so many layers are logged, evenly spread over the depth. All are measured and judged.
        histograms: Something that draws histograms of the gradients and weights of these layers, such as the
            ``TensorBoardLogger`` in the same list.

    Raises:
        ConfigError: An argument is not of these.

    Examples:
        >>> inspector = GradientInspector(every=Every(steps=2))
        >>> trainer = Trainer(model, optimizer, loss, callbacks=[inspector])
        >>> result = trainer.fit(train_loader, epochs=5)
        >>> inspector.findings
        ()
    """

    def __init__(
        self,
        every: Every = Every(steps=50),  # noqa: B008  # it is frozen
        *,
        layers: int = 40,
        histograms: Histograms | None = None,
    ) -> None:
        check_every("every", every, "every=Every(steps=50), or every=Every(epochs=1)")
        check_count("layers", layers)
        if histograms is not None and not isinstance(histograms, Histograms):
            raise ConfigError(
                f"histograms is {histograms!r}",
                why="its method histogram(name, values, step) is what is called",
                fix="the TensorBoardLogger of the same list, or None",
            )
        self.every = every
        self.layers = layers
        self.histograms = histograms
        self._probe: Probe | None = None
        self._fitting = False
        self._forget()

    def _forget(self) -> None:
        self._record = Record()
        self._waiting: list[tuple[Taken, dict[str, float]]] = []  # what was taken, and what is to be logged of it
        self._died = False
        self._earlier: dict[str, Tensor] = {}
        self._turns: dict[str, int] = {}
        self._seen: set[str] = set()  # names that are logged once there is something to say
        self._named: dict[str, _Named] = {}
        self._agenda = Agenda()
        self._set_next(NEVER)

    def _set_next(self, step: int) -> None:
        """Inspect the step of this number: watch its forward pass, and remember the gradient of the step before."""
        self._next, self._before, self._two_before = step, step - 1, step - 2

    def _catch_up(self) -> None:
        """Work out the inspections that are waiting, one after the other."""
        with TURNS:
            while self._waiting:  # one by one: an error in one of them leaves the others
                self._work_out(*self._waiting.pop(0))

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What is wrong, as far as the inspections so far show; empty where nothing is."""
        return tuple(diagnose(self._evidence()))

    def report(self) -> str:
        """The findings as text.

        Returns:
            Each finding with its evidence, likely cause and first remedy; one line where all is well.
        """
        evidence = self._evidence()
        return report_of(evidence, diagnose(evidence))

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the gradient flow by depth and the update ratios over the steps into a picture.

        Args:
            path: The file to write. Its suffix says the format; without one, ``.png`` is added.

        Raises:
            ConfigError: matplotlib is not installed, cannot write this format, or nothing was inspected.

        Examples:
            >>> inspector = GradientInspector()
            >>> result = Trainer(model, optimizer, loss, callbacks=[inspector]).fit(train_loader, epochs=5)
            >>> inspector.plot("runs/gradients.png")
        """
        from loopwright.inspecting.plot import draw

        evidence = self._evidence()
        draw(evidence, diagnose(evidence), path)

    @property
    def latest(self) -> Mapping[str, LayerNumbers]:
        """The numbers of the newest inspection, by parameter."""
        self._catch_up()
        if not self._record.inspections:
            return {}
        one = self._record.inspections[-1]
        return {p.name: layer_numbers(one, [i], [p.size]) for i, p in enumerate(self._record.parameters)}

    def _evidence(self) -> Evidence:
        with TURNS:
            self._catch_up()
            return evidence_of(self._record, self._turns, died=self._died)

    def on_fit_start(self, state: State) -> None:
        """Begin afresh in a fresh run, and find the first step to inspect."""
        if state.progress.fresh:
            self._forget()
        self._died, self._fitting = False, True
        self._agenda.start(self.every, state.plan)
        self._set_next(self._agenda.after(state.progress.step))

    def on_epoch_start(self, state: State) -> None:
        """Choose a step of the epoch, where epochs are counted."""
        if self._agenda.start_epoch(state.plan, state.progress):
            self._set_next(self._agenda.after(state.progress.step))

    def on_batch_start(self, state: State, batch: Any) -> None:
        """Watch the forward pass of a step that is to be inspected."""
        if state.progress.step < self._before:
            return
        activations = (self._probe or self._look(state)).activations
        if not self._turns or activations.wanted:
            activations.watch(turns=not self._turns)

    def on_before_step(self, state: State) -> None:
        """Measure the gradients of a step that is to be inspected, and keep a copy of the weights."""
        step = state.progress.step
        if step < self._two_before:
            return
        probe = self._probe or self._look(state)
        if step < self._before:
            probe.remember()
            return
        if probe.pending:  # of an attempt that was skipped
            self._put_off(probe.after(self._next, state.plan.clip_norm, made=False))
            probe.forget()
        if probe.activations.handles:
            probe.activations.close()
        probe.before(clipped=state.plan.clip_norm is not None)
        if self._agenda.after(self._next) == self._next + 1:  # here, for clipping and the optimizer may write to them
            probe.remember()

    def on_step_end(self, state: State) -> None:
        """Take what the step has changed, and log all of it."""
        if state.progress.step < self._next:
            return
        probe = self._probe or self._look(state)
        if probe.activations.handles:
            probe.activations.close()
        values = self._put_off(probe.after(self._next, state.plan.clip_norm))
        self._set_next(self._agenda.after(state.progress.step))
        if values is not None:
            state.metrics.record_later(partial(self._worked_out, values))
            if self.histograms is not None:
                self._draw(state)

    def _look(self, state: State) -> Probe:
        if self._probe is None:
            self._probe = Probe(state.model, state.optimizer, self._turns, self._earlier)
        return self._probe

    def _put_off(self, taken: Taken | None) -> dict[str, float] | None:
        """Put the work on an inspection off until somebody wants to know, if that is possible.

        Args:
            taken: What it has taken, or None where there was nothing.

        Returns:
            What it has to log, which is empty as long as it is not worked out.
        """
        if taken is None:
            return None
        values: dict[str, float] = {}
        self._waiting.append((taken, values))
        if not taken.keeps or len(self._waiting) >= _MOST_WAITING:
            self._catch_up()
        return values

    def _worked_out(self, values: dict[str, float]) -> dict[str, float]:
        if not values:
            self._catch_up()
        return values

    def _work_out(self, taken: Taken, values: dict[str, float]) -> None:
        inspection, record = taken.inspection(), self._record
        if record.parameters != taken.parameters:
            self._named = {}
        record.add(taken.parameters, inspection)
        record.quiet = taken.silent(inspection, record.quiet)
        if taken.made:
            values.update(self._values(record.inspections[-1]))  # with the numbers at the record's places

    def _values(self, inspection: Inspection) -> dict[str, float]:
        if not self._named:
            self._named = _names(self._record, self.layers)
        values = {"grad/norm": inspection.total}
        changed = weights = 0.0
        for places, sizes, names, shares in self._named.values():
            numbers = layer_numbers(inspection, places, sizes)
            if numbers.update >= 0:
                changed, weights = changed + numbers.update**2, weights + numbers.weight**2
            if shares is None:
                continue
            if numbers.grad != MISSING:
                values[names[0]] = numbers.grad
            if numbers.cosine == numbers.cosine:
                values[names[1]] = numbers.cosine
            values[names[2]] = numbers.weight
            if (ratio := numbers.ratio) == ratio:
                values[names[3]] = ratio
            if numbers.zero or numbers.bad or self._seen:
                for name, share in zip(shares, (numbers.zero, numbers.bad, self._dead(places)), strict=True):
                    if share or name in self._seen:  # logged from the first time on at which it is not zero
                        self._seen.add(name)
                        values[name] = share
        if weights:
            values["update/ratio"] = math.sqrt(changed / weights)
        return values

    def _dead(self, places: list[int]) -> float:
        """The share of a layer's units whose gradient is zero, once it was half of them."""
        for i in places:
            if (quiet := self._record.quiet.get(self._record.parameters[i].name)) is not None:
                return float((quiet[0] > 0).float().mean())
        return 0.0

    def _draw(self, state: State) -> None:
        assert self._probe is not None
        assert self.histograms is not None
        self._catch_up()
        logged = {
            self._record.parameters[i].name
            for places, _, _, shares in self._named.values()
            if shares is not None
            for i in places
        }
        for parameter, tensor in self._probe.measured():
            if parameter.name in logged and tensor.grad is not None:
                name = _clean(parameter.name)
                self.histograms.histogram(f"grad/{name}", tensor.grad.detach(), state.progress.step)
                self.histograms.histogram(f"weight/{name}", tensor.detach(), state.progress.step)

    def on_eval_start(self, state: State) -> None:
        """Leave no hook on the model where a window was given up."""
        if self._probe is not None:
            self._probe.activations.close()

    def on_fit_end(self, state: State) -> None:
        """Say what the gradients tell."""
        evidence = self._evidence()
        findings = diagnose(evidence)
        level = logging.WARNING if findings else logging.INFO
        if logger.isEnabledFor(level):
            logger.log(level, "%s", report_of(evidence, findings))

    def on_exception(self, state: State, error: BaseException) -> None:
        """Say what the gradients tell, where a value that is not finite has ended the run, or somebody has."""
        if not self._fitting:
            return
        self._died = isinstance(error, FloatingPointError)
        if self._died and self._probe is not None:
            self._put_off(self._probe.after(self._next, state.plan.clip_norm, made=False))
        if self._died or isinstance(error, KeyboardInterrupt):
            evidence = self._evidence()
            if findings := diagnose(evidence):
                logger.warning("%s", report_of(evidence, findings))

    def teardown(self, state: State) -> None:
        """Take the hooks off the model, and let go of it."""
        self._fitting = False
        self._catch_up()
        if self._probe is not None:
            self._earlier, self._turns = self._probe.earlier(), self._probe.turns
            self._probe.close()
            self._probe = None

    def state_dict(self) -> dict[str, Any]:
        """The inspections so far, and what is under way for the next one."""
        self._catch_up()
        probe, agenda = self._probe, self._agenda
        return {
            "record": dict(self._record.state_dict()),
            "chosen": agenda.chosen,
            "began": agenda.began,
            "length": agenda.length,
            "samples": dict(self._earlier) if probe is None else probe.earlier(),
            "turns": dict(self._turns if probe is None else probe.turns),
            "seen": sorted(self._seen),
            "died": self._died,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned."""
        if isinstance(state, dict) and "earlier" in state:  # of 0.1.0, whose samples held other elements
            others = {name: value for name, value in state.items() if name != "earlier"}
            state = {**others, "began": 0, "length": 0, "samples": {}}
        check_form(state, _Saved)
        record = Record.from_state_dict(state["record"])
        self._forget()
        self._record = record
        self._earlier, self._turns = dict(state["samples"]), dict(state["turns"])
        self._seen = {check_name(name) for name in state["seen"]}
        self._died = state["died"]
        agenda = self._agenda
        agenda.chosen, agenda.began, agenda.length = state["chosen"], state["began"], state["length"]
        self._probe = None


def _clean(name: str) -> str:
    """A layer's name as a part of a metric's."""
    kept = "".join(c if c.isprintable() and c not in "\\/" else "_" for c in name).strip() or "_"
    return kept if len(kept) <= 150 else f"{kept[:70]}...{kept[-70:]}"


def _names(record: Record, most: int) -> dict[str, _Named]:
    """For each layer that learns: its parameters, and what it is logged as, where it is."""
    parameters = record.parameters
    layers = {la: at for la, at in layers_of(parameters).items() if any(parameters[i].trainable for i in at)}
    spread = max(1, min(most, len(layers)) - 1)
    logged = {list(layers)[round(k * (len(layers) - 1) / spread)] for k in range(min(most, len(layers)))}
    named: dict[str, _Named] = {}
    taken: set[str] = set()
    for layer, places in layers.items():
        name = base = _clean(layer)
        number = 2
        while name in taken:
            name, number = f"{base}-{number}", number + 1
        taken.add(name)
        sizes = [parameters[i].size for i in places]
        names = (f"grad/{name}/norm", f"grad/{name}/cosine", f"weight/{name}/norm", f"update/{name}/ratio")
        shares = f"grad/{name}/zero", f"grad/{name}/nonfinite", f"grad/{name}/dead"
        if layer in logged:
            check_name(shares[1])  # the longest
        named[layer] = places, sizes, names, shares if layer in logged else None
    return named
