"""Worker processes that are known by the item each works on, so that one that dies is named and nothing hangs.

A `ProcessPoolExecutor` breaks as a whole when one process dies and does not say over which item.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Generic, TypeVar

from ouro_megatron.errors import DataError, OuroError

Item = TypeVar("Item")
Result = TypeVar("Result")

Pulse = Callable[["Work"], None]
"""A worker's report on the item it works on."""


@dataclass(frozen=True)
class Work:
    """What was done of one item so far."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0


@dataclass(frozen=True)
class Begun(Generic[Item]):
    worker: int
    item: Item


@dataclass(frozen=True)
class Pulsed(Generic[Item]):
    worker: int
    item: Item
    work: Work


@dataclass(frozen=True)
class Done(Generic[Item, Result]):
    worker: int
    item: Item
    result: Result


@dataclass(frozen=True)
class Failed(Generic[Item]):
    """An item that could not be finished: its worker died, or raised something nobody foresaw."""

    worker: int
    item: Item
    reason: str
    died: bool


Event = Begun[Item] | Pulsed[Item] | Done[Item, Result] | Failed[Item]


def run(
    function: Callable[[Item, Pulse], Result], items: Sequence[Item], workers: int
) -> Generator[Event[Item, Result], None, None]:
    """Events of `function(item, pulse)` for all items, in the order they happen, `workers` items at a time.

    One worker means this process. An OuroError or a full disk ends it at once by being raised here; a worker that dies
    is replaced, and its item comes as `Failed`. Closing the iterator stops the workers.
    """
    if workers <= 1:
        yield from _run_here(function, items)
        return
    with contextlib.ExitStack() as stack:
        crew = _Crew(function, items)
        stack.callback(crew.stop)
        for number in range(min(workers, len(items))):
            crew.start(number)
            yield from crew.give(number)
        while crew.busy:
            yield from crew.listen()


def _run_here(function: Callable[[Item, Pulse], Result], items: Sequence[Item]) -> Iterator[Event[Item, Result]]:
    for item in items:
        yield Begun(0, item)
        try:
            result = function(item, _ignore)
        except (OuroError, OSError, KeyboardInterrupt):
            raise
        except Exception as error:
            yield Failed(0, item, _describe(error), died=False)
        else:
            yield Done(0, item, result)


def _ignore(work: Work) -> None:
    """In one process nobody could look at it in between."""


class _Crew(Generic[Item, Result]):
    def __init__(self, function: Callable[[Item, Pulse], Result], items: Sequence[Item]) -> None:
        # Spawned, not forked: the tokenizer's threads of this process would be lost in a fork.
        self._context = multiprocessing.get_context("spawn")
        self._function = function
        self._waiting = list(reversed(items))
        self._processes: dict[int, tuple[SpawnProcess, Connection]] = {}
        self.busy: dict[int, Item] = {}

    def start(self, number: int) -> None:
        here, there = self._context.Pipe()
        process = self._context.Process(target=_work, args=(self._function, there), daemon=True)
        process.start()
        there.close()
        self._processes[number] = (process, here)

    def give(self, number: int) -> Iterator[Event[Item, Result]]:
        """The next item to a free worker; sends it home when there is none."""
        _, connection = self._processes[number]
        # A worker that died while it was free is found out when it is listened to.
        with contextlib.suppress(OSError):
            connection.send(self._waiting[-1] if self._waiting else None)
        if self._waiting:
            self.busy[number] = self._waiting.pop()
            yield Begun(number, self.busy[number])

    def listen(self) -> Iterator[Event[Item, Result]]:
        of = {id(self._processes[number][1]): number for number in self.busy}
        for connection in wait([self._processes[number][1] for number in self.busy]):
            number = of[id(connection)]
            item = self.busy[number]
            assert isinstance(connection, Connection)
            try:
                kind, value = connection.recv()
            except (EOFError, OSError):
                yield from self._replace(number)
                continue
            if kind == "pulse":
                yield Pulsed(number, item, value)
                continue
            if kind == "raise":
                raise value
            del self.busy[number]
            yield Done(number, item, value) if kind == "done" else Failed(number, item, value, died=False)
            yield from self.give(number)

    def _replace(self, number: int) -> Iterator[Event[Item, Result]]:
        process, connection = self._processes.pop(number)
        connection.close()
        process.join()
        yield Failed(number, self.busy.pop(number), _how_it_died(process.exitcode), died=True)
        if self._waiting:
            self.start(number)
            yield from self.give(number)

    def stop(self) -> None:
        for process, connection in self._processes.values():
            connection.close()
            if self.busy:
                process.terminate()
        for process, _ in self._processes.values():
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _work(function: Callable[[Any, Pulse], Any], connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and stops its workers
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what is half written is removed
    try:
        while (item := connection.recv()) is not None:
            connection.send(_attempt(function, item, connection))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(1)  # the parent is gone


def _attempt(function: Callable[[Any, Pulse], Any], item: Any, connection: Connection) -> tuple[str, Any]:
    try:
        return "done", function(item, lambda work: connection.send(("pulse", work)))
    except OuroError as error:
        return "raise", type(error)(str(error))
    except (BrokenPipeError, ConnectionResetError):
        raise
    except OSError as error:
        return "raise", OSError(error.errno, error.strerror or str(error), error.filename)
    except Exception as error:
        return "failed", _describe(error)


def _describe(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({os.path.basename(frame.filename)}:{frame.lineno})"  # noqa: PTH119


def _how_it_died(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return "its worker was killed (signal 9: out of memory, or by hand)"
    if code is not None and code < 0:
        return f"its worker died of signal {-code} ({signal.Signals(-code).name})"
    return f"its worker left with exit code {code}"


def died_message(failures: Sequence[Failed[Any]], name: Callable[[Any], str]) -> DataError:
    """One error that names every item that could not be finished."""
    lines = [f"  {name(failure.item)}: {failure.reason}" for failure in failures]
    return DataError("could not be finished, everything else is kept:\n" + "\n".join(lines))
