"""Which tokens of a sequence a context-parallel rank holds: two slices that balance causal attention.

A sequence is cut into 2 c equal slices for c ranks; rank r holds slice r and slice 2 c - 1 - r. A late token looks at
more keys than an early one, so every pair costs the same (the order that Megatron-Core and Transformer Engine use).
"""

import torch
from torch import Tensor


def slice_numbers(rank: int, size: int) -> tuple[int, int]:
    """The two slices, of 2 `size`, that context-parallel rank `rank` holds, in order."""
    return rank, 2 * size - 1 - rank


def own_positions(length: int, rank: int, size: int) -> Tensor:
    """int64 [length / size], on the CPU: this rank's positions in a sequence of `length`, a multiple of 2 `size`."""
    if size == 1:
        return torch.arange(length, device="cpu")
    each = length // (2 * size)
    begins = [number * each for number in slice_numbers(rank, size)]
    return torch.cat([torch.arange(begin, begin + each, device="cpu") for begin in begins])


def own_tokens(whole_bs: Tensor, rank: int, size: int) -> Tensor:
    """This rank's part of [b, s] as [b, s / size]; the whole, not copied, for one rank."""
    if size == 1:
        return whole_bs
    first, second = slice_numbers(rank, size)
    slices = whole_bs.chunk(2 * size, dim=1)
    return torch.cat((slices[first], slices[second]), dim=1)


def places_in_gathered(length: int, size: int) -> Tensor:
    """Where each token of a sequence lies when the ranks' parts are laid end to end: int64 [length], on the CPU."""
    gathered = torch.cat([own_positions(length, rank, size) for rank in range(size)])
    places = torch.empty_like(gathered)
    places[gathered] = torch.arange(length, device="cpu")
    return places
