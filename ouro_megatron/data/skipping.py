"""Samples a run leaves out: after a rollback it goes on behind the data that led to it. Pure arithmetic."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Window:
    """Samples [start, end) of the blend that are never read (again)."""

    start: int
    end: int

    @property
    def samples(self) -> int:
        return self.end - self.start


def position(windows: Sequence[Window], consumed: int) -> int:
    """The sample that comes next after `consumed` samples were used, all windows left out.

    `windows`: sorted, apart from each other, as `with_window` makes them.
    """
    at = consumed
    for window in windows:
        if at < window.start:
            break
        at += window.samples
    return at


def with_window(windows: Sequence[Window], new: Window) -> tuple[Window, ...]:
    """`windows` and `new`, which covers those that begin behind its start: they belong to what was rolled back."""
    return (*(window for window in windows if window.start < new.start), new)


def windows_of(bounds: Iterable[tuple[int, int]]) -> tuple[Window, ...]:
    """The windows of rollbacks in their order, as (start, end)."""
    windows: tuple[Window, ...] = ()
    for start, end in bounds:
        windows = with_window(windows, Window(start, end))
    return windows
