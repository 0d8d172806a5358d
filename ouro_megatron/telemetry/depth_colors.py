"""One colour a loop, the same in the console, the plots and the report: light for early exits, dark for late ones."""

from collections.abc import Sequence

_STOPS = ((253, 231, 37), (94, 201, 98), (33, 145, 140), (59, 82, 139), (68, 1, 84))
"""Viridis from its bright end: ordered in lightness, and readable by colour-blind people."""


def depth_rgb(depth: int, loops: int) -> tuple[int, int, int]:
    """Colour of loop `depth` (1-based) of `loops`."""
    position = 0.0 if loops <= 1 else (min(depth, loops) - 1) / (loops - 1) * (len(_STOPS) - 1)
    low = min(int(position), len(_STOPS) - 2)
    share = position - low
    mixed = (round(a + (b - a) * share) for a, b in zip(_STOPS[low], _STOPS[low + 1], strict=True))
    return tuple(mixed)  # type: ignore[return-value]


def depth_hex(depth: int, loops: int) -> str:
    return "#{:02x}{:02x}{:02x}".format(*depth_rgb(depth, loops))


def ink_on(rgb: Sequence[int]) -> str:
    """Black or white, whichever reads better on `rgb`."""
    red, green, blue = rgb
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#ffffff"
