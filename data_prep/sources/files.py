"""Local files as units of work."""

from itertools import pairwise
from pathlib import Path

from data_prep.sources.base import Unit
from ouro_megatron.errors import DataError


def find_files(name: str, path: Path, pattern: str) -> list[Path]:
    """`path` itself when it is a file, else the files below it that match, in the order of their names.

    Raises DataError naming the source when there are none.
    """
    if path.is_file():
        return [path]
    found = sorted(file for file in path.glob(pattern) if file.is_file())
    if not found:
        raise DataError(f"source {name}: {path} is no file, and no file below it matches {pattern!r}")
    return found


def stamp_of(file: Path) -> str:
    """Changes when the file is written again."""
    status = file.stat()
    return f"{status.st_size}-{status.st_mtime_ns}"


def unit_of(file: Path) -> Unit:
    """All of a file."""
    return Unit(str(file), file.stat().st_size, stamp=stamp_of(file))


def ranges_of(file: Path, target_bytes: int) -> list[Unit]:
    """A plain file in byte ranges of `target_bytes`, the last one 0.5 to 1.5 of it; a small file stays whole."""
    size, stamp = file.stat().st_size, stamp_of(file)
    count = max(1, round(size / target_bytes))
    if count == 1:
        return [Unit(str(file), size, stamp=stamp)]
    bounds = [*range(0, count * target_bytes, target_bytes)[:count], size]
    return [Unit(str(file), stop - start, start, stop, stamp) for start, stop in pairwise(bounds)]
