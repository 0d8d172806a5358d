"""How unevenly the ranks work: gathered with the question about stop signals, so it costs no message of its own."""

import torch
import torch.distributed as dist

from ouro_megatron.parallel.context import ParallelContext
from ouro_megatron.telemetry.records import RankSpread
from ouro_megatron.telemetry.sink import Sinks
from ouro_megatron.training.trainer import StepOutcome, Trainer

_RANK_BITS = 20
_NOTHING = -(1 << 62)


def ask_ranks(context: ParallelContext, stop: bool, busy_seconds: float) -> tuple[bool, RankSpread]:
    """Whether any rank wants to stop, and the spread of `busy_seconds`. All ranks call it and get the same answer.

    One reduction of 1 + 2 x pipeline integers. Each holds microseconds and, in its lowest bits, a rank: the largest of
    them says which rank was slowest. Ranks are compared with those of the same pipeline position, as only these do the
    same work.
    """
    microseconds = min(int(busy_seconds * 1e6), 1 << 40)
    values = [_NOTHING] * (1 + 2 * context.pipeline_size)
    values[0] = int(stop)
    values[1 + 2 * context.pipeline_rank] = microseconds << _RANK_BITS | context.rank
    values[2 + 2 * context.pipeline_rank] = -(microseconds << _RANK_BITS | context.rank)
    if context.world_size > 1:
        tensor = torch.tensor(values, dtype=torch.int64, device=context.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        values = tensor.tolist()
    return bool(values[0]), _spread(values[1::2], [-value for value in values[2::2]])


def _spread(slowest: list[int], fastest: list[int]) -> RankSpread:
    """Both by pipeline position: microseconds and rank in one number."""

    def seconds(value: int) -> float:
        return (value >> _RANK_BITS) / 1e6

    def rank(value: int) -> int:
        return value & ((1 << _RANK_BITS) - 1)

    ratios = [
        seconds(high) / seconds(low) if seconds(low) > 0 else 1.0 for high, low in zip(slowest, fastest, strict=True)
    ]
    worst = max(range(len(ratios)), key=lambda position: ratios[position])
    return RankSpread(
        fastest_seconds=seconds(min(fastest)),
        slowest_seconds=seconds(max(slowest)),
        slowest_rank=rank(max(slowest)),
        straggler_rank=rank(slowest[worst]),
        straggler_ratio=ratios[worst],
        straggler_excess=seconds(slowest[worst]) - seconds(fastest[worst]),
    )


class Stragglers:
    """A callback: warns when the same rank is much slower than its equals for several steps on end."""

    RATIO = 1.5
    EXCESS_SECONDS = 0.05
    STEPS = 10

    def __init__(self, sinks: Sinks | None) -> None:
        self._sinks = sinks
        self._rank: int | None = None
        self._row = 0

    def start(self, trainer: Trainer) -> None:
        pass

    def after_step(self, trainer: Trainer, outcome: StepOutcome) -> None:
        spread = trainer.spread
        if self._sinks is None or spread is None:
            return
        slow = spread.straggler_ratio >= self.RATIO and spread.straggler_excess >= self.EXCESS_SECONDS
        self._row = self._row + 1 if slow and self._rank in (None, spread.straggler_rank) else int(slow)
        self._rank = spread.straggler_rank if slow else None
        if self._row == self.STEPS:
            self._sinks.notify(
                "warning",
                f"rank {spread.straggler_rank} was the slowest of its equals in {self.STEPS} steps on end, lately by "
                f"{spread.straggler_ratio:.1f} x ({spread.straggler_excess:.2f} s a step), and all others wait for it: "
                "look at its GPU's clock and temperature, its node's other processes, and its path to the data",
            )

    def finish(self, trainer: Trainer) -> None:
        pass
