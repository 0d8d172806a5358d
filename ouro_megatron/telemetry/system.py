"""What the machine of rank 0 is doing, in a few cheap numbers."""

import contextlib
from pathlib import Path

import psutil

_GB = 1e9


def system_numbers(folder: Path, device_bytes: int | None) -> dict[str, float]:
    """Host memory and load, free disk under `folder`, and the device's memory in use where there is one; GB = 1e9 B."""
    memory = psutil.virtual_memory()
    numbers = {
        "process_memory_gb": psutil.Process().memory_info().rss / _GB,
        "host_memory_share": memory.percent / 100,
        "cpu_share": psutil.cpu_percent() / 100,
    }
    with contextlib.suppress(OSError):  # a file system that is away for a moment is no reason to stop
        numbers["disk_free_gb"] = psutil.disk_usage(str(folder)).free / _GB
    if device_bytes is not None:
        numbers["device_memory_gb"] = device_bytes / _GB
    return numbers
