"""Tensor-parallel decoding: rank 0 talks to the user and schedules, the others repeat its visits."""

import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ouro_megatron.errors import InferenceError
from ouro_megatron.inference.attention import Segment
from ouro_megatron.inference.runner import Finish, Mix, Read, Runner, Visited
from ouro_megatron.parallel.context import ParallelContext

IDLE_SECONDS = 20.0
"""A leader without work says so this often: followers wait in a collective, which times out."""
_LEAVE_SECONDS = 10.0


class Followers:
    """The processes of ranks 1 and up."""

    def __init__(self, processes: list[subprocess.Popen[bytes]], folder: tempfile.TemporaryDirectory[str]) -> None:
        self._processes = processes
        self._folder = folder

    def failure(self) -> str | None:
        """What a rank that is gone died of; None while all run."""
        for rank, process in enumerate(self._processes, start=1):
            code = process.poll()
            if code is None:
                continue
            if code < 0:
                return f"tensor-parallel rank {rank} was ended by {signal.Signals(-code).name}"
            lines = (Path(self._folder.name) / f"rank-{rank}.log").read_text(errors="replace").strip().splitlines()
            return f"tensor-parallel rank {rank} ended with exit code {code}" + (f": {lines[-1]}" if lines else "")
        return None

    def wait_ready(self) -> None:
        """Returns when all ranks are about to join. Raises InferenceError when one is gone before.

        Joining a job blocks until everyone is there, so a rank that cannot even start must be noticed first.
        """
        folder = Path(self._folder.name)
        while len(list(folder.glob("*.ready"))) < len(self._processes):
            cause = self.failure()
            if cause is not None:
                raise InferenceError(cause)
            time.sleep(0.05)

    def close(self) -> None:
        """Waits a little for the ranks to leave, then ends them."""
        deadline = time.monotonic() + _LEAVE_SECONDS
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        self._folder.cleanup()


def start_followers(size: int, options: dict[str, Any]) -> Followers:
    """Starts ranks 1 to size - 1 on this machine and makes this process rank 0 of the job."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    folder = tempfile.TemporaryDirectory(prefix="ouro-ranks-")
    file = Path(folder.name) / "options.json"
    file.write_text(json.dumps(options), encoding="utf-8")
    processes = []
    threads = str(max(1, (os.cpu_count() or 1) // size))
    for rank in range(1, size):
        environment = {"OMP_NUM_THREADS": threads, **os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        # -P: the installed package, not a folder of the same name that the user happens to stand in.
        command = [sys.executable, "-P", "-m", "ouro_megatron.inference.follower", str(file)]
        with (Path(folder.name) / f"rank-{rank}.log").open("wb") as log:
            # A session of its own: Ctrl-C in the terminal is rank 0's to handle.
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))
    os.environ.update(shared, RANK="0", LOCAL_RANK="0")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(int(threads))
    return Followers(processes, folder)


class Leader:
    """Rank 0's runner, which takes the other ranks along; see `Runner` for the calls."""

    def __init__(self, runner: Runner, context: ParallelContext, followers: Followers | None) -> None:
        self._runner, self._context, self._followers = runner, context, followers
        self._failed = False

    def visit(self, segments: list[Segment], finished: list[Finish], *, changes: bool = False) -> Visited:
        with self._together("visit", segments, finished, changes):
            return self._runner.visit(segments, finished, changes=changes)

    def logits(self, mixes: list[Mix], reads: list[Read]) -> Tensor:
        with self._together("logits", mixes, reads):
            return self._runner.logits(mixes, reads)

    def idle(self) -> None:
        """Keeps the followers from giving up while there is nothing to do."""
        with self._together("idle"):
            pass

    def close(self) -> None:
        """Lets the followers go."""
        if not self._failed:
            with contextlib.suppress(InferenceError), self._together("stop"):
                pass

    @contextlib.contextmanager
    def _together(self, *command: Any) -> Any:
        if self._context.world_size == 1:
            yield
            return
        try:
            _send(command, self._context)
            yield
        except RuntimeError as error:  # a collective whose peer is gone
            self._failed = True
            time.sleep(0.2)  # so that the peer's end is seen
            cause = self._followers.failure() if self._followers else None
            raise InferenceError(f"{cause or f'a tensor-parallel rank is gone ({error})'}; start again") from error


def follow(runner: Runner, context: ParallelContext) -> None:
    """A follower's life: repeats what rank 0 does until it stops."""
    while True:
        name, *arguments = _receive(context)
        if name == "stop":
            return
        if name == "visit":
            segments, finished, changes = arguments
            runner.visit(segments, finished, changes=changes)
        elif name == "logits":
            runner.logits(*arguments)


def _send(command: tuple[Any, ...], context: ParallelContext) -> None:
    content = torch.frombuffer(bytearray(pickle.dumps(command)), dtype=torch.uint8).to(context.device)
    dist.broadcast(torch.tensor([content.numel()], device=context.device), src=0)
    dist.broadcast(content, src=0)


def _receive(context: ParallelContext) -> tuple[Any, ...]:
    length = torch.zeros(1, dtype=torch.int64, device=context.device)
    dist.broadcast(length, src=0)
    content = torch.empty(int(length), dtype=torch.uint8, device=context.device)
    dist.broadcast(content, src=0)
    command: tuple[Any, ...] = pickle.loads(content.cpu().numpy().tobytes())
    return command
