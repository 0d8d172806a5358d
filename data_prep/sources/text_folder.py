"""A folder of plain text files, each one document."""

from codecs import BOM_UTF8
from collections.abc import Iterator
from itertools import chain
from typing import BinaryIO, ClassVar, Literal

from data_prep.formats.compression import Damaged, codec_of, codec_of_bytes, inflate
from data_prep.formats.files import local, open_file, pieces
from data_prep.long_text import LONG, long_text
from data_prep.sources.base import Document, Fault, Report, Unit
from data_prep.sources.tabular import FileSource, is_taken

_PIECE = 1 << 20


class TextFolder(FileSource):
    """Text files, plain or compressed, each one document."""

    kind: Literal["text_folder"]
    pattern: str = "**/*.txt{,.gz,.zst,.zstd,.xz,.bz2}"

    has_columns: ClassVar[bool] = False

    def units(self, target_bytes: int) -> list[Unit]:
        return [file.unit() for file in self.files()]

    def read(self, unit: Unit, report: Report) -> Iterator[Document]:
        root = local(self.path).rstrip("/") + "/"
        key = unit.path[len(root) :] if unit.path.startswith(root) else unit.path.rsplit("/", 1)[-1]
        try:
            with open_file(unit.path, self.storage_options) as stream:
                document = self._document(key, _content(unit, stream))
        except Damaged as damage:
            report(Fault(unit.path, f"byte {damage.at}", damage.reason, ends_unit=True))
            return
        except UnicodeDecodeError as error:
            report(Fault(unit.path, f"byte {error.start}", f"not UTF-8: {error.reason}"))
            return
        try:
            if is_taken(document, self.take):
                yield document
        finally:
            if document.long_text is not None:
                document.long_text.close()

    def _document(self, key: str, content: Iterator[bytes]) -> Document:
        """Raises Damaged and UnicodeDecodeError."""
        first: list[bytes] = []
        size = 0
        for piece in content:
            first.append(piece)
            size += len(piece)
            if size > LONG and self._scratch is not None:
                return Document(key, "", long_text=long_text(chain(first, content), self._scratch))
        return Document(key, b"".join(first).decode("utf-8"))


def _content(unit: Unit, stream: BinaryIO) -> Iterator[bytes]:
    """What the file holds, inflated, without a byte order mark."""
    head = stream.read(8)
    stream.seek(0)
    codec = codec_of_bytes(head) or (codec_of(unit.path) if not head else None)
    content = pieces(stream, _PIECE) if codec is None else inflate(stream, codec)
    beginning = b""
    for piece in content:
        beginning += piece
        if len(beginning) >= len(BOM_UTF8):
            break
    yield beginning.removeprefix(BOM_UTF8)
    yield from content
