"""Samples that a rollback leaves out."""

from hypothesis import given
from hypothesis import strategies as st

from ouro_megatron.data.skipping import Window, position, with_window


def test_a_window_is_jumped() -> None:
    windows = [Window(10, 20)]
    assert [position(windows, consumed) for consumed in (0, 9, 10, 11, 20)] == [0, 9, 20, 21, 30]


def test_a_longer_return_takes_the_windows_behind_it_along() -> None:
    windows = with_window(with_window((), Window(10, 20)), Window(30, 40))
    assert windows == (Window(10, 20), Window(30, 40))
    assert with_window(windows, Window(5, 60)) == (Window(5, 60),)
    assert with_window(windows, Window(25, 60)) == (Window(10, 20), Window(25, 60))


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 10)), max_size=5), st.integers(1, 60))
def test_every_sample_outside_is_read_once_in_order(gaps: list[tuple[int, int]], count: int) -> None:
    windows, at = [], 0
    for gap, length in gaps:
        windows.append(Window(at + gap, at + gap + length))
        at += gap + length
    read = [position(windows, consumed) for consumed in range(count)]
    wanted = [k for k in range(count + at + 1) if not any(w.start <= k < w.end for w in windows)]
    assert read == wanted[:count]
