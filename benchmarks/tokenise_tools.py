"""The tools that benchmarks/tokenise.py compares, each as a command of its own, watched from outside."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

_DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import MegatronDocumentTokenizer

if __name__ == "__main__":
    source, out, tokenizer, workers = sys.argv[1:]
    LocalPipelineExecutor(
        [
            JsonlReader(source, glob_pattern="*.jsonl"),
            MegatronDocumentTokenizer(out, tokenizer_name_or_path=tokenizer, eos_token="<|endoftext|>"),
        ],
        tasks=int(workers),
        workers=int(workers),
        logging_dir=out + "/logs",
    ).run()
"""


@dataclass(frozen=True)
class Run:
    """One run of a tool."""

    seconds: float
    cpu_seconds: float
    """Processor time of all its processes, which other work on the machine hardly changes."""
    peak_mib: float
    """Largest sum of the resident memory of all its processes."""


def watch(command: list[str], environment: dict[str, str] | None = None) -> Run:
    """Runs a command to its end. Raises RuntimeError with its last lines when it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    watcher = _Watcher(process)
    watcher.start()
    output, _ = process.communicate()
    seconds = time.perf_counter() - started
    watcher.join()
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{output[-3000:]}")
    return Run(seconds, sum(watcher.cpu.values()), watcher.peak / 2**20)


class _Watcher(threading.Thread):
    """Looks at a process and all below it. Not every tool waits for its processes, so their parent cannot be asked."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        super().__init__(daemon=True)
        self.process = process
        self.peak = 0
        self.cpu: dict[int, float] = {}

    def run(self) -> None:
        while self.process.poll() is None:
            total = 0
            try:
                top = psutil.Process(self.process.pid)
                for each in (top, *top.children(recursive=True)):
                    with contextlib.suppress(psutil.Error):
                        times = each.cpu_times()
                        self.cpu[each.pid] = times.user + times.system
                        total += each.memory_info().rss
            except psutil.NoSuchProcess:
                return
            self.peak = max(self.peak, total)
            time.sleep(0.05)


def ours(files: list[Path], tokenizer: Path, out: Path, workers: int) -> tuple[Run, list[Path]]:
    """`ouro data prepare` of the folder that holds the files; returns the run and the .bin files in order."""
    out.mkdir(parents=True)
    recipe = {
        "output": str(out),
        "tokenizer": {"kind": "existing", "path": str(tokenizer)},
        "validation_fraction": 0,
        "sources": [{"name": "text", "kind": "jsonl", "path": str(files[0].parent)}],
    }
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    main = "from ouro_megatron.cli import main; main()"
    command = [sys.executable, "-c", main, "data", "prepare", str(out / "recipe.yaml"), "--workers", str(workers)]
    run = watch(command)
    return run, sorted(out.glob("text*.bin"))


def megatron(
    repository: Path, python: Path, file: Path, tokenizer: Path, out: Path, workers: int
) -> tuple[Run, list[Path]]:
    """Megatron-LM's tools/preprocess_data.py on one file."""
    out.mkdir(parents=True)
    command = [str(python), str(repository / "tools" / "preprocess_data.py"), "--input", str(file), "--append-eod"]
    command += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer)]
    command += ["--output-prefix", str(out / "text"), "--workers", str(workers)]
    run = watch(command, {"PYTHONPATH": str(repository), "TOKENIZERS_PARALLELISM": "false"})
    return run, [out / "text_text_document.bin"]


def datatrove(python: Path, files: list[Path], tokenizer: Path, out: Path, workers: int) -> tuple[Run, list[Path]]:
    """datatrove's MegatronDocumentTokenizer, a task for each file, in the folder that holds the files."""
    out.mkdir(parents=True)
    script = out / "pipeline.py"
    script.write_text(_DATATROVE)
    run = watch(
        [str(python), str(script), str(files[0].parent), str(out), str(tokenizer / "tokenizer.json"), str(workers)]
    )
    return run, sorted(out.glob("*.bin"))
