"""Keys and values of every (loop, layer): a looped model's layers see other states in every loop."""

import torch
from torch import Tensor

_BLOCK = 256
"""Positions by which the buffers grow."""


class LayerCache:
    """One (loop, layer). Holds [capacity, b, g, d] buffers of which the first `cache.length` positions are settled."""

    def __init__(self, cache: "LoopCache") -> None:
        self._cache = cache
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def extend(self, key_sbnd: Tensor, value_sbnd: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Stores the new positions after the settled ones; see `CacheSlot.extend`."""
        start, new = self._cache.length, key_sbnd.shape[0]
        keys, values = self._room(start + new, key_sbnd, value_sbnd)
        keys[start : start + new], values[start : start + new] = key_sbnd, value_sbnd
        mask = None
        if start and new > 1:
            positions = torch.arange(start + new, device=key_sbnd.device)
            mask = (positions[None, :] <= positions[start:, None])[None, None]
        return keys[: start + new], values[: start + new], mask

    def copy_positions(self, source: "LayerCache", start: int, end: int) -> None:
        """Takes over positions `start` to `end` of another loop's entry."""
        assert source._keys is not None and source._values is not None
        keys, values = self._room(end, source._keys, source._values)
        keys[start:end], values[start:end] = source._keys[start:end], source._values[start:end]

    def _room(self, needed: int, key_sbnd: Tensor, value_sbnd: Tensor) -> tuple[Tensor, Tensor]:
        if self._keys is None or self._values is None:
            self._keys = key_sbnd.new_zeros((0, *key_sbnd.shape[1:]))
            self._values = value_sbnd.new_zeros((0, *value_sbnd.shape[1:]))
        missing = needed - self._keys.shape[0]
        if missing > 0:
            grow = -(-missing // _BLOCK) * _BLOCK
            self._keys = torch.cat((self._keys, self._keys.new_zeros((grow, *self._keys.shape[1:]))))
            self._values = torch.cat((self._values, self._values.new_zeros((grow, *self._values.shape[1:]))))
        return self._keys, self._values


class LoopCache:
    """All entries of a model: `slots[loop][layer]`, loops from 0."""

    def __init__(self, loops: int, layers: int) -> None:
        self.length = 0
        """Positions that all loops have seen."""
        self.slots = [[LayerCache(self) for _ in range(layers)] for _ in range(loops)]

    def fill_deeper(self, exit_loop: int, new: int) -> None:
        """Gives the `new` newest positions of all loops after `exit_loop` (1-based) that loop's keys and values."""
        for deeper in self.slots[exit_loop:]:
            for target, source in zip(deeper, self.slots[exit_loop - 1], strict=True):
                target.copy_positions(source, self.length, self.length + new)
