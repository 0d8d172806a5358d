"""One HTTP request's answers on their way from the engine's thread to the event loop."""

import asyncio
from collections.abc import AsyncIterator

from ouro_megatron.inference.request import Event, Finished, Request
from ouro_megatron.inference.server.errors import ApiError
from ouro_megatron.inference.service import EngineService, Receiver


class Exchange:
    """The open requests behind one HTTP request. Leaving the `with` block ends what is not finished."""

    def __init__(self, service: EngineService, requests: list[Request], timeout: float) -> None:
        """Raises what `EngineService.submit` raises."""
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event] | ApiError] = asyncio.Queue()
        self._open = set(range(len(requests)))
        self._deadline = self._loop.time() + timeout
        self._timeout = timeout
        self._tickets = service.submit([(item, self._receiver(index)) for index, item in enumerate(requests)])

    def __enter__(self) -> "Exchange":
        return self

    def __exit__(self, *unused: object) -> None:
        for index in self._open:
            self._service.cancel(self._tickets[index])
        self._open = set()

    def _receiver(self, index: int) -> Receiver:
        def receive(event: Event) -> None:
            # The loop is gone when the server was cut off while requests were running.
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        return receive

    def fail(self, error: ApiError) -> None:
        """Makes `events` raise: called in the event loop."""
        self._events.put_nowait(error)

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """(request's index, event) until all are finished. Raises ApiError when time is up or something failed."""
        while self._open:
            try:
                async with asyncio.timeout_at(self._deadline):
                    item = await self._events.get()
            except TimeoutError as error:
                raise ApiError(
                    504, f"not finished within {self._timeout:g} seconds", kind="timeout_error", code="timeout"
                ) from error
            if isinstance(item, ApiError):
                raise item
            index, event = item
            if event.finished is not None:
                self._open.discard(index)
                _check(event.finished)
            yield index, event


def _check(finished: Finished) -> None:
    if finished.reason == "error":
        raise ApiError(503, finished.message.splitlines()[0], kind="server_error", code="engine_failed")
    if finished.reason == "cancelled":
        raise ApiError(503, "the request was cut off", kind="server_error", code="cancelled")
