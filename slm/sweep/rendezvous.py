"""Rendezvous of the nodes of a Slurm job: options of torchrun and the network interface of gloo."""

from __future__ import annotations

import os
import socket

import psutil

PORTS = range(10_000, 30_000)
"""Rendezvous ports, below the system's ephemeral ones; neighbouring job numbers get different ones.
"""


def rendezvous_args(nodes: int) -> tuple[str, ...]:
    """Return torchrun's options on one of several nodes.

    The master is the first node, whose script called srun.
    """
    port = PORTS[int(os.environ["SLURM_JOB_ID"]) % len(PORTS)]
    return (
        f"--nnodes={nodes}",
        f"--node-rank={os.environ['SLURM_NODEID']}",
        f"--master-addr={os.environ['SLURM_LAUNCH_NODE_IPADDR']}",
        f"--master-port={port}",
    )


def gloo_environment() -> dict[str, str]:
    """Name the interface that reaches the first node to gloo, unless the user does.

    gloo would use the interface of the host's own name, which often leads to no other machine.
    """
    master = os.environ["SLURM_LAUNCH_NODE_IPADDR"]
    family, kind, protocol, _, address = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        local = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if local in [entry.address for entry in addresses]:
            return {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", name)}
    return {}
