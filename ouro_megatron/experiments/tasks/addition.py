"""Addition of n numbers: "315+120+045=0480", one token a character."""

from typing import Annotated

import numpy as np
from pydantic import Field

from ouro_megatron.experiments.tasks.examples import BOS, Examples, constant, from_columns, joined
from ouro_megatron.experiments.tasks.task import Task

PLUS, EQUALS = 11, 12
Terms = Annotated[int, Field(ge=2)]


class Addition(Task):
    digits: Annotated[int, Field(ge=1, le=9)] = 3
    train_terms: tuple[Terms, ...] = (2, 4, 8, 16, 32)
    """n of a training example, each with the same chance."""
    test_terms: tuple[Terms, ...] = (8, 16, 24, 32)

    @property
    def source(self) -> str:
        return (
            "Saunshi et al., Reasoning with latent thoughts (arXiv 2502.17416), section 2.1: sums of n numbers of "
            "three digits, character by character, n mixed in training and tested one by one. Left open there and "
            "chosen here: numbers keep leading zeros; the sum has as many digits as the largest sum of n such "
            "numbers, the most significant first"
        )

    @property
    def words(self) -> list[str]:
        return [BOS, *"0123456789", "+", "="]

    @property
    def longest(self) -> int:
        return max(self._length(terms) for terms in [*self.train_terms, *self.test_terms])

    @property
    def tests(self) -> list[str]:
        return [f"n={terms}" for terms in self.test_terms]

    @property
    def possible(self) -> dict[str, int]:
        return {f"n={terms}": 10 ** (self.digits * terms) for terms in self.test_terms}

    def draw(self, count: int, rng: np.random.Generator) -> Examples:
        which = rng.integers(0, len(self.train_terms), count)
        parts = [self._sums(terms, int((which == i).sum()), rng) for i, terms in enumerate(self.train_terms)]
        mixed = joined(parts)
        order = np.argsort(np.argsort(which, kind="stable"), kind="stable")
        return mixed[order]

    def draw_test(self, name: str, count: int, rng: np.random.Generator) -> Examples:
        return self._sums(int(name.removeprefix("n=")), count, rng)

    def answer_digits(self, terms: int) -> int:
        """Digits of the largest sum of `terms` numbers."""
        return len(str(terms * (10**self.digits - 1)))

    def _length(self, terms: int) -> int:
        return 1 + terms * (self.digits + 1) + self.answer_digits(terms)

    def _sums(self, terms: int, count: int, rng: np.random.Generator) -> Examples:
        numbers = rng.integers(0, 10**self.digits, (count, terms))
        columns: list[np.ndarray] = [constant(count, 0)]
        for term in range(terms):
            columns.append(_digits(numbers[:, term], self.digits))
            columns.append(constant(count, EQUALS if term == terms - 1 else PLUS))
        columns.append(_digits(numbers.sum(1), self.answer_digits(terms)))
        return from_columns(columns, 1 + terms * (self.digits + 1))


def _digits(numbers: np.ndarray, width: int) -> np.ndarray:
    """Token ids [n, width] of decimal digits, the most significant first."""
    return 1 + numbers[:, None] // 10 ** np.arange(width - 1, -1, -1) % 10
