"""Files by path or fsspec URL: found in an order that never changes, opened for reading."""

import io
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, cast

from data_prep.formats.remote import Options, RemoteFile, list_remote
from data_prep.sources.base import Unit
from ouro_megatron.errors import DataError

_REMOTE_BUFFER = 1 << 20


@dataclass(frozen=True)
class File:
    path: str
    size: int
    """Bytes on disk."""
    stamp: str
    """Changes when the file is written again."""

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @property
    def folder(self) -> str:
        return self.path.rpartition("/")[0]

    def unit(self, start: int = 0, stop: int | None = None, size: int | None = None) -> Unit:
        return Unit(self.path, self.size if size is None else size, start, stop, self.stamp)


def is_url(path: str) -> bool:
    return "://" in path or "::" in path


def local(path: str) -> str:
    """`path` without file://, which needs no fsspec."""
    return path.removeprefix("file://") if path.startswith("file:///") else path


def find_files(source: str, path: str, pattern: str, options: Options) -> list[File]:
    """`path` itself when it is a file, else the files below it that match `pattern`, ordered by path.

    `pattern` knows `*`, `?`, `[a-z]`, `{one,two}` and `**/` (any number of folders). `path` may end in a pattern of
    its own. What begins with a dot is left out: downloaders keep their notes there.
    Raises DataError naming the source when there is nothing.
    """
    path = local(path)
    base, own = _split_glob(path)
    if own and not Path(path).exists():
        path, pattern = base, own
    matches = _matcher(pattern)
    found = _remote_files(path, matches, options) if is_url(path) else _local_files(path, matches)
    if not found:
        raise DataError(f"source {source}: {path} is no file, and no file below it matches {pattern!r}")
    return found


def _split_glob(path: str) -> tuple[str, str]:
    parts = path.split("/")
    for index, part in enumerate(parts):
        if re.search(r"[*?{]|\[.+\]", part):
            return "/".join(parts[:index]) or ("/" if path.startswith("/") else "."), "/".join(parts[index:])
    return path, ""


def _matcher(pattern: str) -> Callable[[str], bool]:
    out, index, alternatives = "", 0, 0
    while index < len(pattern):
        char = pattern[index]
        if pattern.startswith("**/", index):
            out, index = out + "(?:[^/]+/)*", index + 3
            continue
        if char == "*":
            out += "[^/]*"
        elif char == "?":
            out += "[^/]"
        elif char == "{":
            out, alternatives = out + "(?:", alternatives + 1
        elif char == "}" and alternatives:
            out, alternatives = out + ")", alternatives - 1
        elif char == "," and alternatives:
            out += "|"
        elif char == "[" and (end := pattern.find("]", index + 2)) > 0:
            out += "[" + pattern[index + 1 : end].replace("!", "^", 1) + "]"
            index = end
        else:
            out += re.escape(char)
        index += 1
    try:
        compiled = re.compile(out)
    except re.error as error:
        raise DataError(f"{pattern!r} is no file pattern: {error}") from error
    return lambda name: (
        compiled.fullmatch(name) is not None and not any(part.startswith(".") for part in name.split("/"))
    )


def _local_files(path: str, matches: Callable[[str], bool]) -> list[File]:
    root = Path(path)
    if root.is_file():
        return [local_file(root)]
    found = []
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            file = Path(folder) / name
            if matches(file.relative_to(root).as_posix()):
                if not file.exists():
                    raise DataError(f"{file}: a link to a file that is not there; finish the download")
                found.append(local_file(file))
    return sorted(found, key=lambda file: file.path)


def local_file(file: Path) -> File:
    """A file of this machine."""
    status = file.stat()
    return File(str(file), status.st_size, f"{status.st_size}-{status.st_mtime_ns}")


def _remote_files(path: str, matches: Callable[[str], bool], options: Options) -> list[File]:
    return sorted((File(*listed) for listed in list_remote(path, matches, options)), key=lambda file: file.path)


def open_file(path: str, options: Options) -> BinaryIO:
    """Opens for reading from the beginning; seekable. Remote reads are tried again at the same place when they fail.

    Raises DataError when the file cannot be opened.
    """
    if is_url(path):
        return cast("BinaryIO", io.BufferedReader(RemoteFile(path, options), _REMOTE_BUFFER))
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def byte_ranges(file: File, target_bytes: int) -> list[Unit]:
    """A plain file in ranges of `target_bytes`, the last one 0.5 to 1.5 of it; a small file stays whole."""
    count = max(1, round(file.size / target_bytes))
    if count == 1:
        return [file.unit()]
    bounds = [*(index * target_bytes for index in range(count)), file.size]
    return [file.unit(start, stop, stop - start) for start, stop in pairwise(bounds)]


def pieces(stream: BinaryIO, size: int) -> Iterator[bytes]:
    """All of a stream in pieces of at most `size` bytes."""
    while piece := stream.read(size):
        yield piece
