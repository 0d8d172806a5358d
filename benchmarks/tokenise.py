"""Data preparation against what users have today: same machine, same text, same tokenizer, same bytes out.

    python benchmarks/tokenise.py --megatron DIR --megatron-python VENV/bin/python --datatrove-python VENV/bin/python

DIR is a checkout of Megatron-LM, run by a Python that has what it needs; datatrove has a Python of its own because its
dependencies are not ours. Tools that are not given are left out. Runs of the tools take turns, and medians are shown.
"""

import argparse
import hashlib
import os
import shutil
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from benchmarks import tokenise_tools as tools
from benchmarks.tokenise_stages import stages
from benchmarks.tokenise_text import documents, train_tokenizer, write_corpus
from data_prep.byte_level import ByteLevelEncoder
from data_prep.encode import PlainEncoder, same_ids
from ouro_megatron.data.tokenizer import load_tokenizer

Tool = Callable[[Path], tuple[tools.Run, list[Path]]]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    paths = sysconfig.get_paths()
    parser.add_argument("--text", type=Path, nargs="+", default=[Path(paths["stdlib"]), Path(paths["purelib"])])
    parser.add_argument("--tokenizer", type=Path, help="folder; one like SmolLM2's is trained when left out")
    parser.add_argument("--megabytes", type=float, default=60)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--megatron", type=Path, help="checkout of Megatron-LM")
    parser.add_argument("--megatron-python", type=Path, default=Path("python3"))
    parser.add_argument("--datatrove-python", type=Path)
    parser.add_argument(
        "--memory",
        type=_shape,
        nargs="+",
        default=[(50, 0), (200, 0), (500, 0), (120, 1), (120, 6), (120, 60)],
        metavar="MB:MILLIONS",
        help="text to measure the memory with, and millions of characters a document; 0: of the web's size",
    )
    parser.add_argument("--parts", nargs="+", default=["core", "tools", "memory", "stages"])
    return parser.parse_args()


def _shape(word: str) -> tuple[float, float]:
    megabytes, millions = word.split(":")
    return float(megabytes), float(millions)


def main() -> None:
    given = arguments()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        tokenizer = given.tokenizer or train_tokenizer(work / "tokenizer", given.text)
        if "core" in given.parts:
            per_core(tokenizer, list(documents(given.text, min(given.megabytes, 20))), given.repeats)
        if "tools" in given.parts:
            compare_tools(given, tokenizer, work)
        if "memory" in given.parts:
            memory(given, tokenizer, work)
        if "stages" in given.parts:
            (file,) = write_corpus(work / "stages", given.text, given.megabytes, files=1)
            stages(file, tokenizer)


def per_core(tokenizer: Path, texts: list[str], repeats: int) -> None:
    """Processor time of `encode_batch_fast` alone, without reading its ids, against ours with ids in an array."""
    loaded = load_tokenizer(tokenizer)
    raw = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    batches = [texts[at : at + 64] for at in range(0, len(texts), 64)]
    size = sum(len(text.encode()) for text in texts) / 1e6
    # A str keeps its UTF-8 once it was asked for, so that every repetition gets strings that are new.
    fresh = [[text.encode() for text in batch] for batch in batches]
    rates: dict[str, list[float]] = {"encode_batch_fast": [], "ours, cold cache": [], "ours, warm cache": []}
    encoder = ByteLevelEncoder(loaded)
    for _ in range(repeats):
        cold = ByteLevelEncoder(loaded)
        for name, encode in (
            ("encode_batch_fast", lambda batch: raw.encode_batch_fast(batch, add_special_tokens=False)),
            ("ours, cold cache", cold.encode_batch),
            ("ours, warm cache", cold.encode_batch),
        ):
            again = [[text.decode() for text in batch] for batch in fresh]
            started = time.process_time()
            for batch in again:
                encode(batch)
            rates[name].append(size / (time.process_time() - started))
    plain = PlainEncoder(loaded)
    equal = all(same_ids(encoder.encode_batch(batch), plain.encode_batch(batch)) for batch in batches)
    print(f"\n## One core, {size:.0f} MB, {len(texts):,} documents, ids equal: {equal}\n")
    base = statistics.median(rates["encode_batch_fast"])
    for name, values in rates.items():
        rate = statistics.median(values)
        print(f"{name:20} {rate:8.1f} MB/s  {rate / base:6.1f} x  (of {', '.join(f'{value:.1f}' for value in values)})")


def compare_tools(given: argparse.Namespace, tokenizer: Path, work: Path) -> None:
    """Whole commands, from start to finished files; processor time also less that of a run on a few documents."""
    corpus = write_corpus(work / "corpus", given.text, given.megabytes, files=given.workers)
    tiny = write_corpus(work / "tiny", given.text, 0.01, files=given.workers, characters=100)
    size = sum(file.stat().st_size for file in corpus) / 1e6
    runs: dict[str, list[tools.Run]] = {}
    starts: dict[str, float] = {}
    digests: dict[str, str] = {}
    for repeat in range(-1, given.repeats):
        for name, tool in _tools(given, tokenizer, tiny if repeat < 0 else corpus, work).items():
            out = work / "out"
            run, results = tool(out)
            if repeat < 0:
                starts[name] = run.cpu_seconds
            else:
                runs.setdefault(name, []).append(run)
                digests[name] = _digest(results)
            shutil.rmtree(out)
    print(f"\n## {given.workers} workers, {size:.0f} MB of JSON lines, medians of {given.repeats}\n")
    base = None
    for name, found in runs.items():
        seconds = statistics.median(run.seconds for run in found)
        cpu = statistics.median(run.cpu_seconds for run in found)
        net = cpu - starts[name]
        base = base or (seconds, cpu, net)
        print(
            f"{name:28} {seconds:7.1f} s {size / seconds:6.1f} MB/s ({seconds / base[0]:5.1f} x ours)  "
            f"cpu {cpu:7.1f} s ({cpu / base[1]:5.1f} x), less the start {net:7.1f} s ({net / base[2]:5.1f} x)  "
            f"peak {max(run.peak_mib for run in found):6.0f} MiB"
        )
    print("token ids:", "the same bytes from all" if len(set(digests.values())) == 1 else f"DIFFERENT: {digests}")


def _tools(given: argparse.Namespace, tokenizer: Path, files: Sequence[Path], work: Path) -> dict[str, Tool]:
    found: dict[str, Tool] = {"ouro data prepare": lambda out: tools.ours(list(files), tokenizer, out, given.workers)}
    if given.megatron:
        whole = work / "whole.jsonl"
        with whole.open("wb") as stream:
            for file in files:
                stream.write(file.read_bytes())
        found["preprocess_data.py"] = lambda out: tools.megatron(
            given.megatron, given.megatron_python, whole, tokenizer, out, given.workers
        )
    if given.datatrove_python:
        found["datatrove"] = lambda out: tools.datatrove(
            given.datatrove_python, list(files), tokenizer, out, given.workers
        )
    return found


def _digest(files: Sequence[Path]) -> str:
    """Of the token ids of all files, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(np.fromfile(file, dtype=np.uint16).tobytes())
    return digest.hexdigest()[:16]


def memory(given: argparse.Namespace, tokenizer: Path, work: Path) -> None:
    """Peak of all processes together, for more text and for longer documents."""
    print(f"\n## Peak memory of ouro data prepare, {given.workers} workers\n")
    for megabytes, millions in given.memory:
        characters = int(millions * 1e6) or None
        files = write_corpus(work / "memory", given.text, megabytes, characters=characters)
        run, _ = tools.ours(files, tokenizer, work / "out", given.workers)
        shape = (
            f"documents of {characters / 1e6:.0f} million characters" if characters else "documents of the web's size"
        )
        print(f"{megabytes:5.0f} MB, {shape:40} {run.peak_mib:7.0f} MiB  {megabytes / run.seconds:6.1f} MB/s")
        shutil.rmtree(work / "out")
        shutil.rmtree(work / "memory")


if __name__ == "__main__":
    main()
