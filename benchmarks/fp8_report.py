"""Tables and pictures of fp8_numerics.py."""

from pathlib import Path
from typing import Any

import numpy as np

SHOWN = {
    "bf16": "bf16",
    "fp32": "fp32",
    "current": "current",
    "blockwise": "blockwise",
    "delayed": "delayed",
    "mxfp8": "mxfp8",
    "current-ends-bf16": "current, first and last layer bf16",
}
COLOURS = {
    "bf16": "#1f2933",
    "fp32": "#6b7785",
    "current": "#2b5c8a",
    "blockwise": "#c7622b",
    "delayed": "#8a2b5c",
    "mxfp8": "#3f8a2b",
    "current-ends-bf16": "#7fb2df",
}
MEASURES = {
    "state": "error of the state",
    "visit": "error of one visit",
    "logits": "error of the logits",
    "kl": "KL of the next token, nats",
    "gradient": "error of the gradient",
}


def report(numbers: dict[str, Any], out: Path) -> None:
    """Prints Markdown tables and draws fp8-curves.png and fp8-loops.png into `out`."""
    finished = max(len(curve["train"]) for curve in numbers["curves"].values())
    curves = {
        name: numbers["curves"][name]
        for name in SHOWN
        if name in numbers["curves"] and len(numbers["curves"][name]["train"]) == finished
    }
    print(curve_table(curves))
    for measure, title in MEASURES.items():
        print(f"\n{title}\n\n{error_table(numbers['errors'], measure)}")
    draw_curves(curves, out / "fp8-curves.png")
    draw_loops(numbers["errors"], out / "fp8-loops.png")


def tail(curve: dict[str, list[float]], steps: int = 50) -> float:
    """Mean training loss of the last steps."""
    return float(np.mean(curve["train"][-steps:]))


def curve_table(curves: dict[str, Any]) -> str:
    lines = [
        "| | held-out loss, last loop | minus bf16 | training, last 50 steps | minus bf16 | gradient norm |",
        "|---|---|---|---|---|---|",
    ]
    base = curves["bf16"]
    for name, curve in curves.items():
        held, last = curve["held_out"][-1], tail(curve)
        apart, later = held - base["held_out"][-1], last - tail(base)
        norm = np.median(curve["grad_norm"])
        lines.append(f"| {SHOWN[name]} | {held:.4f} | {apart:+.4f} | {last:.4f} | {later:+.4f} | {norm:.3f} |")
    return "\n".join(lines)


def error_table(errors: dict[str, Any], measure: str) -> str:
    loops = len(next(iter(errors.values()))[measure])
    lines = ["| loop | " + " | ".join(str(t) for t in range(1, loops + 1)) + " |", "|---" * (loops + 1) + "|"]
    for name, row in errors.items():
        lines.append(f"| {SHOWN[name]} | " + " | ".join(f"{value:.3g}" for value in row[measure]) + " |")
    return "\n".join(lines)


def draw_curves(curves: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from ouro_megatron.telemetry.plot_style import STYLE

    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
        base = np.array(curves["bf16"]["train"])
        for name, curve in curves.items():
            line = {"color": COLOURS[name], "label": SHOWN[name], "linewidth": 1.3}
            left.plot(curve["steps"], curve["held_out"], marker="o", markersize=2.5, **line)
            if name != "bf16":
                difference = np.array(curve["train"]) - base
                right.plot(np.convolve(difference, np.ones(20) / 20, "valid"), **line)
        left.set(title="Held-out loss of the last loop", xlabel="step", ylabel="nats a token")
        right.set(title="Training loss minus bf16's (mean of 20 steps)", xlabel="step")
        right.axhline(0.0, color=COLOURS["bf16"], linewidth=0.8)
        left.legend()
        figure.tight_layout()
        figure.savefig(path)
        plt.close(figure)


def draw_loops(errors: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from ouro_megatron.telemetry.plot_style import STYLE

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(11, 4.0))
        for axis, measure in zip(axes, ("state", "logits", "gradient"), strict=True):
            for name, row in errors.items():
                values = row[measure]
                axis.plot(
                    range(1, len(values) + 1), values, marker="o", markersize=3, color=COLOURS[name], label=SHOWN[name]
                )
            axis.set(title=f"Relative {MEASURES[measure]}", xlabel="loop", ylim=(0.0, None))
        figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=len(errors))
        figure.tight_layout(rect=(0, 0.07, 1, 1))
        figure.savefig(path)
        plt.close(figure)
