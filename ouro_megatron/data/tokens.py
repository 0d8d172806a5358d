"""Reading stretches of a pair: token ids from PREFIX.bin and, beside them, which count as labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ouro_megatron.data.indexed import read_index, read_manifest, with_suffix
from ouro_megatron.errors import DataError

LOSS_SUFFIX = ".loss.bin"
"""PREFIX.loss.bin: one uint8 a token of PREFIX.bin, in its order; 0 for those that do not count as a label."""


@dataclass(frozen=True)
class Stretch:
    """`length` tokens of one sequence of the index, from token `offset` on."""

    sequence: int
    offset: int
    length: int


def check_loss_mask(prefix: Path, tokens: int) -> bool:
    """Whether the pair has a loss mask. Raises DataError when it is missing though promised, or of another size."""
    path = with_suffix(prefix, LOSS_SUFFIX)
    manifest = read_manifest(prefix)
    promised = manifest is not None and manifest.get("loss") is not None
    if not path.exists():
        if promised:
            raise DataError(
                f"{path}: missing, but the manifest of {prefix} has a loss mask: without it, prompts would be trained "
                "on. Copy it again, or prepare the data again."
            )
        return False
    size = path.stat().st_size
    if size != tokens:
        raise DataError(
            f"{path}: {size} bytes, but {with_suffix(prefix, '.bin')} holds {tokens} tokens and each needs one. "
            "Copy it again, or prepare the data again."
        )
    return True


class TokenReader:
    """Random access to the tokens of a pair, memory-mapped; may be shared between threads."""

    def __init__(self, prefix: Path) -> None:
        index = read_index(prefix)
        self.lengths = index.lengths
        self._offsets = index.offsets
        self._itemsize = index.dtype.itemsize
        self._tokens = np.memmap(with_suffix(prefix, ".bin"), dtype=index.dtype, mode="r")
        mask = with_suffix(prefix, LOSS_SUFFIX)
        self._counts = np.memmap(mask, dtype=np.uint8, mode="r") if mask.exists() else None

    def read(self, stretches: Sequence[Stretch]) -> tuple[np.ndarray, np.ndarray]:
        """The stretches one after the other: ids int64[n], and bool[n], whether each counts as a label."""
        places = []
        for stretch in stretches:
            begin = int(self._offsets[stretch.sequence]) // self._itemsize + stretch.offset
            places.append(slice(begin, begin + stretch.length))
        ids = np.concatenate([self._tokens[place] for place in places]).astype(np.int64)
        if self._counts is None:
            return ids, np.ones(len(ids), bool)
        return ids, np.concatenate([self._counts[place] for place in places]) != 0
