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
    """[layer, entry, slot, 2, g, capacity, d]: keys, then values; a slot is one sequence's. Entries are loops, or one
    shared. New keys and values come as [n, 2g, d], as the fused product leaves them."""

    def __init__(self, weights: ModelWeights, policy: CachePolicy, loops: int, slots: int, capacity: int) -> None:
        self.policy = policy
        self.loops, self.slots, self.capacity = loops, slots, capacity
        self.entries = loops if policy == "all" else 1
        layers, groups, dim = len(weights.layers), weights.groups, weights.head_dim
        # Finite everywhere: where a batch is padded, weight 0 times garbage could be NaN. On a CPU these are pages of
        # zeros from the system, which take no memory until a position reaches them.
        shape = (layers, self.entries, slots, 2, groups, capacity, dim)
        self._buffer = torch.zeros(shape, dtype=weights.dtype, device=weights.device)
        self._rows_by_layer = [layer.view(-1, dim) for layer in self._buffer]
        self._groups, self._dim = groups, dim
        self._pairs = torch.arange(2 * groups, device=weights.device) * capacity
        self._own: Tensor | None = None
        if policy in ("first", "average"):
            # The entry of the token under way: the cache itself holds what it attends to at the current loop.
            self._own = torch.zeros(layers, slots, 2 * groups, dim, dtype=torch.float32, device=weights.device)

    @property
    def device(self) -> torch.device:
        return self._buffer.device

    @property
    def bytes_a_position(self) -> int:
        """Memory of one position of one sequence on this rank."""
        return 2 * self._buffer.shape[0] * self.entries * self._groups * self._dim * self._buffer.element_size()

    def entry(self, loop: int) -> int:
        """Where loop `loop` (1-based) is kept."""
        return loop - 1 if self.entries > 1 else 0

    def rows(self, loops: list[int], slots: list[int], positions: list[int]) -> Tensor:
        """Indices [n 2g] into a layer seen as [entry slot 2 g capacity, d], for n positions."""
        starts = [
            (self.entry(loop) * self.slots + slot) * 2 * self._groups * self.capacity + position
            for loop, slot, position in zip(loops, slots, positions, strict=True)
        ]
        return (torch.tensor(starts, device=self.device)[:, None] + self._pairs).flatten()

    def view(self, layer: int, entry: int, slot: int, slots: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values [slots, g, length, d] of neighbouring slots from `slot` on. One call each: this is done in
        every layer of every visit, and slicing five dimensions takes three times as long."""
        head = self.capacity * self._dim
        half = self._groups * head
        size, stride = (slots, self._groups, length, self._dim), (2 * half, head, self._dim, 1)
        start = ((layer * self.entries + entry) * self.slots + slot) * 2 * half
        return self._buffer.as_strided(size, stride, start), self._buffer.as_strided(size, stride, start + half)

    def write(self, layer: int, rows: Tensor, kv_npd: Tensor) -> None:
        """Stores n positions at `rows`."""
        self._rows_by_layer[layer].index_copy_(0, rows, kv_npd.reshape(-1, self._dim))

    def write_mean(self, layer: int, loop: int, rows: Tensor, kv_npd: Tensor) -> None:
        """Brings the mean over loops at `rows` up to `loop`: for prompts, whose entries no loop reads back."""
        flat, new = self._rows_by_layer[layer], kv_npd.reshape(-1, self._dim)
        if loop > 1:
            new = flat.index_select(0, rows).float().lerp_(new.float(), 1.0 / loop).to(flat.dtype)
        flat.index_copy_(0, rows, new)

    def note_own(self, layer: int, first: bool, slots: Tensor, kv_npd: Tensor) -> None:
        """Keeps a token's own entry of this loop for `settle`: loop 1's, or the sum for the average."""
        assert self._own is not None
        if first:
            self._own[layer].index_copy_(0, slots, kv_npd.float())
        else:
            self._own[layer].index_add_(0, slots, kv_npd.float())

    def settle(self, slot: int, position: int, loops_run: int) -> None:
        """Gives a finished position its shared entry (policies `first` and `average`)."""
        if self._own is None:
            return
        scale = 1.0 / loops_run if self.policy == "average" else 1.0
        own = (self._own[:, slot] * scale).to(self._buffer.dtype)
        self._buffer[:, 0, slot, :, :, position] = own.view(-1, 2, self._groups, self._dim)

    def fill_deeper(self, slot: int, position: int, exit_loop: int) -> None:
        """Gives all loops after `exit_loop` that loop's keys and values at a position (policy `all`)."""
        kept = self._buffer[:, exit_loop - 1 : exit_loop, slot, :, :, position]
        self._buffer[:, exit_loop:, slot, :, :, position] = kept
