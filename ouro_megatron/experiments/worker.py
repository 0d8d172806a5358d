"""A process that takes cells of a sweep one after the other: `python -m ouro_megatron.experiments.worker OUT`.

Any number of workers share a sweep, on one machine or on several that see its folder: each takes the next cell that
is neither done nor taken.
"""

import argparse
import sys
import traceback
import warnings
from pathlib import Path

from ouro_megatron.errors import STOPPED_EXIT_CODE, OuroError
from ouro_megatron.parallel.leaving import die_with_parent, leave
from ouro_megatron.training.signals import StopSignals


def work(out: Path, attempt: str, names: list[str], nproc: int | None, signals: StopSignals) -> int:
    """Runs cells (those in `names`) until none is left to take. The exit code: 0, 1 with a failed cell, 75 stopped."""
    from ouro_megatron.experiments.cells import cells_of
    from ouro_megatron.experiments.plan import by_cost, load_plan
    from ouro_megatron.experiments.run import run_cell

    sweep = load_plan(out)
    most = max((int(name.rsplit("-seed", 1)[1]) for name in names), default=None)
    cells = [cell for cell in by_cost(sweep, cells_of(sweep.settings, most)) if not names or cell.name in names]
    failed = False
    took_one = True
    while took_one:
        took_one = False
        for cell in cells:
            failure = sweep.failure(cell)
            if sweep.result(cell) is not None or (failure is not None and failure["attempt"] == attempt):
                continue
            with sweep.claim(cell) as mine:
                if not mine or sweep.result(cell) is not None:
                    continue
                took_one = True
                print(f"== {cell.name}", flush=True)
                try:
                    if not run_cell(sweep, cell, signals, nproc):
                        return STOPPED_EXIT_CODE
                except Exception as error:
                    failed = True
                    expected = isinstance(error, OuroError)
                    message = str(error) if expected else "".join(traceback.format_exception(error))
                    print(f"{cell.name} failed: {message}", file=sys.stderr, flush=True)
                    sweep.fail(cell, attempt, message)
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--attempt", required=True, help="Cells that failed in this attempt are not tried again.")
    parser.add_argument("--cells", default="", help="Names, separated by commas; all when left out.")
    parser.add_argument("--nproc", type=int, help="Ranks of each cell.")
    parser.add_argument("--die-with-parent", action="store_true")
    options = parser.parse_args()
    signals = StopSignals()
    signals.install()
    if options.die_with_parent:
        die_with_parent()
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    names = [name for name in options.cells.split(",") if name]
    try:
        return work(options.out, options.attempt, names, options.nproc, signals)
    except OuroError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


if __name__ == "__main__":
    leave(main())
