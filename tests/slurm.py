"""A real Slurm on this machine: daemons as children of the test, on free local ports, as root."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

WAIT_SECONDS = 300
DAEMONS = ("munged", "munge", "slurmctld", "slurmd", "sbatch")
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdSpoolDir={folder}/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
KillWait=10
ReturnToService=2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
"""Differences from a real cluster: a requeued job waits as long as credentials last, five seconds
instead of two minutes; the scheduler runs every second; no control groups, which a container may
lack.
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} "
    "RealMemory=1000 State=UNKNOWN\n"
)


def why_not() -> str | None:
    """Return the reason why Slurm cannot run on this machine, None if it can."""
    missing = [name for name in DAEMONS if shutil.which(name, path=_path()) is None]
    if missing:
        return f"no {' '.join(missing)} here: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "only root can start Slurm's daemons"


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin"


@contextmanager
def cluster(folder: Path, nodes: int = 2, cpus: int = 1) -> Iterator[None]:
    """Run nodes n1, n2, ... in this block, with SLURM_CONF set for clients."""
    _configure(folder, nodes, cpus)
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    with ExitStack() as daemons:
        daemons.callback(_restore, before)
        munged = (
            "--foreground",
            "--force",
            f"--key-file={folder}/munge.key",
            f"--socket={folder}/munge.socket",
        )
        files = (
            f"--pid-file={folder}/munged.pid",
            f"--log-file={folder}/munged.log",
            f"--seed-file={folder}/seed",
        )
        daemons.enter_context(_daemon("munged", *munged, *files))
        _wait("munge", "-S", f"{folder}/munge.socket", "-n")
        daemons.enter_context(_daemon("slurmctld", "-D"))
        for number in range(1, nodes + 1):
            daemons.enter_context(_daemon("slurmd", "-D", "-N", f"n{number}"))
        _wait("sh", "-c", 'test "$(sinfo -h -N -o %T | sort -u)" = idle')
        daemons.callback(_empty)
        yield


def _configure(folder: Path, nodes: int, cpus: int) -> None:
    folder.mkdir(mode=0o755, parents=True)
    for name in ("state", *(f"spool.n{number}" for number in range(1, nodes + 1))):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    host = socket.gethostname().partition(".")[0]
    port, *ports = _free_ports(1 + nodes)
    text = CONFIGURATION.format(folder=folder, host=host, port=port)
    for number, node_port in enumerate(ports, start=1):
        text += NODE.format(name=f"n{number}", host=host, port=node_port, cpus=cpus)
    (folder / "slurm.conf").write_text(text)
    version = subprocess.run(
        ["slurmd", "-V"], capture_output=True, text=True, check=True, env=_environment()
    ).stdout
    old = version.split()[1] < "23.11"  # older versions need a plugin
    (folder / "cgroup.conf").write_text(f"CgroupPlugin={'cgroup/v1' if old else 'disabled'}\n")


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [server.getsockname()[1] for server in sockets]


def _environment() -> dict[str, str]:
    return os.environ | {"PATH": _path()}


@contextmanager
def _daemon(*command: str) -> Iterator[None]:
    quiet = subprocess.DEVNULL
    with subprocess.Popen(
        command, stdin=quiet, stdout=quiet, stderr=quiet, env=_environment()
    ) as process:
        try:
            yield
        finally:
            process.terminate()


def _wait(*command: str) -> None:
    """Wait until a command succeeds."""
    deadline = time.monotonic() + WAIT_SECONDS
    while subprocess.run(command, capture_output=True, check=False, env=_environment()).returncode:
        assert time.monotonic() < deadline, (
            f"{' '.join(command)}: failed for {WAIT_SECONDS} s; see the logs next to $SLURM_CONF"
        )
        time.sleep(0.1)


def _empty() -> None:
    """Cancel all jobs, and wait until their processes have ended."""
    steps = [
        process for process in psutil.process_iter(["name"]) if process.info["name"] == "slurmstepd"
    ]
    subprocess.run(["scancel", "--me"], check=False)
    psutil.wait_procs(steps, timeout=120)


def _restore(before: str | None) -> None:
    if before is None:
        del os.environ["SLURM_CONF"]
    else:
        os.environ["SLURM_CONF"] = before
