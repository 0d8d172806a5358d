"""The training data of one rank, step by step, with the samples that a rollback leaves out."""

from collections.abc import Callable, Iterator, Sequence

from ouro_megatron.data.packing import PackingReport
from ouro_megatron.data.sampler import MicrobatchReader
from ouro_megatron.data.skipping import Window, position
from ouro_megatron.recipe.schedule import BatchPoint
from ouro_megatron.training.engine import Microbatch


class DataStream:
    """Hands out the microbatches of any step. `open_reader(samples)` makes a reader of at least so many samples.

    Sample k of a blend does not depend on how many are asked for, so a longer reader goes on where a shorter one ended.
    Making one is collective: all ranks build and change their stream together.
    """

    def __init__(
        self,
        open_reader: Callable[[int], MicrobatchReader],
        first: int,
        samples: int,
        windows: Sequence[Window] = (),
    ) -> None:
        """`samples` samples from number `first` of the blend on, apart from `windows`."""
        self._open = open_reader
        self._first = first
        self._samples = samples
        self.windows = tuple(windows)
        self._reader = self._reopen()

    def _reopen(self) -> MicrobatchReader:
        return self._open(self._first + self._samples + sum(window.samples for window in self.windows))

    def leave_out(self, windows: Sequence[Window]) -> None:
        """From now on `windows` are the samples left out. All ranks call it together."""
        self._reader.close()
        self.windows = tuple(windows)
        self._reader = self._reopen()

    def position(self, consumed: int) -> int:
        """The blend's sample that comes after `consumed` ones of this stage."""
        return position(self.windows, self._first + consumed)

    def step(self, before: BatchPoint) -> list[Microbatch]:
        """This rank's microbatches of the step that `before` describes."""
        return list(read(self._reader, self.position(before.consumed_samples), before.samples))

    def source_counts(self, consumed: int, samples: int) -> dict[str, int]:
        """How many of `samples` samples after `consumed` used ones came from each source of the blend."""
        counts: dict[str, int] = {}
        bounds = [window.start for window in self.windows]
        start, left = self.position(consumed), samples
        while left > 0:
            until = min([bound for bound in bounds if bound > start], default=start + left)
            take = min(left, until - start)
            for name, count in self._reader.source_counts(start, start + take).items():
                counts[name] = counts.get(name, 0) + count
            left -= take
            consumed += take
            start = self.position(consumed)
        return counts

    def packing(self) -> dict[str, PackingReport]:
        """By source: how its documents were packed. Empty when they are a stream."""
        return self._reader.packing()

    def close(self) -> None:
        self._reader.close()


def read(reader: MicrobatchReader, first: int, samples: int) -> Iterator[Microbatch]:
    """This rank's microbatches of the global batch of `samples` samples that begins with sample `first`."""
    for batch in reader.step(first, samples):
        yield Microbatch.of(batch)
