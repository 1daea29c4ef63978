"""What is worked out when somebody reads is what would be there at once: copied, pickled, and after an error too."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from faults_nets import mlp, vectors
from helpers import At, Samples, small_trainer, some_batches
from loopwright import Every, Output, State
from loopwright.callbacks import GradientInspector
from loopwright.metrics import Metrics

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


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns as often as they can."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("inspected", [False, True], ids=["plain", "inspected"])
def test_another_thread_may_read_while_one_trains(*, inspected: bool) -> None:
    def run(*, watched: bool) -> tuple[list[dict[str, float]], list[str]]:
        inspector = GradientInspector(Every(steps=1))
        trainer = small_trainer(*([inspector] if inspected else []), step=step, seed=0)
        ended, failed = threading.Event(), []

        def watch() -> None:
            try:
                while not ended.is_set():
                    found = dict(trainer.state.metrics)
                    trainer.state.metrics.since(0)
                    inspector.report()
                    assert "train/other" not in found or "train/loss" in found
            except Exception as error:
                failed.append(repr(error))

        watcher = threading.Thread(target=watch)
        if watched:
            watcher.start()
        try:
            history = trainer.fit(batches, epochs=60).history
        finally:
            ended.set()
            if watched:
                watcher.join()
        return history, failed

    def step(model: nn.Module, batch: Samples) -> Output:
        loss = nn.functional.mse_loss(model(batch[0]), batch[1])
        return Output(loss, metrics={"other": loss.detach() * 2})

    batches = some_batches(4)
    expected, _ = run(watched=False)
    found, failed = run(watched=True)
    assert failed == []
    assert repr(found) == repr(expected)  # in which NaN may be
