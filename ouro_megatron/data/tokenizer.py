"""The tokenizer as training and generation see it: text to ids and back, and the id that ends a document."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ouro_megatron.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"


class TextTokenizer:
    """A `tokenizers` file with a known end-of-document token.

    `vocab_size`, `eod`, `eos`, `pad` and `unique_identifiers` are what Megatron's GPTDataset asks of a tokenizer.
    """

    pad = -1
    """No id: samples are always full, and an id that occurs in data would be left out of the loss by Megatron."""

    def __init__(self, path: Path, backend: "Tokenizer", eod_token: str, sha256: str) -> None:
        eod = backend.token_to_id(eod_token)
        if eod is None:
            raise DataError(f"{path}: its end-of-document token {eod_token!r} is not in its vocabulary.")
        self.path = path
        self.eod_token = eod_token
        self.eod: int = eod
        self.sha256 = sha256
        self._backend = backend
        # Text that merely spells a special token must stay text; see `encode`.
        self._backend.encode_special_tokens = True
        self.special_ids = frozenset(id for id, token in backend.get_added_tokens_decoder().items() if token.special)
        self._vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: rows that an embedding needs."""
        return self._vocab_size

    @property
    def eos(self) -> int:
        return self.eod

    @property
    def unique_identifiers(self) -> OrderedDict[str, object]:
        """Enters the key of Megatron's index cache; content, not path, so that a moved folder stays valid."""
        return OrderedDict(sha256=self.sha256, eod=self.eod)

    def to_json(self) -> str:
        """The content of tokenizer.json in the form of the installed `tokenizers`, with every default written out."""
        return self._backend.to_str()

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`, nothing added. "<|endoftext|>" in it is plain text unless `special` is set."""
        self._backend.encode_special_tokens = not special
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        finally:
            self._backend.encode_special_tokens = True

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts; without offsets, which makes it about 1.5 times as fast as one by one."""
        return [item.ids for item in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        """`encode`, and for each id the place in `text` (characters) where its own first character stands."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, [start for start, _ in encoding.offsets]

    def piece(self, token: int) -> str | None:
        """The vocabulary's own spelling of a token (byte-level letters, not text); None for an id without one."""
        return self._backend.id_to_token(token)

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of `ids`; a cut character at either end becomes U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)


def tokenizer_file(path: Path) -> Path:
    """tokenizer.json of a folder, or `path` itself when it is a file. Raises DataError when there is none."""
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"{path}: no {TOKENIZER_FILE} there. Make one with `ouro data prepare`, or fix data.tokenizer.")
    return file


def load_tokenizer(path: Path, *, model_vocab: int | None = None) -> TextTokenizer:
    """Opens a tokenizer folder (tokenizer.json beside tokenizer_config.json, which names `eos_token`).

    `model_vocab`: rows of the model's embedding; a tokenizer with ids beyond them is refused.
    Raises DataError for a missing or broken file, an unknown end-of-document token, or too large a vocabulary.
    """
    from tokenizers import Tokenizer

    file = tokenizer_file(path)
    content = file.read_bytes()
    try:
        backend = Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # tokenizers raises bare Exception
        raise DataError(f"{file}: not a tokenizer that `tokenizers` can load ({error}).") from error
    # Limits saved with a tokenizer for other uses would silently cut or fill documents here.
    backend.no_truncation()
    backend.no_padding()
    # It only adds special tokens, which nothing here asks for, and some shift offsets.
    backend.post_processor = None
    tokenizer = TextTokenizer(path, backend, _eos_token(file.parent / CONFIG_FILE), hashlib.sha256(content).hexdigest())
    if model_vocab is not None and tokenizer.vocab_size > model_vocab:
        raise DataError(
            f"{file}: ids run up to {tokenizer.vocab_size - 1} (vocabulary {tokenizer.vocab_size}), "
            f"the model has {model_vocab}. Set model.vocab to {tokenizer.vocab_size} or more, or change the tokenizer."
        )
    return tokenizer


def tokenizer_vocab_size(path: Path) -> int:
    """Rows that an embedding needs for the tokenizer at `path`. Raises DataError as `load_tokenizer` does."""
    return load_tokenizer(path).vocab_size


def _eos_token(config: Path) -> str:
    try:
        content: Any = json.loads(config.read_text(encoding="utf-8"))
        token = content["eos_token"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{config}: must be JSON that names `eos_token`, the end-of-document token ({error})."
        ) from error
    # Hugging Face writes either the string or {"content": string, ...}.
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise DataError(f"{config}: `eos_token` is not a string.")
    return text
