"""Sums on the device and sums read at every step agree; the watch finds the first bad value."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loopwright.averages import Averages, Watch, weighted_mean
from loopwright.window import Window

MANY = 128 * 2 + 5  # more than is kept before it is summed

finite = st.floats(-1e6, 1e6, allow_nan=False)
weights = st.one_of(st.just(0.0), st.integers(0, 2**30), st.floats(1e-3, 1e6))
Number = float | Tensor


def as_kind(kind: str, value: float, *, weight: bool) -> Number:
    if kind == "tensors" or (kind == "tensor values" and not weight) or (kind == "tensor weights" and weight):
        return torch.tensor(value, dtype=torch.float64)
    return value


def exact_mean(pairs: Sequence[tuple[float, float]]) -> float:
    """By fractions; NaN where all weights are 0."""
    counted = [(Fraction(value), Fraction(weight)) for value, weight in pairs if weight]
    total = sum(weight for _, weight in counted)
    return float(sum(value * weight for value, weight in counted) / total) if total else math.nan


def averaged(pairs: Sequence[tuple[Number, Number]], *, eager: bool) -> dict[str, float]:
    averages = Averages(eager=eager)
    for value, weight in pairs:
        averages.add({"loss": value}, weight)
    return averages.means()


def tolerance(pairs: Sequence[tuple[float, float]]) -> float:
    """Sums in double precision are as good as their largest terms allow."""
    total = sum(weight for _, weight in pairs) or 1.0
    return 1e-13 * sum(abs(value) * weight for value, weight in pairs) / total + 1e-300


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    pairs=st.lists(st.tuples(finite, weights), min_size=1, max_size=40),
    kind=st.sampled_from(["numbers", "tensors", "tensor values", "tensor weights"]),
    repeat=st.sampled_from([1, 1, 10]),
)
def test_both_ways_of_summing_give_the_exact_weighted_mean(
    pairs: list[tuple[float, float]], kind: str, repeat: int
) -> None:
    pairs = pairs * repeat
    given_ = [(as_kind(kind, value, weight=False), as_kind(kind, weight, weight=True)) for value, weight in pairs]
    exact = exact_mean(pairs)
    for eager in (True, False):
        mean = averaged(given_, eager=eager)["loss"]
        assert type(mean) is float
        assert mean == pytest.approx(exact, abs=tolerance(pairs), rel=1e-12, nan_ok=True)
    window = weighted_mean(given_)
    assert float(window) == pytest.approx(exact, abs=tolerance(pairs), rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("kind", ["numbers", "tensors"])
def test_a_batch_of_weight_0_counts_for_nothing_even_if_it_is_nan(kind: str, eager: bool) -> None:
    pairs = [(math.nan, 0.0), (2.0, 3.0), (math.inf, 0.0)]
    given_ = [(as_kind(kind, value, weight=False), as_kind(kind, weight, weight=True)) for value, weight in pairs]
    assert averaged(given_, eager=eager) == {"loss": 2.0}
    assert float(weighted_mean(given_)) == 2.0


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nan_or_infinity_that_counts_is_in_the_mean(bad: float, eager: bool) -> None:
    assert not math.isfinite(averaged([(1.0, 1.0), (torch.tensor(bad), 2)], eager=eager)["loss"])


@pytest.mark.parametrize("eager", [True, False])
def test_each_name_has_weights_of_its_own(eager: bool) -> None:
    averages = Averages(eager=eager)
    averages.add({"loss": torch.tensor(1.0), "rare": 7.0}, 1)
    averages.add({"loss": torch.tensor(2.0)}, 3)
    assert averages.means() == {"loss": 1.75, "rare": 7.0}


@pytest.mark.parametrize("eager", [True, False])
def test_means_can_be_asked_for_in_between(eager: bool) -> None:
    averages = Averages(eager=eager)
    assert averages.means() == {}
    averages.add({"loss": torch.tensor(1.0)}, 1)
    assert averages.means() == {"loss": 1.0}
    assert averages.means() == {"loss": 1.0}
    averages.add({"loss": torch.tensor(4.0)}, 2)
    assert averages.means() == {"loss": 3.0}


def test_many_small_values_are_summed_in_double_precision() -> None:
    # In float32 the sum would stop growing, and a weight beyond 2**24 would be rounded.
    values = [torch.tensor(0.1, dtype=torch.float32) for _ in range(MANY)]
    exact = float(values[0])
    for weight in (1, 0.3, 2**24 + 1, torch.tensor(2**24 + 1)):
        assert averaged([(value, weight) for value in values], eager=False)["loss"] == pytest.approx(exact, rel=1e-14)


def test_the_default_dtype_does_not_matter() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        pairs = [(torch.tensor(1.0 + i / 100, dtype=torch.float32), 257.0) for i in range(5)]
        mean = averaged(pairs, eager=False)["loss"]
        numbers = averaged([(1.01, 257.0), (1.03, 3.0)], eager=False)["loss"]
    finally:
        torch.set_default_dtype(before)
    assert mean == pytest.approx(1.02, rel=1e-7)
    assert numbers == pytest.approx((1.01 * 257 + 1.03 * 3) / 260, rel=1e-12)


def test_values_of_low_precision_are_summed_in_double_precision() -> None:
    values = [torch.tensor(1.0, dtype=torch.bfloat16), torch.tensor(0.0078125, dtype=torch.bfloat16)] * 300
    assert averaged([(value, 1) for value in values], eager=False)["loss"] == pytest.approx(1.0078125 / 2, rel=1e-12)


def test_what_waits_on_the_device_does_not_grow_with_the_epoch() -> None:
    averages, watch = Averages(eager=False), Watch()
    alive: list[weakref.ref[Tensor]] = []
    gc.disable()  # it has to go at once, not when a collector comes by
    try:
        for i in range(MANY * 4):
            value = torch.tensor(float(i))
            alive.append(weakref.ref(value))
            averages.add({"loss": value}, 1)
            watch.add(value)
        del value
        assert sum(ref() is not None for ref in alive) <= 128
    finally:
        gc.enable()
    assert averages.means()["loss"] == (MANY * 4 - 1) / 2
    assert watch.first_bad() is None


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    length=st.integers(1, MANY),
    bad=st.lists(st.tuples(st.integers(0, MANY - 1), st.sampled_from([math.nan, math.inf, -math.inf])), max_size=4),
    ask=st.integers(0, MANY),
)
def test_the_watch_finds_the_first_value_that_is_not_finite(
    length: int, bad: list[tuple[int, float]], ask: int
) -> None:
    values = [1e38] * length
    for index, value in bad:
        if index < length:
            values[index] = value
    watch = Watch()
    first = next((i for i, value in enumerate(values) if not math.isfinite(value)), None)
    for i, value in enumerate(values):
        watch.add(torch.tensor(value))
        if i == ask:  # a look in between changes nothing
            found = watch.first_bad()
            assert found == (first if first is not None and first <= i else None)
    assert watch.first_bad() == first
    assert watch.first_bad() == first


def test_a_watch_that_has_seen_nothing_finds_nothing() -> None:
    assert Watch().first_bad() is None


# The window: its gradient is that of the weighted mean, whatever the weights are.


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    pairs=st.lists(st.tuples(st.floats(-10, 10), weights), min_size=1, max_size=6),
    missing=st.integers(0, 2),
    tensors=st.booleans(),
)
def test_backward_and_correction_give_the_gradient_of_the_weighted_mean(
    pairs: list[tuple[float, float]], missing: int, tensors: bool
) -> None:
    window = Window(len(pairs) + missing)  # it may hold fewer than it was to hold, as at an end nobody knew of
    slope = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for value, number in pairs:
        weight: Number = torch.tensor(number, dtype=torch.float64) if tensors else number
        window.add({"loss": value}, weight)
        if number or tensors:  # the loop does not go backward from a weight that is known to be 0
            loss = slope * value
            if window.size > 1:
                loss = loss / window.divisor(weight, loss.dtype)
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotation there
    correction = window.correction()
    gradient = 0.0 if slope.grad is None else slope.grad.item()
    if correction is not None:
        gradient /= float(correction) or 1.0
    if any(number for _, number in pairs):
        assert gradient == pytest.approx(exact_mean(pairs), abs=tolerance(pairs) + 1e-300, rel=1e-9)
    elif window.size > 1:
        assert gradient == 0
        assert tensors or window.empty


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    weight=st.one_of(st.integers(1, 2**40), st.floats(1e-3, 1e6)),
    size=st.integers(2, 7),
    tensors=st.booleans(),
)
def test_equal_weights_divide_by_exactly_the_number_of_batches(weight: float, size: int, tensors: bool) -> None:
    window = Window(size)
    for _ in range(size):
        given_: Number = torch.tensor(weight, dtype=torch.float64) if tensors else weight
        window.add({"loss": 1.0}, given_)
        assert float(window.divisor(given_, torch.float32)) == size
    correction = window.correction()
    if tensors:
        assert float(correction or 1) == pytest.approx(1, rel=1e-15)
    else:
        assert correction is None


@pytest.mark.parametrize("tensors", [True, False])
def test_a_windows_means_are_weighted_and_leave_the_window_for_the_epoch(tensors: bool) -> None:
    window, averages = Window(3), Averages(eager=not tensors)
    for value, number in [(1.0, 1), (2.0, 3), (math.nan, 0)]:
        weight: Number = torch.tensor(number) if tensors else number
        window.add({"loss": torch.tensor(value) if tensors else value}, weight)
    assert window.full
    assert {name: float(value) for name, value in window.commit(averages).items()} == {"loss": 1.75}
    assert averages.means() == {"loss": 1.75}
