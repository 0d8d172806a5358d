"""What goes wrong in run number `seed`: drawn once, the same on every machine."""

import random
from dataclasses import dataclass, field
from typing import Literal

STEPS, EVERY, EVALUATE = 12, 3, 6
RANKS = 2
LAYOUTS = ("tensor", "pipeline", "data")

Kind = Literal[
    "kill", "term", "disk full", "not finite", "spike", "corrupt checkpoint", "corrupt data", "clock", "wandb gone",
    "slow rank", "frozen rank", "kill command",
]  # fmt: skip

STEP_PLACES = ("data", "forward", "backward", "optimizer")
SAVE_PLACES = ("save begins", "half-written file", "file written", "before state", "before marker", "after marker")
"""In the order they are passed."""
PLACES = (*STEP_PLACES, "evaluation", *SAVE_PLACES, "deletion of an old checkpoint", "start", "load")
RANK_ZERO_PLACES = ("before state", "before marker", "after marker", "deletion of an old checkpoint")

DAMAGES = ("flipped bit", "truncated", "file missing", "marker is garbage", "marker missing")

_WEIGHTS: dict[Kind, int] = {
    "kill": 34,
    "term": 12,
    "disk full": 6,
    "not finite": 6,
    "spike": 8,
    "corrupt checkpoint": 12,
    "corrupt data": 5,
    "clock": 4,
    "wandb gone": 4,
    "slow rank": 5,
    "frozen rank": 2,
    "kill command": 2,
}


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong in one attempt, on rank `rank`, at `place` of the first step from `step` on."""

    kind: Kind
    rank: int = 0
    step: int = 1
    place: str = "data"
    detail: str = ""


@dataclass(frozen=True)
class Case:
    """One run: the attempts' faults in order, then attempts without any until it is finished."""

    seed: int
    layout: str
    asynchronous: bool
    faults: list[Fault] = field(default_factory=list)
    bad_data: str = ""
    """"not finite" or "spike": in every attempt, and in the run it is compared with."""
    bad_sample: int = 0

    def __str__(self) -> str:
        faults = " then ".join(
            f"{fault.kind}{f' ({fault.detail})' if fault.detail else ''} at {fault.place}, step {fault.step}, "
            f"rank {fault.rank}"
            for fault in self.faults
        )
        saving = "async" if self.asynchronous else "sync"
        data = f"{self.bad_data} data, " if self.bad_data else ""
        return f"{self.layout}, {saving}: {data}{faults}"


def draw(seed: int) -> Case:
    """The case of a seed. Every kind comes up in proportion to its weight; a third of the cases have two faults."""
    generator = random.Random(f"ouro fault {seed}")
    kind = generator.choices(list(_WEIGHTS), weights=list(_WEIGHTS.values()))[0]
    layout, asynchronous = generator.choice(LAYOUTS), generator.random() < 0.5
    bad_data, bad_sample = "", 0
    if kind in ("not finite", "spike"):
        bad_data, bad_sample = kind, generator.randrange(5, STEPS - 3) * 4 + generator.randrange(4)
        first = _crash(generator, generator.choice(("kill", "term")))
    else:
        first = _fault(generator, kind)
    faults = [first]
    if first.kind in ("kill", "term") and generator.random() < 0.4:
        started_with = ("load",) if first.kind == "term" or first.step > EVERY + 2 else ()
        faults.append(_crash(generator, "kill", places=(*PLACES[:5], "start", *started_with)))
    return Case(seed, layout, asynchronous, faults, bad_data, bad_sample)


def _fault(generator: random.Random, kind: Kind) -> Fault:
    rank, step = generator.randrange(RANKS), generator.randrange(2, STEPS - 1)
    if kind in ("kill", "term"):
        return _crash(generator, kind)
    if kind == "corrupt checkpoint":  # late enough that there is an older one
        return Fault(
            kind, rank, generator.randrange(8, STEPS), generator.choice(STEP_PLACES), generator.choice(DAMAGES)
        )
    if kind == "disk full":
        return Fault(kind, rank, generator.randrange(2, STEPS - 3), "data")
    if kind == "corrupt data":
        return Fault(kind, rank, generator.randrange(2, STEPS - 4), "data")
    if kind == "clock":
        return Fault(kind, rank, step, generator.choice(STEP_PLACES), generator.choice(("+400000000", "-400000000")))
    if kind == "wandb gone":
        return Fault(kind, 0, step, "data")
    if kind == "slow rank":
        return Fault(kind, rank, step, generator.choice((*STEP_PLACES, "save begins")))
    if kind == "frozen rank":
        return Fault(kind, rank, step, generator.choice(STEP_PLACES))
    return Fault("kill command", rank, step, "any", generator.choice(("a rank", "the launcher")))


def _crash(generator: random.Random, kind: Kind, places: tuple[str, ...] = PLACES[:-2]) -> Fault:
    place = generator.choice(places)
    rank = 0 if place in RANK_ZERO_PLACES else generator.randrange(RANKS)
    step = generator.randrange(1, STEPS)
    if place in SAVE_PLACES:
        step = generator.randrange(1, STEPS - EVERY)
    elif place == "evaluation":
        step = generator.randrange(1, STEPS)
    elif place == "deletion of an old checkpoint":  # the first is due when the third one is complete
        step = generator.randrange(1, STEPS - 2)
    detail = "all ranks" if kind == "term" and generator.random() < 0.5 else ""
    return Fault(kind, rank, step, place, detail)
