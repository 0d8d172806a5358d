"""Where a rank says why it failed: in a file for the launcher, else on its standard error."""

import json
import os
import sys
import traceback
from pathlib import Path

from ouro_megatron.errors import AnotherRankFailed, OuroError, RankGone, TrainingError

FAILURE_FOLDER = "OURO_FAILURE_FOLDER"
"""Environment variable: the folder in which the launcher looks for reasons."""


def report(error: BaseException) -> None:
    """Leaves the reason for the launcher; without one, prints it with the rank's number, once for the whole job."""
    expected = isinstance(error, OuroError)
    rank = os.environ.get("RANK", "0")
    folder = os.environ.get(FAILURE_FOLDER)
    message = str(error) if expected else "".join(traceback.format_exception(error))
    if folder is None:
        if not isinstance(error, AnotherRankFailed):
            print(f"rank {rank}: error: {message}", file=sys.stderr, flush=True)
        return
    values = {
        "message": message,
        "code": error.exit_code if isinstance(error, OuroError) else 1,
        "expected": expected,
        "final": isinstance(error, TrainingError) and error.reported and not isinstance(error, AnotherRankFailed),
        "last_seen": error.last_seen if isinstance(error, RankGone) else {},
    }
    partial = Path(folder) / f".{rank}.part"
    partial.write_text(json.dumps(values), encoding="utf-8")
    partial.replace(Path(folder) / f"{rank}.json")
