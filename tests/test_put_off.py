"""What is worked out when somebody reads is what would be there at once: copied, pickled, and after an error too."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faults_nets import mlp, vectors
from helpers import At, small_trainer
from loopwright import Every, State
from loopwright.callbacks import GradientInspector
from loopwright.state import Metrics

Copy = Callable[[Any], Any]


def pickled(what: Any) -> Any:
    return pickle.loads(pickle.dumps(what))


names, number = st.sampled_from("abc"), st.integers(0, 9).map(float)
losses = st.fixed_dictionaries({"loss": number}, optional={"accuracy": number})  # a step always has a loss
actions: st.SearchStrategy[tuple[str, dict[str, float]]] = st.one_of(
    st.tuples(st.just("hold"), losses),
    st.tuples(st.just("record"), st.dictionaries(names, number, min_size=1, max_size=1)),
    st.tuples(st.just("later"), st.dictionaries(names, number, min_size=1)),
    st.tuples(st.sampled_from(["afterwards", "read", "copy", "pickle"]), st.just({})),
)


@given(st.lists(actions, max_size=30))
def test_reading_late_gives_what_storing_at_once_would_have(todo: list[tuple[str, dict[str, float]]]) -> None:
    metrics = Metrics()
    at_once: dict[str, float] = {}
    seen: list[dict[str, float]] = []
    expected: list[dict[str, float]] = []
    for action, values in todo:
        at_once |= {f"train/{name}": value for name, value in values.items()} if action == "hold" else values
        match action:
            case "hold":
                metrics.hold("train", values)
            case "record":
                metrics.record(*next(iter(values.items())))
            case "later":
                metrics.record_later(values.copy)
            case "afterwards":
                metrics.afterwards(lambda: seen.append(dict(metrics)))
                expected.append(dict(at_once))
            case "read":
                assert dict(metrics) == at_once
            case "copy":
                assert dict(copy.deepcopy(metrics)) == at_once
            case "pickle":
                assert dict(pickled(metrics)) == at_once
    assert dict(metrics) == at_once
    assert seen == expected


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("read", [False, True], ids=["put off", "read at once"])
def test_a_copy_made_in_mid_run_holds_what_was_logged_by_then_and_nothing_newer(copied: Copy, *, read: bool) -> None:
    copies: list[tuple[State, list[dict[str, float]], Mapping[str, Any]]] = []

    def take(state: State) -> None:
        if read:
            len(state.metrics)
        if state.progress.step == 7:
            twin, history, watching = copied((state, trainer._run.history, inspector))
            copies.append((twin, history.rows(), watching.latest))

    inspector = GradientInspector(Every(steps=1))
    trainer = small_trainer(inspector, At(on_step_end=take), model=mlp(3))
    found = trainer.fit(list(vectors())[:5], steps=7)
    ((twin, rows, latest),) = copies
    assert list(twin.metrics.items()) == list(trainer.state.metrics.items())
    assert rows == found.history[:1]
    assert rows[0]["grad/norm"] > 0
    assert repr(latest) == repr(inspector.latest)  # in which NaN may be
    assert twin.model is not trainer.state.model


class Broken:
    """Work that fails once."""

    def __init__(self, error: BaseException) -> None:
        self.error: BaseException | None = error

    def __call__(self) -> Mapping[str, float]:
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return {"b": 2.0}


@pytest.mark.parametrize(
    ("error", "left"),
    [(ValueError("no"), {"a", "c", "d"}), (KeyboardInterrupt(), {"a", "b", "c", "d"})],
    ids=["error", "Ctrl-C"],
)
def test_an_error_in_what_was_put_off_does_not_lose_what_comes_after_it(error: BaseException, left: set[str]) -> None:
    metrics = Metrics()
    seen: list[set[str]] = []
    metrics.record_later(lambda: {"a": 1.0})
    metrics.record_later(Broken(error))
    metrics.record_later(lambda: {"c": 3.0})
    metrics.afterwards(lambda: seen.append(set(metrics)))
    metrics.record("d", 4.0)
    with pytest.raises(type(error)):
        len(metrics)
    assert set(metrics) == left
    assert seen == [left - {"d"}]
