"""Breaks training runs in many ways and checks that nothing is lost.

    python -m tests.faults.run --runs 100 --seed 0          # seeds 0 to 99
    python -m tests.faults.run --seeds 7,11,42              # these
    python -m tests.faults.run --runs 100 --list            # what would be done

Each run is a training stage of 12 steps on two ranks with a checkpoint every 3 steps. It is killed, stopped, frozen,
starved of disk or fed with damage as its seed says, started again until it is done, and compared with an undisturbed
run: the loss of every step, the held-out losses and the tensors of the last checkpoint must be the same bit for bit.
Results are written as they come; --resume goes on with the seeds that are not in FILE yet.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

from tests.faults.cases import draw


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", default="", help="these seeds instead, separated by commas")
    parser.add_argument("--list", action="store_true", help="print the cases and end")
    parser.add_argument("--out", type=Path, help="append one JSON object a run to this file")
    parser.add_argument("--resume", action="store_true", help="leave out seeds that --out holds already")
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",") if seed]
    seeds = seeds or list(range(arguments.seed, arguments.seed + arguments.runs))
    if arguments.list:
        for seed in seeds:
            print(f"{seed:4d}  {draw(seed)}")
        return 0
    if arguments.resume and arguments.out and arguments.out.exists():
        done = {json.loads(line)["seed"] for line in arguments.out.read_text(encoding="utf-8").splitlines()}
        seeds = [seed for seed in seeds if seed not in done]
    return _run(seeds, arguments.out)


def _run(seeds: list[int], out: Path | None) -> int:
    os.environ["OMP_NUM_THREADS"] = "1"
    warnings.simplefilter("ignore")  # Megatron-Core names every optional package it does not find
    from tests.faults.forked import start_fork_server
    from tests.faults.harness import Suite

    failed: list[int] = []
    times: list[float] = []
    lost: list[int] = []
    with tempfile.TemporaryDirectory(prefix="ouro-faults-") as folder:
        began = time.monotonic()
        start_fork_server(Path(folder))
        suite = Suite(Path(folder))
        for seed in seeds:
            report = suite.run(draw(seed))
            times.append(report.seconds)
            lost += report.lost_steps
            verdict = "ok" if not report.problem else "BROKEN"
            print(
                f"{verdict:6s} seed {seed}: {report.case}; {report.attempts} attempts, lost {report.lost_steps} steps, "
                f"{report.seconds:.1f} s" + (f"\n       {report.problem}" if report.problem else ""),
                flush=True,
            )
            if report.problem:
                failed.append(seed)
            if out is not None:
                bad_data = [report.case.bad_data] if report.case.bad_data else []
                row = {
                    "seed": seed,
                    "case": str(report.case),
                    "kinds": [fault.kind for fault in report.case.faults] + bad_data,
                    "attempts": report.attempts,
                    "lost_steps": report.lost_steps,
                    "seconds": round(report.seconds, 2),
                    "problem": report.problem,
                }
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
        print(
            f"{len(seeds) - len(failed)} of {len(seeds)} runs kept every promise"
            + (f"; broken: {failed}" if failed else "")
            + f"; at most {max(lost, default=0)} steps done again after a restart; "
            f"median {statistics.median(times) if times else 0:.1f} s a run, {time.monotonic() - began:.0f} s in all"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
