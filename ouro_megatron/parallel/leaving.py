"""How a rank's process ends."""

import ctypes
import os
import signal
import sys
from typing import NoReturn

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """The kernel kills this process when the one that started it is gone, however it went."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def leave(status: int) -> NoReturn:
    """Ends this process with exit code `status`, without Python's clean-up; what was printed is written first.

    Gloo's threads may still wait for peers that are gone: a clean end would wait for them, or be aborted by one of them
    (SIGABRT in place of `status`).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
