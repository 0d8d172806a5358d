"""What a thread is doing, seen from another thread through its Python stack: no hooks, nothing asked of the GPU.

A rank that waits for others is inside a function of torch.distributed, in the `wait()` of a handle that one returned,
or, on a GPU, where the host reads a number. Everything else is work of its own.
"""

import linecache
import re
import sys
from collections.abc import Mapping
from types import FrameType
from typing import NamedTuple

import torch
import torch.distributed as dist

_C10D = ("torch/distributed/distributed_c10d.py", "torch/distributed/c10d_logger.py")
_BACKWARD = "torch/autograd/graph.py"
_HANDLE_WAIT = re.compile(r"\.wait\(\)")
_MESSAGE = re.compile(r"(recv|send)_(prev|next)")
_READS_GPU = re.compile(r"\.item\(\)|\.tolist\(\)|\.cpu\(\)|synchronize\(|\bfloat\(|\bbool\(")
_DEEPEST = 200


class Place(NamedTuple):
    """Where a thread is."""

    text: str
    waits: bool
    """For other ranks (or, on a GPU, for the work it has queued)."""
    stack: int
    """Changes when any frame of the stack moves on."""


def place_of(thread: int, neighbours: Mapping[str, int] | None = None, *, cuda: bool = False) -> Place:
    """Where thread `thread` is. On a GPU backward runs in a thread of autograd's, which is looked at as well.

    `neighbours`: global ranks of the "prev" and the "next" pipeline rank, to name the other end of a message.
    """
    frames = sys._current_frames()
    stack = _stack(frames.get(thread))
    if not stack:
        return Place("the end of its work", False, 0)
    found = _wait(stack, neighbours or {}, cuda)
    if found is None and _file(stack[0]).endswith(_BACKWARD):
        for other, frame in frames.items():
            if other != thread and found is None:
                found = _wait(_stack(frame), neighbours or {}, cuda=False)
    signature = hash(tuple((id(frame.f_code), frame.f_lineno) for frame in stack))
    return Place(found or _own_work(stack), found is not None, signature)


def _stack(frame: FrameType | None) -> list[FrameType]:
    """Innermost frame first."""
    frames: list[FrameType] = []
    while frame is not None and len(frames) < _DEEPEST:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _file(frame: FrameType) -> str:
    return frame.f_code.co_filename


def _line(frame: FrameType) -> int:
    """Some instructions belong to no line: then that of the function."""
    return frame.f_lineno or frame.f_code.co_firstlineno


def _wait(stack: list[FrameType], neighbours: Mapping[str, int], cuda: bool) -> str | None:
    """What the innermost frame of `stack` waits for; None when it does work of its own."""
    inside = 0
    while inside < len(stack) and _file(stack[inside]).endswith(_C10D):
        inside += 1
    if inside:
        # The outermost function of torch.distributed is the one that was called; "wrapper" only logs.
        named = [frame for frame in stack[:inside] if frame.f_code.co_name != "wrapper"]
        caller = f", called by {_spot(stack[inside])}" if inside < len(stack) else ""
        return f"{_collective(named[-1])}{caller}" if named else None
    line = linecache.getline(_file(stack[0]), _line(stack[0])).strip()
    if _HANDLE_WAIT.search(line) and _is_ours(stack[0]):
        return _handle(stack[0], line, neighbours)
    if cuda and _READS_GPU.search(line):
        return f"a read of its GPU in {_spot(stack[0])}"
    return None


def _collective(frame: FrameType) -> str:
    """ "all_reduce of 4 float32 over ranks 0, 1"."""
    values, name = frame.f_locals, frame.f_code.co_name
    tensor = next((values[key] for key in ("tensor", "output_tensor", "output", "input") if key in values), None)
    what = name
    if isinstance(tensor, torch.Tensor):
        what += f" of {tensor.numel():,} {str(tensor.dtype).removeprefix('torch.')}"
    for key, preposition in (("src", "from"), ("dst", "to")):
        if name in ("send", "recv", "broadcast") and isinstance(values.get(key), int):
            what += f" {preposition} rank {values[key]}"
    return f"{what} over ranks {ranks_text(dist.get_process_group_ranks(values.get('group')))}"


def _handle(frame: FrameType, line: str, neighbours: Mapping[str, int]) -> str:
    """A message between pipeline ranks, or a reduction that was started before."""
    pending = frame.f_locals.get("reqs")
    names = " ".join(pending) if isinstance(pending, dict) else line
    messages = [
        f"{'message from' if way == 'recv' else 'message to'} rank {neighbours[side]}"
        for way, side in dict.fromkeys(_MESSAGE.findall(names))
        if side in neighbours
    ]
    what = " and ".join(messages) or f"`{line}`"
    return f"{what} in {_spot(frame)}"


def _own_work(stack: list[FrameType]) -> str:
    ours = next((frame for frame in stack if "ouro_megatron" in _file(frame)), stack[0])
    return _spot(ours)


def _is_ours(frame: FrameType) -> bool:
    return "megatron" in _file(frame) or "torch/distributed" in _file(frame)


def _spot(frame: FrameType) -> str:
    return f"{frame.f_code.co_name} ({_file(frame).rpartition('/')[2]}:{_line(frame)})"


def ranks_text(ranks: list[int]) -> str:
    """ "0, 1, 2", or "0, 8, .. 1016" for many."""
    return ", ".join(map(str, ranks)) if len(ranks) <= 8 else f"{ranks[0]}, {ranks[1]}, .. {ranks[-1]}"
