"""Packing documents into sequences: this project against TRL's `pack_dataset`, the same documents, the same run.

    pip install --no-deps trl && python benchmarks/packing.py

Both begin with tokenised documents on disk (a .bin/.idx pair; an Arrow data set) and end when every packed sequence was
read once as a tensor. Each measurement is a process of its own, alternating; medians, ratios and padding are printed.
TRL packs batches of 1,000 documents apart from each other, which is its default. The planning alone is timed for
millions of documents, where nothing is compared.
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
from pathlib import Path
from typing import Any

import numpy as np

SEQUENCE, VOCAB = 32_768, 49_152


def lengths_of(documents: int) -> np.ndarray:
    """Lengths as reasoning sets have them: log-normal around 3,000 tokens, long tails."""
    lengths = np.random.default_rng(0).lognormal(8.0, 1.0, documents)
    return np.clip(lengths, 16, 4 * SEQUENCE).astype(np.int32)


def prepare(folder: Path, documents: int) -> None:
    """The same documents as a pair and as a `datasets` folder."""
    from datasets import Dataset, Features, Sequence, Value

    from data_prep.writer import PairWriter

    lengths = lengths_of(documents)
    tokens = np.random.default_rng(1).integers(1, VOCAB, int(lengths.sum()), dtype=np.uint16)
    rows = np.split(tokens, np.cumsum(lengths)[:-1])
    with PairWriter(folder / "talks", np.dtype("<u2")) as writer:
        for row in rows:
            writer.add(row.tolist())
    features = Features({"input_ids": Sequence(Value("int32"))})
    made = Dataset.from_generator(lambda: ({"input_ids": row} for row in rows), features=features)
    made.save_to_disk(folder / "arrow")


def ours(folder: Path) -> dict[str, float]:
    import torch

    from ouro_megatron.data.epochs import PackedEpoch, SampleForm
    from ouro_megatron.data.plans import PackingPlan, write_plan
    from ouro_megatron.data.tokens import TokenReader

    started = time.perf_counter()
    reader = TokenReader(folder / "talks")
    plan_folder = Path(tempfile.mkdtemp(dir=folder))
    write_plan(plan_folder, reader.lengths, SEQUENCE, "best_fit", "truncate")
    planned = time.perf_counter() - started
    plan = PackingPlan(plan_folder)
    form = SampleForm(SEQUENCE, 0, mask_end_of_document=False, document_mask=True)
    epoch = PackedEpoch(plan, np.arange(len(plan)), reader, form, None, "benchmark")
    total = torch.zeros((), dtype=torch.int64)
    for index in range(len(plan)):
        total += epoch[index]["tokens"].sum()
    waste = plan.report.waste
    return {"seconds": time.perf_counter() - started, "plan": planned, "sequences": len(plan), "padding": waste}


def trl(folder: Path) -> dict[str, float]:
    import torch
    from datasets import disable_caching, disable_progress_bars, load_from_disk
    from trl.data_utils import pack_dataset

    disable_caching()
    disable_progress_bars()
    started = time.perf_counter()
    packed = pack_dataset(load_from_disk(folder / "arrow"), SEQUENCE, "bfd")
    planned = time.perf_counter() - started
    used, total = 0, torch.zeros((), dtype=torch.int64)
    for row in packed.with_format("torch"):
        total += row["input_ids"].sum()
        used += len(row["input_ids"])
    waste = 1 - used / (len(packed) * SEQUENCE)
    return {"seconds": time.perf_counter() - started, "plan": planned, "sequences": len(packed), "padding": waste}


def plan_alone(documents: int) -> dict[str, float]:
    from ouro_megatron.data.packing import packing_report

    lengths = lengths_of(documents)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    report = packing_report(lengths, SEQUENCE, "best_fit", "truncate")
    seconds = time.perf_counter() - started
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": seconds, "sequences": report.sequences, "padding": report.waste, "mib": peak}


def run(name: str, argument: str) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--measure", name, argument]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        name, argument = arguments.measure
        print(
            json.dumps(
                plan_alone(int(argument)) if name == "plan" else {"ours": ours, "trl": trl}[name](Path(argument))
            )
        )
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), arguments.documents)
        found = [(run("ours", folder), run("trl", folder)) for _ in range(arguments.repeats)]
    for index, name in enumerate(("this project", "TRL pack_dataset")):
        runs = [pair[index] for pair in found]
        seconds, plan = (statistics.median(item[key] for item in runs) for key in ("seconds", "plan"))
        last = runs[-1]
        print(
            f"{name}: {seconds:.2f} s, of them {plan:.2f} s before the first sequence can be read; "
            f"{last['sequences']:,} sequences, {last['padding']:.2%} padding"
        )
    ratio = statistics.median(theirs["seconds"] / own["seconds"] for own, theirs in found)
    print(f"ratio of the whole, median of {len(found)}: {ratio:.2f}")
    for documents in (1_000_000, 8_300_000):
        alone = run("plan", str(documents))
        print(
            f"planning {documents:,} documents: {alone['seconds']:.1f} s, {alone['mib']:.0f} MiB, "
            f"{alone['sequences']:,} sequences, {alone['padding']:.3%} padding"
        )


if __name__ == "__main__":
    main()
