"""Training step of the demo's model: this project in one process against plain PyTorch, same shapes, same run.

    python benchmarks/training_step.py

Each measurement is a process of its own, alternating between the two; medians and ratios are printed. The peak is the
growth of the process's resident memory over what it had before the first step.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from ouro_megatron.recipe.schema import ModelSection

SEQUENCE, MICROBATCH, MICROBATCHES = 128, 16, 2
CASES = {
    "demo model (vocabulary 2,048)": {"vocab": 2048},
    "demo model with Ouro's vocabulary (49,152)": {"vocab": 49_152},
}


def section(vocab: int) -> ModelSection:
    return ModelSection(layers=2, hidden=128, heads=4, ffn=352, vocab=vocab, loops=4)


def measure(system: str, vocab: int, steps: int) -> dict[str, float]:
    """Runs in the child: median seconds a step and peak memory in MiB."""
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = section(vocab)
    tokens = torch.randint(0, vocab, (MICROBATCHES, MICROBATCH, SEQUENCE + 1))
    batches = [(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in tokens]
    step = _ours(model, batches) if system == "ours" else _plain(model, batches)
    before = _resident()
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": statistics.median(times[1:]), "mib": peak - before}


def _ours(model: ModelSection, batches: list):  # type: ignore[no-untyped-def]
    import torch

    from ouro_megatron.model.looplm import LoopLM, initialise
    from ouro_megatron.parallel.context import create_context
    from ouro_megatron.recipe.schema import ObjectiveSection, OptimizerSection, ParallelSection
    from ouro_megatron.training.engine import Engine, Microbatch

    context = create_context(ParallelSection())
    lm = LoopLM(model, context)
    initialise(lm, 0)
    engine = Engine(lm, context, ObjectiveSection(), OptimizerSection(lr=1e-3), loops=model.loops)
    engine.adopt_weights()
    data = [Microbatch(x, y, torch.ones(x.shape)) for x, y in batches]
    return lambda: engine.train_step(data, 1e-3)


def _plain(model: ModelSection, batches: list):  # type: ignore[no-untyped-def]
    import torch

    from benchmarks.plain_model import PlainLoopLM

    plain = PlainLoopLM(model)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)

    def step() -> None:
        optimizer.zero_grad()
        for x, y in batches:
            (plain(x, y, 0.1) / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()

    return step


def _resident() -> float:
    with Path("/proc/self/statm").open() as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def _child(system: str, vocab: int, steps: int) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", __file__, "--child", system, str(vocab), str(steps)]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{Path(__file__).resolve().parents[1]}:{os.environ.get('PYTHONPATH', '')}",
    }
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind and case")
    parser.add_argument("--steps", type=int, default=6, help="steps in each; the first is left out")
    parser.add_argument("--child", nargs=3, metavar=("SYSTEM", "VOCAB", "STEPS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        system, vocab, steps = arguments.child
        print(json.dumps(measure(system, int(vocab), int(steps))))
        return
    tokens = SEQUENCE * MICROBATCH * MICROBATCHES
    for name, case in CASES.items():
        found: dict[str, list[dict[str, float]]] = {"ours": [], "plain": []}
        for _ in range(arguments.rounds):
            for system, results in found.items():
                results.append(_child(system, case["vocab"], arguments.steps))
        medians = {
            system: {key: statistics.median(result[key] for result in results) for key in ("seconds", "mib")}
            for system, results in found.items()
        }
        ours, plain = medians["ours"], medians["plain"]
        print(f"{name}: {tokens} tokens a step, one thread")
        print(f"  plain PyTorch  {tokens / plain['seconds']:8.0f} tokens/s   peak +{plain['mib']:6.0f} MiB")
        print(f"  ouro_megatron  {tokens / ours['seconds']:8.0f} tokens/s   peak +{ours['mib']:6.0f} MiB")
        speed, memory = plain["seconds"] / ours["seconds"], ours["mib"] / plain["mib"]
        print(f"  ratio          {speed:8.2f} x          {memory:8.2f} x")


if __name__ == "__main__":
    main()
