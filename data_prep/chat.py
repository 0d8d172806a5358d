"""Conversations to token ids, with a mark on those that count in the loss: the assistant's turns.

The tokenizer's own Jinja template renders the conversation; the ids are those of the rendered text as a whole. What
merely spells a special token inside a message stays text: such spellings are broken by a guard character before the
template sees them, so that only the template's own special tokens become special ids.

Where a turn of the assistant begins and ends is found in the rendered text. A template with `generation` blocks says
so itself. For others, the turn begins where the template's generation prompt ends, and it includes the special token
that ends it, the one at which generation stops.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from data_prep.chat_turns import check_messages, guarded, name_of
from data_prep.safe_cuts import can_be_cut, parts
from ouro_megatron.data.chat_template import CHATML, CHATML_TOKENS, CLOSE, OPEN, ChatTemplate, load_template
from ouro_megatron.data.tokenizer import tokenizer_file
from ouro_megatron.errors import DataError

GUARD, STAND_IN = "\ufdd2", "\ufdd3"
"""Noncharacters: one breaks spellings of special tokens, one stands in for a message to see where it lands."""
_THOUGHT = "</think>"
_FAR = 2**62
"""Behind every character."""

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]


class ChatEncoder:
    """Encodes conversations with the tokenizer in one folder. Holds no state between calls."""

    def __init__(self, tokenizer_folder: Path, template: str | None = None) -> None:
        """`template`: see `load_template`. Raises DataError for a tokenizer or template that cannot be used."""
        from tokenizers import Tokenizer

        file = tokenizer_file(tokenizer_folder)
        content = json.loads(file.read_text(encoding="utf-8"))
        # Post-processors only add special tokens, which templates write themselves, and some shift offsets.
        content["post_processor"] = None
        self._tokenizer = Tokenizer.from_str(json.dumps(content))
        self._can_be_cut = can_be_cut(self._tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        special = [token["content"] for token in content.get("added_tokens", []) if token.get("special")]
        # Longest first: of two that begin alike, the tokenizer takes the longer.
        self._special = re.compile(
            "|".join(re.escape(text) for text in sorted(special, key=len, reverse=True)) or "(?!)"
        )
        self.template: ChatTemplate = load_template(file.parent, template)
        missing = [token for token in CHATML_TOKENS if token not in special]
        if self.template.source == CHATML and missing:
            raise DataError(
                f"{file}: has no chat template, and for ChatML its vocabulary lacks the special tokens "
                f"{' and '.join(missing)}. Add them to the tokenizer, or give a chat template."
            )

    def encode(self, messages: Messages, tools: Sequence[Any] | None = None) -> tuple[list[int], list[bool]]:
        """`encode_arrays` as lists."""
        ids, counts = self.encode_arrays(messages, tools)
        return ids.tolist(), counts.tolist()

    def encode_arrays(self, messages: Messages, tools: Sequence[Any] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a conversation (uint32) and, for each, whether it counts as a label (bool): it is of the assistant.

        `messages`: mappings with `role` and `content` (text, or a list of text parts, which are joined), as chat
        templates take them; also `tool_calls`, `reasoning_content` and what else the template knows. No end of document
        is added. Raises DataError naming the turn for a conversation that is malformed or that the template refuses or
        does not render whole.
        """
        turns = guarded(check_messages(messages), self._special, GUARD)
        text, spans = self._render(turns, tools)
        plain, guards = _without(text, GUARD)
        spans = [(_before(guards, start), _before(guards, end)) for start, end in spans]
        return self._tokenise(text, plain, guards, spans)

    def prompt(self, messages: Messages, tools: Sequence[Any] | None = None) -> list[int]:
        """Ids of a conversation up to where the assistant's next turn begins: what generation is fed."""
        turns = guarded(check_messages(messages, answered=False), self._special, GUARD)
        text, _ = _cut_marks(self._rendered(turns, tools, prompt=True))
        plain, guards = _without(text, GUARD)
        ids: list[int] = self._tokenise(text, plain, guards, [])[0].tolist()
        return ids

    def _render(self, turns: Messages, tools: Sequence[Any] | None) -> tuple[str, list[Span]]:
        """The rendered text, guards still in it, and the character spans of the assistant's turns."""
        text, marked = _cut_marks(self._rendered(turns, tools))
        spans = [self._with_end(text, span) for span in marked]
        assistants = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
        if not spans:
            spans = [self._span(text, turns, index, tools) for index in assistants]
        if not any(start < end for start, end in spans):
            raise DataError(f"{self.template.where}: renders nothing of what the assistant says")
        self._check_reasoning(assistants[-1], turns, text[spans[-1][0] : spans[-1][1]])
        return text, spans

    def _check_reasoning(self, index: int, turns: Messages, said: str) -> None:
        """Templates for inference drop the reasoning of earlier turns, some of all: not to be trained on unnoticed."""
        turn = turns[index]
        apart = str(turn.get("reasoning_content") or "").strip()
        if (_THOUGHT in turn["content"] and _THOUGHT not in said) or apart not in said:
            raise DataError(
                f"{name_of(index, turn)}: {self.template.where} leaves its reasoning out; give a template that keeps it"
            )

    def _rendered(self, turns: Messages, tools: Sequence[Any] | None, *, prompt: bool = False) -> str:
        try:
            return self.template.render(turns, tools=tools, prompt=prompt)
        except Exception as error:
            where = self._refused(turns, tools, _reason(error))
            raise DataError(f"{where}: {self.template.where} refuses it: {_reason(error)}") from error

    def _refused(self, turns: Messages, tools: Sequence[Any] | None, reason: str) -> str:
        """The turn with which the template begins to refuse for this reason."""
        for count in range(1, len(turns) + 1):
            try:
                self.template.render(turns[:count], tools=tools)
            except Exception as error:
                if _reason(error) == reason:
                    return name_of(count - 1, turns[count - 1])
        return "the conversation"

    def _span(self, text: str, turns: Messages, index: int, tools: Sequence[Any] | None) -> Span:
        """Where turn `index`, the assistant's, lies in `text`, for a template without marks."""
        start = self._start(text, turns, index, tools)
        until = self._rendered(turns[: index + 1], tools)
        if text.startswith(until):
            # What follows the last special token (a newline, mostly) is not for the assistant to write.
            ends = [match.end() for match in self._special.finditer(text, start, len(until))]
            if ends and not text[ends[-1] : len(until)].strip():
                return start, ends[-1]
            return start, len(until)
        # The template renders a turn otherwise once others follow: look where its content ends in the whole text.
        turn = turns[index]
        if turn.get("tool_calls"):
            raise DataError(
                f"{name_of(index, turn)}: {self.template.where} renders its tool calls otherwise when turns follow, so "
                "its end is not known; give a template with `generation` blocks"
            )
        other = self._rendered([*turns[:index], {**turn, "content": STAND_IN}, *turns[index + 1 :]], tools)
        _, found, after = other.partition(STAND_IN)
        if not found or not text.endswith(after):
            raise DataError(
                f"{name_of(index, turn)}: cannot be found in what {self.template.where} renders; "
                "give a template with `generation` blocks"
            )
        return self._with_end(text, (start, len(text) - len(after)))

    def _start(self, text: str, turns: Messages, index: int, tools: Sequence[Any] | None) -> int:
        prompt = self._rendered(turns[:index], tools, prompt=True) if index else ""
        if text.startswith(prompt):
            return len(prompt)
        # The prompt may hold more than the turn's header, such as an opened thought: the header is what both share.
        shared = next(
            (i for i, (a, b) in enumerate(zip(text, prompt, strict=False)) if a != b), min(len(text), len(prompt))
        )
        if shared > len(self._rendered(turns[:index], tools)):
            return shared
        raise DataError(
            f"{name_of(index, turns[index])}: {self.template.where} renders the turns before it otherwise once it is "
            "there, so its start is not known; give a template with `generation` blocks"
        )

    def _with_end(self, text: str, span: Span) -> Span:
        """`span` with the special token that ends it, when that one follows and is not in it yet."""
        start, end = span
        inside = [match.end() for match in self._special.finditer(text, start, end)]
        if inside and not text[inside[-1] : end].strip():
            return start, inside[-1]
        follows = self._special.search(text, end)
        if follows is not None and not text[end : follows.start()].strip():
            return start, follows.end()
        return span

    def _tokenise(
        self, text: str, plain: str, guards: list[int], spans: Sequence[Span]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids of `plain`, in which what `text` guards stays text, and whether each has a character in a span."""
        if not guards:
            return _joined(self._encode(plain, spans, special=True))
        pieces = self._pieces(text)
        # Cutting at special tokens must not change ids: seen on the same text with harmless spellings.
        harmless = [piece.replace(GUARD, "x") for piece, _ in pieces]
        apart, _ = _joined(found for piece in harmless for found in self._encode(piece, [], special=True))
        if not np.array_equal(apart, _joined(self._encode("".join(harmless), [], special=True))[0]):
            raise DataError(
                "a message spells a special token, and this tokenizer cannot keep it as text: it encodes text "
                "otherwise at the start or beside special tokens"
            )
        found: list[tuple[np.ndarray, np.ndarray]] = []
        at = 0
        for piece, special in pieces:
            piece = piece.replace(GUARD, "")
            found += self._encode(piece, spans, special=special, at=at)
            at += len(piece)
        return _joined(found)

    def _pieces(self, text: str) -> list[tuple[str, bool]]:
        """`text` cut at the template's special tokens around guarded stretches: (piece, are special tokens meant)."""
        pieces: list[tuple[str, bool]] = []
        at = 0
        for match in [*self._special.finditer(text), None]:
            stretch = text[at : len(text) if match is None else match.start()]
            token = "" if match is None else match.group()
            if GUARD in stretch:
                pieces += [(stretch, False), (token, True)]
            elif pieces and pieces[-1][1]:
                pieces[-1] = (pieces[-1][0] + stretch + token, True)
            else:
                pieces.append((stretch + token, True))
            at = len(text) if match is None else match.end()
        return [piece for piece in pieces if piece[0]]

    def _encode(
        self, text: str, spans: Sequence[Span], *, special: bool, at: int = 0
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids of a text that begins at character `at`, and whether each has a character in a span; part by part."""
        self._tokenizer.encode_special_tokens = not special
        for part in parts((text,)) if self._can_be_cut else (text,):
            encoding = self._tokenizer.encode(part, add_special_tokens=False)
            offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2) + at
            yield np.array(encoding.ids, dtype=np.uint32), _overlaps(offsets, spans)
            at += len(part)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"


def _without(text: str, mark: str) -> tuple[str, list[int]]:
    """`text` without `mark`, and where the marks were."""
    return text.replace(mark, ""), [match.start() for match in re.finditer(mark, text)]


def _before(marks: list[int], position: int) -> int:
    """`position` in the text that has lost its marks."""
    return position - bisect_left(marks, position)


def _cut_marks(text: str) -> tuple[str, list[Span]]:
    """Takes the marks of `generation` blocks out: (text, outermost spans)."""
    marks = [(mark.start(), mark.group()) for mark in re.finditer(f"[{OPEN}{CLOSE}]", text)]
    # One after the other, so that a long text is held twice and not three times.
    text = text.replace(OPEN, "")
    text = text.replace(CLOSE, "")
    spans: list[Span] = []
    depth = start = 0
    for number, (at, mark) in enumerate(marks):
        place = at - number
        if mark == OPEN:
            start = start if depth else place
            depth += 1
        else:
            depth -= 1
            if not depth:
                spans.append((start, place))
    return text, spans


def _overlaps(offsets: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """For each token (int64[tokens, 2]) whether one of its characters lies in a span (bool); both are in order."""
    starts, ends = np.array([*spans, (_FAR, _FAR)], dtype=np.int64).T
    return offsets[:, 1] > starts[np.searchsorted(ends, offsets[:, 0], side="right")]


def _joined(found: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    ids, counts = zip(*found, strict=True)
    return np.concatenate(ids), np.concatenate(counts)
