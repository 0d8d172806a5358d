"""`ouro eval`: what each loop of a model is worth, on held-out text, as one JSON file and one picture."""

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ouro_megatron.checkpoint.folder import write_json
from ouro_megatron.checkpoint.load import InferenceModel, load_for_inference
from ouro_megatron.errors import RecipeError
from ouro_megatron.evaluation.depth import (
    ClassDepth,
    CurvePoint,
    LoopCalibration,
    LoopQuality,
    calibration,
    depth_by_class,
    exit_curve,
    loop_quality,
)
from ouro_megatron.evaluation.held_out_texts import TOKEN_CLASSES, held_out_batches, token_bytes, token_classes
from ouro_megatron.evaluation.scores import Batch, score_tokens
from ouro_megatron.parallel.context import create_context
from ouro_megatron.recipe.schema import ParallelSection

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class EvaluationSettings:
    """What to evaluate on, and how deep."""

    loops: int = 8
    sequences: int = 64
    data: tuple[Path, ...] = ()
    text: tuple[Path, ...] = ()
    sequence_length: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """One model on one text."""

    folder: Path
    trained_loops: int
    layers: int
    tokens: int
    text_bytes: int
    quality: list[LoopQuality]
    curve: list[CurvePoint]
    """Q-exit with as many loops at most as the model was trained with."""
    gates: list[LoopCalibration]
    classes: list[ClassDepth]
    expected_depth: float

    def as_json(self) -> dict[str, Any]:
        values = asdict(self)
        values["folder"] = str(self.folder)
        return values


def evaluate(
    path: Path,
    settings: EvaluationSettings,
    *,
    device: str = "cpu",
    out: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> Evaluation:
    """Evaluates the model at `path`: a checkpoint, a run folder or a folder in the published layout.

    Under torchrun all ranks share the model (tensor parallel). Writes `out`/evaluation.json and evaluation.png when
    `out` is given. Raises RecipeError for settings out of range,
    DataError without text to evaluate on, CheckpointError when the model cannot be loaded.
    """
    if settings.loops < 1 or settings.sequences < 1:
        raise RecipeError(f"--loops {settings.loops}, --sequences {settings.sequences}: at least 1 each")
    model = load_on_all_ranks(path, device)
    try:
        found = evaluate_loaded(model, settings, progress)
        if out is not None and model.context.rank == 0:
            write_evaluation(found, out)
        return found
    finally:
        model.context.close()


def load_on_all_ranks(path: Path, device: str = "cpu") -> InferenceModel:
    """The model at `path`, cut over all ranks of a job started by torchrun (tensor parallel), or in one process."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    context = create_context(ParallelSection(tensor=ranks), device) if ranks > 1 else None
    return load_for_inference(path, device, context)


def evaluate_loaded(
    model: InferenceModel, settings: EvaluationSettings, progress: Progress = lambda done, total: None
) -> Evaluation:
    """`evaluate` for a model in memory; with tensor parallelism all ranks call it and get the same."""
    trained = model.recipe.model.loops
    batches = held_out_batches(
        model,
        settings.sequences,
        data=list(settings.data),
        text=list(settings.text),
        length=settings.sequence_length,
    )

    def counted() -> Iterator[Batch]:
        for done, batch in enumerate(batches, start=1):
            yield batch
            progress(done, settings.sequences)

    scores = score_tokens(model.lm, counted(), settings.loops)
    at_training = scores.first(min(trained, settings.loops))
    text_bytes = token_bytes(model.tokenizer, scores.labels_n)
    classes = depth_by_class(at_training, token_classes(model.tokenizer, scores.labels_n), TOKEN_CLASSES)
    exits_t = at_training.exit_probabilities().mean(1)
    return Evaluation(
        model.folder,
        trained,
        model.recipe.model.layers,
        scores.tokens,
        text_bytes,
        loop_quality(scores, text_bytes, trained),
        exit_curve(at_training),
        calibration(at_training),
        classes,
        float(sum((t + 1) * p for t, p in enumerate(exits_t))),
    )


def write_evaluation(found: Evaluation, out: Path) -> tuple[Path, Path]:
    """Writes evaluation.json and evaluation.png into `out`; returns both paths."""
    from ouro_megatron.evaluation.figures import evaluation_figure

    out.mkdir(parents=True, exist_ok=True)
    values, picture = out / "evaluation.json", out / "evaluation.png"
    evaluation_figure(
        f"{found.folder}: {found.layers} layers, {found.tokens:,} tokens",
        found.trained_loops,
        found.quality,
        found.curve,
        found.gates,
        found.classes,
        picture,
    )
    write_json(values, found.as_json())
    return values, picture


def default_out(path: Path) -> Path:
    """Where an evaluation of `path` goes: run/evaluation for a run and its checkpoints, beside anything else."""
    path = path.resolve()
    if path.parent.name == "checkpoints":
        return path.parent.parent / "evaluation"
    if (path / "checkpoints").is_dir():
        return path / "evaluation"
    return path.with_name(f"{path.name}-evaluation")
