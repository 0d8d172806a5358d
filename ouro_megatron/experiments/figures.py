"""Pictures of an experiment: learning curves, accuracy by shape, bits of biographies, exits under priors."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from ouro_megatron.errors import MetricsError
from ouro_megatron.experiments.claims import spread
from ouro_megatron.experiments.settings import ExperimentFile, parse_shape, shown
from ouro_megatron.telemetry.metrics_file import METRICS_NAME, read_records
from ouro_megatron.telemetry.plot_style import STYLE
from ouro_megatron.telemetry.records import EvalRecord, StepRecord

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Results = Mapping[str, Sequence[Mapping[str, Any]]]
_COLORS = ("#2b5c8a", "#c7622b", "#3c8d5a", "#8a4f9e", "#b03a48", "#4a90a4", "#7f7f3f", "#555555")


def draw(settings: ExperimentFile, results: Results, cells_folder: Path, out: Path) -> list[Path]:
    """All pictures that fit the experiment, as PNG files in `out`."""
    with plt.rc_context(STYLE):
        made = [_save(_learning_curves(settings, results, cells_folder), out / "curves.png")]
        if settings.measure == "accuracy":
            made.append(_save(_accuracies(settings, results), out / "accuracy.png"))
        elif settings.measure == "bits":
            made.append(_save(_bits(settings, results), out / "bits.png"))
        else:
            made.append(_save(_exits(settings, results), out / "exits.png"))
    return made


def _save(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    return path


def label_of(group: str, settings: ExperimentFile) -> str:
    shape, _, name = group.partition("/")
    variant = settings.variant(name)
    return shown(shape) if variant is None else f"{shown(shape)}, {variant.label}"


def _color(index: int) -> str:
    return _COLORS[index % len(_COLORS)]


def _learning_curves(settings: ExperimentFile, results: Results, cells_folder: Path) -> Any:
    """Loss in training (smoothed) and on the test sets by step: the mean over seeds, with all of them in the band."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8))
    for index, (group, cells) in enumerate(results.items()):
        curves: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"train": [], "test": []}
        for cell in cells:
            for name, curve in _curves(cells_folder / str(cell["cell"])).items():
                curves[name].append(curve)
        for axis, name in zip(axes, ("train", "test"), strict=True):
            _band(axis, curves[name], _color(index), label_of(group, settings))
    axes[0].set(title="Loss in training", xlabel="step", ylabel="nats a token that counts")
    axes[1].set(title="Loss on the test sets", xlabel="step")
    axes[0].legend()
    return figure


def _curves(run_folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(steps, losses) of the last loop, in training as means of 25 stretches, and of the evaluations."""
    try:
        records = read_records(run_folder / METRICS_NAME)
    except MetricsError:  # the run folder was cleared away; the measured numbers are still there
        return {}
    found = {}
    steps = [record for record in records if isinstance(record, StepRecord)]
    if steps:
        parts = [part for part in np.array_split(np.arange(len(steps)), 25) if len(part)]
        places = np.array([steps[part[-1]].step for part in parts])
        found["train"] = places, np.array([np.mean([steps[i].loops.ce[-1] for i in part]) for part in parts])
    evaluations = [record for record in records if isinstance(record, EvalRecord)]
    if evaluations:
        found["test"] = np.array([r.step for r in evaluations]), np.array([r.loops.ce[-1] for r in evaluations])
    return found


def _band(axis: Any, curves: Sequence[tuple[np.ndarray, np.ndarray]], color: str, label: str) -> None:
    if not curves:
        return
    length = min(len(steps) for steps, _ in curves)
    steps = curves[0][0][:length]
    values = np.stack([losses[:length] for _, losses in curves])
    axis.plot(steps, values.mean(0), color=color, label=label, linewidth=1.6)
    axis.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)


def _accuracies(settings: ExperimentFile, results: Results) -> Any:
    """With values on variants an accuracy curve a shape, else bars by test set."""
    names = [n for n in _metric_names(results) if n.startswith("accuracy ")]
    if settings.variants and all(variant.value is not None for variant in settings.variants):
        return _against_value(settings, results, names[-1])
    figure, axis = plt.subplots(figsize=(max(6.0, 1.1 * len(results) * len(names) ** 0.5), 3.8))
    width = 0.8 / max(1, len(results))
    for index, (group, cells) in enumerate(results.items()):
        values = [[float(cell["metrics"][name]) for cell in cells] for name in names]
        places = np.arange(len(names)) + (index - (len(results) - 1) / 2) * width
        heights = [statistics.fmean(value) for value in values]
        axis.bar(places, heights, width * 0.92, color=_color(index), label=label_of(group, settings))
        for place, value in zip(places, values, strict=True):
            axis.plot([place] * len(value), value, "o", color="#1f2933", markersize=2.5)
    axis.set_axisbelow(True)
    axis.set_xticks(range(len(names)), [name.removeprefix("accuracy ") for name in names])
    axis.set(title="Exact match on examples never trained on (dots: seeds)", ylabel="percent", ylim=(0, 103))
    axis.legend(ncols=min(4, max(1, len(results))))
    return figure


def _against_value(settings: ExperimentFile, results: Results, metric: str) -> Any:
    figure, axis = plt.subplots(figsize=(6, 3.8))
    for index, shape in enumerate(settings.shapes):
        points = []
        for group, cells in results.items():
            variant = settings.variant(group.partition("/")[2])
            if group.partition("/")[0] == shape and variant is not None and cells:
                values = [float(cell["metrics"][metric]) for cell in cells]
                points.append((variant.value, statistics.fmean(values), spread(values)))
        if points:
            x, y, error = zip(*sorted(points), strict=True)
            axis.errorbar(x, y, error, color=_color(index), marker="o", capsize=2, label=shown(shape))
    axis.set(title="Exact match on held-out questions", xlabel="different training questions", ylabel="percent")
    axis.legend()
    return figure


def _bits(settings: ExperimentFile, results: Results) -> Any:
    """Bits known against parameters, one colour a number of loops, with lines of 1 and 2 bits a parameter."""
    figure, axis = plt.subplots(figsize=(6, 4))
    sizes = [float(cell["parameters"]) for cells in results.values() for cell in cells]
    if sizes:
        ends = np.array([min(sizes) * 0.8, max(sizes) * 1.25])
        axis.plot(ends, 2 * ends, "--", color="#b03a48", linewidth=1, label="2 bits a parameter")
        axis.plot(ends, ends, "-", color="#6b7785", linewidth=1, label="1 bit a parameter")
    by_loops: dict[int, list[tuple[float, float]]] = {}
    for group, cells in results.items():
        loops = parse_shape(group.partition("/")[0])[1]
        points = by_loops.setdefault(loops, [])
        points += [(float(cell["parameters"]), float(cell["metrics"]["bits"])) for cell in cells]
    for index, (loops, points) in enumerate(sorted(by_loops.items())):
        if points:
            x, y = zip(*points, strict=True)
            marker = "os^D"[index % 4]
            axis.plot(x, y, marker, color=_color(index), alpha=0.8, label=f"{loops} loop{'s' if loops > 1 else ''}")
    axis.set(title="Knowledge against size", xlabel="parameters", ylabel="bits known", xscale="log", yscale="log")
    axis.legend()
    return figure


def _exits(settings: ExperimentFile, results: Results) -> Any:
    """Left the exit histogram of each prior, right the loss after each loop."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8))
    width = 0.8 / max(1, len(results))
    for index, (group, cells) in enumerate(results.items()):
        if not cells:
            continue
        loops = range(1, parse_shape(group.partition("/")[0])[1] + 1)
        exits = [statistics.fmean(float(c["metrics"][f"exits at loop {t}"]) for c in cells) for t in loops]
        losses = [[float(cell["metrics"][f"loss loop {t}"]) for cell in cells] for t in loops]
        places = np.array(loops) + (index - (len(results) - 1) / 2) * width
        axes[0].bar(places, exits, width * 0.92, color=_color(index), label=label_of(group, settings))
        means, errors = [statistics.fmean(values) for values in losses], [spread(values) for values in losses]
        axes[1].errorbar(list(loops), means, errors, color=_color(index), marker="o", capsize=2)
    axes[0].set_axisbelow(True)
    axes[0].set(title="Where tokens leave", xlabel="loop", ylabel="percent of tokens")
    axes[1].set(title="Held-out loss after each loop", xlabel="loop", ylabel="nats")
    axes[0].legend()
    return figure


def _metric_names(results: Results) -> list[str]:
    names: dict[str, None] = {}
    for cells in results.values():
        for cell in cells:
            names |= dict.fromkeys(cell["metrics"])
    return list(names)
