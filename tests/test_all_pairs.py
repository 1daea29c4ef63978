from __future__ import annotations

from collections import Counter

import pytest

from all_pairs import all_pairs, every_pair, pairs_of

FACTORS = {"size": ["s", "m", "l"], "colour": ["red", "blue"], "form": ["a", "b", "c", "d"], "lid": ["on", "off"]}


def test_every_pair_names_each_pair_of_levels_once() -> None:
    assert len(every_pair(FACTORS)) == 3 * 2 + 3 * 4 + 3 * 2 + 2 * 4 + 2 * 2 + 4 * 2
    assert len(set(every_pair(FACTORS))) == len(every_pair(FACTORS))


@pytest.mark.parametrize("times", [1, 2, 3])
def test_each_pair_meets_as_often_as_asked(times: int) -> None:
    met = Counter(pair for config in all_pairs(FACTORS, times=times) for pair in pairs_of(config))
    assert set(met) == set(every_pair(FACTORS))
    assert min(met.values()) >= times


def test_no_configuration_stands_twice_and_few_are_needed() -> None:
    chosen = all_pairs(FACTORS, times=2)
    assert len({tuple(config.items()) for config in chosen}) == len(chosen)
    assert len(chosen) < 3 * 2 * 4 * 2
    assert len(all_pairs(FACTORS)) <= 16  # 12 is the least that there can be


def test_the_same_arguments_give_the_same_list() -> None:
    assert all_pairs(FACTORS, seed=5) == all_pairs(FACTORS, seed=5)
    assert all_pairs(FACTORS, seed=5) != all_pairs(FACTORS, seed=6)
