"""The local report: one HTML page that holds everything, and its pictures as PNG files beside it."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from ouro_megatron.telemetry.depth_colors import depth_hex, depth_rgb, ink_on
from ouro_megatron.telemetry.plots import FIGURES, write_figures
from ouro_megatron.telemetry.run_reader import Stage, read_stages
from ouro_megatron.telemetry.text import big, duration
from ouro_megatron.telemetry.timeline import Timeline

_CAPTIONS = {
    "loss": "Cross-entropy of each loop's own prediction. Light is loop 1, dark the last one.",
    "exit-distribution": "How the gate shares each token's weight over the loops, a batch on average. Light is loop 1.",
    "depth": "Mean of the exit distribution, and how undecided it is.",
    "held-out": "What another loop buys: the same head reads the state after each loop.",
    "gradient-norm": "Before clipping.",
    "learning-rate": "By the schedule of each stage, which begins afresh.",
    "throughput": "All ranks together.",
    "data-mix": "Tokens of each source of the blend since the stage began; each counts afresh. Hatched: replays.",
}


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Writes index.html and PNG files to `out` (folder/report when None) and returns the page's path.

    `folder` is a run folder, or a folder of run folders: its stages are shown as one history. Raises MetricsError when
    it holds no run.
    """
    stages = read_stages(folder)
    out = out or folder / "report"
    out.mkdir(parents=True, exist_ok=True)
    images = write_figures(stages, out)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ouro_megatron.telemetry", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        title=folder.resolve().name,
        stages=[_stage(stage) for stage in stages],
        figures=[{"name": name, "caption": _CAPTIONS[name], "data": _inline(images[name])} for name in FIGURES],
        headline=_headline(stages),
        samples=[_sample(sample, stage) for stage in stages for sample in stage.samples],
        legend=[_swatch(loop, max(stage.loops for stage in stages)) for loop in range(1, _deepest(stages) + 1)],
    )
    path = out / "index.html"
    partial = out / ".index.html.part"
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path


def _deepest(stages: Sequence[Stage]) -> int:
    return max(stage.loops for stage in stages)


def _inline(image: Path) -> str:
    return base64.b64encode(image.read_bytes()).decode()


def _headline(stages: Sequence[Stage]) -> list[tuple[str, str]]:
    """The few numbers a reader looks for first."""
    tokens = Timeline.of(stages).end
    facts = [("tokens", big(tokens)), ("time in steps", duration(sum(stage.seconds for stage in stages)))]
    evaluated = [stage for stage in stages if stage.evaluations]
    if evaluated:
        last = evaluated[-1]
        ce = last.evaluations[-1].loops.ce
        facts.append(("held-out loss, loop 1", f"{ce[0]:.3f}"))
        if len(ce) > 1:
            facts.append((f"held-out loss, loop {len(ce)}", f"{ce[-1]:.3f}"))
        if last.unigram_entropy is not None:
            facts.append(("unigram entropy", f"{last.unigram_entropy:.3f}"))
        facts.append(("expected depth", f"{last.evaluations[-1].loops.expected_depth:.2f}"))
    return facts


def _stage(stage: Stage) -> dict[str, Any]:
    recipe, last = stage.recipe, stage.steps[-1] if stage.steps else None
    evaluation = stage.evaluations[-1] if stage.evaluations else None
    return {
        "name": stage.name,
        "layers": recipe.model.layers if recipe else "",
        "loops": stage.loops,
        "sequence": recipe.data.sequence_length if recipe else "",
        "layout": _layout(stage),
        "steps": f"{last.step}/{last.total_steps}" if last else "0",
        "tokens": big(last.tokens) if last else "0",
        "parent": stage.parent or "",
        "time": duration(stage.seconds),
        "restarts": stage.restarts,
        "skipped": last.skipped_steps if last else 0,
        "rollbacks": last.rollbacks if last else 0,
        "losses": [f"{value:.3f}" for value in evaluation.loops.ce] if evaluation else [],
        "depth": f"{evaluation.loops.expected_depth:.2f}" if evaluation else "",
        "events": [{"step": e.step, "name": e.name, "message": e.message} for e in stage.events],
        "recipe": stage.recipe_text,
    }


def _layout(stage: Stage) -> str:
    if stage.recipe is None:
        return ""
    parallel = stage.recipe.parallel
    context = f" × CP {parallel.context}" if parallel.context > 1 else ""
    data = f" × DP {parallel.data}" if parallel.data else ""
    return f"TP {parallel.tensor}{context} × PP {parallel.pipeline}{data}"


def _swatch(depth: int, loops: int) -> dict[str, Any]:
    return {"depth": depth, "color": depth_hex(depth, loops), "ink": ink_on(depth_rgb(depth, loops))}


def _sample(sample: dict[str, Any], stage: Stage) -> dict[str, Any]:
    tokens = sample.get("tokens", [])
    loops = max([stage.loops, *(token.get("depth", 0) for token in tokens)])
    new = [token["depth"] for token in tokens if not token.get("prompt")]
    return {
        "stage": stage.name,
        "exit": sample.get("exit", ""),
        "mean": f"{sum(new) / len(new):.2f}" if new else "",
        "tokens": [
            {"text": token["text"], "prompt": bool(token.get("prompt")), **_swatch(max(1, token["depth"]), loops)}
            for token in tokens
        ],
    }
