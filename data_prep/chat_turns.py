"""The turns of a conversation before any template sees them: are they well formed, and what do they merely spell."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ouro_megatron.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_NONCHARACTER = re.compile("[\ufdd0-\ufdef]")


def name_of(index: int, turn: Mapping[str, Any]) -> str:
    """For messages: "turn 3 (assistant)", counted from 1."""
    return f"turn {index + 1} ({turn.get('role')})"


def check_messages(messages: Sequence[Mapping[str, Any]], *, answered: bool = True) -> list[dict[str, Any]]:
    """The turns with their text parts joined. `answered`: the assistant must say something.

    Raises DataError naming the turn and what is wrong with it.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise DataError(f"a conversation is a list of turns, not {type(messages).__name__}")
    if not messages:
        raise DataError("the conversation has no turns")
    turns = [_check_turn(index, message) for index, message in enumerate(messages)]
    if answered and not any(turn["role"] == "assistant" for turn in turns):
        raise DataError("the conversation has no turn of the assistant: nothing would be learned from it")
    return turns


def _check_turn(index: int, message: Any) -> dict[str, Any]:
    where = f"turn {index + 1}"
    if not isinstance(message, Mapping):
        raise DataError(f"{where}: must be a mapping with role and content, is {type(message).__name__}")
    role = message.get("role")
    if not isinstance(role, str):
        raise DataError(f"{where}: has no role" if role is None else f"{where}: its role is not text but {role!r}")
    if role not in ROLES:
        raise DataError(f"{where}: unknown role {role!r}; known are {', '.join(ROLES)}")
    turn = {name: value for name, value in message.items() if value is not None or name == "content"}
    where = name_of(index, message)
    turn["content"] = _text(where, message.get("content"))
    said = turn["content"].strip() or turn.get("tool_calls") or turn.get("reasoning_content")
    if role == "assistant" and not said:
        raise DataError(f"{where}: is empty")
    _check_characters(where, turn)
    return turn


def _text(where: str, content: Any) -> str:
    """Text, or a list of text parts joined without anything between them; None is ""."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise DataError(f"{where}: its content is neither text nor a list of parts but {type(content).__name__}")
    texts = []
    for number, part in enumerate(content, start=1):
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type", "text" if "text" in part else None) if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise DataError(f"{where}: part {number} of its content is {kind or part!r}; only text can be trained on")
        texts.append(part["text"])
    return "".join(texts)


def _check_characters(where: str, value: Any) -> None:
    for text in _strings(value):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: holds half a surrogate pair at character {error.start}") from error
        if match := _NONCHARACTER.search(text):
            raise DataError(f"{where}: holds the Unicode noncharacter U+{ord(match.group()):04X}")


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for pair in value.items() for part in pair for text in _strings(part)]
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [text for item in value for text in _strings(item)]
    return []


def guarded(turns: Sequence[Mapping[str, Any]], special: re.Pattern[str], guard: str) -> list[dict[str, Any]]:
    """The turns with `guard` after the first character of whatever spells a special token, as deep as values go."""
    return [
        {name: _guard(value, special, guard) if name != "role" else value for name, value in turn.items()}
        for turn in turns
    ]


def _guard(value: Any, special: re.Pattern[str], guard: str) -> Any:
    if isinstance(value, str):
        # Again until nothing matches: a broken spelling may leave another that overlaps it.
        while match := special.search(value):
            if len(match.group()) == 1:
                raise DataError(f"a message holds {match.group()!r}, which is a special token of one character")
            value = special.sub(lambda match: match.group()[0] + guard + match.group()[1:], value)
        return value
    if isinstance(value, Mapping):
        return {name: _guard(item, special, guard) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_guard(item, special, guard) for item in value]
    return value
