"""Documents to ids and loss masks: plain text in batches, conversations and the like one by one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.chat import ChatEncoder
from data_prep.encode import BatchEncoder, Encoded
from data_prep.long_text import LongText
from data_prep.memory import CONVERSATION, DOCUMENT_MEMORY, UNCUT, check_size
from data_prep.sources.base import Document
from ouro_megatron.data.tokenizer import TextTokenizer
from ouro_megatron.errors import DataError


@dataclass(frozen=True)
class EncodedDocuments:
    """Ids of a batch, one document after the other, each with its end-of-document id."""

    outcome: list[int | str]
    """For each document its number of ids, or why it has none."""
    ids: np.ndarray
    """uint32[sum of the numbers in `outcome`]"""
    loss: np.ndarray | None
    """bool, one for each id: whether it counts as a label. None: all do."""

    def only(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """(ids, lengths, loss) of the documents whose entry in `chosen` (bool) is true."""
        lengths = np.array([0 if isinstance(item, str) else item for item in self.outcome], dtype=np.int64)
        if chosen.all():
            return self.ids, lengths, self.loss
        inside = np.repeat(chosen, lengths)
        return self.ids[inside], lengths[chosen], None if self.loss is None else self.loss[inside]


class DocumentEncoder:
    def __init__(
        self,
        tokenizer: TextTokenizer,
        encoder: BatchEncoder,
        folder: Path,
        chat_template: str | None = None,
        memory: int = DOCUMENT_MEMORY,
    ) -> None:
        """`memory`: bytes that a document may take which must be held in one piece."""
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._folder = folder
        self._template = chat_template
        self._memory = memory
        self._chat: _Conversations | None = None

    def encode(self, documents: Sequence[Document]) -> EncodedDocuments:
        """Raises DataError when there are conversations and the tokenizer has no way to write them down."""
        plain = [item.text for item in documents if item.loss_spans is None and item.messages is None]
        encoded = self._encoder.encode_batch(plain).ended_by(self._tokenizer.eod)
        if len(plain) == len(documents):
            return EncodedDocuments(encoded.lengths.tolist(), encoded.ids, None)
        return self._mixed(documents, encoded)

    def check_size(self, document: Document, size: int) -> None:
        """Raises TooLargeError for a document of `size` bytes that would take too much memory."""
        if document.messages is not None:
            check_size("a conversation", size, CONVERSATION, self._memory)
        elif document.loss_spans is not None:
            check_size("a text of which only parts count", size, UNCUT, self._memory)

    def encode_long(self, text: LongText, put: Callable[[np.ndarray], object]) -> None:
        """Ids of a text that is not held in memory, piece by piece, with its end-of-document id. All count.

        Raises TooLargeError as `BatchEncoder.encode_long` does.
        """
        self._encoder.encode_long(text, put, self._memory)
        put(np.array([self._tokenizer.eod], dtype=np.uint32))

    def _mixed(self, documents: Sequence[Document], plain: Encoded) -> EncodedDocuments:
        texts = iter(np.split(plain.ids, np.cumsum(plain.lengths)[:-1])) if len(plain.lengths) else iter(())
        outcome: list[int | str] = []
        ids: list[np.ndarray] = []
        loss: list[np.ndarray] = []
        for document in documents:
            if document.loss_spans is None and document.messages is None:
                row = next(texts)
                mask = np.ones(len(row), dtype=bool)
            else:
                # What the tokenizer cannot do at all ends the run; what is wrong with one document does not.
                encode = self._spans if document.messages is None else self._conversations().encode
                try:
                    row, mask = encode(document)
                except DataError as error:
                    outcome.append(str(error))
                    continue
            outcome.append(len(row))
            ids.append(row)
            loss.append(mask)
        if not ids:
            return EncodedDocuments(outcome, np.zeros(0, np.uint32), np.zeros(0, bool))
        return EncodedDocuments(outcome, np.concatenate(ids), np.concatenate(loss))

    def _spans(self, document: Document) -> tuple[np.ndarray, np.ndarray]:
        """A token counts when its first character lies in a span; the end of the document when the last one does."""
        ids, starts = self._tokenizer.encode_with_starts(document.text)
        wanted = np.zeros(len(document.text) + 1, dtype=bool)
        for start, stop in document.loss_spans or ():
            if not 0 <= start <= stop <= len(document.text):
                raise DataError(f"loss span {start} to {stop} of a text of {len(document.text)} characters")
            wanted[start:stop] = True
        wanted[-1] = wanted[-2]
        mask = wanted[np.array([*starts, len(document.text)], dtype=np.int64)]
        return np.array([*ids, self._tokenizer.eod], dtype=np.uint32), mask

    def _conversations(self) -> "_Conversations":
        if self._chat is None:
            self._chat = _Conversations(ChatEncoder(self._folder, self._template), self._tokenizer.eod)
        return self._chat


class _Conversations:
    def __init__(self, encoder: ChatEncoder, eod: int) -> None:
        self._encoder, self._eod = encoder, eod

    def encode(self, document: Document) -> tuple[np.ndarray, np.ndarray]:
        """The end of the document does not count: the template's own end of a turn is what stops generation."""
        ids, counts = self._encoder.encode_arrays(document.messages or ())
        if not len(ids) or ids[-1] != self._eod:
            ids, counts = np.append(ids, np.uint32(self._eod)), np.append(counts, False)
        return ids, counts
