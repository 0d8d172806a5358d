"""Runs a test function on several gloo ranks, each a fresh process.

The processes are forked from one server that has imported torch and Megatron-Core already, so a case costs a fraction
of a second instead of one import a rank.
"""

import atexit
import multiprocessing as mp
import os
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

PRELOAD = [
    "ouro_megatron.training.stage",
    "megatron.core.datasets.gpt_dataset",
    "torch._dynamo",  # the first optimizer step would import it in each rank
]
ROOT = Path(__file__).resolve().parents[2]


class RankFailure(AssertionError):
    """One of the ranks raised; the message holds its traceback."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def preloaded_forkserver() -> Any:
    """The multiprocessing context whose server has torch and Megatron-Core imported."""
    context = mp.get_context("forkserver")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context.set_forkserver_preload(PRELOAD)
    return context


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0, forked: bool = True
) -> list[Any]:
    """Calls `function(*args)` on `world_size` ranks with RANK, WORLD_SIZE and MASTER_ADDR/PORT set.

    `function` must be a module-level function and its result picklable, arrays rather than tensors. Returns the results
    in rank order. When a rank raises or dies the others are killed and RankFailure is raised; the same after `timeout`
    seconds. `forked`: from the server; CUDA works in processes that import everything themselves only.
    """
    context = preloaded_forkserver() if forked else mp.get_context("spawn")
    port = free_port()
    pipes: list[Connection] = []
    processes = []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(sender, rank, world_size, port, function, args))
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    try:
        return _collect(pipes, time.monotonic() + timeout, function.__name__)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def _collect(pipes: list[Connection], deadline: float, what: str) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[str] = []
    while len(results) < len(pipes) and not failures:
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = [rank for rank in range(len(pipes)) if rank not in results]
            raise RankFailure(f"{what}: ranks {missing} did not finish in time")
        for rank, pipe in enumerate(pipes):
            if pipe not in ready:
                continue
            try:
                succeeded, value = pipe.recv()
            except EOFError:
                succeeded, value = False, "the process died without a word"
            if succeeded:
                results[rank] = value
            else:
                failures.append(f"rank {rank}: {value}")
    if failures:
        # A peer's "connection closed" is a consequence; the cause is easier to find when it comes first.
        failures.sort(key=lambda text: "Connection closed by peer" in text)
        raise RankFailure(f"{what}:\n" + "\n".join(failures))
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    sender: Connection, rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        sender.send((True, function(*args)))
    except BaseException:
        sender.send((False, traceback.format_exc()))
    finally:
        sender.close()
        # Gloo's threads may outlive a failed peer; nothing is left to say.
        atexit._run_exitfuncs()
        os._exit(0)
