"""Multi-hop questions over a made-up world: "Who is the teacher of the friend of Bob?", answered at once."""

from functools import cached_property
from typing import Annotated

import numpy as np
from pydantic import Field, model_validator

from ouro_megatron.experiments.tasks.examples import BOS, Examples, constant, from_columns, joined
from ouro_megatron.experiments.tasks.task import Task


class MultiHop(Task):
    """Entities lie in layers; each relation leads every entity to one of the next layer. `world_seed` draws the world
    and what is held out, so that all runs of a sweep ask about the same one."""

    layers: Annotated[int, Field(ge=2)] = 5
    entities: Annotated[int, Field(ge=1)] = 100
    """Of one layer."""
    relations: Annotated[int, Field(ge=1)] = 20
    hops: Annotated[int, Field(ge=1)] = 3
    shorter: bool = False
    """Training also asks questions of fewer hops, each number with the same chance."""
    held_out: Annotated[int, Field(ge=1)] = 3000
    questions: Annotated[int, Field(ge=1)] | None = None
    """How many different questions of `hops` hops training may see; all that are not held out when absent."""
    world_seed: int = 0

    @model_validator(mode="after")
    def _fits(self) -> "MultiHop":
        if self.hops >= self.layers:
            raise ValueError(f"{self.hops} hops need more than {self.layers} layers")
        left = self._all_questions - self.held_out
        if left < 1 or (self.questions or 1) > left:
            raise ValueError(
                f"there are {self._all_questions} questions, {self.held_out} are held out: {self.questions or 'none'} "
                "cannot be taken from the rest"
            )
        return self

    @property
    def _all_questions(self) -> int:
        return self.entities * self.relations**self.hops

    @property
    def source(self) -> str:
        return (
            "arXiv 2510.25741, section 6 and appendix B, after Yao et al. (arXiv 2505.17923): 500 entities in 5 "
            "layers, 20 relations, questions of 3 hops, 3,000 held out, one token a name, greedy exact match. "
            "Questions begin in the first layer, which gives the paper's number of about 8e5. Words as there: "
            "Who is the R1 of the R2 of E ? \\n Answer: E'"
        )

    @cached_property
    def words(self) -> list[str]:
        frame = ["Who", "is", "the", "of", "?", "\\n", "Answer:"]
        relations = [f"relation_{r}" for r in range(self.relations)]
        return [BOS, *frame, *relations, *(f"name_{i}" for i in range(self.layers * self.entities))]

    @property
    def longest(self) -> int:
        return 4 + 3 * self.hops + 4

    @property
    def tests(self) -> list[str]:
        return [f"{self.hops} hops"]

    @property
    def possible(self) -> dict[str, int]:
        return {f"{self.hops} hops": self._all_questions}

    @cached_property
    def world(self) -> np.ndarray:
        """int64 [relations, layers - 1, entities]: place in the next layer that a relation leads to."""
        rng = np.random.default_rng([self.world_seed, 1])
        return rng.integers(0, self.entities, (self.relations, self.layers - 1, self.entities))

    @cached_property
    def _order(self) -> np.ndarray:
        """All question numbers, shuffled: the held-out ones first, then those of training."""
        return np.random.default_rng([self.world_seed, 2]).permutation(self._all_questions)

    def draw(self, count: int, rng: np.random.Generator) -> Examples:
        end = None if self.questions is None else self.held_out + self.questions
        pool = self._order[self.held_out : end]
        hops = rng.integers(1, self.hops + 1, count) if self.shorter else np.full(count, self.hops)
        parts = []
        for number in range(1, self.hops + 1):
            size = int((hops == number).sum())
            if number == self.hops:
                parts.append(self._numbered(rng.choice(pool, size)))
            else:
                starts = self._start_layers(number, size, rng)
                relations = rng.integers(0, self.relations, (size, number))
                parts.append(self._ask(starts, rng.integers(0, self.entities, size), relations))
        order = np.argsort(np.argsort(hops, kind="stable"), kind="stable")
        return joined(parts)[order]

    def _start_layers(self, hops: int, count: int, rng: np.random.Generator) -> np.ndarray:
        """Layers that questions of the full length pass through: short ones teach what these need."""
        return rng.integers(0, self.hops - hops + 1, count)

    def draw_test(self, name: str, count: int, rng: np.random.Generator) -> Examples:
        return self._numbered(rng.choice(self._order[: self.held_out], count))

    def _numbered(self, questions: np.ndarray) -> Examples:
        """Questions of all hops by number: entity and relations are its digits."""
        left, entity = questions // self.entities, questions % self.entities
        relations = left[:, None] // self.relations ** np.arange(self.hops) % self.relations
        return self._ask(np.zeros(len(questions), np.int64), entity, relations)

    def _ask(self, layers: np.ndarray, entities: np.ndarray, relations: np.ndarray) -> Examples:
        """relations [n, hops] in the order they are followed: the first is the one written last."""
        count, hops = relations.shape
        first_name = 8 + self.relations
        at = entities
        for step in range(hops):
            at = self.world[relations[:, step], layers + step, at]
        columns = [constant(count, 0), constant(count, 1), constant(count, 2), constant(count, 3)]
        for step in reversed(range(hops)):
            columns += [8 + relations[:, step], constant(count, 4)]
            if step:
                columns.append(constant(count, 3))
        columns += [first_name + layers * self.entities + entities, *(constant(count, word) for word in (5, 6, 7))]
        prompt = len(columns)
        columns.append(first_name + (layers + hops) * self.entities + at)
        return from_columns(columns, prompt)
