"""Ranks forked from a server that has imported everything already; from there on they are processes like any other,
with process ids, signals and files of their own."""

import multiprocessing as mp
import os
import subprocess
from pathlib import Path
from typing import Any

from ouro_megatron.training.launch import RankProcess, Ranks
from tests.distributed.ranks import PRELOAD
from tests.faults.rank import rank_main


class ForkedRank:
    """A rank of the fork server, with the face of a subprocess.Popen."""

    def __init__(self, process: Any) -> None:
        self._process = process
        self.returncode: int | Any = None

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    def poll(self) -> int | None:
        self.returncode = self._process.exitcode
        return self.returncode

    def send_signal(self, sig: int) -> None:
        os.kill(self.pid, sig)

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> int:
        self._process.join()
        self.returncode = self._process.exitcode
        return int(self.returncode)


class ForkedRanks(Ranks):
    """The launcher, with forked ranks that have a fault built in; ends what hangs."""

    def __init__(self, *launch: Any, arguments: tuple[Any, ...]) -> None:
        super().__init__(*launch)
        self._arguments = arguments
        self.timed_out = False

    def _spawn(self, rank: int, environment: dict[str, str], log: Path) -> RankProcess:
        process = mp.get_context("forkserver").Process(
            target=rank_main, args=(environment, str(log), str(self._file), *self._arguments)
        )
        process.start()
        return ForkedRank(process)

    def give_up(self) -> None:
        self.timed_out = True
        for process in self._processes:
            process.kill()


def start_fork_server(folder: Path) -> None:
    """Starts the server that ranks are forked from, with the movable wall clock. Call it once, before the first run."""
    library = folder / "clock.so"
    source = Path(__file__).with_name("clock.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-o", str(library), str(source), "-ldl"], check=True)
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.rank", *PRELOAD])
    before = dict(os.environ)
    os.environ["LD_PRELOAD"] = " ".join([str(library), *before.get("LD_PRELOAD", "").split()])
    os.environ["PYTHONWARNINGS"] = "ignore"  # Megatron-Core names every optional package it does not find
    try:
        process = context.Process(target=_nothing)
        process.start()
        process.join()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _nothing() -> None:
    """The first process makes the server start."""
