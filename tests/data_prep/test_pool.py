"""Workers that fail in every way a process can: each is named, the others finish."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_prep.pool import Failed, Pulse, Work, run
from data_prep.progress import State, Tracker
from ouro_megatron.errors import DataError

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Job:
    name: str
    marks: Path | None = None

    @property
    def label(self) -> str:
        return f"file {self.name}"

    @property
    def size(self) -> int:
        return 10


def act(job: Job, pulse: Pulse) -> str:
    pulse(Work(1, 2, 3))
    if job.name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if job.name == "segfault":
        ctypes.string_at(0)
    if job.name == "left":
        os._exit(7)
    if job.name == "bug":
        raise ZeroDivisionError("no")
    if job.name == "bad":
        raise DataError("this input is wrong")
    if job.name == "full":
        raise OSError(28, "No space left on device", "/somewhere")
    if job.name == "once" and job.marks is not None and not job.marks.exists():
        job.marks.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if job.name == "slow":
        time.sleep(60)
    return job.name.upper()


class Quiet:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.states: list[tuple[int, int]] = []

    def update(self, state: State) -> None:
        self.states.append((state.work.documents, state.done_bytes))

    def end(self) -> None:
        self.lines.append("end")

    def say(self, line: str) -> None:
        self.lines.append(line)


def test_dead_workers_are_named_and_the_others_finish() -> None:
    names = ["a", "killed", "b", "segfault", "c", "left", "d", "bug", "e"]
    events = list(run(act, [Job(name) for name in names], workers=2))
    done = {event.result for event in events if hasattr(event, "result")}
    assert done == {"A", "B", "C", "D", "E"}
    failed = {event.item.name: event for event in events if isinstance(event, Failed)}
    assert set(failed) == {"killed", "segfault", "left", "bug"}
    assert "signal 9" in failed["killed"].reason and "SIGSEGV" in failed["segfault"].reason
    assert "exit code 7" in failed["left"].reason and "ZeroDivisionError: no" in failed["bug"].reason
    assert failed["killed"].died and not failed["bug"].died


def test_a_dead_worker_s_item_is_tried_once_more(tmp_path: Path) -> None:
    watcher, done = Quiet(), []
    tracker = Tracker("trying", watcher, total=30)
    jobs = [Job("a"), Job("once", tmp_path / "mark"), Job("b")]
    tracker.run(act, jobs, 2, lambda item, result: done.append(result))
    assert sorted(done) == ["A", "B", "ONCE"]
    assert any("file once" in line and "once more, alone" in line for line in watcher.lines)
    assert watcher.states[-1] == (3, 30)


def test_what_dies_twice_is_in_the_error() -> None:
    done: list[str] = []
    with pytest.raises(DataError, match=r"file killed: its worker was killed.*\n.*file bug: Zero|file bug.*\n.*killed"):
        Tracker("trying", Quiet(), 40).run(
            act, [Job("killed"), Job("a"), Job("bug"), Job("b")], 2, lambda item, result: done.append(result)
        )
    assert sorted(done) == ["A", "B"]


@pytest.mark.parametrize("workers", [1, 2])
def test_wrong_input_and_a_full_disk_stop_all(workers: int) -> None:
    with pytest.raises(DataError, match="this input is wrong"):
        list(run(act, [Job("bad"), Job("slow"), Job("slow")], workers))
    with pytest.raises(OSError, match="No space left") as caught:
        list(run(act, [Job("full"), Job("slow"), Job("slow")], workers))
    assert caught.value.filename == "/somewhere"


def test_workers_do_not_outlive_their_parent() -> None:
    script = (
        "from tests.data_prep.test_pool import Job, act\n"
        "from data_prep.pool import run\n"
        "from multiprocessing import active_children\n"
        "for event in run(act, [Job('a'), Job('b'), Job('c'), *[Job('slow')] * 0, Job('d')], 2):\n"
        "    print(*[child.pid for child in active_children()], flush=True)\n"
        "    import time; time.sleep(1)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    children = [int(word) for word in process.stdout.readline().split()]
    assert children
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while any(_is_alive(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
