"""Writes this rank's files of a checkpoint and hashes them, in the calling thread or beside training.

Megatron-Core plans a save together (which rank writes what) and hands back a request: buckets of host tensors, one file
each, and functions that finish the save on all ranks. Its own way to serve the request forks a process a file; a forked
writer that the kernel ends leaves its rank waiting for ever. Threads of this process do the same work here.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch.distributed.checkpoint.api import CheckpointException

from ouro_megatron.checkpoint.hashes import hash_of


class RankFiles:
    """The files one rank contributes to a checkpoint.

    `write` never raises: what went wrong is kept and raised on all ranks together by `finish`.
    """

    def __init__(self, request: AsyncRequest) -> None:
        self._request = request
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self.hashes: dict[str, str] = {}
        """File name -> hash of the files this rank wrote, once `is_written`."""

    def write(self) -> None:
        """Writes, flushes to the disk and hashes this rank's files."""
        if self._request.async_fn is None:  # nothing on this rank
            return
        transforms = self._request.async_fn.args[0]
        _, buckets, results = self._request.async_fn_args
        outcome: dict[int, Any] | Exception
        try:
            with ThreadPoolExecutor(max_workers=len(buckets), thread_name_prefix="checkpoint") as pool:
                jobs = [pool.submit(self._write_file, transforms, i, bucket) for i, bucket in enumerate(buckets)]
                outcome = {index: job.result() for index, job in enumerate(jobs)}
        except Exception as error:
            outcome = self._failure = error
        results.put(outcome)

    def _write_file(self, transforms: list[Any], index: int, bucket: Any) -> list[Any]:
        path, name, _ = bucket
        answers: queue.Queue[tuple[int, Any]] = queue.Queue()
        tickets: queue.Queue[int] = queue.Queue()
        tickets.put(index)
        FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, answers, tickets, True)
        _, written = answers.get_nowait()
        try:
            if isinstance(written, Exception):
                raise written
            self.hashes[name] = hash_of(Path(path))
        except Exception as error:
            raise OSError(f"{path}: {error}") from error
        return list(written)

    def write_in_background(self) -> None:
        self._thread = threading.Thread(target=self.write, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_written(self) -> bool:
        """Written or failed; this rank only."""
        return self._thread is None or not self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        return self._failure is not None

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def finish(self) -> None:
        """Writes the index over all ranks' files. All ranks call it together, after `wait`.

        Raises on every rank when one of them could not write: there the OSError, elsewhere a CheckpointException.
        """
        finishers: list[Callable[[], None]] = self._request.finalize_fns
        try:
            for function in finishers:
                function()
        except CheckpointException:
            if self._failure is not None:  # this rank's own: it names the file
                raise self._failure from None
            raise
