"""p-hop induction: follow the last earlier occurrence of the current symbol, p times."""

from typing import Annotated

import numpy as np
from pydantic import Field

from ouro_megatron.experiments.tasks.examples import BOS, Examples, constant, from_columns, joined
from ouro_megatron.experiments.tasks.task import Task

Hops = Annotated[int, Field(ge=1)]


class PHop(Task):
    length: Annotated[int, Field(ge=4)] = 256
    """n, symbols of a sequence."""
    alphabet: Annotated[int, Field(ge=2, le=26)] = 4
    hops: tuple[Hops, ...] = (16,)
    """p of a training example, each with the same chance; with several, the sequence begins with p."""
    test_hops: tuple[Hops, ...] | None = None
    """All of `hops` when absent."""

    @property
    def source(self) -> str:
        return (
            "Sanford et al., Transformers, parallel computation and logarithmic depth (arXiv 2402.09268), definition "
            "of hop_k; sizes of Saunshi et al. (arXiv 2502.17416): 256 symbols of an alphabet of 4. The answer follows "
            "the last symbol; sequences without one (a hop that finds no earlier occurrence) are drawn again. The "
            "number of possible examples counts these too"
        )

    @property
    def words(self) -> list[str]:
        letters = [chr(ord("a") + i) for i in range(self.alphabet)]
        return [BOS, *letters, *([f"p{p}" for p in self.hops] if self._names_hops else [])]

    @property
    def _names_hops(self) -> bool:
        return len(self.hops) > 1

    @property
    def longest(self) -> int:
        return self.length + 2 + self._names_hops

    @property
    def tests(self) -> list[str]:
        return [f"p={p}" for p in self.test_hops or self.hops]

    @property
    def possible(self) -> dict[str, int]:
        return dict.fromkeys(self.tests, self.alphabet**self.length)

    def draw(self, count: int, rng: np.random.Generator) -> Examples:
        which = rng.integers(0, len(self.hops), count)
        parts = [self._sequences(p, int((which == i).sum()), rng) for i, p in enumerate(self.hops)]
        order = np.argsort(np.argsort(which, kind="stable"), kind="stable")
        return joined(parts)[order]

    def draw_test(self, name: str, count: int, rng: np.random.Generator) -> Examples:
        return self._sequences(int(name.removeprefix("p=")), count, rng)

    def _sequences(self, hops: int, count: int, rng: np.random.Generator) -> Examples:
        found = [np.empty((0, self.length), np.int64)]
        answers = [np.empty(0, np.int64)]
        missing = count
        while missing:
            symbols = rng.integers(0, self.alphabet, (max(64, missing * 2), self.length))
            places = hop(symbols, hops)
            good = np.flatnonzero(places >= 0)[:missing]
            found.append(symbols[good])
            answers.append(symbols[good, places[good]])
            missing -= len(good)
        columns = [constant(count, 0)]
        if self._names_hops:
            columns.append(constant(count, 1 + self.alphabet + self.hops.index(hops)))
        columns += [1 + np.concatenate(found), 1 + np.concatenate(answers)]
        return from_columns(columns, self.longest - 1)


def hop(symbols: np.ndarray, hops: int) -> np.ndarray:
    """Where `hops` hops from the last symbol lead, int64 [n], from symbols [n, length]; -1 where one finds nothing.

    A hop from place i goes to the place after the last earlier occurrence of the symbol at i.
    """
    count, length = symbols.shape
    rows = np.arange(count)
    target = np.full((count, length), -1, np.int64)
    last_seen = np.full((count, int(symbols.max(initial=0)) + 1), -1, np.int64)
    for place in range(length):
        seen = last_seen[rows, symbols[:, place]]
        target[:, place] = np.where(seen < 0, -1, seen + 1)
        last_seen[rows, symbols[:, place]] = place
    at = np.full(count, length - 1)
    for _ in range(hops):
        at = np.where(at < 0, -1, target[rows, at])
    return at
