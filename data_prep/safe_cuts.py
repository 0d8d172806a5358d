"""Places where a text can be cut so that the ids of its parts are those of the whole, for tokenizers of the slow path.

`tokenizers` takes over a hundred bytes of memory for each character of a text, so long ones go to it in parts. A place
lies behind a letter or digit, before white space or punctuation. There each known splitter ends a word and begins one:
no alternative of its pattern takes both, and none looks back. The only one that looks ahead, `\\s+(?!\\S)`, is about
white space, all of which lies behind the place. In no normal form does what follows compose with what is before.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from data_prep.memory import UNCUT, check_size

PART = 1 << 16
"""Characters of a part, at least."""

_LETTERS = "A-Za-zА-Яа-яぁ-ゖァ-ヺ一-鿿가-힣"
"""Letters in every version of Unicode."""
_PLACE = re.compile(rf"[0-9{_LETTERS}](?=[ \t\n\r,.;:!?()，。、；：！？（）「」…])")

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BEHIND = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _BEHIND,  # GPT-4, Llama 3
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _BEHIND,  # Qwen 2 and 3
}
_LOCAL_PATTERNS = {r"\p{N}", r"\p{N}+", r"\p{N}{1,3}"}
"""These alone do not cut at every place, and beside another pattern change nothing there."""
_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase"}


def can_be_cut(tokenizer_json: str) -> bool:
    """Whether the tokenizer is made of parts that are known to allow it."""
    content = json.loads(tokenizer_json)
    return (
        all(step["type"] in _NORMALIZERS for step in _steps(content["normalizer"], "normalizers"))
        and _splits_at_places(list(_steps(content["pre_tokenizer"], "pretokenizers")))
        and not any(_spans_a_place(token) for token in content["added_tokens"])
        and not content["model"].get("dropout")
    )


def _steps(step: Mapping[str, Any] | None, name: str) -> Iterator[Mapping[str, Any]]:
    if step is None:
        return
    if step["type"] != "Sequence":
        yield step
        return
    for inner in step[name]:
        yield from _steps(inner, name)


def _splits_at_places(steps: list[Mapping[str, Any]]) -> bool:
    """Each step is known, at least one of them ends words at places, and none looks at letters that stand for bytes."""
    splits = False
    for number, step in enumerate(steps):
        if step["type"] == "ByteLevel" and not step["add_prefix_space"] and number == len(steps) - 1:
            splits = splits or step["use_regex"]
        elif step["type"] == "Split" and (step["behavior"], step["invert"]) in {("Isolated", False), ("Removed", True)}:
            pattern = step["pattern"].get("Regex")
            if pattern not in _PATTERNS and (pattern not in _LOCAL_PATTERNS or step["invert"]):
                return False
            splits = splits or pattern in _PATTERNS
        elif step["type"] != "Digits":
            return False
    return splits


def _spans_a_place(token: Mapping[str, Any]) -> bool:
    """Whether an added token may be found across a place, or take the white space behind it."""
    content = token["content"]
    return _PLACE.search(content) is not None or (token["rstrip"] and _PLACE.search(content + " ") is not None)


def parts(pieces: Iterable[str], memory: int | None = None) -> Iterator[str]:
    """A text that comes in pieces, cut at places; where there are none for long, a part is long.

    Raises TooLargeError when tokenising a part would take more than `memory` bytes.
    """
    rest, looked = "", 0
    for piece in pieces:
        rest += piece
        start = 0
        while match := _PLACE.search(rest, max(start + PART, looked)):
            yield rest[start : match.end()]
            start = match.end()
        looked = max(0, len(rest) - start - 1)  # a place takes two characters
        rest = rest[start:]
        if memory is not None:
            check_size("a text without a place to cut it at", len(rest), UNCUT, memory)
    if rest:
        yield rest
