"""Names the rank that holds up a job, from threads of each rank that neither stop training nor touch the GPU.

Every rank says every second or two where it is (`Beat`), over a connection of its own to the store that the ranks met
at. A rank that has stood still for almost `parallel.timeout_seconds` calls the roll: it reads what all others said,
decides who is at fault (`verdict`), reports it and lets the others leave quietly. A rank whose connections broke asks
in the same way who is gone.

Two threads: one looks at the main thread and keeps the time, the other talks to the store. When the store's host is the
process that froze, talking never returns, and the first thread ends this rank.
"""

import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from types import TracebackType

import torch.distributed as dist

from ouro_megatron.errors import AnotherRankFailed, OuroError, RankGone, TrainingError
from ouro_megatron.parallel.context import ParallelContext
from ouro_megatron.parallel.position import STEP_PHASES, Position
from ouro_megatron.parallel.verdict import Beat, gone, host_gone, is_consequence, verdict
from ouro_megatron.parallel.whereabouts import Place, place_of


class Pace:
    """The watchdog's times, all in seconds and derived from one: a verdict falls before `timeout` is over."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.interval = max(0.05, min(1.5, timeout / 60))
        """Between two beats."""
        self.silence = max(1.5 * self.interval + 0.5, min(1.0, timeout / 5))
        """A rank that says nothing for so long, during a roll call, is frozen or gone."""
        self.threshold = max(timeout / 4, timeout - self.silence - 3 * self.interval)
        """Standing still for so long is a stall."""
        self.lost = min(10.0, self.threshold)
        """The same once the store's host has closed its connections: it is gone."""


class Watchdog:
    """Runs in every rank of a job of several, as a context manager around the whole stage; idle for a single rank."""

    def __init__(
        self, context: ParallelContext, position: Position, timeout: float, report: Callable[[TrainingError], None]
    ) -> None:
        """`report` leaves an error where people see it; it is called from the watchdog's thread just before the end."""
        self._rank, self._world = context.rank, context.world_size
        self._position = position
        self._report = report
        self._who = context.describe_rank()
        self._cuda = not context.platform.is_cpu
        self._neighbours = _neighbours(context)
        self._main = threading.get_ident()
        self.pace = Pace(timeout)
        self.last_words: Callable[[str], None] = lambda message: None
        """Told why this process ends when its main thread cannot end it; rank 0 writes it into the metrics."""
        # torchrun keeps the store in its agent, which outlives the ranks and is used again when it restarts them.
        self._host = None if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0
        self._keys = f"ouro/watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._beat, self._stack = self._look(0)
        self._host_beat: Beat | None = None
        self._heard = time.monotonic()
        self._lost = False
        self._ended = ""
        self._question: threading.Event | None = None
        self._answer: OuroError | None = None
        self._explained: Exception | None = None
        self._stopped, self._woken, self._told = threading.Event(), threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "Watchdog":
        if self._world > 1 and "MASTER_ADDR" in os.environ:
            if self._rank == 0:
                _allow_connections(self._world)
            for work in (self._observe, self._talk):
                thread = threading.Thread(target=work, name=f"watchdog: {work.__name__}", daemon=True)
                self._threads.append(thread)
                thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._threads:
            return
        if isinstance(error, TrainingError) and error is self._explained:
            self._say(error)
        self._ended = "done" if error is None else "failed"
        self._woken.set()
        self._told.wait(2 * self.pace.silence)  # the thread that talks says so and ends
        self._stopped.set()

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Around work of the main thread: errors that only say that a connection broke are replaced by the cause."""
        try:
            yield
        except Exception as error:
            explained = self._explain(error)
            if explained is error:
                raise
            raise explained from error

    def _explain(self, error: Exception) -> Exception:
        """RankGone, which names who is gone, on one rank and AnotherRankFailed on the others; `error` if nobody is."""
        if not self._threads or self._stopped.is_set() or error is self._explained or not is_consequence(str(error)):
            return error
        self._question = threading.Event()
        self._woken.set()
        self._question.wait(3 * self.pace.silence + 8.0)
        if self._answer is None and self._lost:
            self._answer = self._without_host()
        self._explained = self._answer or error
        return self._explained

    # The thread that looks

    def _observe(self) -> None:
        last = time.monotonic()
        while not self._stopped.wait(self._wait_seconds()):
            now = time.monotonic()
            # A process that was suspended together with all others has not stalled: the time it could run counts.
            passed, last = min(now - last, 2 * self.pace.interval), now
            before, stack = self._beat, self._stack
            beat, self._stack = self._look(before.number + 1)
            if (beat.position, self._stack) == (before.position, stack):
                beat = replace(beat, still=before.still + passed)
            self._beat = beat
            # A roll call keeps the other thread busy for `silence` seconds; the host cannot be cut off from itself.
            unheard = self._rank != self._host and now - self._heard > 2 * self.pace.silence + 4 * self.pace.interval
            limit = self.pace.lost if self._lost else self.pace.threshold
            if (self._lost or unheard) and self._question is None and self._has_stalled(limit):
                self._leave(self._without_host())

    def _look(self, number: int) -> tuple[Beat, int]:
        try:
            place = place_of(self._main, self._neighbours, cuda=self._cuda)
        except Exception as error:  # the main thread goes on while its frames are read: the next look may be luckier
            place = Place(f"a place that cannot be read ({type(error).__name__})", False, number)
        return Beat(self._rank, self._who, number, str(self._position), place.text, place.waits), place.stack

    def _has_stalled(self, limit: float) -> bool:
        beat = self._beat
        return beat.still >= limit and (beat.waits or self._position.phase in STEP_PHASES)

    def _wait_seconds(self) -> float:
        near = self._beat.still > self.pace.threshold / 2
        return min(self.pace.interval, 0.25) if near else self.pace.interval

    # The thread that talks

    def _talk(self) -> None:
        connected = False
        try:
            while not self._ended and (
                not connected or listens(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
            ):
                try:
                    store = self._connect()
                    connected = True
                    self._converse(store)
                except RuntimeError:  # the connection broke, or there never was one
                    if not connected:
                        self._stopped.set()
                        print(f"{self._who}: no watchdog, the store cannot be reached", file=sys.stderr, flush=True)
                        return
            self._lost = not self._ended
        finally:
            if self._question is not None:
                self._question.set()
            self._told.set()

    def _connect(self) -> dist.TCPStore:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        patience = timedelta(seconds=max(5.0, self.pace.timeout))
        return dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=patience)

    def _converse(self, store: dist.TCPStore) -> None:
        while not self._ended:
            self._exchange(store)
            self._woken.wait(self._wait_seconds())
            self._woken.clear()
        self._say_goodbye(store)

    def _exchange(self, store: dist.TCPStore) -> None:
        self._publish(store)
        if store.check([self._key("verdict")]) and self._question is None:
            self._ended = "failed"
            self._say_goodbye(store)
            self._leave(None)
        host = self._host
        if host is not None and host != self._rank and store.check([self._key(host)]):
            self._host_beat = Beat.from_json(store.get(self._key(host)))
        self._heard = time.monotonic()
        if self._question is not None and not self._question.is_set():
            self._answer = self._who_is_gone(store)
            self._question.set()
        elif self._question is None and self._has_stalled(self.pace.threshold):
            self._judge(store)

    def _judge(self, store: dist.TCPStore) -> None:
        """The first rank to come calls the roll; should it die over that, another takes its place."""
        first = store.add(self._key("judge"), 1) == 1
        if not first and self._beat.still < self.pace.threshold + 4 * self.pace.silence:
            return
        beats, silent = self._roll_call(store)
        if not self._has_stalled(self.pace.threshold):
            store.delete_key(self._key("judge"))
            return
        error = TrainingError(verdict(beats, silent, self._world, self.pace.timeout))
        self._say(error)
        store.set(self._key("verdict"), "fallen")
        self._ended = "failed"
        self._say_goodbye(store)
        self._leave(error)

    def _who_is_gone(self, store: dist.TCPStore) -> OuroError | None:
        """The answer to a question of the main thread; None when nobody is gone and nobody failed."""
        if store.add(self._key("asked"), 1) > 1:
            deadline = time.monotonic() + 2 * self.pace.silence + 5.0
            while time.monotonic() < deadline and not store.check([self._key("verdict")]):
                time.sleep(0.05)
            return AnotherRankFailed()
        beats, silent = self._roll_call(store)
        if silent:
            return RankGone(gone(beats, silent), {rank: beats[rank].last_seen for rank in silent})
        return AnotherRankFailed() if any(beat.ended == "failed" for beat in beats.values()) else None

    def _roll_call(self, store: dist.TCPStore) -> tuple[dict[int, Beat], set[int]]:
        """What every rank says, and which ranks said nothing new for `silence` seconds."""
        before = self._read(store)
        time.sleep(self.pace.silence)
        self._publish(store)
        beats = self._read(store)
        silent = {
            rank
            for rank, beat in beats.items()
            if rank != self._rank and rank in before and before[rank].number == beat.number and not beat.ended
        }
        return beats, silent

    def _read(self, store: dist.TCPStore) -> dict[int, Beat]:
        keys = {rank: self._key(rank) for rank in range(self._world)}
        if not store.check(list(keys.values())):
            keys = {rank: key for rank, key in keys.items() if store.check([key])}
        values = store.multi_get(list(keys.values()))
        self._heard = time.monotonic()
        return {rank: Beat.from_json(value) for rank, value in zip(keys, values, strict=True)}

    def _publish(self, store: dist.TCPStore) -> None:
        store.set(self._key(self._rank), replace(self._beat, ended=self._ended).to_json())

    def _say_goodbye(self, store: dist.TCPStore) -> None:
        """The last word of this rank. After a failure the store's host stays until the others have read why."""
        self._publish(store)
        if self._ended == "failed" and self._explained is not None:
            store.set(self._key("verdict"), "explained")
        self._told.set()
        deadline = time.monotonic() + self.pace.silence + 0.5
        while self._ended == "failed" and self._rank == self._host and time.monotonic() < deadline:
            if all(beat.ended for beat in self._read(store).values()):
                break
            time.sleep(0.05)

    def _key(self, name: object) -> str:
        return f"{self._keys}/{name}"

    # The end

    def _without_host(self) -> TrainingError:
        """Nobody can call the roll or decides who speaks: rank 1 does, and the first rank of each other node."""
        if self._rank != 1 and os.environ.get("LOCAL_RANK", "0") != "0":
            return AnotherRankFailed()
        beat = self._host_beat if self._host is not None else None
        seen = {} if beat is None else {beat.rank: beat.last_seen}
        return RankGone(host_gone(beat, self._beat, lost=self._lost, timeout=self.pace.timeout), seen)

    def _say(self, error: TrainingError) -> None:
        error.reported = True
        self._report(error)

    def _leave(self, error: TrainingError | None) -> None:
        """Ends this process, whose main thread cannot. `error` None: another rank has said why."""
        if error is not None and not error.reported:
            self._say(error)
        self.last_words(str(error or AnotherRankFailed()))
        os._exit(TrainingError.exit_code)


def listens(address: str, port: int) -> bool:
    """Whether a process listens there and stays: what is just being ended may lose its connections before its port."""
    try:
        probe = socket.create_connection((address, port), timeout=3.0)
    except OSError:
        return False
    with probe:
        probe.settimeout(1.0)
        try:
            return probe.recv(1) != b""
        except TimeoutError:  # nothing was asked, so nothing is said; the connection stands
            return True
        except OSError:
            return False


def _neighbours(context: ParallelContext) -> dict[str, int]:
    if context.pipeline_size == 1:
        return {}
    ranks = dist.get_process_group_ranks(context.groups.pp)
    own = context.pipeline_rank
    return {"prev": ranks[own - 1], "next": ranks[(own + 1) % len(ranks)]}


def _allow_connections(world: int) -> None:
    """The store's host holds two connections a rank; a shell's usual limit of open files is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * world + 1024
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
