"""Generation on a CPU: this project's engine against transformers running the same exported model, in the same run.

    python benchmarks/inference.py

Random weights (8 layers x hidden 512, 4 loops), greedy, equal prompts, a fixed number of new tokens, the same
number of threads; transformers with its cache and scaled_dot_product_attention. Processes of the two alternate; medians
and their ratios are printed. Memory is the growth of the process's
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
PROMPT, NEW, CONTEXT = 32, 32, 2048
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


def measure(system: str, folder: Path, dtype: str, cases: list[str], size: dict[str, int]) -> dict[str, Any]:
    """Runs in the child: for each case the seconds of each generation after a short one to warm up, and the depth.

    A case is an exit policy, and for ours a cache policy and what becomes of skipped loops: "q=0.5 all later". `size`:
    batch, length of the prompts, new tokens, repeats, threads.
    """
    import torch

    torch.set_num_threads(size["threads"])
    batch = size["batch"]
    generator = (_ours if system == "ours" else _transformers)(folder, dtype, batch)
    found: dict[str, Any] = {}
    for case in cases:
        policy, *options = case.split()
        generate = generator(policy, options)
        generate(prompts(batch, 8), 4)
        before = _resident()
        wall, cpu, depth = [], [], 0.0
        for _ in range(size["repeats"]):
            started, worked = time.perf_counter(), time.process_time()
            depth = generate(prompts(batch, size["length"]), size["new"])
            wall.append(time.perf_counter() - started)
            cpu.append(time.process_time() - worked)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        found[case] = {"wall": wall, "cpu": cpu, "depth": depth, "peak": peak - before, "kept": _resident() - before}
    return found


Generate = Callable[[list[list[int]], int], float]
"""Prompts and a number of new tokens -> mean depth."""


def _ours(folder: Path, dtype: str, batch: int) -> Callable[[str, list[str]], Generate]:
    from ouro_megatron.checkpoint.load import load_for_inference
    from ouro_megatron.inference.engine import Engine, EngineSettings
    from ouro_megatron.inference.exit_policy import ExitPolicy
    from ouro_megatron.inference.load import DTYPES, make_runner
    from ouro_megatron.inference.request import Request
    from ouro_megatron.inference.weights import take_weights

    model = load_for_inference(folder)
    weights = take_weights(model.lm, DTYPES[dtype])

    def make(policy: str, options: list[str]) -> Generate:
        cache, skipped = options or ["all", "later"]
        settings = EngineSettings(batch, CONTEXT, MODEL.loops, cache, skipped)  # type: ignore[arg-type]
        engine = Engine(make_runner(weights, settings, model.context), settings, None, MODEL.vocab)

        def generate(ids: list[list[int]], new: int) -> float:
            for prompt in ids:
                engine.submit(Request(tuple(prompt), new, ExitPolicy.parse(policy)))
            depths: list[int] = []
            while engine.unfinished:
                depths += [event.token.depth for event in engine.step() if event.token is not None]
            assert len(depths) == new * len(ids)
            return sum(depths) / len(depths)

        return generate

    return make


def _transformers(folder: Path, dtype: str, batch: int) -> Callable[[str, list[str]], Generate]:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=precision, attn_implementation="sdpa"
    ).eval()
    kept: list[Any] = []

    def make(policy: str, options: list[str]) -> Generate:
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
                return_dict_in_generate=True,
                **TRANSFORMERS[policy],
            )
            assert made.sequences.shape == (len(ids), len(ids[0]) + new)
            # As ours, the cache is still there when the memory is read.
            kept[:] = [made]
            return 0.0

        return generate

    return make


def child(folder: Path, system: str, dtype: str, cases: list[str], **size: int) -> dict[str, Any]:
    """`measure` in a fresh process."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(size["threads"]),
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    task = json.dumps([system, str(folder), dtype, cases, size])
    done = subprocess.run([sys.executable, __file__, "--child", task], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{system} {dtype} {cases}:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def rates(runs: list[dict[str, Any]], case: str, tokens: int) -> tuple[float, float]:
    """Median tokens a second of wall time and of processor time."""
    wall, cpu = ([tokens / seconds for run in runs for seconds in run[case][key]] for key in ("wall", "cpu"))
    return statistics.median(wall), statistics.median(cpu)


def speed(folder: Path, dtypes: list[str], batches: list[int], rounds: int, **size: int) -> None:
    """Table of tokens a second by policy."""
    print(
        f"\ntokens/s, {size['threads']} threads, prompt {PROMPT}, {NEW} new tokens a sequence; medians of "
        f"{rounds * size['repeats']} in {rounds} processes; beside it, the ratio of tokens per second of processor time"
    )
    print(
        f"{'dtype':6}{'batch':>6}  {'exit':10}{'ours':>9}{'transformers':>14}{'ratio':>8}{'cpu':>8}{'mean depth':>12}"
    )
    for dtype in dtypes:
        for batch in batches:
            shape = {"batch": batch, "length": PROMPT, "new": NEW, **size}
            ours, theirs = [], []
            for _ in range(rounds):
                ours.append(child(folder, "ours", dtype, POLICIES, **shape))
                theirs.append(child(folder, "transformers", dtype, POLICIES, **shape))
            for policy in POLICIES:
                (wall, cpu), (their_wall, their_cpu) = (rates(runs, policy, batch * NEW) for runs in (ours, theirs))
                print(
                    f"{dtype:6}{batch:6d}  {policy:10}{wall:9.1f}{their_wall:14.1f}{wall / their_wall:7.2f}x"
                    f"{cpu / their_cpu:7.2f}x{ours[0][policy]['depth']:12.2f}",
                    flush=True,
                )


def forms(folder: Path, dtype: str, batch: int, rounds: int, **size: int) -> None:
    """What the cache policies and the ways to treat skipped loops cost and save, within this project."""
    cases = ["q=0.5 all later", "q=0.5 all copy", "q=0.5 all run", "q=0.5 last copy", "q=0.5 first copy"]
    cases += ["q=0.5 average copy", "change=0.5 all later", "all all later", "all last copy", "all average copy"]
    print(f"\nours, {dtype}, batch {batch}: tokens/s by exit, cache policy and what becomes of skipped loops")
    shape = {"batch": batch, "length": PROMPT, "new": NEW, **size}
    runs = [child(folder, "ours", dtype, cases, **shape) for _ in range(rounds)]
    for case in cases:
        print(
            f"  {case:22}{rates(runs, case, batch * NEW)[0]:9.1f}   mean depth {runs[0][case]['depth']:.2f}", flush=True
        )


def memory(folder: Path, dtype: str, **size: int) -> None:
    """Growth of resident memory with the cache of long prompts, each case in a process of its own."""
    print(f"\nmemory in MiB, {dtype}, batch {LONG_BATCH}, prompt {LONG_PROMPT}, 8 new tokens: at the end / at the peak")
    shape = {**size, "batch": LONG_BATCH, "length": LONG_PROMPT, "new": 8, "repeats": 1}
    cases = [("transformers", "all"), *(("ours", f"all {form}") for form in ("all later", "last copy", "first copy"))]
    for system, case in [*cases, ("ours", "all average copy")]:
        run = child(folder, system, dtype, [case], **shape)[case]
        print(f"  {system:13}{case:18}{run['kept']:8.0f} / {run['peak']:.0f}   {run['wall'][0]:.2f} s", flush=True)


def main() -> None:
    """Writes the model, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--parts", nargs="+", default=["speed", "forms", "memory"])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        system, folder, dtype, cases, size = json.loads(arguments.child)
        print(json.dumps(measure(system, Path(folder), dtype, cases, size)))
        return
    size = {"repeats": arguments.repeats, "threads": arguments.threads}
    with tempfile.TemporaryDirectory(prefix="ouro-benchmark-") as name:
        write_model(Path(name))
        if "speed" in arguments.parts:
            speed(Path(name), arguments.dtypes, arguments.batches, arguments.rounds, **size)
        if "forms" in arguments.parts:
            forms(Path(name), arguments.dtypes[0], arguments.batches[-1], arguments.rounds, **size)
        if "memory" in arguments.parts:
            memory(Path(name), arguments.dtypes[0], **size)


if __name__ == "__main__":
    main()
