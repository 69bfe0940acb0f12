"""What computes here, found without torch."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
from itertools import takewhile
from pathlib import Path

PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
}
"""Dense bfloat16 FLOPs a second by what a device's name holds, from NVIDIA's data sheets; the first that fits."""


MEMORIES = {"H100 NVL": 94e9, "H100": 80e9, "H200": 141e9, "B200": 180e9, "A100": 40e9}
"""Bytes, the fewest sold, by what a device's name holds, for planning where there is none to ask."""


def peak_flops(name: str) -> float | None:
    """FLOPs a second that MFU is measured against; None for a device whose peak is not known."""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


@functools.cache
def _gpus(field: str) -> tuple[str, ...]:
    """What nvidia-smi says in a field of each NVIDIA GPU that this process may use; () when there is none."""
    if shutil.which("nvidia-smi") is None:
        return ()
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    found = (
        tuple(line.strip() for line in result.stdout.splitlines() if line.strip())
        if not result.returncode
        else ()
    )
    visible = _visible()
    return found if visible is None else found[: len(visible)]


def _visible() -> tuple[str, ...] | None:
    """Entries of CUDA_VISIBLE_DEVICES up to the first that names no device; None where it is not set."""
    entries = os.environ.get("CUDA_VISIBLE_DEVICES")
    if entries is None:
        return None
    return tuple(
        takewhile(
            lambda entry: entry and not entry.startswith("-"), map(str.strip, entries.split(","))
        )
    )


def gpus() -> tuple[str, ...]:
    """NVIDIA GPUs that this process may use, each as CUDA_VISIBLE_DEVICES names it."""
    return (_visible() or tuple(map(str, range(gpu_count()))))[: gpu_count()]


def gpu_names() -> tuple[str, ...]:
    """Names of the NVIDIA GPUs that this process may use; () when there is none."""
    return _gpus("name")


def gpu_count() -> int:
    """NVIDIA GPUs that this process may use."""
    return len(gpu_names())


def apple_gpu() -> bool:
    """Whether there is a GPU of Apple's, which shares the machine's memory."""
    return (platform.system(), platform.machine()) == ("Darwin", "arm64")


def gpu_memory() -> int | None:
    """Bytes of the smallest NVIDIA GPU that this process may use; None where that is not known."""
    sizes = [int(size) for size in _gpus("memory.total") if size.isdigit()]
    return min(sizes) * 2**20 if sizes else None


def driver() -> str | None:
    """Version of NVIDIA's driver; None without a GPU of theirs."""
    return next(iter(_gpus("driver_version")), None)


def memory() -> int:
    """Bytes of the machine's memory that this process may use: all of it, or what its control groups allow."""
    return min(
        [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_group_limits(Path("/"))]
    )


def memory_kills(root: Path = Path("/")) -> int:
    """Processes that the kernel killed for want of memory so far: in this one's control group, else on the machine."""
    files = [*(folder / "memory.events" for folder in _groups(root)), root / "proc/vmstat"]
    lines = next((file.read_text().splitlines() for file in files if file.is_file()), [])
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def _group_limits(root: Path) -> list[int]:
    """The limits, in bytes, of the control group of this process and of those that it lies in."""
    files = [folder / "memory.max" for folder in _groups(root)]
    limits = [file.read_text().strip() for file in files if file.is_file()]
    return [int(limit) for limit in limits if limit.isdigit()]


def _groups(root: Path) -> list[Path]:
    """Folders of the control group (version 2) of this process and of those that it lies in, its own first."""
    table, groups = root / "proc/self/cgroup", root / "sys/fs/cgroup"
    lines = table.read_text().splitlines() if table.exists() else []
    own = groups / next(
        (line.removeprefix("0::/") for line in lines if line.startswith("0::/")), ""
    )
    return [own, *own.parents]


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def name(device: str) -> str:
    """What "cpu", "cuda" or "mps" is here, for people."""
    return gpu_names()[0] if device == "cuda" else _cpu_name() + (" GPU" if device == "mps" else "")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
