"""What a rank sends to whom, in order, recorded while it runs on the meta device; and whether ranks agree about it."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ouro_megatron.parallel.shape_cache import ShapeCache


class Call(NamedTuple):
    """One collective operation or message."""

    operation: str
    """Name of the c10d operation, such as "allreduce_" or "send"."""
    ranks: tuple[int, ...]
    """Global ranks of the group."""
    tensors: tuple[tuple[int, str], ...]
    """(elements, dtype) of each tensor."""
    peer: int | None = None
    """Global rank at the other end of a message."""


class CollectiveLog(TorchDispatchMode):
    """Records collectives and lets a fake process group answer them with nothing, so that shapes alone flow."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._run = ShapeCache()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here; to say so again in each of 100,000 calls would take a tenth of the time."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "c10d":
            return self._run(func, args, kwargs or {})
        self.calls.append(_describe(func._schema.name.removeprefix("c10d::"), args))
        # The fake group ignores contents; nothing must be allocated for them.
        empty = tree_map_only(torch.Tensor, lambda tensor: torch.empty(0, dtype=tensor.dtype, device="cpu"), args)
        return func(*empty, **(kwargs or {}))


def _describe(operation: str, args: Sequence[Any]) -> Call:
    groups = [leaf for leaf in tree_leaves(list(args)) if isinstance(leaf, torch.ScriptObject)]
    ranks = next((_ranks_of(group) for group in groups if _ranks_of(group)), ())
    tensors = tuple(
        (leaf.numel(), str(leaf.dtype).removeprefix("torch."))
        for leaf in tree_leaves(list(args))
        if isinstance(leaf, torch.Tensor)
    )
    peer = ranks[args[2]] if operation in ("send", "recv_") else None
    return Call(operation, ranks, tensors, peer)


def _ranks_of(boxed: torch.ScriptObject) -> tuple[int, ...]:
    try:
        return tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(boxed)))
    except RuntimeError:  # a reduction operator, boxed like a group
        return ()


def disagreements(logs: Mapping[int, Sequence[Call]]) -> list[str]:
    """`logs`: calls by global rank. One line for each group and pair of ranks whose calls do not fit together."""
    return [*_collectives(logs), *_messages(logs)]


def _collectives(logs: Mapping[int, Sequence[Call]]) -> Iterator[str]:
    """Members of a group must issue the same operations on the same shapes in the same order."""
    by_group: dict[tuple[int, ...], dict[int, list[Call]]] = defaultdict(dict)
    for rank, calls in logs.items():
        for call in calls:
            if call.peer is None:
                by_group[call.ranks].setdefault(rank, []).append(call)
    for ranks, members in by_group.items():
        present = sorted(rank for rank in logs if rank in ranks)
        first = present[0]
        for rank in present[1:]:
            yield from _first_difference(
                f"group of {len(ranks)} ranks ({_short(ranks)})",
                first,
                members.get(first, []),
                rank,
                members.get(rank, []),
            )


def _messages(logs: Mapping[int, Sequence[Call]]) -> Iterator[str]:
    """What one rank sends to another, that one must receive: the same shapes in the same order."""
    for sender, calls in logs.items():
        receivers = {call.peer for call in calls if call.operation == "send" and call.peer is not None}
        for receiver in sorted(receivers & set(logs)):
            sent = [call.tensors for call in calls if call.operation == "send" and call.peer == receiver]
            received = [call.tensors for call in logs[receiver] if call.operation == "recv_" and call.peer == sender]
            if sent != received:
                yield (
                    f"rank {sender} sends rank {receiver} {len(sent)} messages, it receives {len(received)}"
                    if len(sent) != len(received)
                    else f"rank {sender} and rank {receiver} disagree about the shape of message "
                    f"{next(i for i, pair in enumerate(zip(sent, received, strict=True)) if pair[0] != pair[1]) + 1}"
                )


def _first_difference(
    where: str, left: int, left_calls: list[Call], right: int, right_calls: list[Call]
) -> Iterator[str]:
    for number, (a, b) in enumerate(zip(left_calls, right_calls, strict=False), start=1):
        if a != b:
            yield (
                f"{where}: call {number} is {a.operation} {list(a.tensors)} on rank {left} "
                f"and {b.operation} {list(b.tensors)} on rank {right}"
            )
            return
    if len(left_calls) != len(right_calls):
        yield f"{where}: rank {left} makes {len(left_calls)} calls, rank {right} {len(right_calls)}"


def _short(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks)) if len(ranks) <= 8 else f"{ranks[0]}, {ranks[1]}, .. {ranks[-1]}"
