"""Indices of the large gzip streams of a recipe, made once, so that many workers can read one stream."""

from typing import Protocol

from data_prep.formats.gzip_parts import GzipParts
from data_prep.recipe import DataRecipe


class Watcher(Protocol):
    """Is told how the work goes on."""

    def begin(self, what: str, total: int) -> None:
        """Work of `total` bytes begins."""

    def reached(self, done: int) -> None:
        """So many bytes are done."""

    def say(self, line: str) -> None: ...


def index_streams(recipe: DataRecipe, watcher: Watcher, *, everything: bool = False) -> None:
    """Makes the indices that are missing, of streams larger than a shard (`everything`: of all).

    A run that was killed goes on near where it stopped. Raises DataError naming a part that is damaged.
    """
    for source in recipe.sources:
        find = getattr(source, "gzip_streams", None)
        streams: list[GzipParts] = [] if find is None else find()
        large = [stream for stream in streams if everything or stream.size > recipe.shard_bytes]
        if not large:
            watcher.say(f"{source.name}: no gzip stream that needs an index")
        for stream in large:
            if stream.index() is not None:
                watcher.say(f"{stream.path}: has its index")
                continue
            watcher.begin(stream.path.rsplit("/", 1)[-1], stream.size)
            index = stream.make_index(watcher.reached)
            places = f"{len(index.points):,} places to start from" + (
                "" if index.points else ": short, read as a whole"
            )
            watcher.say(f"{stream.path}: {stream.size:,} bytes, {index.content:,} of content, {places}")
