"""Speed and memory of whole training steps on one GPU, against plain PyTorch with torch.compile, in one run.

    python -m benchmarks.gpu                           # all cases
    python -m benchmarks.gpu --only "1.4b TE" --steps 5
    python -m benchmarks.gpu --profile profiles        # where the time goes, a text file a case

Prints a table; `--out FILE` keeps the numbers as JSON lines, one a case, written as soon as it is measured.
"""

import argparse
import json
import time
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.gpu.cases import CASES, PLAIN, Case, measure
from ouro_megatron.parallel.context import ParallelContext, create_context
from ouro_megatron.recipe.schema import ParallelSection


def versions() -> dict[str, str]:
    found = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    for name in ("triton", "transformer-engine", "megatron-core"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def attempt(case: Case, context: ParallelContext, arguments: argparse.Namespace) -> dict[str, object]:
    """What `measure` found, or why it could not: one case that fails does not take the others' numbers along."""
    try:
        return measure(case, context, arguments.steps, arguments.warm_up, arguments.profile)
    except (torch.OutOfMemoryError, RuntimeError, ImportError) as error:
        return {"case": case.name, "failed": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}


def line(result: dict[str, object], base: float | None) -> str:
    """`base`: tokens/s of plain PyTorch with this model and sequence, where it was fastest so far."""
    name = f"{result['case']:42}"
    if "failed" in result:
        return f"{name} {result['failed']}"
    rate, mfu, peak = (result[key] for key in ("tokens_per_s", "mfu_bf16", "peak_gib"))
    assert isinstance(rate, float) and isinstance(peak, float)
    ratio = "" if base is None else f"{rate / base:6.3f} x plain"
    share = f"{100 * mfu:5.1f}%" if isinstance(mfu, float) else "    -"
    return f"{name} {rate:9.0f} tokens/s   MFU {share}   peak {peak:6.1f} GiB   {ratio}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose name has this in it; several, with | between them")
    parser.add_argument("--steps", type=int, default=5, help="timed optimizer steps of each case")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before them")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further case after this long")
    parser.add_argument("--profile", type=Path, help="folder for a profile of one more step of each case")
    parser.add_argument("--out", type=Path, help="file that gets a JSON line a case")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: torch sees no CUDA GPU on this machine; `ouro doctor` says what is missing")
    if arguments.profile is not None:
        arguments.profile.mkdir(parents=True, exist_ok=True)
    wanted = [case for case in CASES if any(part in case.name for part in arguments.only.split("|"))]
    if not wanted:
        raise SystemExit(f"--only {arguments.only!r} names no case; there are: {', '.join(c.name for c in CASES)}")
    print(" ".join(f"{name} {version}" for name, version in versions().items()), flush=True)
    context, begun = create_context(ParallelSection(), "cuda"), time.perf_counter()
    best: dict[tuple[str, int], float] = {}
    for case in wanted:
        if time.perf_counter() - begun > arguments.seconds:
            print(f"{case.name:42} not begun: --seconds {arguments.seconds:g} are over")
            continue
        result = attempt(case, context, arguments)
        rate, kind = result.get("tokens_per_s"), (case.model, case.sequence)
        if case.system in PLAIN and isinstance(rate, float):
            best[kind] = max(rate, best.get(kind, 0.0))
        print(line(result, best.get(kind)), flush=True)
        if arguments.out is not None:
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**versions(), **result}) + "\n")
    context.close()


if __name__ == "__main__":
    main()
