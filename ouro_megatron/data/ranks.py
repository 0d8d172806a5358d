"""Work that one rank does for all: a failure on any rank ends all of them with the same message, none waits for ever.

All functions are collective over the default process group and plain calls without one.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from ouro_megatron.errors import DataError, OuroError

T = TypeVar("T")


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def from_rank_zero(work: Callable[[], T]) -> T:
    """Rank 0's result of `work`, on every rank (it is pickled).

    When rank 0 fails, raises its OuroError everywhere; any other error as DataError.
    """
    if world_size() == 1:
        return work()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = work()
        except Exception as error:
            kind = type(error) if isinstance(error, OuroError) else DataError
            box[1] = (kind, _describe(error))
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        kind, message = box[1]
        raise kind(message)
    return box[0]


def on_rank_zero(work: Callable[[], object]) -> None:
    """Runs `work` on rank 0 while the others wait. Raises everywhere when it fails, as `from_rank_zero` does."""

    def run() -> None:
        work()

    from_rank_zero(run)


def agree(work: Callable[[], T], doing: str) -> T:
    """Runs `work` on every rank. Raises DataError everywhere, naming the ranks and `doing`, when it fails on any."""
    if world_size() == 1:
        return work()
    result: T | None = None
    message: str | None = None
    try:
        result = work()
    except Exception as error:
        message = _describe(error)
    messages: list[str | None] = [None] * world_size()
    dist.all_gather_object(messages, message)
    failed = {rank: text for rank, text in enumerate(messages) if text is not None}
    if failed:
        rank, text = next(iter(failed.items()))
        raise DataError(
            f"rank {rank}: {doing} failed: {text} ({len(failed)} of {len(messages)} ranks failed; "
            "is data.cache on a file system that every node sees?)"
        )
    return result  # type: ignore[return-value]


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, OuroError) else f"{type(error).__name__}: {error}"
