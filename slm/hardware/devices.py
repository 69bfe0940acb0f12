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
    values = tuple(filter(None, map(str.strip, result.stdout.splitlines())))
    visible = _visible_gpus()
    return values if visible is None else values[: len(visible)]


def _visible_gpus() -> tuple[str, ...] | None:
    """Return the entries of CUDA_VISIBLE_DEVICES up to the first that names no device; None if it
    is not set.
    """
    entries = os.environ.get("CUDA_VISIBLE_DEVICES")
    if entries is None:
        return None
    names = map(str.strip, entries.split(","))
    return tuple(takewhile(lambda name: name and not name.startswith("-"), names))


def gpus() -> tuple[str, ...]:
    """Return the NVIDIA GPUs that this process may use, each as CUDA_VISIBLE_DEVICES names it."""
    count = gpu_count()
    numbers = tuple(map(str, range(count)))
    return (_visible_gpus() or numbers)[:count]


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
    files = [folder / "memory.events" for folder in _control_groups(root)]
    contents = map(_lines, [*files, root / "proc/vmstat"])
    counters = next(filter(None, contents), [])
    return sum(int(line.split()[1]) for line in counters if line.startswith("oom_kill "))


def _group_limits(root: Path) -> list[int]:
    """Return the memory limits, in bytes, of this process's control group and of its parents."""
    limits = []
    for folder in _control_groups(root):
        limits += [int(line) for line in _lines(folder / "memory.max") if line.isdigit()]
    return limits


def _control_groups(root: Path) -> list[Path]:
    """Return the folders of this process's control group (version 2) and of its parents, innermost
    first.
    """
    prefix = "0::/"
    table = _lines(root / "proc/self/cgroup")
    names = (line.removeprefix(prefix) for line in table if line.startswith(prefix))
    group = root / "sys/fs/cgroup" / next(names, "")
    return [group, *group.parents]


def _lines(file: Path) -> list[str]:
    """Return the lines of a file of the kernel, [] without that file."""
    return file.read_text().splitlines() if file.is_file() else []


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def name(device: str) -> str:
    """Return the name of this machine's "cpu", "cuda" or "mps" device, as people know it."""
    if device == "cuda":
        return gpu_names()[0]
    models = [line for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    if models:
        cpu = models[0].split(":", 1)[1].strip()
    else:
        cpu = platform.processor() or platform.machine()
    return f"{cpu} GPU" if device == "mps" else cpu
