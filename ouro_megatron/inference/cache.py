"""Keys and values of decoding: what is kept of each loop, and what a position holds whose token left early.

A looped model's layers see another state in every loop, so the exact cache has an entry for each (loop, layer). After
the prompt the loops may share one entry a layer instead (arXiv 2510.25741, table 14), which takes 1/T of the memory:

| policy  | a finished position holds                           | at loop t a token attends to              |
|---------|-----------------------------------------------------|-------------------------------------------|
| all     | each loop's own                                     | loop t of every position                  |
| last    | those of the last loop that ran for it              | the shared entry, and its own of loop t   |
| first   | those of loop 1                                     | the shared entry, and its own of loop t   |
| average | the mean over the loops that ran for it             | the shared entry, and its own of loop t   |

Prompts run through all loops with each loop's own entries whatever the policy.
"""

from typing import Literal

import torch
from torch import Tensor

from ouro_megatron.inference.weights import ModelWeights

CachePolicy = Literal["all", "last", "first", "average"]
CACHE_POLICIES: tuple[CachePolicy, ...] = ("all", "last", "first", "average")


class KeyValueCache:
    """[layer, entry, slot, g, capacity, d] buffers; a slot is one sequence's. Entries are loops, or one shared."""

    def __init__(self, weights: ModelWeights, policy: CachePolicy, loops: int, slots: int, capacity: int) -> None:
        self.policy = policy
        self.loops, self.slots, self.capacity = loops, slots, capacity
        self.entries = loops if policy == "all" else 1
        layers, groups, dim = len(weights.layers), weights.groups, weights.head_dim
        shape = (layers, self.entries, slots, groups, capacity, dim)
        # Finite everywhere: where a batch is padded, weight 0 times garbage could be NaN. On a CPU these are pages of
        # zeros from the system, which take no memory until a position reaches them.
        self.keys = torch.zeros(shape, dtype=weights.dtype, device=weights.device)
        self.values = torch.zeros(shape, dtype=weights.dtype, device=weights.device)
        self._groups, self._dim = groups, dim
        self._heads = torch.arange(groups, device=weights.device) * capacity
        self._own: tuple[Tensor, Tensor] | None = None
        if policy in ("first", "average"):
            # The entry of the token under way: the cache itself holds what it attends to at the current loop.
            own = (layers, slots, groups, dim)
            self._own = (
                torch.zeros(own, dtype=torch.float32, device=weights.device),
                torch.zeros(own, dtype=torch.float32, device=weights.device),
            )

    @property
    def bytes_a_position(self) -> int:
        """Memory of one position of one sequence on this rank."""
        return 2 * self.keys.shape[0] * self.entries * self._groups * self._dim * self.keys.element_size()

    def entry(self, loop: int) -> int:
        """Where loop `loop` (1-based) is kept."""
        return loop - 1 if self.entries > 1 else 0

    def rows(self, loops: list[int], slots: list[int], positions: list[int]) -> Tensor:
        """Indices [n g] into a layer's keys seen as [entry slot g capacity, d], for n positions."""
        starts = [
            ((self.entry(loop) * self.slots + slot) * self._groups) * self.capacity + position
            for loop, slot, position in zip(loops, slots, positions, strict=True)
        ]
        device = self.keys.device
        return (torch.tensor(starts, device=device)[:, None] + self._heads).flatten()

    def write(self, layer: int, rows: Tensor, key_ngd: Tensor, value_ngd: Tensor) -> None:
        """Stores n positions at `rows`."""
        self.keys[layer].view(-1, self._dim).index_copy_(0, rows, key_ngd.reshape(-1, self._dim))
        self.values[layer].view(-1, self._dim).index_copy_(0, rows, value_ngd.reshape(-1, self._dim))

    def write_mean(self, layer: int, loop: int, rows: Tensor, key_ngd: Tensor, value_ngd: Tensor) -> None:
        """Brings the mean over loops at `rows` up to `loop`: for prompts, whose entries no loop reads back."""
        for buffer, new in ((self.keys, key_ngd), (self.values, value_ngd)):
            flat = buffer[layer].view(-1, self._dim)
            new = new.reshape(-1, self._dim)
            if loop > 1:
                old = flat.index_select(0, rows)
                new = old.float().lerp_(new.float(), 1.0 / loop).to(buffer.dtype)
            flat.index_copy_(0, rows, new)

    def note_own(self, layer: int, first: bool, slots: Tensor, key_ngd: Tensor, value_ngd: Tensor) -> None:
        """Keeps a token's own entry of this loop for `settle`: loop 1's, or the sum for the average."""
        assert self._own is not None
        for buffer, new in zip(self._own, (key_ngd, value_ngd), strict=True):
            if first:
                buffer[layer].index_copy_(0, slots, new.float())
            else:
                buffer[layer].index_add_(0, slots, new.float())

    def settle(self, slot: int, position: int, loops_run: int) -> None:
        """Gives a finished position its shared entry (policies `first` and `average`)."""
        if self._own is None:
            return
        scale = 1.0 / loops_run if self.policy == "average" else 1.0
        for buffer, own in zip((self.keys, self.values), self._own, strict=True):
            buffer[:, 0, slot, :, position] = (own[:, slot] * scale).to(buffer.dtype)

    def fill_deeper(self, slot: int, position: int, exit_loop: int) -> None:
        """Gives all loops after `exit_loop` that loop's keys and values at a position (policy `all`)."""
        for buffer in (self.keys, self.values):
            buffer[:, exit_loop:, slot, :, position] = buffer[:, exit_loop - 1 : exit_loop, slot, :, position]
