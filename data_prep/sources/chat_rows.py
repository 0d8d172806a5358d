"""Rows of the many chat sets, turned into one shape: turns with `role` (system, user, assistant, tool) and `content`.

Reasoning between <think> and </think> stays where it is; where a set keeps it in a field of its own it is put there.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

Messages = list[dict[str, str]]
Layout = Literal["auto", "messages", "conversations", "pair"]

_ROLES = {
    "system": "system",
    "developer": "system",
    **dict.fromkeys(("user", "human", "prompter", "question"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bard", "chatgpt", "bot", "answer", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "function_response"), "tool"),
}
_LISTS = ("messages", "conversations", "conversation", "dialog", "turns")
PAIRS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("query", "response"),
    ("question", "answer"),
    ("problem", "solution"),
    ("input", "output"),
)
"""Columns of question and answer, in the order they are looked for."""
_REASONING = ("reasoning_content", "reasoning", "thinking")
_SYSTEM = ("system_prompt", "system")


def pair_of(names: Iterable[str]) -> tuple[str, str] | None:
    """The columns of question and answer among `names`."""
    present = set(names)
    return next((pair for pair in PAIRS if present.issuperset(pair)), None)


def list_of(names: Iterable[str], layout: Layout = "auto") -> str | None:
    """The column that holds a list of turns."""
    present = set(names)
    wanted = _LISTS if layout == "auto" else (layout,)
    return next((name for name in wanted if name in present), None)


def messages_of(row: Mapping[str, Any], layout: Layout = "auto", pair: tuple[str, str] | None = None) -> Messages:
    """The conversation of a row. Raises ValueError saying what does not fit."""
    if pair is None and layout != "pair" and (name := list_of(row, layout)) is not None:
        turns = [turn_of(turn) for turn in _as_list(row[name], name)]
    else:
        turns = _turns_of_pair(row, pair)
    system = next((row[name] for name in _SYSTEM if isinstance(row.get(name), str) and row[name].strip()), None)
    if system is not None and (not turns or turns[0]["role"] != "system"):
        turns.insert(0, {"role": "system", "content": system})
    return checked(turns)


def checked(turns: Messages) -> Messages:
    """`turns`, if someone asks and the assistant says something. Raises ValueError otherwise."""
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in turns):
        raise ValueError("a conversation in which the assistant says nothing")
    if not any(turn["role"] == "user" for turn in turns):
        raise ValueError("a conversation without a user's turn")
    for turn in turns:
        turn["content"].encode("utf-8")  # half of a surrogate pair, which JSON can spell, is no character
    return turns


def _as_list(value: Any, name: str) -> Sequence[Any]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"field {name!r} is text that is no JSON list: {error}") from error
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"field {name!r} is {'empty' if value in (None, [], ()) else 'no list of turns'}")
    return value


def turn_of(turn: Any) -> dict[str, str]:
    """One turn from {role, content} or {from, value}. Raises ValueError for an unknown role or what is not text."""
    if not isinstance(turn, Mapping):
        raise ValueError(f"a turn is a {type(turn).__name__}, not an object")
    speaker = turn.get("role", turn.get("from", turn.get("speaker")))
    role = _ROLES.get(str(speaker).strip().lower())
    if role is None:
        raise ValueError(f"unknown role {speaker!r}; known are {', '.join(_ROLES)}")
    content = turn.get("content", turn.get("value", turn.get("text")))
    text = _plain(content)
    if role == "assistant":
        text = _with_reasoning(turn, text)
        text += "".join(_tool_call(call) for call in turn.get("tool_calls") or ())
    if content is None and not text:
        raise ValueError(f"a turn of {role} has no content")
    return {"role": role, "content": text}


def _plain(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list | tuple):
        parts = []
        for part in content:
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise ValueError(f"a turn holds {kind}, which is not text")
            parts.append(part["text"])
        return "".join(parts)
    raise ValueError(f"the content of a turn is a {type(content).__name__}, not text")


def _with_reasoning(turn: Mapping[str, Any], text: str) -> str:
    reasoning = next(
        (turn[name] for name in _REASONING if isinstance(turn.get(name), str) and turn[name].strip()), None
    )
    if reasoning is None or "<think>" in text:
        return text
    return f"<think>\n{reasoning.strip()}\n</think>\n\n{text}"


def _tool_call(call: Any) -> str:
    """A call as text, in the way chat templates of this family write it; nothing of it is dropped."""
    function = call.get("function", call) if isinstance(call, Mapping) else call
    if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
        with suppress(ValueError):  # arguments that are no JSON stay a string
            function = {**function, "arguments": json.loads(function["arguments"])}
    return f"\n<tool_call>\n{json.dumps(function, ensure_ascii=False)}\n</tool_call>"


def _turns_of_pair(row: Mapping[str, Any], pair: tuple[str, str] | None) -> Messages:
    found = pair or pair_of(row)
    if found is None or any(name not in row for name in found):
        wanted = f"fields {found[0]!r} and {found[1]!r}" if found else "turns, nor a question with its answer"
        raise ValueError(f"no {wanted}; there are {', '.join(map(str, row))}")
    question, answer = (row[name] for name in found)
    if isinstance(question, list | tuple):  # turns before the answer
        turns = [turn_of(turn) for turn in question]
    else:
        turns = [{"role": "user", "content": _question(row, found[0], question)}]
    if not isinstance(answer, str):
        raise ValueError(f"field {found[1]!r} is {'null' if answer is None else type(answer).__name__}, not text")
    turns.append({"role": "assistant", "content": _with_reasoning(row, answer)})
    return turns


def _question(row: Mapping[str, Any], name: str, question: Any) -> str:
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"field {name!r} is {'empty' if question in (None, '') else 'no text'}")
    more = row.get("input") if name == "instruction" else None
    return f"{question}\n\n{more}" if isinstance(more, str) and more.strip() else question


def key_of(messages: Messages) -> str:
    """The first question: all answers to it are held out together."""
    return next(turn["content"] for turn in messages if turn["role"] == "user")
