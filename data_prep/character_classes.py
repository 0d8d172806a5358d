r"""Which characters are letters, numbers and space to `tokenizers`.

Two Unicode tables of it count, and they need not be of the same Unicode version: that of its regular expressions
(\p{L}, \p{N}, \s) and that of Rust (`char::is_numeric`, which isolates digits). Both are asked for every character and
kept in character_classes.json; after an upgrade of `tokenizers`:

    python -m data_prep.character_classes
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

CHARACTERS = 0x110000
OTHER, LETTER, NUMBER, SPACE, DIGIT = range(5)
"""The codes that _byte_level.c knows. A DIGIT always stands alone."""

_FILE = Path(__file__).with_suffix(".json")
_SURROGATES = range(0xD800, 0xE000)
_PATTERNS = {"letter": r"\p{L}+", "number": r"\p{N}+", "space": r"\s+"}


@cache
def load_classes() -> tuple[str, dict[str, np.ndarray]]:
    """The version of `tokenizers` that was asked, and bool[0x110000] for letter, number, space and numeric (Rust's)."""
    content: dict[str, Any] = json.loads(_FILE.read_text(encoding="utf-8"))
    return content.pop("tokenizers"), {name: _mask(ranges) for name, ranges in content.items()}


def class_codes(isolate_digits: bool) -> np.ndarray:
    """uint8[0x110000], the code of each character; numeric characters are DIGIT when they are isolated."""
    _, masks = load_classes()
    codes = np.full(CHARACTERS, OTHER, dtype=np.uint8)
    codes[masks["letter"]] = LETTER
    codes[masks["number"]] = NUMBER
    codes[masks["space"]] = SPACE
    if isolate_digits:
        codes[masks["numeric"]] = DIGIT
    return codes


def ask_tokenizers() -> dict[str, np.ndarray]:
    """The masks of `load_classes` as the installed `tokenizers` has them."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Digits, Split

    codes = np.array([code for code in range(CHARACTERS) if code not in _SURROGATES])
    text = "".join(map(chr, codes))
    masks = {name: np.zeros(CHARACTERS, dtype=bool) for name in (*_PATTERNS, "numeric")}
    for name, pattern in _PATTERNS.items():
        masks[name][codes] = True
        for _, (start, stop) in Split(Regex(pattern), "removed").pre_tokenize_str(text):
            masks[name][codes[start:stop]] = False
    # Runs of numeric and other characters alternate, and U+0000 begins the first.
    pieces = Digits(individual_digits=False).pre_tokenize_str(text)
    for _, (start, stop) in pieces[1::2]:
        masks["numeric"][codes[start:stop]] = True
    return masks


def _mask(ranges: list[list[int]]) -> np.ndarray:
    mask = np.zeros(CHARACTERS, dtype=bool)
    for start, stop in ranges:
        mask[start:stop] = True
    return mask


def _ranges(mask: np.ndarray) -> list[list[int]]:
    """Half-open ranges of the characters in a mask."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.astype(np.int8), [0]))))
    return edges.reshape(-1, 2).tolist()


def main() -> None:
    import tokenizers

    parts = [f'"tokenizers": {json.dumps(tokenizers.__version__)}']
    for name, mask in ask_tokenizers().items():
        lines = [""]
        for pair in _ranges(mask):
            text = json.dumps(pair, separators=(",", ":"))
            if len(lines[-1]) + len(text) > 110:
                lines.append("")
            lines[-1] += ("," if lines[-1] else "") + text
        body = ",\n  ".join(lines)
        parts.append(f'"{name}": [\n  {body}\n ]')
    _FILE.write_text("{\n " + ",\n ".join(parts) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
