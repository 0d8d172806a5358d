"""What the watchdog sees of a thread, and whom it finds at fault."""

import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FunctionType

import pytest

from ouro_megatron.parallel.position import Position
from ouro_megatron.parallel.verdict import Beat, gone, host_gone, is_consequence, verdict
from ouro_megatron.parallel.watchdog import Pace, listens
from ouro_megatron.parallel.whereabouts import Place, place_of
from tests.distributed.ranks import run_ranks


def beat(rank: int, *, waits: bool = False, place: str = "", still: float = 5.0, ended: str = "") -> Beat:
    place = place or ("all_reduce of 4 float32 over ranks 0, 1, 2" if waits else "run_layers (looplm.py:9)")
    return Beat(
        rank,
        f"rank {rank} (tensor 0, pipeline 0, data {rank})",
        7,
        "stage s, step 3, reading data",
        place,
        waits,
        still,
        ended,
    )


def test_a_silent_rank_is_at_fault_even_when_it_last_waited() -> None:
    said = verdict({rank: beat(rank, waits=True) for rank in range(3)}, {1}, 3, 5.0)
    assert said.startswith(
        "rank 1 (tensor 0, pipeline 0, data 1) does not answer: frozen, killed or cut off; last seen in"
    )
    assert "stage s, step 3, reading data, at all_reduce of 4 float32 over ranks 0, 1, 2" in said
    assert (
        "2 ranks waited up to 5 s (parallel.timeout_seconds=5): rank 0 (tensor 0, pipeline 0, data 0) in all_reduce"
        in said
    )
    assert "(and 1 more)" in said


def test_who_waits_for_nobody_is_at_fault_the_longest_first() -> None:
    beats = {0: beat(0, waits=True), 1: beat(1, still=4), 2: beat(2, still=9)}
    said = verdict(beats, set(), 3, 5.0)
    assert said.startswith("rank 2 (tensor 0, pipeline 0, data 2) does not go on: for 9 s in stage s, step 3")
    assert said.index("rank 2 ") < said.index("rank 1 ") < said.index("rank 0 ")


def test_all_wait_for_each_other() -> None:
    beats = {0: beat(0, waits=True), 1: beat(1, waits=True, place="message from rank 0 in recv_forward (p2p.py:1)")}
    said = verdict(beats, set(), 2, 5.0)
    assert said.startswith("all ranks wait for each other. 2 ranks waited")
    assert "all_reduce" in said and "message from rank 0" in said


def test_a_rank_that_never_began_and_one_that_is_done() -> None:
    said = verdict({0: beat(0, waits=True), 2: beat(2, ended="done")}, set(), 3, 5.0)
    assert said.startswith("rank 1 never began") and "rank 2" not in said.partition(" over ranks ")[0]


def test_a_thousand_ranks_make_a_short_message() -> None:
    beats = {rank: beat(rank, waits=True) for rank in range(1024)}
    assert len(verdict(beats, set(range(1024)) - {0}, 1024, 600.0)) < 1500
    assert len(verdict(beats, {5}, 1024, 600.0)) < 1000


def test_messages_of_dead_ranks() -> None:
    assert gone({0: beat(0), 1: beat(1)}, {1}).startswith("rank 1 (tensor 0, pipeline 0, data 1) is gone: killed")
    assert gone({0: beat(0)}, set()) == ""
    said = host_gone(beat(0), beat(1, waits=True), lost=False, timeout=5.0)
    assert said.startswith("rank 0 (tensor 0, pipeline 0, data 0) does not answer") and "rank 1 (" in said
    assert "MASTER_ADDR" in host_gone(None, beat(1), lost=True, timeout=5.0)


def test_beats_survive_the_store() -> None:
    assert Beat.from_json(beat(3, waits=True).to_json()) == beat(3, waits=True)


@pytest.mark.parametrize("timeout", [1.0, 5.0, 60.0, 600.0, 3600.0])
def test_a_verdict_falls_before_the_timeout(timeout: float) -> None:
    pace = Pace(timeout)
    assert timeout / 4 <= pace.threshold and pace.threshold + pace.silence + 2 * pace.interval <= timeout
    assert pace.silence > pace.interval


@pytest.mark.parametrize(
    "message",
    ["Connection closed by peer [127.0.0.1]:1", "rank 1 could not save x: another rank failed", "Broken pipe"],
)
def test_consequences(message: str) -> None:
    assert is_consequence(message) and not is_consequence("CUDA out of memory")


def test_position_names_the_task() -> None:
    position = Position(stage="s", step=2)
    position.enter("forward and backward")
    assert str(position) == "stage s, step 2, forward and backward"
    position.task, position.loop, position.microbatch = "backward", 0, 4
    assert str(position) == "stage s, step 2, forward and backward, backward of all loops, microbatch 4"
    position.phase = "optimizer step"
    assert str(position) == "stage s, step 2, optimizer step"


def seen_while(work: Callable[[], None], peers: dict[str, int]) -> Place:
    """Where this thread is while it does `work`, seen from a thread half a second later."""
    places: list[Place] = []
    main = threading.get_ident()
    timer = threading.Timer(0.5, lambda: places.append(place_of(main, peers)))
    timer.start()
    work()
    timer.join()
    return places[0]


def waits() -> list[tuple[str, bool]]:
    """On rank 0 of two: what is seen while it waits for the other, which comes a second later each time."""
    import time

    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()

    def reduce_all() -> None:
        dist.all_reduce(torch.zeros(1234))

    def receive() -> None:
        if rank == 0:
            dist.recv(torch.zeros(2), src=1)
        else:
            dist.send(torch.zeros(2), dst=0)

    def think() -> None:
        if rank == 0:
            deadline = time.monotonic() + 1.0
            while time.monotonic() < deadline:
                pass

    seen = []
    for work in (reduce_all, receive, think):
        if rank == 0:
            place = seen_while(work, {})
            seen.append((place.text, place.waits))
        else:
            time.sleep(1.0)
            work()
        dist.barrier()
    dist.destroy_process_group()
    return seen


@pytest.mark.distributed
def test_places() -> None:
    (reduce, one), (receive, two), (think, three) = run_ranks(waits, 2)[0]
    assert (
        reduce.startswith("all_reduce of 1,234 float32 over ranks 0, 1, called by reduce_all (test_watchdog.py:")
        and one
    )
    assert receive.startswith("recv of 2 float32 from rank 1 over ranks 0, 1, called by receive (") and two
    assert think.startswith("think (test_watchdog.py:") and not three


@pytest.mark.parametrize("stays", [True, False])
def test_a_port_that_is_about_to_close_does_not_listen(stays: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # nobody accepts: the kernel connects all the same
        port = server.getsockname()[1]
        closing = threading.Timer(0.2, server.close)
        if not stays:
            closing.start()
        assert listens("127.0.0.1", port) == stays
    closing.cancel()
    assert not listens("127.0.0.1", port)


def test_an_instruction_that_belongs_to_no_line() -> None:
    """Python says None for its line, while a module is imported for example; a watchdog must survive that."""

    def nap() -> None:
        time.sleep(1.0)

    lineless = FunctionType(nap.__code__.replace(co_linetable=b""), globals())
    seen: list[int | None] = []
    main = threading.get_ident()
    looking = threading.Timer(0.25, lambda: seen.append(sys._current_frames()[main].f_lineno))
    looking.start()
    place = seen_while(lineless, {})
    assert seen == [None]
    assert place.text == f"nap (test_watchdog.py:{nap.__code__.co_firstlineno})" and not place.waits
