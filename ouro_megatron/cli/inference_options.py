"""Options that `ouro generate`, `ouro chat` and `ouro serve` share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from ouro_megatron.inference.load import ModelOptions

CacheChoice = Literal["all", "last", "first", "average"]
SkippedChoice = Literal["later", "copy", "run"]
DtypeChoice = Literal["fp32", "bf16"]

Checkpoint = Annotated[
    Path, typer.Argument(help="A checkpoint, a run folder (its newest is taken), or an exported Hugging Face folder.")
]
Exit = Annotated[
    str,
    typer.Option(
        "--exit",
        help="When a token leaves the loop. all: after the last; q=0.8: when the exit CDF reaches 0.8; step=3: after "
        "loop 3; change=0.1: when a loop changes the state by less than a tenth; expected: all loops, mean prediction.",
    ),
]
MaxLoops = Annotated[int | None, typer.Option(min=1, help="Loops at most; the training's when left out.")]
Context = Annotated[
    int | None, typer.Option(min=2, help="Longest sequence in tokens; the training's sequence length when left out.")
]
Cache = Annotated[
    CacheChoice,
    typer.Option(help="Keys and values kept of finished tokens: of all loops, or one entry shared by all loops."),
]
Skipped = Annotated[
    SkippedChoice | None,
    typer.Option(
        help="Loops after an exit. later: run when a later token needs them (exact); copy: never, deeper tokens read "
        "the exit loop's entries; run: always. later with --cache all, else copy, when left out."
    ),
]
Dtype = Annotated[DtypeChoice, typer.Option(help="Precision of weights and cache.")]
Tensor = Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks on this machine.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]


def model_options(
    checkpoint: Path,
    *,
    dtype: DtypeChoice,
    device: str,
    tensor: int,
    max_loops: int | None,
    context: int | None,
    cache: CacheChoice,
    skipped: SkippedChoice | None,
    slots: int,
) -> "ModelOptions":
    """Options for `open_model`; silences what the libraries say while loading."""
    import warnings

    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    from ouro_megatron.inference.engine import EngineSettings
    from ouro_megatron.inference.load import ModelOptions

    settings = EngineSettings(slots=slots, cache=cache, skipped=skipped)
    return ModelOptions(checkpoint, dtype, device, tensor, max_loops, context, settings)
