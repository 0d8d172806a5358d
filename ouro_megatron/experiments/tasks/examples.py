"""Examples of a made-up task as arrays, and the arithmetic that all tasks share: hashes, distinct rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

BOS = "<|endoftext|>"
"""Token 0 of every task: begins an example, and ends a document for the tokenizer."""


@dataclass(frozen=True)
class Examples:
    """n examples, one a row; rows are filled up with 0 to one width."""

    tokens: np.ndarray
    """int32 [n, width]."""
    lengths: np.ndarray
    """int64 [n]: tokens of each example."""
    prompts: np.ndarray
    """int64 [n]: tokens before the answer, which is the rest."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: np.ndarray | slice) -> "Examples":
        return Examples(self.tokens[rows], self.lengths[rows], self.prompts[rows])

    @property
    def places(self) -> np.ndarray:
        """bool [n, width]: where a row holds a token of its example."""
        return np.arange(self.tokens.shape[1]) < self.lengths[:, None]

    @property
    def answers(self) -> np.ndarray:
        """bool [n, width]: where a row holds a token of its answer."""
        return self.places & (np.arange(self.tokens.shape[1]) >= self.prompts[:, None])

    def prompt_and_answer(self, row: int) -> tuple[list[int], list[int]]:
        """Token ids of one example, cut where its answer begins."""
        ids = self.tokens[row, : int(self.lengths[row])].tolist()
        return ids[: int(self.prompts[row])], ids[int(self.prompts[row]) :]

    def hashes(self) -> np.ndarray:
        """uint64 [n], equal for equal examples: a random multilinear hash, two others meet with chance 2^-63."""
        width = self.tokens.shape[1]
        weights = np.random.RandomState(977).randint(1, 2**62, size=(width + 1, 2), dtype=np.int64).astype(np.uint64)
        wide = np.where(self.places, self.tokens + 1, 0).astype(np.uint64)
        # Two factors a place: a product alone would keep the low bits of a token readable in those of the hash.
        low, high = wide @ weights[:-1, 0], wide @ weights[:-1, 1]
        mixed = (low ^ (high >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
        return mixed ^ (mixed >> np.uint64(29))


def joined(parts: Sequence[Examples]) -> Examples:
    """All rows of several sets, at the width of the widest."""
    width = max(part.tokens.shape[1] for part in parts)
    tokens = [np.pad(part.tokens, ((0, 0), (0, width - part.tokens.shape[1]))) for part in parts]
    return Examples(
        np.concatenate(tokens),
        np.concatenate([part.lengths for part in parts]),
        np.concatenate([part.prompts for part in parts]),
    )


def from_columns(columns: Sequence[np.ndarray], prompt: int) -> Examples:
    """Examples of one length from their columns: each int [n] or [n, k]."""
    parts = [column[:, None] if column.ndim == 1 else column for column in columns]
    tokens = np.concatenate(parts, axis=1).astype(np.int32)
    count, width = tokens.shape
    return Examples(tokens, np.full(count, width), np.full(count, prompt))


def batches(total: int, size: int) -> Iterator[int]:
    """Sizes that add up to `total`, none above `size`."""
    for start in range(0, total, size):
        yield min(size, total - start)


def constant(count: int, value: int) -> np.ndarray:
    return np.full(count, value, np.int64)
