"""Prompt files of the analyses."""

import json
from dataclasses import dataclass
from pathlib import Path

from ouro_megatron.errors import DataError


@dataclass(frozen=True)
class PromptItem:
    """One prompt, with the answers to choose from where there are such."""

    text: str
    choices: tuple[str, ...] = ()


def read_items(path: Path, limit: int | None = None) -> list[PromptItem]:
    """A .jsonl file's objects with `prompt` (and `choices`, a list of at least two), or any other file's lines.

    Raises DataError naming the line, or when the file is empty.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    items = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        items.append(_item(line, f"{path}:{number}") if path.suffix == ".jsonl" else PromptItem(line))
        if limit is not None and len(items) >= limit:
            break
    if not items:
        raise DataError(f"{path} holds no prompt")
    return items


def _item(line: str, where: str) -> PromptItem:
    try:
        values = json.loads(line)
        text, choices = values["prompt"], values.get("choices", [])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f'{where}: write an object such as {{"prompt": "..."}} ({error!r})') from error
    if not isinstance(text, str) or not text:
        raise DataError(f"{where}: prompt is not a text")
    if not isinstance(choices, list) or len(choices) == 1 or not all(isinstance(c, str) and c for c in choices):
        raise DataError(f"{where}: choices is not a list of two texts or more")
    return PromptItem(text, tuple(choices))
