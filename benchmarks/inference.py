"""Generation on a CPU: this project's engine against transformers running the same exported model, in the same run.

    python benchmarks/inference.py

Random weights (8 layers x hidden 512, 4 loops), greedy, equal prompts, a fixed number of new tokens, two threads on
both sides; transformers with its cache and scaled_dot_product_attention. Every measurement is a process of its own,
alternating between the two; medians of the rounds and their ratios are printed. Memory is the growth of the process's
resident memory over what it had with the model loaded, for long prompts, where the cache is what grows.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from ouro_megatron.recipe.schema import ModelSection

MODEL = ModelSection(layers=8, hidden=512, heads=8, ffn=1408, vocab=32_000, loops=4)
PROMPT, NEW, CONTEXT = 32, 48, 2048
POLICIES = ["all", "step=2", "q=0.5", "q=0.8", "expected"]
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "all": {},
    "step=2": {"exit_at_step": 1},
    "q=0.5": {"exit_threshold": 0.5},
    "q=0.8": {"exit_threshold": 0.8},
    "expected": {"use_weighted_exit": True},
}
LONG_BATCH, LONG_PROMPT = 4, 1024


def write_model(folder: Path) -> None:
    """The exported folder that both systems load; its gate spreads the exits over the loops."""
    import torch
    from tokenizers import Tokenizer, models

    from ouro_megatron.checkpoint.huggingface.config import published_config
    from ouro_megatron.checkpoint.huggingface.layout import published_shapes
    from ouro_megatron.checkpoint.huggingface.shards import ShardWriter

    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = published_config(MODEL, dtype="float32", max_positions=CONTEXT, exit_threshold=1.0, special=special)
    (folder / "config.json").write_text(json.dumps(config))
    code = files("ouro_megatron.checkpoint.huggingface") / "remote_code"
    for name in ("configuration_ouro.py", "modeling_ouro.py"):
        (folder / name).write_text((code / name).read_text(encoding="utf-8"))
    tokenizer = Tokenizer(models.WordLevel({"<|endoftext|>": 0}, unk_token="<|endoftext|>"))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    torch.manual_seed(0)
    writer = ShardWriter(folder, published_shapes(MODEL), torch.float32, 2**32)
    for name, shape in published_shapes(MODEL).items():
        if "norm" in name:
            tensor = torch.ones(shape)
        elif name.endswith("gate.bias"):
            tensor = torch.full(shape, -0.5)
        else:
            tensor = torch.randn(shape) * (MODEL.hidden**-0.5 if "gate.weight" in name else 0.05)
        writer.write(name, tensor)
    writer.close()


def prompts(batch: int, length: int) -> list[list[int]]:
    import torch

    return torch.randint(1, MODEL.vocab, (batch, length), generator=torch.Generator().manual_seed(1)).tolist()


def _resident() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmRSS")


def measure(system: str, folder: Path, dtype: str, case: str, batch: int, length: int, new: int) -> dict[str, Any]:
    """Runs in the child: seconds of one generation after a shorter one to warm up, depth, memory in MiB.

    `case`: an exit policy, and for ours a cache policy and what becomes of skipped loops: "q=0.5 all later".
    """
    import torch

    torch.set_num_threads(2)
    policy, *options = case.split()
    make = _ours if system == "ours" else _transformers
    generate = make(folder, dtype, policy, options, batch)
    generate(prompts(batch, 8), 4)
    before = _resident()
    started = time.perf_counter()
    depth = generate(prompts(batch, length), new)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "depth": depth, "mib": peak - before, "kept": _resident() - before}


def _ours(folder: Path, dtype: str, policy: str, options: list[str], batch: int) -> Callable[..., float]:
    from ouro_megatron.inference.engine import EngineSettings
    from ouro_megatron.inference.exit_policy import ExitPolicy
    from ouro_megatron.inference.load import ModelOptions, open_model
    from ouro_megatron.inference.request import Request

    cache, skipped = options or ["all", "later"]
    settings = EngineSettings(slots=batch, cache=cache, skipped=skipped)  # type: ignore[arg-type]
    opened = open_model(ModelOptions(folder, dtype, context=CONTEXT, settings=settings))  # type: ignore[arg-type]
    engine = opened.__enter__().engine

    def generate(ids: list[list[int]], new: int) -> float:
        for prompt in ids:
            engine.submit(Request(tuple(prompt), new, ExitPolicy.parse(policy)))
        depths = []
        while engine.unfinished:
            depths += [event.token.depth for event in engine.step() if event.token is not None]
        assert len(depths) == new * len(ids)
        generate.keep = opened  # type: ignore[attr-defined]
        return sum(depths) / len(depths)

    return generate


def _transformers(folder: Path, dtype: str, policy: str, options: list[str], batch: int) -> Callable[..., float]:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=precision, attn_implementation="sdpa"
    ).eval()

    @torch.inference_mode()
    def generate(ids: list[list[int]], new: int) -> float:
        tokens = torch.tensor(ids)
        made = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            use_cache=True,
            **TRANSFORMERS[policy],
        )
        assert made.shape == (len(ids), len(ids[0]) + new)
        return 0.0

    return generate


def child(folder: Path, *arguments: object) -> dict[str, Any]:
    """One measurement in a fresh process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    command = [sys.executable, __file__, "--child", str(folder), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{arguments}:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def speed(folder: Path, dtypes: list[str], batches: list[int], rounds: int) -> None:
    """Table of tokens a second by policy."""
    print(f"\ntokens/s, prompt {PROMPT}, {NEW} new tokens a sequence, medians of {rounds}")
    print(f"{'dtype':6}{'batch':>6}  {'exit':10}{'ours':>9}{'transformers':>14}{'ratio':>8}{'mean depth':>12}")
    for dtype in dtypes:
        for batch in batches:
            for policy in POLICIES:
                ours, theirs = [], []
                for _ in range(rounds):
                    ours.append(child(folder, "ours", dtype, policy, batch, PROMPT, NEW))
                    theirs.append(child(folder, "transformers", dtype, policy, batch, PROMPT, NEW))
                mine, other = (statistics.median(batch * NEW / r["seconds"] for r in runs) for runs in (ours, theirs))
                depth = ours[0]["depth"]
                print(
                    f"{dtype:6}{batch:6d}  {policy:10}{mine:9.1f}{other:14.1f}{mine / other:7.2f}x{depth:12.2f}",
                    flush=True,
                )


def forms(folder: Path, dtype: str, batch: int, rounds: int) -> None:
    """What the cache policies and the ways to treat skipped loops cost and save, within this project."""
    cases = ["q=0.5 all later", "q=0.5 all copy", "q=0.5 all run", "q=0.5 last copy", "q=0.5 first copy"]
    cases += ["q=0.5 average copy", "all last copy", "all average copy"]
    print(f"\nours, {dtype}, batch {batch}: tokens/s by cache policy and what becomes of skipped loops")
    for case in cases:
        runs = [child(folder, "ours", dtype, case, batch, PROMPT, NEW) for _ in range(rounds)]
        value = statistics.median(batch * NEW / run["seconds"] for run in runs)
        print(f"  {case:20}{value:9.1f}   mean depth {runs[0]['depth']:.2f}", flush=True)


def memory(folder: Path, dtype: str) -> None:
    """Growth of resident memory with the cache of long prompts."""
    print(f"\nmemory in MiB, {dtype}, batch {LONG_BATCH}, prompt {LONG_PROMPT}, 8 new tokens: at the end / at the peak")
    cases = [("transformers", "all"), *(("ours", f"all {form}") for form in ("all later", "last copy", "first copy"))]
    for system, case in [*cases, ("ours", "all average copy")]:
        run = child(folder, system, dtype, case, LONG_BATCH, LONG_PROMPT, 8)
        print(f"  {system:13}{case:18}{run['kept']:8.0f} / {run['mib']:.0f}   {run['seconds']:.2f} s", flush=True)


def main() -> None:
    """Writes the model, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--parts", nargs="+", default=["speed", "forms", "memory"])
    parser.add_argument("--child", nargs=7, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        folder, system, dtype, case, *numbers = arguments.child
        print(json.dumps(measure(system, Path(folder), dtype, case, *map(int, numbers))))
        return
    with tempfile.TemporaryDirectory(prefix="ouro-benchmark-") as name:
        folder = Path(name)
        write_model(folder)
        if "speed" in arguments.parts:
            speed(folder, arguments.dtypes, arguments.batches, arguments.rounds)
        if "forms" in arguments.parts:
            forms(folder, arguments.dtypes[0], arguments.batches[-1], arguments.rounds)
        if "memory" in arguments.parts:
            memory(folder, arguments.dtypes[0])


if __name__ == "__main__":
    main()
