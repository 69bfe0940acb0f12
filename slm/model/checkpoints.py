"""Checkpoints that survive: whole or not there at all, their hash in their name, the one before kept beside the last.

One process of a run writes, all may read. A checkpoint that is read is to the bit the one that was written, so nothing
here shapes the weights.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

HASH_DIGITS = 16
"""Hex digits of a file's SHA-256 in its name."""


def write(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    before: Path | None = None,
) -> Path:
    """Write the checkpoint of a step, keep it and the good one `before` it, and drop all else; its path.

    Raises OSError when it cannot be written; the checkpoints there are left as they were.
    """
    folder.mkdir(exist_ok=True)
    for left in folder.glob(".*"):  # by writers that were killed
        left.unlink()
    temporary = folder / f".step-{step:09d}"
    digest = _write(temporary, tensors, metadata)
    path = folder / f"step-{step:09d}.{digest[:HASH_DIGITS]}.safetensors"
    _rename(temporary, path)
    for old in {*folder.iterdir()} - {path, before}:
        with suppress(OSError):  # what cannot be removed takes space, and no more
            old.unlink()
    return path


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Write tensors whole or not at all; the file's SHA-256. Raises OSError when they cannot be written."""
    temporary = path.with_name(f".{path.name}")
    digest = _write(temporary, tensors, metadata)
    _rename(temporary, path)
    return digest


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is as it was written, None when there is none; and a line for each damaged one."""
    good, damaged = None, []
    for path in sorted(folder.glob("step-*.*.safetensors"), reverse=True):
        if (damage := _damage(path)) is None:
            good = path
            break
        damaged.append(f"checkpoint {path.name} is damaged ({damage})")
    instead = f"went on from {good.name}" if good else "started from step 0"
    return good, [f"{line}: {instead}" for line in damaged]


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, on the CPU as private maps of the file, and metadata of a file that was written here."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def sha256(path: Path) -> str:
    """Of a file's content, in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Write a file through to the disk, or remove what there is of it; its SHA-256."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        digest = sha256(path)
    except (OSError, SafetensorError) as error:
        path.unlink(missing_ok=True)
        raise _system_error(error, path) from error
    return digest


def _system_error(error: OSError | SafetensorError, path: Path) -> OSError:
    """The error with number, words and path; safetensors has the number in its text alone."""
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror, str(path))
    number = re.search(r"(?:os error|code:) (\d+)", str(error))
    if number is None:
        return OSError(errno.EIO, str(error), str(path))
    return OSError(int(number[1]), os.strerror(int(number[1])), str(path))


def _rename(temporary: Path, path: Path) -> None:
    """Give a written file its name, for good."""
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, None when its content is what its name says."""
    try:
        digest = sha256(path)[:HASH_DIGITS]
    except OSError as error:
        return error.strerror
    return None if digest == path.name.split(".")[1] else f"the hash of its content is {digest}"
