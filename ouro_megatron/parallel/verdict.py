"""Who holds up a run: from what every rank last said about itself to one message."""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass

_SHOWN = 4
_CONSEQUENCES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "communicator was aborted",
    "Timed out waiting",
    "another rank failed",
)


def is_consequence(message: str) -> bool:
    """Whether a rank's error only says that another one is gone, has failed or does not come."""
    return any(words in message for words in _CONSEQUENCES)


@dataclass(frozen=True)
class Beat:
    """A rank's word about itself."""

    rank: int
    who: str
    """ "rank 3 (tensor 1, pipeline 1, data 0)"."""
    number: int
    """Grows by one each time: a rank whose number stands still has no running process."""
    position: str
    place: str
    waits: bool
    """For other ranks, at `place`."""
    still: float = 0.0
    """Seconds since position or place changed."""
    ended: str = ""
    """ "done" or "failed": it will say nothing more."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Beat":
        return cls(**json.loads(text))

    @property
    def last_seen(self) -> str:
        return f"{self.position}, at {self.place}"


def verdict(beats: Mapping[int, Beat], silent: Collection[int], world: int, timeout: float) -> str:
    """The message that ends a run in which ranks have waited too long.

    `beats`: by rank; a rank without one never began. `silent`: ranks that no longer speak and did not say goodbye.
    At fault are, in this order: ranks that are silent or never began; ranks that wait for nobody; else all wait for
    each other.
    """
    missing = [rank for rank in range(world) if rank not in beats]
    waiting = [beat for beat in beats.values() if beat.waits and beat.rank not in silent and not beat.ended]
    lines = [f"rank {rank} never began: its process or node is gone" for rank in missing]
    lines += [
        f"{beats[rank].who} does not answer: frozen, killed or cut off; last seen in {beats[rank].last_seen}"
        for rank in sorted(silent)
    ]
    if not lines:
        busy = [beat for beat in beats.values() if not beat.waits and not beat.ended]
        busy.sort(key=lambda beat: -beat.still)
        lines = [f"{beat.who} does not go on: for {beat.still:.0f} s in {beat.last_seen}" for beat in busy]
    if not lines:
        lines = ["all ranks wait for each other"]
    if len(lines) > _SHOWN:
        lines = [*lines[:_SHOWN], f"and {len(lines) - _SHOWN} ranks more"]
    return "; ".join(lines) + _waiters(waiting, timeout) + ". Start the run again to go on from its last checkpoint"


def _waiters(waiting: list[Beat], timeout: float) -> str:
    """Who waits where, one example of each place."""
    if not waiting:
        return f" (parallel.timeout_seconds={timeout:g})"
    longest = max(beat.still for beat in waiting)
    places: dict[str, list[Beat]] = {}
    for beat in sorted(waiting, key=lambda beat: beat.rank):
        places.setdefault(beat.place.partition(" over ranks ")[0], []).append(beat)
    shown = [
        f"{group[0].who} in {group[0].place}, {group[0].position}"
        + (f" (and {len(group) - 1} more)" * (len(group) > 1))
        for group in sorted(places.values(), key=len, reverse=True)[:_SHOWN]
    ]
    ranks = f"{len(waiting)} rank{'s' if len(waiting) > 1 else ''}"
    return f". {ranks} waited up to {longest:.0f} s (parallel.timeout_seconds={timeout:g}): " + "; ".join(shown)


def gone(beats: Mapping[int, Beat], silent: Collection[int]) -> str:
    """The message when connections broke because ranks are gone; empty when all are still there or said why."""
    lines = [
        f"{beats[rank].who} is gone: killed, or its node failed; last seen in {beats[rank].last_seen}"
        for rank in sorted(silent)
    ]
    if len(lines) > _SHOWN:
        lines = [*lines[:_SHOWN], f"and {len(lines) - _SHOWN} ranks more"]
    return "; ".join(lines) + ". Start the run again to go on from its last checkpoint" if lines else ""


def host_gone(host: Beat | None, own: Beat, *, lost: bool, timeout: float) -> str:
    """The message when the store's host no longer answers. `lost`: it closed its connections, as a dead process does.

    `host` is what it said last; None when it never did, or when the store is kept by torchrun and not by a rank.
    """
    who = host.who if host else "the store that the ranks met at (MASTER_ADDR)"
    state = "is gone: killed, or its node failed" if lost else "does not answer: frozen or cut off"
    seen = f"; last seen in {host.last_seen}" if host else ""
    return (
        f"{who} {state}{seen}. {own.who} waited {own.still:.0f} s (parallel.timeout_seconds={timeout:g}) in "
        f"{own.place}, {own.position}. Start the run again to go on from its last checkpoint"
    )
