"""A conversation with a model: the turns so far, and the next answer token by token."""

import queue
from collections.abc import Iterator
from dataclasses import replace

from ouro_megatron.data.tokenizer import TextTokenizer
from ouro_megatron.errors import InferenceError, RequestError
from ouro_megatron.inference.chat import ChatPrompts
from ouro_megatron.inference.request import Event, Finished, GeneratedToken, Request
from ouro_megatron.inference.service import EngineService


class Conversation:
    """Holds the turns. With `prompts` None there is no template: all turns are one text that the model goes on with."""

    def __init__(
        self,
        service: EngineService,
        tokenizer: TextTokenizer,
        prompts: ChatPrompts | None,
        request: Request,
        system: str | None = None,
    ) -> None:
        """`request`: the settings of every answer. Raises RequestError when the model cannot chat."""
        if prompts is not None and prompts.problem is not None:
            raise RequestError(f"this model cannot chat: {prompts.problem} Or talk to it without one: --plain")
        self._service, self._tokenizer, self._prompts = service, tokenizer, prompts
        self.request = request
        self._start = [{"role": "system", "content": system}] if system else []
        self.turns: list[dict[str, str]] = list(self._start)

    def reset(self) -> None:
        """Forgets all turns but the system message."""
        self.turns = list(self._start)

    def undo(self) -> bool:
        """Takes back the last question and its answer; False when there is none."""
        questions = [index for index, turn in enumerate(self.turns) if turn["role"] == "user"]
        if questions:
            del self.turns[questions[-1] :]
        return bool(questions)

    def ask(self, text: str) -> Iterator[GeneratedToken | Finished]:
        """The answer as it comes; its last item is how it ended. Closing the iterator ends the answer early.

        Both turns are kept, an answer that was cut short with what it had. Raises RequestError when the conversation
        has outgrown the context; then the question is not kept.
        """
        turns = [*self.turns, {"role": "user", "content": text}]
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        ticket = self._service.submit([(self._request(turns), events.put)])[0]
        self.turns = turns
        said: list[str] = []
        finished = False
        try:
            while not finished:
                event = events.get()
                if event.token is not None:
                    said.append(event.token.text)
                    yield event.token
                if event.finished is not None:
                    finished = True
                    if event.finished.reason == "error":
                        raise InferenceError(event.finished.message)
                    said.append(event.finished.text)
                    yield event.finished
        finally:
            if not finished:
                self._service.cancel(ticket)
            # A turn without a word cannot be part of a conversation.
            self.turns.append({"role": "assistant", "content": "".join(said) or "…"})

    def _request(self, turns: list[dict[str, str]]) -> Request:
        if self._prompts is not None:
            return replace(self.request, prompt=self._prompts.encode(turns), stop_ids=self._prompts.stop_ids)
        text = "".join(turn["content"] for turn in turns)
        ids = tuple(self._tokenizer.encode(text) or [self._tokenizer.eod])
        return replace(self.request, prompt=ids, stop_ids=frozenset({self._tokenizer.eod}))
