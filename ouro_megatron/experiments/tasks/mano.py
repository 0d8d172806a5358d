"""Mano: arithmetic modulo a prime in prefix notation, answered at once, without intermediate results."""

from typing import Annotated

import numpy as np
from pydantic import Field

from ouro_megatron.experiments.tasks.examples import BOS, Examples, joined
from ouro_megatron.experiments.tasks.task import Task

OPERATIONS = "+-*"


class Mano(Task):
    operations: Annotated[int, Field(ge=1)] = 10
    """L: an example has 1..L operations, each number with the same chance; tested on L."""
    modulus: Annotated[int, Field(ge=2)] = 23
    test_operations: tuple[Annotated[int, Field(ge=1)], ...] | None = None

    @property
    def source(self) -> str:
        return (
            "Allen-Zhu, Physics of language models part 4.1 (task Mano), as used in arXiv 2510.25741, appendix B: "
            "<bos> <len_l> expression <ans> value with l operations of + - * on 0..22 modulo 23. The shape of an "
            "expression is left open there: here the first operation gives its left side 0..l-1 of the other l - 1, "
            "each number with the same chance, and so on"
        )

    @property
    def words(self) -> list[str]:
        lengths = [f"<len_{count}>" for count in range(1, self.operations + 1)]
        return [BOS, "<ans>", *OPERATIONS, *lengths, *map(str, range(self.modulus))]

    @property
    def longest(self) -> int:
        return 2 * self.operations + 5

    @property
    def tests(self) -> list[str]:
        return [f"l={count}" for count in self.test_operations or [self.operations]]

    @property
    def possible(self) -> dict[str, int]:
        return {name: self._expressions(int(name.removeprefix("l="))) for name in self.tests}

    def _expressions(self, operations: int) -> int:
        shapes = [1]
        for count in range(1, operations + 1):
            shapes.append(sum(shapes[left] * shapes[count - 1 - left] for left in range(count)))
        return shapes[operations] * len(OPERATIONS) ** operations * self.modulus ** (operations + 1)

    def draw(self, count: int, rng: np.random.Generator) -> Examples:
        operations = rng.integers(1, self.operations + 1, count)
        sizes = range(1, self.operations + 1)
        parts = [self._examples(size, int((operations == size).sum()), rng) for size in sizes]
        order = np.argsort(np.argsort(operations, kind="stable"), kind="stable")
        return joined(parts)[order]

    def draw_test(self, name: str, count: int, rng: np.random.Generator) -> Examples:
        return self._examples(int(name.removeprefix("l=")), count, rng)

    def _examples(self, operations: int, count: int, rng: np.random.Generator) -> Examples:
        first_number = 5 + self.operations
        is_operation, kinds, numbers = self._expression(operations, count, rng)
        body = np.where(is_operation, 2 + kinds, first_number + numbers)
        values = evaluate(is_operation, kinds, numbers, self.modulus)
        tokens = np.zeros((count, body.shape[1] + 4), np.int32)
        tokens[:, 1] = 4 + operations
        tokens[:, 2:-2] = body
        tokens[:, -2] = 1
        tokens[:, -1] = first_number + values
        width = tokens.shape[1]
        return Examples(tokens, np.full(count, width), np.full(count, width - 1))

    def _expression(
        self, operations: int, count: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where operations stand, bool [n, 2l + 1]; the operation and the number that each place would hold."""
        length = 2 * operations + 1
        kinds = rng.integers(0, len(OPERATIONS), (count, length))
        numbers = rng.integers(0, self.modulus, (count, length))
        is_operation = np.zeros((count, length), bool)
        # Sizes, in operations, of the sub-expressions that are still to be written, the next one on top.
        stack = np.zeros((count, operations + 2), np.int64)
        stack[:, 0] = operations
        top, rows = np.zeros(count, np.int64), np.arange(count)
        for place in range(length):
            size = stack[rows, top]
            splits = is_operation[:, place] = size > 0
            left = rng.integers(0, np.maximum(size, 1))
            stack[rows[splits], top[splits]] = (size - 1 - left)[splits]
            stack[rows[splits], top[splits] + 1] = left[splits]
            top = np.where(splits, top + 1, top - 1)
        return is_operation, kinds, numbers


def evaluate(is_operation: np.ndarray, kinds: np.ndarray, numbers: np.ndarray, modulus: int) -> np.ndarray:
    """Values int64 [n] of prefix expressions [n, places], read from the right with a stack."""
    count, length = is_operation.shape
    stack = np.zeros((count, length + 1), np.int64)
    top, rows = np.zeros(count, np.int64), np.arange(count)
    for place in range(length - 1, -1, -1):
        works = is_operation[:, place]
        left = stack[rows, np.maximum(top - 1, 0)]
        right = stack[rows, np.maximum(top - 2, 0)]
        results = np.stack((left + right, left - right, left * right), axis=1) % modulus
        value = np.where(works, results[rows, kinds[:, place]], numbers[:, place])
        top = np.where(works, top - 2, top)
        stack[rows, top] = value
        top = top + 1
    return stack[:, 0]
