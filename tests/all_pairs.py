"""A set of configurations in which every pair of settings meets."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations

Config = dict[str, str]
Pair = tuple[tuple[str, str], tuple[str, str]]


def all_pairs(factors: Mapping[str, Sequence[str]], *, times: int = 1, seed: int = 0) -> list[Config]:
    """Configurations in which any two levels of any two factors meet at least ``times`` times.

    Greedy: each configuration is built around the pair that is most in need, factor by factor, always with the
    level that meets the most needs with what has been chosen already. The same arguments give the same list.

    Args:
        factors: The levels of every factor, by its name.
        times: How many different configurations have to hold each pair.
        seed: Decides between levels that are equally good.
    """
    chance = random.Random(seed)
    needs = Counter(dict.fromkeys(every_pair(factors), times))
    chosen: list[Config] = []
    while neediest := max(needs, key=lambda pair: needs[pair], default=None):
        config = dict(neediest)
        rest = [name for name in factors if name not in config]
        chance.shuffle(rest)
        for name in rest:
            levels = list(factors[name])
            chance.shuffle(levels)
            config[name] = max(levels, key=lambda level: _met(config, name, level, needs))
        config = {name: config[name] for name in factors}
        if config in chosen:  # all its other needs are met: any company will do
            config.update({name: chance.choice(factors[name]) for name in rest})
        if config in chosen:
            continue
        chosen.append(config)
        for pair in pairs_of(config):
            needs[pair] -= 1
            if needs[pair] <= 0:
                del needs[pair]
    return chosen


def every_pair(factors: Mapping[str, Sequence[str]]) -> list[Pair]:
    """All pairs of levels of two different factors, in the factors' order."""
    return [
        ((first, one), (second, other))
        for first, second in combinations(factors, 2)
        for one in factors[first]
        for other in factors[second]
    ]


def pairs_of(config: Config) -> list[Pair]:
    """The pairs that one configuration holds, in the factors' order."""
    return list(combinations(config.items(), 2))


def _met(config: Config, name: str, level: str, needs: Counter[Pair]) -> int:
    """How much is met by adding one more level to the ones chosen; a pair stands in either order."""
    new = (name, level)
    return sum(needs.get((new, old), 0) + needs.get((old, new), 0) for old in config.items())
