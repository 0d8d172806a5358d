"""A tensor-parallel rank other than 0: `python -m ouro_megatron.inference.follower OPTIONS`, started by rank 0."""

import json
import os
import sys
import warnings
from pathlib import Path

from ouro_megatron.parallel.leaving import die_with_parent, leave


def main() -> int:
    """Returns the exit code; the last line printed says what went wrong."""
    die_with_parent()
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
    leave(status)
