"""Checkpoint files: written whole or not at all, with their hash in their name, the last two kept.

One process of a run writes them, any process may read. A checkpoint is read bit by bit as it was
written, so that nothing here shapes the weights.
"""

from __future__ import annotations

import errno
import os
import re
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slm.files import sha256_of

HASH_DIGITS = 16
"""Hex digits of a file's SHA-256 in its name."""


def write(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    previous: Path | None = None,
) -> Path:
    """Write the checkpoint of a step and return its path; keep `previous`, and remove the others.

    Raises OSError when it cannot be written; the existing checkpoints are left as they were.
    """
    folder.mkdir(exist_ok=True)
    for unfinished in folder.glob(".*"):  # of writers that were killed
        unfinished.unlink()
    temporary = folder / f".step-{step:09d}"
    digest = _write(temporary, tensors, metadata)
    path = folder / f"step-{step:09d}.{digest[:HASH_DIGITS]}.safetensors"
    _rename(temporary, path)
    for old in {*folder.iterdir()} - {path, previous}:
        with suppress(OSError):  # a file that cannot be removed only takes space
            old.unlink()
    return path


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Write tensors whole or not at all and return the file's SHA-256.

    Raises OSError when they cannot be written.
    """
    temporary = path.with_name(f".{path.name}")
    digest = _write(temporary, tensors, metadata)
    _rename(temporary, path)
    return digest


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint without damage, if any, and a line for each damaged one."""
    good = None
    damages = []
    for path in sorted(folder.glob("step-*.*.safetensors"), reverse=True):
        damage = _damage(path)
        if damage is None:
            good = path
            break
        damages.append(f"checkpoint {path.name} is damaged ({damage})")
    instead = f"resumed from {good.name}" if good else "started from step 0"
    return good, [f"{line}: {instead}" for line in damages]


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors, on the CPU as private maps of the file, and the metadata of a file."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Write a file and sync it to disk, or remove it; return its SHA-256."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        return sha256_of(path)
    except (OSError, SafetensorError) as error:
        path.unlink(missing_ok=True)
        raise _system_error(error, path) from error


def _system_error(error: OSError | SafetensorError, path: Path) -> OSError:
    """Return the error with number, text and path; safetensors has the number in its text only."""
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror, str(path))
    match = re.search(r"(?:os error|code:) (\d+)", str(error))
    if match is None:
        return OSError(errno.EIO, str(error), str(path))
    number = int(match[1])
    return OSError(number, os.strerror(number), str(path))


def _rename(temporary: Path, path: Path) -> None:
    """Rename a written file, and sync its folder to disk."""
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _damage(path: Path) -> str | None:
    """Return the damage of a checkpoint; None if its content has the hash in its name."""
    try:
        digest = sha256_of(path)[:HASH_DIGITS]
    except OSError as error:
        return error.strerror
    if digest == path.name.split(".")[1]:
        return None
    return f"the hash of its content is {digest}"
