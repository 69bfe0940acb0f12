"""A real PostgreSQL on this machine: a throw-away server on a socket."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

ACCOUNT = "postgres"
"""Account that runs the server when root runs the tests: PostgreSQL refuses root."""
SETTINGS = "-c listen_addresses= -c fsync=off -c synchronous_commit=off -c full_page_writes=off"


def why_not() -> str | None:
    """Return what keeps PostgreSQL from running here, None if nothing does."""
    if _binaries() is None:
        return "no PostgreSQL here: apt-get install postgresql"
    if find_spec("psycopg") is None:
        return "no psycopg here: pip install 'slm[postgres]'"
    if os.geteuid() == 0 and ACCOUNT not in {entry.pw_name for entry in pwd.getpwall()}:
        return f"no account {ACCOUNT} here: PostgreSQL refuses to run as root"
    return None


def _binaries() -> Path | None:
    if path := shutil.which("initdb"):
        return Path(path).parent
    debian = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3])
    )
    return debian[-1].parent if debian else None


@contextmanager
def server() -> Iterator[str]:
    """Run a server that admits everyone as `slm`; yield the folder of its socket."""
    binaries = _binaries()
    assert binaries is not None
    account = ACCOUNT if os.geteuid() == 0 else None
    # Only root may enter the parent of pytest's temporary folders.
    folder = Path(tempfile.mkdtemp(prefix="slm-postgres-"))
    if account:
        shutil.chown(folder, account, account)

    def run(name: str, *arguments: str) -> None:
        group = {"user": account, "group": account, "extra_groups": []} if account else {}
        command = [str(binaries / name), "-D", str(folder / "data"), *arguments]
        subprocess.run(
            command,
            check=True,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            **group,
        )  # type: ignore[call-overload]

    try:
        run(
            "initdb", "--no-sync", "--auth=trust", "--username=slm", "--locale=C", "--encoding=UTF8"
        )
        run("pg_ctl", "start", "-w", "-l", str(folder / "log"), "-o", f"{SETTINGS} -k {folder}")
        yield str(folder)
        run("pg_ctl", "stop", "-m", "immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
