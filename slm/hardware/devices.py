"""Processors and GPUs of this machine, found without torch: names, memory, peak FLOPs, MFU."""

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
"""Dense bfloat16 FLOPs a second by a part of the device's name, from NVIDIA's data sheets; the
first match counts."""
MEMORIES = {"H100 NVL": 94e9, "H100": 80e9, "H200": 141e9, "B200": 180e9, "A100": 40e9}
"""Bytes by a part of the device's name, the smallest model sold, for planning on a machine without
the device."""


def peak_flops(name: str) -> float | None:
    """Return the peak FLOPs a second of a device, None where it is not known."""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def mfu(flops_per_second: float | None, name: str | None, count: int | None) -> float | None:
    """Return the model FLOPs utilisation: FLOPs a second over the peak of `count` devices.

    None where the speed, the count or the peak of a device of that name is not known.
    """
    peak = peak_flops(name or "")
    if not (peak and flops_per_second and count):
        return None
    return flops_per_second / (peak * count)


@functools.cache
def _query_gpus(field: str) -> tuple[str, ...]:
    """Return a field of nvidia-smi for each NVIDIA GPU of this process; () without one."""
    if shutil.which("nvidia-smi") is None:
        return ()
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        return ()
    values = tuple(line.strip() for line in result.stdout.splitlines() if line.strip())
    visible = _visible_gpus()
    return values if visible is None else values[: len(visible)]


def _visible_gpus() -> tuple[str, ...] | None:
    """Return the entries of CUDA_VISIBLE_DEVICES up to the first that names no device; None if it
    is not set.
    """
    entries = os.environ.get("CUDA_VISIBLE_DEVICES")
    if entries is None:
        return None
    names = (entry.strip() for entry in entries.split(","))
    return tuple(takewhile(lambda name: name and not name.startswith("-"), names))


def gpus() -> tuple[str, ...]:
    """Return the NVIDIA GPUs that this process may use, each as CUDA_VISIBLE_DEVICES names it."""
    return (_visible_gpus() or tuple(map(str, range(gpu_count()))))[: gpu_count()]


def gpu_names() -> tuple[str, ...]:
    """Return the names of the NVIDIA GPUs that this process may use; () without one."""
    return _query_gpus("name")


def gpu_count() -> int:
    """Return the number of NVIDIA GPUs that this process may use."""
    return len(gpu_names())


def apple_gpu() -> bool:
    """Whether there is an Apple GPU, which shares the machine's memory."""
    return (platform.system(), platform.machine()) == ("Darwin", "arm64")


def gpu_memory() -> int | None:
    """Return the bytes of the smallest NVIDIA GPU that this process may use; None where they are
    not known.
    """
    sizes = [int(size) for size in _query_gpus("memory.total") if size.isdigit()]
    return min(sizes) * 2**20 if sizes else None


def driver() -> str | None:
    """Return the version of NVIDIA's driver; None without an NVIDIA GPU."""
    return next(iter(_query_gpus("driver_version")), None)


def memory() -> int:
    """Return the bytes of memory that this process may use: the machine's, or the limit of its
    control groups.
    """
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *_group_limits(Path("/"))])


def memory_kills(root: Path = Path("/")) -> int:
    """Return how many processes the kernel has killed for lack of memory, in this control group,
    else on the machine.
    """
    files = [*(folder / "memory.events" for folder in _control_groups(root)), root / "proc/vmstat"]
    lines = next((file.read_text().splitlines() for file in files if file.is_file()), [])
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def _group_limits(root: Path) -> list[int]:
    """Return the memory limits, in bytes, of this process's control group and of its parents."""
    files = [folder / "memory.max" for folder in _control_groups(root)]
    limits = [file.read_text().strip() for file in files if file.is_file()]
    return [int(limit) for limit in limits if limit.isdigit()]


def _control_groups(root: Path) -> list[Path]:
    """Return the folders of this process's control group (version 2) and of its parents, innermost
    first.
    """
    table = root / "proc/self/cgroup"
    lines = table.read_text().splitlines() if table.exists() else []
    names = [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
    group = root / "sys/fs/cgroup" / next(iter(names), "")
    return [group, *group.parents]


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def name(device: str) -> str:
    """Return the name of this machine's "cpu", "cuda" or "mps" device, as people know it."""
    if device == "cuda":
        return gpu_names()[0]
    return _cpu_name() + (" GPU" if device == "mps" else "")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())
