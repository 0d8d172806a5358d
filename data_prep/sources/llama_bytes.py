"""Llama-3 ids back to bytes. Ids are mapped one by one: a character cut in two is lost by decoding to text."""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from ouro_megatron.data.tokenizer import tokenizer_file
from ouro_megatron.errors import DataError

BEGIN, END, END_OF_TURN = 128000, 128001, 128009
_BASE = 128000
_KNOWN = {2028: "This", 374: "Ġis", 264: "Ġa", 1296: "Ġtest", 11914: "Ġsentence", 13: "."}
"""Ids of "This is a test sentence." in Meta's published tokenizer."""
_SPECIAL = {BEGIN: "<|begin_of_text|>", END: "<|end_of_text|>", END_OF_TURN: "<|eot_id|>"}


def byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level BPE vocabularies."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


@lru_cache(maxsize=1)
def llama_table(folder: Path) -> tuple[bytes, ...]:
    """Bytes of each id, special tokens as they are spelt.

    Raises DataError when the folder does not hold the Llama-3 tokenizer (3, 3.1, 3.2 and 3.3 share it).
    """
    file = tokenizer_file(folder)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        vocab = {int(number): token for token, number in content["model"]["vocab"].items()}
        added = {int(token["id"]): str(token["content"]) for token in content.get("added_tokens", [])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: no readable tokenizer: {error}") from error
    wrong = _difference(vocab, added)
    if wrong:
        raise DataError(
            f"{file}: not the Llama-3 tokenizer that ProLong's ids were made with ({wrong}). "
            "Give the folder of Meta-Llama-3-8B's tokenizer"
        )
    alphabet = byte_alphabet()
    size = 1 + max(added)
    table = [b""] * size
    for number, token in vocab.items():
        table[number] = bytes(alphabet[char] for char in token)
    for number, text in added.items():
        table[number] = text.encode()
    return tuple(table)


def _difference(vocab: dict[int, str], added: dict[int, str]) -> str:
    base = {number: token for number, token in vocab.items() if number < _BASE}
    if len(base) != _BASE:
        return f"{len(base):,} ids below {_BASE:,}, not all"
    for known, table in ((_KNOWN, base), (_SPECIAL, added)):
        for number, token in known.items():
            if table.get(number) != token:
                return f"id {number} is {table.get(number)!r}, not {token!r}"
    alphabet = byte_alphabet()
    odd = next((token for token in base.values() if not alphabet.keys() >= set(token)), None)
    return "" if odd is None else f"{odd!r} is not written in the byte alphabet"


def joined(table: Sequence[bytes], ids: Sequence[int]) -> bytes:
    """Raises ValueError for an id that the tokenizer does not have."""
    try:
        return b"".join([table[number] for number in ids])
    except IndexError:
        raise ValueError(f"id {max(ids)} is beyond the tokenizer's {len(table)}") from None
