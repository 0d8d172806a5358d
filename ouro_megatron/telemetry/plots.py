"""The report's pictures. All take the stages of a run in order and draw over the tokens of all of them together."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ouro_megatron.telemetry.depth_colors import depth_hex
from ouro_megatron.telemetry.plot_style import INK, LINE, MUTED, SECOND, STYLE
from ouro_megatron.telemetry.records import StepRecord
from ouro_megatron.telemetry.run_reader import Stage
from ouro_megatron.telemetry.text import big
from ouro_megatron.telemetry.timeline import Span, Timeline

_ALARM = "#b3261e"
_BRANCH_LINES = ("-", "--", "-.", ":")


def _style(branch: int) -> str:
    return _BRANCH_LINES[branch % len(_BRANCH_LINES)]


def _at(values: Sequence[float], loop: int) -> float:
    return values[loop] if loop < len(values) else math.nan


def _finish(axes: Axes, timeline: Timeline, title: str, label: str) -> None:
    axes.set_title(title)
    axes.set_ylabel(label)
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(lambda value, _: big(value) if value else "0")
    if timeline.end:
        axes.set_xlim(0, timeline.end)
    if len(timeline.spans) > 1:
        _stage_bounds(axes, timeline)


def _label_places(starts: Sequence[int], end: int) -> list[float]:
    """Where the stages' names go: at their starts, moved apart so that none covers another or leaves the picture."""
    width, places, free = 0.026 * end, list[float](), 0.0
    for start in starts:
        places.append(max(float(start), free))
        free = places[-1] + width
    return [min(place, end - width * (len(starts) - number)) for number, place in enumerate(places)]


def in_short(names: Sequence[str]) -> str:
    """Names of stages that begin together; what branches have in common at the end is said once."""
    parts = [name.split("-") for name in names]
    shared = 0
    while len(names) > 1 and all(len(part) > shared + 1 for part in parts):
        if len({part[-1 - shared] for part in parts}) > 1:
            break
        shared += 1
    if not shared:
        return " | ".join(names)
    return f"{' | '.join('-'.join(part[:-shared]) for part in parts)}: {'-'.join(parts[0][-shared:])}"


def _stage_bounds(axes: Axes, timeline: Timeline) -> None:
    """Every other stage shaded, a line where each begins, names along it; short stages' names move aside."""
    starts = timeline.starts
    for number, (start, at) in enumerate(zip(starts, _label_places(starts, timeline.end), strict=True)):
        names = [span.stage.name for span in timeline.spans if span.start == start]
        end = starts[number + 1] if number + 1 < len(starts) else timeline.end
        if number % 2:
            axes.axvspan(start, end, color=INK, alpha=0.045, linewidth=0, zorder=0)
        if start:
            axes.axvline(start, color=MUTED, linewidth=0.8, linestyle=":")
        axes.annotate(
            in_short(names),
            (at, 0.02),
            xycoords=("data", "axes fraction"),
            xytext=(3, 2),
            textcoords="offset points",
            fontsize=6.5,
            color=INK,
            va="bottom",
            rotation=90,
            zorder=5,
            bbox={"facecolor": "white", "alpha": 0.6, "linewidth": 0, "pad": 0.6},
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
    seen: list[float] = []
    for loop in range(timeline.loops):
        colour = depth_hex(loop + 1, timeline.loops)
        for branch in timeline.branches:
            steps, evaluations = timeline.steps(branch), timeline.evaluations(branch)
            values = [_at(step.loops.ce, loop) for _, step in steps]
            seen += values
            label = f"loop {loop + 1}" if branch == 0 else None
            axes.plot([x for x, _ in steps], values, _style(branch), color=colour, linewidth=1.1, label=label)
            axes.plot(
                [x for x, _ in evaluations],
                [_at(record.loops.ce, loop) for _, record in evaluations],
                "o" if branch == 0 else "s",
                color=colour,
                markersize=4.5,
                markeredgecolor="white",
                markeredgewidth=0.6,
            )
    known = [span.stage.unigram_entropy for span in timeline.spans if span.stage.unigram_entropy is not None]
    if known:
        axes.axhline(known[-1], color=INK, linewidth=0.9, linestyle="--", label="unigram entropy")
        seen.append(known[-1])
    _limit(axes, seen)
    _finish(axes, timeline, "Loss by loop (dots: held out)", "nats a token")
    axes.legend(loc="upper right")


def draw_exit(axes: Axes, timeline: Timeline) -> None:
    """The exit distribution over time, loop 1 at the bottom; of further branches only the bounds between loops."""
    colours = [depth_hex(loop + 1, timeline.loops) for loop in range(timeline.loops)]
    for span, steps in _pieces(timeline):
        shares = [
            np.nan_to_num(np.array([_at(step.loops.exit_probability, loop) for _, step in steps]))
            for loop in range(timeline.loops)
        ]
        x = [position for position, _ in steps]
        if span.branch == 0:
            axes.stackplot(x, *shares, colors=colours, linewidth=0)
        else:
            for bound in np.cumsum(shares, axis=0)[:-1]:
                axes.plot(x, bound, _style(span.branch), color=INK, linewidth=0.8)
    axes.set_ylim(0, 1)
    axes.grid(visible=False)
    _finish(axes, timeline, "Exit distribution", "probability")


def draw_depth(axes: Axes, timeline: Timeline) -> None:
    """Expected depth, and the entropy of the exit distribution on a second axis."""
    second = axes.twinx()
    for branch in timeline.branches:
        steps = timeline.steps(branch)
        x, style = [position for position, _ in steps], _style(branch)
        axes.plot(x, [step.loops.expected_depth for _, step in steps], style, color=LINE, linewidth=1.3)
        second.plot(x, [step.loops.entropy for _, step in steps], style, color=SECOND, linewidth=1.0)
    axes.set_ylim(1, max(2, timeline.loops))
    second.set_ylim(0, max(0.1, math.log(max(2, timeline.loops)) * 1.05))
    second.set_ylabel("entropy (nats)", color=SECOND)
    second.grid(False)
    second.spines["right"].set_visible(True)
    _finish(axes, timeline, "Expected depth and exit entropy", "loops")


def _pieces(timeline: Timeline) -> Iterator[tuple[Span, list[tuple[int, StepRecord]]]]:
    """Each stage's steps by their place on the axis. The first one is drawn from the stage's start on, so that what
    jumps between stages is no slope and a stage of one step is a line."""
    for span in timeline.spans:
        steps = [(span.start + step.tokens, step) for step in span.stage.steps]
        if steps:
            yield span, [(span.start, steps[0][1]), *steps]


def _draw_line(axes: Axes, timeline: Timeline, value: Callable[[StepRecord], float]) -> list[float]:
    """One line a stage; returns all values."""
    seen = []
    for span, steps in _pieces(timeline):
        values = [value(step) for _, step in steps]
        seen += values
        axes.plot([x for x, _ in steps], values, _style(span.branch), color=LINE, linewidth=1.0)
    return seen


def draw_gradient(axes: Axes, timeline: Timeline) -> None:
    """Gradient norm before clipping; skipped updates are marked at the bottom, rollbacks by a line."""
    _limit(axes, _draw_line(axes, timeline, lambda step: step.grad_norm))
    steps = [entry for branch in timeline.branches for entry in timeline.steps(branch)]
    skipped = [x for x, step in steps if step.skipped]
    if skipped:
        axes.plot(skipped, [axes.get_ylim()[0]] * len(skipped), "x", color=_ALARM, label="skipped", clip_on=False)
    for number, at in enumerate(timeline.rollbacks()):
        axes.axvline(at, color=_ALARM, linewidth=1.0, label=None if number else "rolled back to")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper right")
    _finish(axes, timeline, "Gradient norm", "norm")


def draw_rate(axes: Axes, timeline: Timeline) -> None:
    """Learning rate."""
    _draw_line(axes, timeline, lambda step: step.lr)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    _finish(axes, timeline, "Learning rate", "")


def draw_throughput(axes: Axes, timeline: Timeline) -> None:
    """Tokens per second of all ranks together."""
    _draw_line(axes, timeline, lambda step: step.tokens_per_second)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: big(value) if value else "0")
    _finish(axes, timeline, "Throughput", "tokens / s")


def draw_sources(axes: Axes, timeline: Timeline) -> None:
    """Share of each stage's tokens so far by source of the blend, of the first branch; replays are hatched."""
    colours: dict[str, Any] = {}
    replays = False
    for span, steps in _pieces(timeline):
        sources = list(dict.fromkeys(source_of(name) for _, step in steps for name in step.source_share))
        if span.branch or not sources:
            continue
        shares = [
            [sum(share for name, share in step.source_share.items() if source_of(name) == source) for _, step in steps]
            for source in sources
        ]
        for name, _ in sources:
            colours.setdefault(name, plt.get_cmap("tab20")(len(colours) % 20))
        areas = axes.stackplot([x for x, _ in steps], *shares, colors=[colours[name] for name, _ in sources])
        for area, (_, replay) in zip(areas, sources, strict=True):
            area.set(linewidth=0, hatch="////" if replay else None, edgecolor="white" if replay else "face")
            replays = replays or replay
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    if replays:
        handles.append(Patch(facecolor=MUTED, edgecolor="white", hatch="////", label="hatched: read again"))
    if handles:
        axes.figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=6.5, handlelength=1.2)
    axes.set_ylim(0, 1)
    axes.grid(visible=False)
    _finish(axes, timeline, "Data of each stage so far", "share of tokens")


def source_of(name: str) -> tuple[str, bool]:
    """A source without the number of its part, and whether it is a replay ("replay/NAME") of an earlier stage's."""
    whole = re.sub(r"-\d{5}(-of-\d{5})?$", "", name)
    return whole.removeprefix("replay/"), whole.startswith("replay/")


def draw_final(axes: Axes, timeline: Timeline) -> None:
    """Held-out loss against the loop it was read after, one line a stage, at the stage's end.

    Stages that begin together have one colour; branches are dashed as everywhere.
    """
    spans = [span for span in timeline.spans if span.stage.evaluations]
    for index, span in enumerate(spans):
        ce = span.stage.evaluations[-1].loops.ce
        loops = range(1, len(ce) + 1)
        colour = plt.get_cmap("tab10")(timeline.starts.index(span.start) % 10)
        style = f"{_style(span.branch)}o"
        axes.plot(loops, ce, style, color=colour, linewidth=1.3, markersize=4, label=span.stage.name)
        if index == len(spans) - 1 and len(spans) <= 6:  # of more, the report's table has the numbers
            for loop, value in zip(loops, ce, strict=True):
                axes.annotate(
                    f"{value:.3f}", (loop, value), (0, -15), textcoords="offset points", ha="center", fontsize=8
                )
    if spans:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=6.5 if len(spans) > 6 else 8)
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
    "data-mix": draw_sources,
}
_SUMMARY = ("loss", "exit-distribution", "depth", "held-out", "gradient-norm", "throughput")


def write_figures(stages: Sequence[Stage], folder: Path) -> dict[str, Path]:
    """One PNG a figure and summary.png; returns their paths by name."""
    timeline = Timeline.of(stages)
    written = {}
    with plt.rc_context(STYLE):
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
