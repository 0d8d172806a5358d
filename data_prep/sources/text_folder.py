"""A folder of plain text files, each one document."""

from collections.abc import Iterator
from typing import ClassVar, Literal

from data_prep.formats.compression import Damaged, codec_of, codec_of_bytes, inflate
from data_prep.formats.files import local, open_file
from data_prep.sources.base import Document, Fault, Report, Unit
from data_prep.sources.tabular import FileSource, is_taken


class TextFolder(FileSource):
    """Text files, plain or compressed, each one document."""

    kind: Literal["text_folder"]
    pattern: str = "**/*.txt{,.gz,.zst,.zstd,.xz,.bz2}"

    has_columns: ClassVar[bool] = False

    def units(self, target_bytes: int) -> list[Unit]:
        return [file.unit() for file in self.files()]

    def read(self, unit: Unit, report: Report) -> Iterator[Document]:
        with open_file(unit.path, self.storage_options) as stream:
            content = stream.read()
            codec = codec_of_bytes(content[:8])
            if codec is not None or (codec_of(unit.path) is not None and not content):
                stream.seek(0)
                try:
                    content = b"".join(inflate(stream, codec or codec_of(unit.path) or ""))
                except Damaged as damage:
                    report(Fault(unit.path, f"byte {damage.at}", damage.reason, ends_unit=True))
                    return
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            report(Fault(unit.path, f"byte {error.start}", f"not UTF-8: {error.reason}"))
            return
        root = local(self.path).rstrip("/") + "/"
        key = unit.path[len(root) :] if unit.path.startswith(root) else unit.path.rsplit("/", 1)[-1]
        if is_taken(key, self.take):
            yield Document(key, text)
