"""What 8-bit products do to a looped model: error from loop to loop, and training curves against bf16. On any machine.

    ouro data prepare stages/demo/data.yaml
    python benchmarks/fp8_numerics.py --out docs/images

1. The same small model is trained once for each way to compute: fp32, bf16 and the emulated FP8 recipes, from the same
   weights, on the same samples (benchmarks/fp8_numerics.yaml). Trained ones are kept: start it again to go on.
2. The model that was trained in bf16 is run with each recipe on held-out text at 1 to 8 loops, in fp32 but for the
   rounding to 8 bits, so that nothing else differs: relative error of the states, of the logits and of the gradients.

Prints tables in Markdown, writes fp8-curves.png and fp8-loops.png below --out, and all numbers into
runs/fp8/numbers.json.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "benchmarks" / "fp8_numerics.yaml"
RUNS = ROOT / "runs" / "fp8"
LOOPS = 8


@dataclass(frozen=True)
class Way:
    """One way to compute."""

    name: str
    overrides: tuple[str, ...] = ()
    fp8: tuple[tuple[str, Any], ...] | None = None
    """Settings of `precision.fp8` beside `emulate`; None without FP8."""

    @property
    def words(self) -> list[str]:
        """The command line's."""
        fp8 = [f"precision.fp8.{key}={value}" for key, value in (("emulate", "true"), *(self.fp8 or ()))]
        return [f"name={self.name}", *self.overrides, *(fp8 if self.fp8 is not None else [])]


ENDS = (("first_layers_bf16", 1), ("last_layers_bf16", 1))
WAYS = [
    Way("bf16"),
    Way("current", fp8=(("recipe", "current"),)),
    Way("blockwise", fp8=(("recipe", "blockwise"),)),
    Way("delayed", fp8=(("recipe", "delayed"),)),
    Way("mxfp8", fp8=(("recipe", "mxfp8"),)),
    Way("current-ends-bf16", fp8=(("recipe", "current"), *ENDS)),
    Way("fp32", ("precision.compute=fp32",)),
]


def train(way: Way, more: list[str]) -> None:
    """Trains to the end; a run that was stopped goes on, one that is finished is left as it is."""
    ouro = Path(sys.executable).with_name("ouro")
    command = [str(ouro), "train", str(RECIPE.relative_to(ROOT)), "--nproc", "1", *way.words, *more]
    print("$", " ".join(command), flush=True)
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def curves() -> dict[str, dict[str, list[float]]]:
    """By way: the last loop's loss on held-out text, and of every training step, with the gradient norm."""
    from ouro_megatron.telemetry.run_reader import read_stages

    return {
        stage.name: {
            "steps": [record.step for record in stage.evaluations],
            "held_out": [record.loops.ce[-1] for record in stage.evaluations],
            "train": [record.loops.ce[-1] for record in stage.steps],
            "grad_norm": [record.grad_norm for record in stage.steps],
        }
        for stage in read_stages(RUNS)
    }


def held_out_tokens(sequences: int) -> Tensor:
    """int64 [sequences, 129] of held-out prose and code in turn."""
    from ouro_megatron.data.tokens import Stretch, TokenReader

    rows = []
    for name in ("prose", "code"):
        reader = TokenReader(ROOT / "data" / "demo" / f"{name}-validation")
        whole = [Stretch(index, 0, int(length)) for index, length in enumerate(reader.lengths)]
        tokens, _ = reader.read(whole)
        rows.append(torch.from_numpy(tokens[: sequences // 2 * 129]).view(-1, 129))
    return torch.cat(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images", help="folder of the pictures")
    parser.add_argument("--sequences", type=int, default=8, help="held-out sequences of 128 tokens")
    parser.add_argument("--only", nargs="*", help="train these ways and stop")
    parser.add_argument("--no-training", action="store_true", help="measure and draw what was trained so far")
    parser.add_argument("overrides", nargs="*", help="key.path=value for every training")
    arguments = parser.parse_args()
    for way in WAYS:
        if not arguments.no_training and (not arguments.only or way.name in arguments.only):
            train(way, arguments.overrides)
    if arguments.only:
        return
    from benchmarks.fp8_errors import error_growth
    from benchmarks.fp8_report import report

    ways = {way.name: dict(way.fp8) for way in WAYS if way.fp8 is not None}
    errors = error_growth(RUNS / "bf16", ways, held_out_tokens(arguments.sequences), LOOPS)
    numbers = {"curves": curves(), "errors": errors}
    (RUNS / "numbers.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    report(numbers, arguments.out)


if __name__ == "__main__":
    main()
