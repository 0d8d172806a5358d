"""Stop signals: remember them, act at the next safe point."""

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Slurm sends TERM before it kills and USR1 when asked to (`--signal`); INT is Ctrl-C."""


class StopSignals:
    """Once installed, the stop signals no longer end the process; `received` names the first one."""

    def __init__(self) -> None:
        self.received: str | None = None

    def install(self) -> None:
        """Main thread only. Installed before any slow start-up work: an early signal must not be lost."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number).name
