"""The fast path: byte-level BPE in C, for tokenizers whose chain it knows, while its ids are those of `tokenizers`.

What fits: BPE over all 256 byte letters, no normalizer, and GPT-2's splitter (`ByteLevel` with `use_regex`, without
`add_prefix_space`), alone or behind `Digits(individual_digits=True)`; added tokens that are all special.
"""

import json
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from data_prep.character_classes import class_codes, load_classes
from data_prep.encode import Encoded, PlainEncoder, same_ids
from data_prep.long_text import LongText
from data_prep.memory import DOCUMENT_MEMORY
from ouro_megatron.data.tokenizer import TextTokenizer

_CACHE_BITS = 16
"""65,536 buckets of two words: 8 MB."""
_WINDOW = 1 << 16
"""Bytes of a word that are merged at one time."""
_PIECE = 1 << 18
"""Ids of a text that is not held in memory, 1 MB, that are handed on at one time."""

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_MODEL = {
    "type": ("BPE",),
    "dropout": (None, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (False, None),
    "ignore_merges": (False, None),
}
_TRICKY = (
    *"abzAZ09'\"-_.,:;!?()[]{}<>|/\\@#$%^&*+=~`",
    *(" ", " ", "  ", "\n", "\r\n", "\t", "\x00", "\x0b", "\x0c", "\x1c", "\x85", "\xa0", "\u1680", "\u2009", "\u200b"),
    *("\u2028", "\u2029", "\u202f", "\u3000", "\ufeff", "\u200d", "\u0301", "\u093e", "\ufe0f", "\U0001f600", "\ufffd"),
    *("é", "ß", "İ", "ſ", "ж", "ש", "ع", "ह", "ก", "한", "中", "文", "。", "ア", "\U00020000", "\U0001d400", "ª", "ʰ"),
    *("²", "½", "Ⅷ", "٣", "३", "①", "〇", "\U0001d7d8", "\U00010107", "\U00011de0", "\U00016ff4", "万"),
    *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "’s", " the", " import", "ing", "return", "        ", "==="),
)
"""Pieces of the text that an encoder is tried on: every class of character, and the edges of the rules."""


class MisfitError(Exception):
    """Why a tokenizer cannot take the fast path."""


class ByteLevelEncoder:
    """`encode_batch_fast` in C; raises MisfitError for a tokenizer that it does not fit or gives other ids for."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        try:
            from data_prep._byte_level import Encoder
        except ImportError as error:
            raise MisfitError(
                f"its C extension was not built ({error}); `pip install` the project again where there is a C compiler"
            ) from error
        if not hasattr(Encoder, "unsettled"):
            raise MisfitError("its C extension was built from older source; `pip install` the project again")
        if sys.byteorder != "little":
            raise MisfitError("this machine is big-endian")
        content = json.loads(tokenizer.to_json())
        codes = class_codes(_isolates_digits(content))
        byte_ids, merges, edges = _tables(content["model"])
        tables = (codes.tobytes(), byte_ids.tobytes(), merges.tobytes(), edges.tobytes())
        self._encoder = Encoder(*tables, _CACHE_BITS, _WINDOW, _PIECE)
        self._try_out(tokenizer, content)

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Raises UnicodeEncodeError (a ValueError) for a text with a lone surrogate."""
        ids, lengths = self._encoder.encode_batch(list(texts))
        return Encoded(np.frombuffer(ids, dtype=np.uint32), np.frombuffer(lengths, dtype=np.int64))

    def encode_long(self, text: LongText, put: Callable[[np.ndarray], object], memory: int = DOCUMENT_MEMORY) -> None:
        with text.mapped() as mapped:

            def take(ids: bytearray, read: int) -> None:
                mapped.forget(read)
                put(np.frombuffer(ids, dtype=np.uint32))

            self._encoder.encode_long(mapped.bytes, take)

    def split(self, text: str) -> np.ndarray:
        """uint32[words], where each word of the text ends in bytes of its UTF-8."""
        return np.frombuffer(self._encoder.split(text), dtype=np.uint32)

    def _try_out(self, tokenizer: TextTokenizer, content: dict[str, Any]) -> None:
        texts = _sample(list(content["model"]["vocab"]), [token["content"] for token in content["added_tokens"]])
        if not same_ids(self.encode_batch(texts), PlainEncoder(tokenizer).encode_batch(texts)):
            raise MisfitError("it gave other ids than `tokenizers` on a sample of text")


def _isolates_digits(content: dict[str, Any]) -> bool:
    """Whether the tokenizer isolates digits; raises MisfitError for any chain but the two that are known."""
    import tokenizers

    version, _ = load_classes()
    if tokenizers.__version__ != version:
        raise MisfitError(
            f"it knows the characters of tokenizers {version}, not {tokenizers.__version__}; "
            "run `python -m data_prep.character_classes`"
        )
    if content["normalizer"] is not None:
        raise MisfitError(f"normalizer {content['normalizer'].get('type')}")
    added = [token["content"] for token in content["added_tokens"] if not token["special"]]
    if added:
        raise MisfitError(f"added token {added[0]!r} is not special, so text can spell it")
    pre = content["pre_tokenizer"] or {"type": "none"}
    chain = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    known = [_DIGITS, _BYTE_LEVEL][-len(chain) :]
    if len(chain) > 2 or not all(expected.items() <= step.items() for step, expected in zip(chain, known, strict=True)):
        raise MisfitError(f"pre-tokenizer {json.dumps(pre)[:200]}")
    return len(chain) == 2


def _tables(model: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids of bytes: uint32[256]; left, right and merged ids and the bytes of the merged token: uint32[merges, 4]; the
    bytes where two tokens meet: uint8[merges, 2]."""
    for name, allowed in _MODEL.items():
        if model.get(name) not in allowed:
            raise MisfitError(f"model {name} {model.get(name)!r}")
    vocab: dict[str, int] = model["vocab"]
    letters = byte_letters()
    missing = [letter for letter in letters if letter not in vocab]
    if missing:
        raise MisfitError(f"{len(missing)} of the 256 byte letters are not in the vocabulary")
    if len(set(vocab.values())) != len(vocab):
        raise MisfitError("two tokens share an id")
    byte_of = {letter: byte for byte, letter in enumerate(letters)}
    pairs = {tuple(merge): None for merge in model["merges"]}
    if len(pairs) != len(model["merges"]):
        raise MisfitError("a merge occurs twice")
    try:
        merges = [(vocab[left], vocab[right], vocab[left + right], len(left + right)) for left, right in pairs]
        edges = [(byte_of[left[-1]], byte_of[right[0]]) for left, right in pairs]
    except (KeyError, IndexError) as error:
        raise MisfitError(f"a merge of something that is no byte or token: {error}") from error
    return (
        np.array([vocab[letter] for letter in letters], dtype=np.uint32),
        np.array(merges, dtype=np.uint32).reshape(-1, 4),
        np.array(edges, dtype=np.uint8).reshape(-1, 2),
    )


def byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary: itself if printable, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _sample(tokens: Sequence[str], specials: Sequence[str]) -> list[str]:
    """Text of the tokenizer's own tokens, alone and in random order, mixed with tricky pieces; the same each time."""
    choose = random.Random(0)
    byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    chosen = choose.sample(tokens, min(len(tokens), 2000))
    spelled = [bytes(byte_of.get(letter, 0x20) for letter in token).decode("utf-8", "ignore") for token in chosen]
    pieces = (*_TRICKY, *specials[:64])
    texts = ["", *pieces, *("x" * 600, " " * 600, "中" * 300, "'" * 100)]
    for kinds in ((pieces,), (spelled,), (pieces, spelled)):
        texts += [
            "".join(choose.choice(choose.choice(kinds)) for _ in range(choose.randrange(2, 60))) for _ in range(200)
        ]
    return texts
