"""What a checkpoint costs: training's wait for it, hashing, verification; against torch.save of the same tensors.

    python benchmarks/checkpoints.py [--hidden 512] [--repeats 5]

One process and one thread, fp32, on the file system of --folder. Medians; ratios to torch.save + fsync of one file.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

warnings.simplefilter("ignore")

from ouro_megatron.checkpoint.folder import read_marker  # noqa: E402
from ouro_megatron.checkpoint.load import load_run  # noqa: E402
from ouro_megatron.checkpoint.save import begin_save, save  # noqa: E402
from ouro_megatron.checkpoint.state import RunState  # noqa: E402
from ouro_megatron.checkpoint.tensors import owned_parts  # noqa: E402
from ouro_megatron.checkpoint.verify import check_contents  # noqa: E402
from ouro_megatron.model.looplm import LoopLM, initialise  # noqa: E402
from ouro_megatron.parallel.context import context_for  # noqa: E402
from ouro_megatron.recipe.schema import Recipe  # noqa: E402
from ouro_megatron.training.engine import Engine  # noqa: E402


def recipe_of(hidden: int, folder: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "benchmark",
            "model": {"layers": 8, "hidden": hidden, "heads": 8, "ffn": 3 * hidden, "vocab": 8192, "loops": 4},
            "data": {"sequence_length": 128, "tokenizer": folder, "train": [{"path": folder, "weight": 1}]},
            "optimizer": {"lr": 1e-3},
            "batch": {"global_tokens": 128},
            "budget": {"total": "1 steps"},
            "precision": {"compute": "fp32"},
            "training": {"device": "cpu"},
        }
    )


def plain(engine: Engine, file: Path) -> None:
    """What a training script without a library does."""
    parts = owned_parts(engine)
    tensors = {
        name: (parameter.detach(), *(parts[parameter].state[key] for key in ("exp_avg", "exp_avg_sq")))
        for name, parameter in engine.lm.named_parameters()
    }
    with file.open("wb") as stream:
        torch.save(tensors, stream)
        stream.flush()
        os.fsync(stream.fileno())


def timed(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder when left out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="ouro-benchmark-", dir=arguments.folder))
    recipe = recipe_of(arguments.hidden, folder)
    context = context_for(recipe)
    lm = LoopLM(recipe.model, context, dtype=torch.float32)
    initialise(lm, 0)
    engine = Engine(lm, context, recipe.objective, recipe.optimizer, loops=recipe.model.loops)
    engine.adopt_weights()
    state = RunState(1, 0, 0, 0, 0, 0.0, "", recipe.model_dump(mode="json"), {})
    try:
        waits: list[float] = []

        def beside() -> None:
            began = time.perf_counter()
            pending = begin_save(engine, folder, state, background=True)
            waits.append(time.perf_counter() - began)
            pending.commit()

        reference = timed(lambda: plain(engine, folder / "plain.pt"), arguments.repeats)
        whole = timed(lambda: save(engine, folder, state), arguments.repeats)
        both = timed(beside, arguments.repeats)
        checkpoint = folder / "step-00000001"
        size = sum(read_marker(checkpoint)["files"].values())
        verify = timed(lambda: check_contents(checkpoint), arguments.repeats)
        load = timed(lambda: load_run(engine, checkpoint, recipe, optimizer=True), arguments.repeats)
        parameters = sum(parameter.numel() for parameter in lm.parameters())
        print(f"{size / 1e6:.0f} MB: {parameters / 1e6:.1f} M parameters in fp32 and two moments of each")
        for name, seconds in (
            ("torch.save and fsync, one file", reference),
            ("save, training waits", whole),
            ("save beside training, all of it", both),
            ("  of which training waits", statistics.median(waits)),
            ("verification (files in the page cache)", verify),
            ("load without verification", load),
        ):
            print(f"{name:42s} {seconds:7.3f} s  {size / seconds / 1e6:7.0f} MB/s  {seconds / reference:5.2f} x")
    finally:
        context.close()
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
