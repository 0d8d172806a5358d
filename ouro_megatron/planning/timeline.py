"""Pictures of a schedule, simulated or measured: a PNG for people and a Chrome trace for zooming (ui.perfetto.dev)."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.patches import Patch

from ouro_megatron.errors import OuroError
from ouro_megatron.planning.schedule import Event, Timeline
from ouro_megatron.telemetry.depth_colors import depth_hex, depth_rgb, ink_on


def draw(timeline: Timeline, loops: int, path: Path, title: str, *, seconds: float | None = None) -> None:
    """Writes a PNG: a row a pipeline rank, a bar a task, coloured by loop, backward hatched.

    `seconds` cuts the picture after that time; the bars carry the microbatch's number where there is room.
    """
    end = min(seconds or timeline.seconds, timeline.seconds)
    figure, axes = plt.subplots(figsize=(14, 1.2 + 0.55 * timeline.pipeline), dpi=130)
    for event in timeline.events:
        if event.start >= end:
            continue
        width = min(event.end, end) - event.start
        backward = event.task.kind == "backward"
        axes.barh(
            event.rank,
            width,
            left=event.start,
            height=0.8,
            color=depth_hex(event.task.loop + 1, loops),
            edgecolor="white",
            linewidth=0.4,
            hatch="////" if backward else None,
            alpha=0.75 if backward else 1.0,
        )
        if width > end / 90:
            label, ink = str(event.task.microbatch + 1), ink_on(depth_rgb(event.task.loop + 1, loops))
            axes.text(event.start + width / 2, event.rank, label, ha="center", va="center", fontsize=6, color=ink)
    axes.set_yticks(range(timeline.pipeline), [f"rank {rank}" for rank in range(timeline.pipeline)])
    axes.invert_yaxis()
    axes.set_xlim(0, end)
    axes.set_xlabel("seconds")
    axes.set_title(title, loc="left", fontsize=10)
    handles = [Patch(color=depth_hex(loop + 1, loops), label=f"loop {loop + 1}") for loop in range(loops)]
    handles.append(Patch(facecolor="lightgrey", hatch="////", edgecolor="white", label="backward"))
    axes.legend(handles=handles, ncols=len(handles), loc="upper right", bbox_to_anchor=(1, -0.18), fontsize=7)
    with _naming(path):
        figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def write_trace(timeline: Timeline, path: Path) -> None:
    """Writes the events in Chrome's trace format, one thread a pipeline rank; times in microseconds."""
    events = [_trace_event(event) for event in timeline.events]
    names = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": rank, "args": {"name": f"pipeline rank {rank}"}}
        for rank in range(timeline.pipeline)
    ]
    with _naming(path):
        path.write_text(json.dumps({"traceEvents": names + events}), encoding="utf-8")


def _trace_event(event: Event) -> dict[str, object]:
    task = event.task
    return {
        "name": f"{task.kind} loop {task.loop + 1} microbatch {task.microbatch + 1}",
        "cat": task.kind,
        "ph": "X",
        "ts": event.start * 1e6,
        "dur": (event.end - event.start) * 1e6,
        "pid": 0,
        "tid": event.rank,
    }


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise OuroError(f"cannot write {path}: {error.strerror or error}") from error
