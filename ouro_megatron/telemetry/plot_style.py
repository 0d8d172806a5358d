"""How the project's pictures look: colours and matplotlib settings, the same in the report and in evaluations."""

INK, MUTED, GRID, LINE, SECOND = "#1f2933", "#6b7785", "#e3e8ee", "#2b5c8a", "#c7622b"
STYLE = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.dpi": 130,
}
