"""The numbers that the talk and the paper (arXiv 2510.25741) report, to stand beside ours."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TalkTable:
    """Percent by shape ("12x1") and column."""

    columns: tuple[str, ...]
    rows: dict[str, tuple[float, ...]]
    caption: str


TABLES: dict[str, TalkTable] = {
    "addition": TalkTable(
        ("n=8", "n=16", "n=24", "n=32"),
        {
            "12x1": (100, 100, 100, 100),
            "1x1": (0, 0, 0, 0),
            "1x12": (99.9, 100, 99.9, 99.6),
            "2x1": (85.8, 71.5, 49.3, 38.8),
            "2x6": (100, 99.8, 99.7, 99.5),
            "3x1": (97.2, 78.5, 69.2, 60.7),
            "3x4": (100, 99.1, 97.0, 96.6),
        },
        "Accuracy on sums of n numbers; 1⊗1 is about 0.",
    ),
    "phop": TalkTable(
        ("p=16", "p=32"),
        {
            "6x1": (99.9, 99.6),
            "1x1": (48.9, 49.0),
            "1x6": (99.9, 99.5),
            "2x1": (68.8, 59.4),
            "2x3": (99.9, 99.8),
            "3x1": (97.2, 73.0),
            "3x2": (99.9, 99.5),
        },
        "Accuracy on sequences of 256 symbols.",
    ),
    "mano": TalkTable(
        ("L=10", "L=16", "L=24"),
        {
            "12x1": (93.6, 94.4, 34.8),
            "2x1": (21.5, 8.4, 7.5),
            "2x6": (98.1, 96.3, 78.0),
            "3x1": (75.4, 29.8, 11.0),
            "3x4": (97.9, 95.8, 92.2),
            "6x1": (84.7, 59.5, 20.0),
            "6x2": (93.4, 88.5, 35.1),
        },
        "Accuracy modulo 23, tested on l = L operations.",
    ),
}

SENTENCES: dict[str, str] = {
    "multihop": "6⊗4 needs fewer samples than 6⊗1 for the same accuracy and learns faster; 24⊗1 is the baseline of "
    "equal FLOPs. The talk shows curves, no table.",
    "capo": "About 2 bits a parameter with one loop and with four, for 1M to 40M parameters and 20K to 500K people: "
    "looping adds no capacity.",
    "prior": "The uniform prior has the lowest and smoothest loss; with a geometric prior the gap widens as eta grows "
    "from 0.1 to 0.9, and the deeper loops are starved (776M parameters, 4 loops, 20B tokens; figure 10).",
}


def beside(name: str, shape: str) -> str:
    """The talk's numbers of a shape in one cell of a table; empty when it has none."""
    table = TABLES.get(name)
    if table is None or shape not in table.rows:
        return ""
    return " / ".join(f"{value:g}" for value in table.rows[shape])
