"""An engine in a thread of its own: requests from any thread, events to each request's own receiver."""

import itertools
import queue
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from ouro_megatron.errors import InferenceError, OuroError
from ouro_megatron.inference.engine import Engine
from ouro_megatron.inference.ranks import IDLE_SECONDS, Leader
from ouro_megatron.inference.request import Event, Finished, Request

Receiver = Callable[[Event], None]
"""Called in the engine's thread; must not block."""


class Busy(InferenceError):
    """As many requests as are allowed are waiting or running."""


@dataclass(frozen=True)
class _Submit:
    ticket: int
    request: Request
    receiver: Receiver


@dataclass(frozen=True)
class _Cancel:
    ticket: int


class EngineService:
    """Start with `with`; leaving ends all requests that are still open as cancelled."""

    def __init__(self, engine: Engine, leader: Leader, *, limit: int = 64) -> None:
        """`limit`: most requests open at one time."""
        self._engine, self._leader, self._limit = engine, leader, limit
        self._commands: queue.SimpleQueue[_Submit | _Cancel | None] = queue.SimpleQueue()
        self._tickets = itertools.count(1)
        self._lock = threading.Lock()
        self._open = 0
        self._receivers: dict[int, tuple[int, Receiver]] = {}
        """Engine's id -> (ticket, receiver). The engine's thread only."""
        self._ids: dict[int, int] = {}
        """Ticket -> engine's id. The engine's thread only."""
        self.failure: str | None = None
        """Why no more requests are served; None while all is well."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def __enter__(self) -> "EngineService":
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._commands.put(None)
        self._thread.join()

    @property
    def open(self) -> int:
        """Requests that wait or run."""
        return self._open

    @property
    def engine(self) -> Engine:
        return self._engine

    def submit(self, requests: list[tuple[Request, Receiver]]) -> list[int]:
        """Queues requests, all or none; returns their tickets.

        Raises RequestError for one that cannot be served, Busy when there is no room for all, InferenceError when the
        engine has failed. Each receiver gets events until one has `finished`.
        """
        for request, _ in requests:
            self._engine.check(request)
        with self._lock:
            if self.failure is not None:
                raise InferenceError(self.failure)
            if self._open + len(requests) > self._limit:
                raise Busy(
                    f"{self._open} requests are under way and at most {self._limit} are allowed: try again later"
                )
            self._open += len(requests)
            commands = [_Submit(next(self._tickets), request, receiver) for request, receiver in requests]
            for command in commands:
                self._commands.put(command)
        return [command.ticket for command in commands]

    def cancel(self, ticket: int) -> None:
        """Ends a request; one that is over already stays as it was."""
        self._commands.put(_Cancel(ticket))

    def _run(self) -> None:
        try:
            while self._obey():
                for event in self._engine.step():
                    self._deliver(event)
            self._close("the engine has stopped", Finished("cancelled"))
        except OuroError as error:
            self._close(str(error), Finished("error", message=str(error)))
        except Exception:
            message = f"the engine failed:\n{traceback.format_exc()}"
            self._close(message, Finished("error", message=message))

    def _obey(self) -> bool:
        """Takes all commands there are, waiting for one when there is nothing to run; False at the end."""
        while True:
            idle = self._engine.unfinished == 0
            try:
                command = self._commands.get(timeout=IDLE_SECONDS) if idle else self._commands.get_nowait()
            except queue.Empty:
                if not idle:
                    return True
                self._leader.idle()
                continue
            if command is None:
                return False
            if isinstance(command, _Submit):
                request_id = self._engine.submit(command.request)
                self._receivers[request_id] = (command.ticket, command.receiver)
                self._ids[command.ticket] = request_id
            elif command.ticket in self._ids:
                event = self._engine.cancel(self._ids[command.ticket])
                if event is not None:
                    self._deliver(event)

    def _deliver(self, event: Event) -> None:
        ticket, receiver = self._receivers[event.request_id]
        if event.finished is not None:
            del self._receivers[event.request_id], self._ids[ticket]
            with self._lock:
                self._open -= 1
        receiver(event)

    def _close(self, failure: str, last: Finished) -> None:
        """Refuses what comes from now on and ends what is open."""
        with self._lock:
            self.failure = failure
        for request_id in list(self._receivers):
            self._deliver(Event(request_id, finished=last))
        while not self._commands.empty():
            command = self._commands.get()
            if isinstance(command, _Submit):
                with self._lock:
                    self._open -= 1
                command.receiver(Event(command.ticket, finished=last))
