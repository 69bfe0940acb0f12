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


def peak_flops(name: str) -> float | None:
    """FLOPs a second that MFU is measured against; None for a device whose peak is not known."""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


@functools.cache
def gpu_names() -> tuple[str, ...]:
    """Names of the NVIDIA GPUs that this process may use; () when there is none."""
    if shutil.which("nvidia-smi") is None:
        return ()
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    names = tuple(line.strip() for line in result.stdout.splitlines() if line.strip()) if not result.returncode else ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return names
    entries = takewhile(lambda entry: entry.strip() and not entry.strip().startswith("-"), visible.split(","))
    return names[: len(list(entries))]


def gpu_count() -> int:
    """NVIDIA GPUs that this process may use."""
    return len(gpu_names())


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def name(device: str) -> str:
    """What "cpu" or "cuda" is here, for people."""
    return gpu_names()[0] if device == "cuda" else _cpu_name()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
