"""JSON of answers, whole and streamed, in OpenAI's shapes; depth statistics of this project under "ouro"."""

import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from ouro_megatron.data.tokenizer import TextTokenizer
from ouro_megatron.inference.request import Event, Finished, GeneratedToken, Request

Kind = Literal["completion", "chat"]


@dataclass
class Choice:
    """One answer as it grows."""

    request: Request
    tokens: list[GeneratedToken] = field(default_factory=list)
    finished: Finished | None = None
    told: int = 0
    """Characters of the tokens that were streamed with their log probabilities."""

    def add(self, event: Event) -> None:
        if event.token is not None:
            self.tokens.append(event.token)
        if event.finished is not None:
            self.finished = event.finished

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens) + (self.finished.text if self.finished else "")


class Answer:
    """The frame around the choices of one HTTP request."""

    def __init__(
        self, kind: Kind, model: str, requests: list[Request], tokenizer: TextTokenizer, max_loops: int
    ) -> None:
        self._kind, self._model, self._tokenizer, self._max_loops = kind, model, tokenizer, max_loops
        self._id = f"{'cmpl' if kind == 'completion' else 'chatcmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self.choices = [Choice(request) for request in requests]

    def whole(self) -> dict[str, Any]:
        """The answer when all choices are finished."""
        choices = []
        for index, choice in enumerate(self.choices):
            assert choice.finished is not None
            said: dict[str, Any] = {"text": choice.text}
            if self._kind == "chat":
                said = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
            choices.append(
                {
                    "index": index,
                    **said,
                    "logprobs": self._logprobs(choice.tokens, choice.request.logprobs),
                    "finish_reason": choice.finished.reason,
                    "ouro": {"depths": [token.depth for token in choice.tokens]},
                }
            )
        return {**self._frame(chunk=False), "choices": choices, "usage": self.usage()}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first chunk of a streamed choice: a chat says who speaks."""
        if self._kind == "completion":
            return None
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None, None)

    def chunk(self, index: int, event: Event) -> dict[str, Any]:
        """What an event adds to a streamed choice."""
        token, finished = event.token, event.finished
        text = (token.text if token else "") + (finished.text if finished else "")
        said: dict[str, Any] = {"text": text}
        if self._kind == "chat":
            said = {"delta": {"content": text} if text or token else {}}
        tokens = [token] if token else []
        choice = self.choices[index]
        chunk = self._chunk(index, said, self._logprobs(tokens, choice.request.logprobs, choice.told), finished)
        choice.told += sum(len(self._tokenizer.decode([each.token])) for each in tokens)
        if token is not None:
            chunk["choices"][0]["ouro"] = {"depth": token.depth, "exit_probability": list(token.exit_probability)}
        return chunk

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk of a stream that was asked for its usage."""
        return {**self._frame(chunk=True), "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Token counts and how deep the tokens went."""
        depths = Counter(token.depth for choice in self.choices for token in choice.tokens)
        made = sum(depths.values())
        # Each prompt is counted once, however many answers it gets.
        prompts = {id(choice.request.prompt): len(choice.request.prompt) for choice in self.choices}
        asked = sum(prompts.values())
        return {
            "prompt_tokens": asked,
            "completion_tokens": made,
            "total_tokens": asked + made,
            "ouro": {
                "exit": str(self.choices[0].request.exit_policy),
                "max_loops": self.choices[0].request.max_loops or self._max_loops,
                "mean_depth": sum(depth * count for depth, count in depths.items()) / made if made else None,
                "tokens_by_depth": {str(depth): depths[depth] for depth in sorted(depths)},
                "layer_visits": sum(choice.finished.row_visits for choice in self.choices if choice.finished),
            },
        }

    def _frame(self, *, chunk: bool) -> dict[str, Any]:
        kind = "text_completion"
        if self._kind == "chat":
            kind = "chat.completion.chunk" if chunk else "chat.completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _chunk(
        self, index: int, said: dict[str, Any], logprobs: dict[str, Any] | None, finished: Finished | None
    ) -> dict[str, Any]:
        reason = finished.reason if finished else None
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}
        return {**self._frame(chunk=True), "choices": [choice]}

    def _logprobs(self, tokens: list[GeneratedToken], top: int | None, start: int = 0) -> dict[str, Any] | None:
        """`start`: characters of the tokens before these."""
        if top is None:
            return None
        spelled = [self._tokenizer.decode([token.token]) for token in tokens]
        if self._kind == "completion":
            return {
                "tokens": spelled,
                "token_logprobs": [token.logprob for token in tokens],
                "top_logprobs": [
                    {self._tokenizer.decode([other]): value for other, value in token.top_logprobs} for token in tokens
                ],
                "text_offset": [start + sum(map(len, spelled[:index])) for index in range(len(spelled))],
            }
        return {
            "content": [
                {
                    **self._spelled(token.token, token.logprob),
                    "top_logprobs": [self._spelled(other, value) for other, value in token.top_logprobs],
                }
                for token in tokens
            ],
            "refusal": None,
        }

    def _spelled(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._tokenizer.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}
