"""Capo: made-up biographies, bioS(N), and how many bits of them a model knows."""

import math
from typing import Annotated

import numpy as np
from pydantic import Field

from ouro_megatron.experiments.tasks.examples import BOS, Examples
from ouro_megatron.experiments.tasks.task import Task

ATTRIBUTES = ("birth_date", "birth_city", "university", "major", "employer")
PositiveInt = Annotated[int, Field(ge=1)]


class Capo(Task):
    """N people: a name of three words and five attributes, drawn from `people_seed`. An example is one biography: name
    and attributes in a new order each time. Everything in it counts in the loss."""

    people: PositiveInt = 20_000
    names: tuple[PositiveInt, PositiveInt, PositiveInt] = (400, 400, 1000)
    """Different first, middle and last names."""
    dates: tuple[PositiveInt, PositiveInt, PositiveInt] = (12, 28, 200)
    """Months, days and years of birth."""
    cities: PositiveInt = 200
    universities: PositiveInt = 300
    majors: PositiveInt = 100
    employers: PositiveInt = 263
    people_seed: int = 0

    @property
    def source(self) -> str:
        return (
            "Allen-Zhu and Li, Physics of language models part 3.3 (arXiv 2404.05405), bioS(N): names from 400 x 400 x "
            "1000, birth date 12 x 28 x 200, 200 birth cities, 300 universities, 100 majors, 263 employers, a gender. "
            "Their sentences are written from templates; here a sentence is the attribute's word and its value, one "
            "token each part, and the five come in a new order each time. The gender is the pronoun's word"
        )

    @property
    def counts_all(self) -> bool:
        return True

    @property
    def words(self) -> list[str]:
        values = [f"{kind}_{i}" for kind, size in self._kinds for i in range(size)]
        return [BOS, ".", *ATTRIBUTES, *values]

    @property
    def _kinds(self) -> list[tuple[str, int]]:
        """Kinds of value words and how many there are of each, in the order of their ids."""
        sizes = (*self.names, 2, *self.dates, self.cities, self.universities, self.majors, self.employers)
        kinds = (
            "first",
            "middle",
            "last",
            "pronoun",
            "month",
            "day",
            "year",
            "city",
            "university",
            "major",
            "employer",
        )
        return list(zip(kinds, sizes, strict=True))

    @property
    def longest(self) -> int:
        return 1 + 3 + 1 + 5 + 7 + 1

    @property
    def tests(self) -> list[str]:
        return []

    @property
    def possible(self) -> dict[str, int]:
        return {"people": math.prod(self.names)}

    @property
    def attribute_bits(self) -> float:
        """log2(S0): bits of one person's attributes."""
        return math.log2(math.prod(size for _, size in self._kinds[3:]))

    @property
    def name_bits(self) -> float:
        """log2(N0): bits of a name before it is known who exists."""
        return math.log2(math.prod(self.names))

    def persons(self) -> np.ndarray:
        """int64 [people, 11]: value of each kind; no name twice."""
        rng = np.random.default_rng([self.people_seed, 3])
        numbers = rng.choice(math.prod(self.names), self.people, replace=False)
        first, rest = np.divmod(numbers, self.names[1] * self.names[2])
        middle, last = np.divmod(rest, self.names[2])
        others = [rng.integers(0, size, self.people) for _, size in self._kinds[3:]]
        return np.stack([first, middle, last, *others], axis=1)

    def biographies(self, orders: np.ndarray) -> Examples:
        """One of each person; orders int [people, 5]: which attribute comes when."""
        persons = self.persons()
        starts = 7 + np.concatenate(([0], np.cumsum([size for _, size in self._kinds])[:-1]))
        ids = starts + persons
        count = len(ids)
        # Tokens of each attribute, the birth date's three parts, filled up with -1.
        parts = np.full((count, 5, 4), -1, np.int64)
        parts[:, :, 0] = 2 + np.arange(5)
        parts[:, 0, 1:] = ids[:, 4:7]
        parts[:, 1:, 1] = ids[:, 7:]
        body = np.take_along_axis(parts, orders[:, :, None], axis=1).reshape(count, -1)
        body = body[body >= 0].reshape(count, 12)
        tokens = np.concatenate(
            [np.zeros((count, 1), np.int64), ids[:, :4], body, np.ones((count, 1), np.int64)], axis=1
        )
        return Examples(tokens.astype(np.int32), np.full(count, tokens.shape[1]), np.ones(count, np.int64))

    def draw(self, count: int, rng: np.random.Generator) -> Examples:
        """Whole rounds of all people, each in an order of its own, cut at `count`."""
        rounds = -(-count // self.people)
        orders = np.argsort(rng.random((rounds, self.people, 5)), axis=2)
        whole = [self.biographies(orders[i]) for i in range(rounds)]
        return Examples(
            np.concatenate([part.tokens for part in whole])[:count],
            np.concatenate([part.lengths for part in whole])[:count],
            np.concatenate([part.prompts for part in whole])[:count],
        )

    def draw_test(self, name: str, count: int, rng: np.random.Generator) -> Examples:
        raise ValueError("capo has no test sets: it asks what a model knows of its training data")

    def value_places(self, examples: Examples) -> tuple[np.ndarray, np.ndarray]:
        """bool [n, width] twice: where names stand, and where values (the pronoun among them) do."""
        tokens = examples.tokens
        ends = 7 + np.cumsum([size for _, size in self._kinds])
        is_name = (tokens >= 7) & (tokens < ends[2])
        return is_name, tokens >= ends[2]


def known_bits(task: Capo, name_nats: float, attribute_nats: float) -> tuple[float, float]:
    """Bits of names and of attributes that a model knows, from its cross-entropy of a person's name and of a person's
    attributes (nats, summed over their tokens, the mean over people): the lower bound of part 3.3, section 3.

    Names: N (log2(N0 - N) - nats / ln 2); attributes: N (log2 S0 - nats / ln 2); what is below 0 counts as 0.
    """
    people = task.people
    free = max(1, math.prod(task.names) - people)
    names = people * (math.log2(free) - name_nats / math.log(2))
    attributes = people * (task.attribute_bits - attribute_nats / math.log(2))
    return max(0.0, names), max(0.0, attributes)
