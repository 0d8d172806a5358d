"""Conversations as prompts: the tokenizer's chat template, and the tokens that end an answer."""

from collections.abc import Mapping, Sequence
from typing import Any

from data_prep.chat import ChatEncoder
from ouro_megatron.data.tokenizer import TextTokenizer
from ouro_megatron.errors import DataError, RequestError

_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")
"""Tokens by which known chat templates end a turn."""


class ChatPrompts:
    """Encodes conversations for one model. Without a usable template every call says why."""

    def __init__(self, tokenizer: TextTokenizer, template: str | None = None) -> None:
        """`template`: a file or a template's text instead of the tokenizer's own."""
        self._encoder: ChatEncoder | None = None
        self._problem = ""
        try:
            self._encoder = ChatEncoder(tokenizer.path, template)
        except DataError as error:
            self._problem = str(error)
        ends = [tokenizer.encode(text, special=True) for text in _ENDS]
        self.stop_ids = frozenset({tokenizer.eod, *(ids[0] for ids in ends if len(ids) == 1)})

    @property
    def problem(self) -> str | None:
        """Why this model cannot chat; None when it can."""
        return None if self._encoder is not None else self._problem

    def encode(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """Ids up to where the assistant's next turn begins. Raises RequestError for what cannot be encoded."""
        if self._encoder is None:
            raise RequestError(f"this model cannot chat: {self._problem}", field="messages")
        try:
            return tuple(self._encoder.prompt(messages))
        except DataError as error:
            raise RequestError(f"messages: {error}", field="messages") from error
