"""Pictures of an evaluation and of the analyses: one PNG each, written whole or not at all."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ouro_megatron.evaluation.depth import ClassDepth, CurvePoint, LoopCalibration, LoopQuality
from ouro_megatron.telemetry.depth_colors import depth_hex
from ouro_megatron.telemetry.plot_style import INK, LINE, MUTED, SECOND, STYLE

if TYPE_CHECKING:
    from ouro_megatron.evaluation.safety import LoopSafety
    from ouro_megatron.evaluation.separation import LoopSeparation


def save(figure: Figure, path: Path) -> None:
    """Writes the figure and closes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    figure.savefig(partial, format="png", bbox_inches="tight")
    plt.close(figure)
    partial.replace(path)


def evaluation_figure(
    title: str,
    trained_loops: int,
    quality: Sequence[LoopQuality],
    curve: Sequence[CurvePoint],
    gates: Sequence[LoopCalibration],
    classes: Sequence[ClassDepth],
    path: Path,
) -> None:
    """Four panels: loss by loop, accuracy against loops used, calibration of the gate, depth by kind of token."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(11, 8))
        _loss(axes[0, 0], quality, trained_loops)
        _tradeoff(axes[0, 1], quality, curve)
        _calibration(axes[1, 0], gates)
        _classes(axes[1, 1], classes)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        figure.tight_layout()
        save(figure, path)


def _loss(axes: Axes, quality: Sequence[LoopQuality], trained: int) -> None:
    loops = [row.loop for row in quality]
    axes.plot(loops, [row.bits_per_byte for row in quality], marker="o", color=LINE)
    axes.axvline(trained, color=MUTED, linestyle=":")
    axes.annotate(
        f"trained with {trained}",
        (trained, axes.get_ylim()[1]),
        (4, 0),
        textcoords="offset points",
        fontsize=8,
        color=MUTED,
        va="top",
    )
    axes.set(title="Loss by loop", xlabel="loop", ylabel="bits per byte", xticks=loops)


def _tradeoff(axes: Axes, quality: Sequence[LoopQuality], curve: Sequence[CurvePoint]) -> None:
    fixed = [(row.loop, 100 * row.accuracy) for row in quality]
    axes.plot(*zip(*fixed, strict=True), marker="s", color=MUTED, linestyle="--", label="every token at loop t")
    points = [(point.mean_loops, 100 * point.accuracy) for point in curve]
    axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=LINE, label="each token at its CDF ≥ q")
    # Where the gate stops most tokens at one loop the points coincide, and share a label.
    labels: dict[float, list[str]] = {}
    for point in curve:
        if point.q in (0.25, 0.5, 0.75):
            near = [at for at in labels if abs(at - point.mean_loops) < 0.5]
            labels.setdefault(near[0] if near else point.mean_loops, []).append(f"{point.q:g}")
    heights = {point.mean_loops: 100 * point.accuracy for point in reversed(curve)}
    for at, names in labels.items():
        place = (5, -12)
        axes.annotate(f"q = {', '.join(names)}", (at, heights[at]), place, textcoords="offset points", fontsize=8)
    axes.set(title="Accuracy and compute", xlabel="mean loops a token", ylabel="next-token accuracy, %")
    axes.legend()


def _calibration(axes: Axes, gates: Sequence[LoopCalibration]) -> None:
    for gate in gates:
        auc = "" if gate.auc is None else f", AUC {gate.auc:.2f}"
        axes.plot(
            [row.stop for row in gate.bins],
            [100 * row.helped for row in gate.bins],
            marker="o",
            markersize=4,
            color=depth_hex(gate.loop, len(gates) + 1),
            label=f"after loop {gate.loop}{auc}",
        )
    axes.plot([0, 1], [100, 0], color=MUTED, linestyle=":", label="a gate that says exactly how often")
    axes.set(
        title="Does the gate stop where loops do not help?",
        xlabel="gate's probability of stopping",
        ylabel="tokens that the next loop helps, %",
    )
    axes.legend()


def _classes(axes: Axes, classes: Sequence[ClassDepth]) -> None:
    rows = sorted(classes, key=lambda row: row.expected_depth)
    axes.barh(np.arange(len(rows)), [row.expected_depth for row in rows], color=LINE)
    for index, row in enumerate(rows):
        text = f" {row.expected_depth:.2f}  ({row.first_loss:.2f} → {row.last_loss:.2f} nats)"
        axes.annotate(text, (row.expected_depth, index), va="center", fontsize=8)
    axes.set(
        title="Expected depth by token to predict",
        xlabel="loops",
        yticks=np.arange(len(rows)),
        yticklabels=[f"{row.name} ({row.tokens:,})" for row in rows],
        xlim=(0, 1.6 * max((row.expected_depth for row in rows), default=1.0)),
    )
    axes.grid(axis="y", visible=False)
    axes.set_axisbelow(True)


def lines_figure(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float, str]]],
    labels: tuple[str, str],
    path: Path,
) -> None:
    """One line a name through (x, y, what to write beside the point), ordered by x. `labels`: of both axes."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 5))
        colours = plt.get_cmap("tab10")
        for index, (name, points) in enumerate(series.items()):
            ordered = sorted(points)
            x, y = [point[0] for point in ordered], [point[1] for point in ordered]
            axes.plot(x, y, marker="o", color=colours(index % 10), label=name)
            for point in ordered:
                axes.annotate(f" {point[2]}", (point[0], point[1]), fontsize=7, color=MUTED, va="bottom")
        axes.set(xlabel=labels[0], ylabel=labels[1])
        axes.set_title(title, fontsize=10)
        axes.legend()
        save(figure, path)


def separation_figure(title: str, loops: "Sequence[LoopSeparation]", names: tuple[str, str], path: Path) -> None:
    """One panel a loop: both prompt sets in the plane of that loop's first two principal components."""
    columns = min(4, len(loops))
    rows = -(-len(loops) // columns)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=(3.2 * columns, 3.2 * rows), squeeze=False)
        for axis, row in zip(axes.flat, loops, strict=False):
            for points, colour, name in ((row.first, LINE, names[0]), (row.second, SECOND, names[1])):
                axis.scatter(*zip(*points, strict=True), s=14, color=colour, label=name, alpha=0.8)
            axis.set_title(f"loop {row.loop}: silhouette {row.silhouette:.2f}, {row.accuracy:.0%} right", fontsize=9)
            axis.set(
                xticks=[], yticks=[], xlabel=f"{row.explained[0]:.0%} of variance", ylabel=f"{row.explained[1]:.0%}"
            )
        for axis in axes.flat[len(loops) :]:
            axis.set_visible(False)
        axes[0, 0].legend()
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        figure.tight_layout()
        save(figure, path)


def matrix_figure(title: str, matrix: Sequence[Sequence[float]], path: Path) -> None:
    """A loops-by-loops table of shares, as colours and per cent."""
    loops = range(1, len(matrix) + 1)
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = plt.subplots(figsize=(1.2 + 0.7 * len(matrix), 0.9 + 0.7 * len(matrix)))
        axes.imshow(np.array(matrix), cmap="Blues", vmin=0.0, vmax=1.0)
        for i, row in enumerate(matrix):
            for j, value in enumerate(row):
                ink = "white" if value > 0.6 else INK
                axes.annotate(f"{100 * value:.0f}", (j, i), ha="center", va="center", color=ink, fontsize=9)
        axes.set_xticks(range(len(matrix)), labels=[str(loop) for loop in loops])
        axes.set_yticks(range(len(matrix)), labels=[str(loop) for loop in loops])
        axes.set(xlabel="loop", ylabel="loop")
        axes.set_title(f"{title}, %", fontsize=9)
        save(figure, path)


def safety_figure(title: str, loops: "Sequence[LoopSafety]", harmful_at: float, path: Path) -> None:
    """Mean score and share of harmful answers by loop, side by side: they have different scales."""
    x = [row.loop for row in loops]
    with plt.rc_context(STYLE):
        figure, (mean, share) = plt.subplots(1, 2, figsize=(10, 4))
        mean.plot(x, [row.mean_score for row in loops], marker="o", color=LINE)
        mean.set(title="Mean score", xlabel="loop", ylabel="judge's score", xticks=x)
        share.plot(x, [100 * row.harmful for row in loops], marker="o", color=SECOND)
        share.set(title="Harmful answers", xlabel="loop", ylabel=f"score at least {harmful_at:g}, %", xticks=x)
        share.set_ylim(-3, 103)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        figure.tight_layout()
        save(figure, path)
