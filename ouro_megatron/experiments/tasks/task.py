"""What an experiment needs of a task: its words, how to draw examples, what it tests on."""

from abc import ABC, abstractmethod

import numpy as np
from pydantic import BaseModel, ConfigDict

from ouro_megatron.experiments.tasks.examples import Examples


class Task(BaseModel, ABC):
    """A task with its sizes, as the settings file names them. Drawing uses the generator it is handed and no other."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    @abstractmethod
    def source(self) -> str:
        """Where the definition comes from, and what this one leaves open or does otherwise."""

    @property
    @abstractmethod
    def words(self) -> list[str]:
        """Spelling of each token id; id 0 is BOS."""

    @property
    @abstractmethod
    def longest(self) -> int:
        """Tokens of the longest example."""

    @property
    @abstractmethod
    def tests(self) -> list[str]:
        """Names of the test sets, the hardest last."""

    @property
    @abstractmethod
    def possible(self) -> dict[str, int]:
        """How many different examples there can be in each test set, or a bound where `source` says so."""

    @property
    def counts_all(self) -> bool:
        """Whether every token counts in the loss, not only the answers."""
        return False

    @abstractmethod
    def draw(self, count: int, rng: np.random.Generator) -> Examples:
        """`count` training examples, with repetitions."""

    @abstractmethod
    def draw_test(self, name: str, count: int, rng: np.random.Generator) -> Examples:
        """`count` examples of a test set, with repetitions."""
