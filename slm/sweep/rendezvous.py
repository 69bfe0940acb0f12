"""How the nodes of a Slurm job meet: what torchrun and gloo are told on each of them."""

from __future__ import annotations

import os
import socket

import psutil

PORTS = range(10_000, 30_000)
"""Where the nodes of a job meet: below the ports that a system gives away, and another one for each of many jobs."""


def meeting(nodes: int) -> tuple[str, ...]:
    """Options of torchrun on a node of several: all meet at the first, which is the one whose script started srun."""
    port = PORTS[int(os.environ["SLURM_JOB_ID"]) % len(PORTS)]
    node, first = os.environ["SLURM_NODEID"], os.environ["SLURM_LAUNCH_NODE_IPADDR"]
    return (
        f"--nnodes={nodes}",
        f"--node-rank={node}",
        f"--master-addr={first}",
        f"--master-port={port}",
    )


def network() -> dict[str, str]:
    """Tells gloo the interface that leads to the first node, unless the user does: it would else take the one that the
    host's own name leads to, on many machines one that no other machine reaches.
    """
    first = os.environ["SLURM_LAUNCH_NODE_IPADDR"]
    family, kind, protocol, _, address = socket.getaddrinfo(first, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        own = probe.getsockname()[0]
    found = [
        name
        for name, all_of in psutil.net_if_addrs().items()
        if own in [one.address for one in all_of]
    ]
    return {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", found[0])} if found else {}
