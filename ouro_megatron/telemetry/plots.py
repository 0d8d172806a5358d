"""The report's pictures. All take the stages of a run in order and draw over the tokens of all of them together."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ouro_megatron.telemetry.depth_colors import depth_hex
from ouro_megatron.telemetry.records import EvalRecord, StepRecord
from ouro_megatron.telemetry.run_reader import Stage
from ouro_megatron.telemetry.text import big

_STAGE_LINES = (":", "--", "-.", "-")
_INK, _MUTED, _GRID, _LINE = "#1f2933", "#6b7785", "#e3e8ee", "#2b5c8a"
_STYLE = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _GRID,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "text.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.dpi": 130,
}


@dataclass(frozen=True)
class Timeline:
    """Steps and evaluations of all stages on one token axis."""

    stages: Sequence[Stage]
    starts: Sequence[int]
    """Tokens consumed before each stage."""

    @classmethod
    def of(cls, stages: Sequence[Stage]) -> "Timeline":
        starts, total = [], 0
        for stage in stages:
            starts.append(total)
            total += stage.steps[-1].tokens if stage.steps else 0
        return cls(stages, starts)

    @property
    def loops(self) -> int:
        return max((stage.loops for stage in self.stages), default=1)

    def steps(self) -> list[tuple[int, StepRecord]]:
        return [
            (start + step.tokens, step)
            for stage, start in zip(self.stages, self.starts, strict=True)
            for step in stage.steps
        ]

    def evaluations(self) -> list[tuple[int, EvalRecord]]:
        return [
            (start + record.tokens, record)
            for stage, start in zip(self.stages, self.starts, strict=True)
            for record in stage.evaluations
        ]


def _at(values: Sequence[float], loop: int) -> float:
    return values[loop] if loop < len(values) else math.nan


def _finish(axes: Axes, timeline: Timeline, title: str, label: str) -> None:
    axes.set_title(title)
    axes.set_ylabel(label)
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(lambda value, _: big(value) if value else "0")
    for stage, start in zip(timeline.stages, timeline.starts, strict=True):
        if start:
            axes.axvline(start, color=_MUTED, linewidth=0.8, linestyle=":")
        if len(timeline.stages) > 1:
            axes.annotate(
                stage.name,
                (start, 0.02),
                xycoords=("data", "axes fraction"),
                xytext=(3, 2),
                textcoords="offset points",
                fontsize=7,
                color=_MUTED,
                va="bottom",
                rotation=90,
            )


def _limit(axes: Axes, values: Sequence[float]) -> None:
    """Keeps one wild step from flattening the rest of the curve."""
    finite = np.array([value for value in values if math.isfinite(value)])
    if len(finite) < 5:
        return
    low, high = float(finite.min()), float(np.percentile(finite, 99.0))
    margin = max(1e-9, 0.06 * (high - low))
    axes.set_ylim(low - margin, high + margin)


def draw_loss(axes: Axes, timeline: Timeline) -> None:
    """Training loss of each loop, held-out points on top, and the unigram entropy as a yardstick."""
    steps, evaluations = timeline.steps(), timeline.evaluations()
    seen: list[float] = []
    for loop in range(timeline.loops):
        colour = depth_hex(loop + 1, timeline.loops)
        values = [_at(step.loops.ce, loop) for _, step in steps]
        seen += values
        axes.plot([x for x, _ in steps], values, color=colour, linewidth=1.1, label=f"loop {loop + 1}")
        axes.plot(
            [x for x, _ in evaluations],
            [_at(record.loops.ce, loop) for _, record in evaluations],
            "o",
            color=colour,
            markersize=4.5,
            markeredgecolor="white",
            markeredgewidth=0.6,
        )
    known = [stage.unigram_entropy for stage in timeline.stages if stage.unigram_entropy is not None]
    if known:
        axes.axhline(known[-1], color=_INK, linewidth=0.9, linestyle="--", label="unigram entropy")
        seen.append(known[-1])
    _limit(axes, seen)
    _finish(axes, timeline, "Loss by loop (dots: held out)", "nats a token")
    axes.legend(loc="upper right")


def draw_exit(axes: Axes, timeline: Timeline) -> None:
    """The exit distribution over time, loop 1 at the bottom."""
    steps = timeline.steps()
    shares = [
        np.nan_to_num(np.array([_at(step.loops.exit_probability, loop) for _, step in steps]))
        for loop in range(timeline.loops)
    ]
    if steps:
        colours = [depth_hex(loop + 1, timeline.loops) for loop in range(timeline.loops)]
        labels = [f"loop {loop + 1}" for loop in range(timeline.loops)]
        axes.stackplot([x for x, _ in steps], *shares, colors=colours, labels=labels, linewidth=0)
    axes.set_ylim(0, 1)
    axes.grid(visible=False)
    _finish(axes, timeline, "Exit distribution", "probability")


def draw_depth(axes: Axes, timeline: Timeline) -> None:
    """Expected depth, and the entropy of the exit distribution on a second axis."""
    steps = timeline.steps()
    x = [position for position, _ in steps]
    axes.plot(x, [step.loops.expected_depth for _, step in steps], color=_LINE, linewidth=1.3, label="expected depth")
    axes.set_ylim(1, max(2, timeline.loops))
    second = axes.twinx()
    second.plot(x, [step.loops.entropy for _, step in steps], color="#c7622b", linewidth=1.0, label="entropy")
    second.set_ylim(0, max(0.1, math.log(max(2, timeline.loops)) * 1.05))
    second.set_ylabel("entropy (nats)", color="#c7622b")
    second.grid(False)
    second.spines["right"].set_visible(True)
    _finish(axes, timeline, "Expected depth and exit entropy", "loops")


def draw_gradient(axes: Axes, timeline: Timeline) -> None:
    """Gradient norm before clipping; skipped steps are marked at the bottom."""
    steps = timeline.steps()
    norms = [step.grad_norm for _, step in steps]
    axes.plot([x for x, _ in steps], norms, color=_LINE, linewidth=1.0)
    _limit(axes, norms)
    skipped = [x for x, step in steps if step.skipped]
    if skipped:
        axes.plot(skipped, [axes.get_ylim()[0]] * len(skipped), "x", color="#b3261e", label="skipped")
        axes.legend(loc="upper right")
    _finish(axes, timeline, "Gradient norm", "norm")


def draw_rate(axes: Axes, timeline: Timeline) -> None:
    """Learning rate."""
    steps = timeline.steps()
    axes.plot([x for x, _ in steps], [step.lr for _, step in steps], color=_LINE, linewidth=1.3)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    _finish(axes, timeline, "Learning rate", "")


def draw_throughput(axes: Axes, timeline: Timeline) -> None:
    """Tokens per second of all ranks together."""
    steps = timeline.steps()
    axes.plot([x for x, _ in steps], [step.tokens_per_second for _, step in steps], color=_LINE, linewidth=1.0)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: big(value) if value else "0")
    _finish(axes, timeline, "Throughput", "tokens / s")


def draw_final(axes: Axes, timeline: Timeline) -> None:
    """Held-out loss against the loop it was read after, one line a stage, at the stage's end."""
    stages = [stage for stage in timeline.stages if stage.evaluations]
    for index, stage in enumerate(stages):
        ce = stage.evaluations[-1].loops.ce
        loops = range(1, len(ce) + 1)
        last = index == len(stages) - 1
        style = _STAGE_LINES[index % len(_STAGE_LINES)]
        axes.plot(loops, ce, style, color=_LINE if last else _MUTED, linewidth=1.3, label=stage.name, zorder=2)
        for loop, value in zip(loops, ce, strict=True):
            axes.plot(loop, value, "o", color=depth_hex(loop, timeline.loops), markersize=8, zorder=3)
            if last:
                axes.annotate(
                    f"{value:.3f}", (loop, value), (0, -15), textcoords="offset points", ha="center", fontsize=8
                )
    if stages:
        axes.legend(loc="center right")
    axes.margins(x=0.12, y=0.16)
    axes.set_title("Held-out loss by loop at the end of each stage")
    axes.set_xlabel("loop")
    axes.set_xticks(range(1, timeline.loops + 1))
    axes.set_ylabel("nats a token")


FIGURES: dict[str, Callable[[Axes, Timeline], None]] = {
    "loss": draw_loss,
    "exit-distribution": draw_exit,
    "depth": draw_depth,
    "held-out": draw_final,
    "gradient-norm": draw_gradient,
    "learning-rate": draw_rate,
    "throughput": draw_throughput,
}
_SUMMARY = ("loss", "exit-distribution", "depth", "held-out", "gradient-norm", "throughput")


def write_figures(stages: Sequence[Stage], folder: Path) -> dict[str, Path]:
    """One PNG a figure and summary.png; returns their paths by name."""
    timeline = Timeline.of(stages)
    written = {}
    with plt.rc_context(_STYLE):
        for name, draw in FIGURES.items():
            figure, axes = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
            draw(axes, timeline)
            written[name] = _save(figure, folder / f"{name}.png")
        figure, grid = plt.subplots(2, 3, figsize=(16, 7.6), layout="constrained")
        for name, axes in zip(_SUMMARY, grid.flat, strict=True):
            FIGURES[name](axes, timeline)
        written["summary"] = _save(figure, folder / "summary.png")
    return written


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
