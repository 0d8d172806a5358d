"""A tensor-parallel rank other than 0: `python -m ouro_megatron.inference.follower OPTIONS`, started by rank 0."""

import ctypes
import json
import os
import signal
import sys
import warnings
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Returns the exit code; the last line printed says what went wrong."""
    # The kernel ends this process when rank 0 is gone, however it went.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    from ouro_megatron.errors import OuroError
    from ouro_megatron.inference.load import from_mapping, open_model

    file = Path(sys.argv[1])
    options = from_mapping(json.loads(file.read_text(encoding="utf-8")))
    file.with_name(f"rank-{os.environ['RANK']}.ready").touch()
    try:
        with open_model(options):
            raise AssertionError("rank 0 does not start itself as a follower")
    except OuroError as error:
        print(error, flush=True)
        return error.exit_code


if __name__ == "__main__":
    try:
        status = main()
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        status = 1
    # Gloo's threads may wait for a peer that is gone.
    os._exit(status)
