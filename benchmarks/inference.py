"""Generation on a CPU: this project's engine against transformers running the same exported model, in the same run.

    python benchmarks/inference.py

Random weights (8 layers x hidden 512, 4 loops), greedy, equal prompts, a fixed number of new tokens, the same
number of threads; transformers with its cache and scaled_dot_product_attention. Each system lives in a process of its
own and the two take turns, one generation each, so that both see the same machine; medians of the times and of the
ratio within a turn are printed. Memory is the growth of the process's resident memory over what it had with the model
loaded, for long prompts, where the cache is what grows.
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
PROMPT, NEW, CONTEXT = 32, 16, 2048
CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "step=2": {"exit_at_step": 1},
    "q=0.5": {"exit_threshold": 0.5},
    "q=0.8": {"exit_threshold": 0.8},
    "expected": {"use_weighted_exit": True},
    "change=0.5": {},
    "all last copy": {},
    "all first copy": {},
    "all average copy": {},
    "q=0.5 all copy": {"exit_threshold": 0.5},
    "q=0.5 all run": {"exit_threshold": 0.5},
    "q=0.5 last copy": {"exit_threshold": 0.5},
}
"""Ours (exit policy, cache policy, what becomes of skipped loops) -> what transformers is told. It has neither an exit
by change nor a smaller cache: it then runs all loops with its own."""
POLICIES = ("all", "step=2", "q=0.5", "expected")
LONG_BATCH, LONG_PROMPT = 4, 512


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


def serve(system: str, folder: Path, dtype: str, batch: int, threads: int) -> None:
    """The child: reads [case, prompt length, new tokens] a line, answers with seconds, depth and memory in MiB."""
    import torch

    torch.set_num_threads(threads)
    make = (_ours if system == "ours" else _transformers)(folder, dtype, batch)
    made: tuple[str, Generate] | None = None
    base = 0.0
    print("ready", flush=True)
    for line in sys.stdin:
        case, length, new = json.loads(line)
        if made is None or made[0] != case:
            made = (case, make(case))
            made[1](prompts(batch, 8), 4)
            base = _resident()
        wall, cpu = time.perf_counter(), time.process_time()
        depth = made[1](prompts(batch, length), new)
        found = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "depth": depth}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({**found, "peak": peak - base, "kept": _resident() - base}), flush=True)


Generate = Callable[[list[list[int]], int], float]
"""Prompts and a number of new tokens -> mean depth."""


def _ours(folder: Path, dtype: str, batch: int) -> Callable[[str], Generate]:
    from ouro_megatron.checkpoint.load import load_for_inference
    from ouro_megatron.inference.engine import Engine, EngineSettings
    from ouro_megatron.inference.exit_policy import ExitPolicy
    from ouro_megatron.inference.load import DTYPES, make_runner
    from ouro_megatron.inference.request import Request
    from ouro_megatron.inference.weights import take_weights

    model = load_for_inference(folder)
    weights = take_weights(model.lm, DTYPES[dtype], batch)

    def make(case: str) -> Generate:
        policy, cache, skipped = [*case.split(), "all", "later"][:3]
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


def _transformers(folder: Path, dtype: str, batch: int) -> Callable[[str], Generate]:
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

    def make(case: str) -> Generate:
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
                **CASES[case],
            )
            assert made.sequences.shape == (len(ids), len(ids[0]) + new)
            # As ours, the cache is still there when the memory is read.
            kept[:] = [made]
            return 0.0

        return generate

    return make


class System:
    """One of the two in a process of its own, asked for one generation at a time."""

    def __init__(self, system: str, folder: Path, dtype: str, batch: int, threads: int) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
        }
        task = json.dumps([system, str(folder), dtype, batch, threads])
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--child", task],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._name = f"{system} {dtype} batch {batch}"
        while self._line() != "ready":
            pass

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._name} ended with exit code {self._process.wait()}: run its --child to see why")
        return line.strip()

    def generate(self, case: str, length: int, new: int) -> dict[str, float]:
        """Seconds (wall, cpu), mean depth, memory (peak, kept) of one generation, after a short one for a new case."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([case, length, new]) + "\n")
        self._process.stdin.flush()
        found: dict[str, float] = json.loads(self._line())
        return found

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def speed(folder: Path, dtypes: list[str], batches: list[int], cases: list[str], repeats: int, threads: int) -> None:
    """Table of tokens a second by policy."""
    print(
        f"\ntokens/s, {threads} threads, prompt {PROMPT}, {NEW} new tokens a sequence; medians of {repeats} turns; "
        "cpu: the ratio of tokens per second of processor time"
    )
    print(
        f"{'dtype':6}{'batch':>6}  {'exit, cache, skipped':22}{'ours':>9}{'transformers':>14}{'ratio':>8}{'cpu':>8}",
        end="",
    )
    print(f"{'depth':>7}")
    for dtype in dtypes:
        for batch in batches:
            ours, theirs = (System(name, folder, dtype, batch, threads) for name in ("ours", "transformers"))
            for case in cases:
                turns = [(ours.generate(case, PROMPT, NEW), theirs.generate(case, PROMPT, NEW)) for _ in range(repeats)]
                rates = [statistics.median(batch * NEW / turn[side]["wall"] for turn in turns) for side in (0, 1)]
                wall, cpu = (statistics.median(b[key] / a[key] for a, b in turns) for key in ("wall", "cpu"))
                print(
                    f"{dtype:6}{batch:6d}  {case:22}{rates[0]:9.1f}{rates[1]:14.1f}{wall:7.2f}x{cpu:7.2f}x"
                    f"{turns[0][0]['depth']:7.2f}",
                    flush=True,
                )
            ours.close()
            theirs.close()


def memory(folder: Path, dtype: str, threads: int) -> None:
    """Growth of resident memory with the cache of long prompts, each case in a process of its own."""
    print(
        f"\ngrowth of memory in MiB, {dtype}, batch {LONG_BATCH}, prompt {LONG_PROMPT}, 8 new tokens: "
        "at the end / at the peak"
    )
    print(f"{'exit, cache, skipped':22}{'ours':>14}{'transformers':>16}")
    for case in ("all", "step=2", "q=0.5", "expected", "all last copy", "all first copy", "all average copy"):
        cells = []
        for name in ("ours", "transformers"):
            # A smaller cache is ours alone.
            if name == "transformers" and case not in POLICIES:
                cells.append("-")
                continue
            system = System(name, folder, dtype, LONG_BATCH, threads)
            run = system.generate(case, LONG_PROMPT, 8)
            system.close()
            cells.append(f"{run['kept']:.0f} / {run['peak']:.0f}")
        print(f"{case:22}{cells[0]:>14}{cells[1]:>16}", flush=True)


def main() -> None:
    """Writes the model, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--parts", nargs="+", choices=["speed", "memory"], default=["speed", "memory"])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        system, folder, dtype, batch, threads = json.loads(arguments.child)
        serve(system, Path(folder), dtype, batch, threads)
        return
    with tempfile.TemporaryDirectory(prefix="ouro-benchmark-") as name:
        write_model(Path(name))
        if "speed" in arguments.parts:
            cases = arguments.cases, arguments.repeats, arguments.threads
            speed(Path(name), arguments.dtypes, arguments.batches, *cases)
        if "memory" in arguments.parts:
            for dtype in arguments.dtypes:
                memory(Path(name), dtype, arguments.threads)


if __name__ == "__main__":
    main()
