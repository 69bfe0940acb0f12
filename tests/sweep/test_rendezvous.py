"""Two nodes train as one process: network namespaces joined by a cable, which share only files."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from slm.data import PreparedDataset
from slm.recipe import pocket
from tests.attempts import ENVIRONMENT, log, make_attempt, plan_of, torchrun
from tests.forked import train

ADDRESSES = ("10.0.0.1", "10.0.0.2")
PORT = 29500
"""Rendezvous port, free in a new namespace."""
CARD = "cable"
"""Name of the network card in either namespace."""


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """Yield the names of two network namespaces that reach only each other."""
    if shutil.which("ip") is None:
        pytest.skip("iproute2 is not installed: no network namespaces")
    names = [f"slm-{os.getpid()}-{node}" for node in range(2)]
    made: list[str] = []
    try:
        for name in names:
            result = ip("netns", "add", name)
            if result.returncode:
                pytest.skip(f"no network namespaces here: {result.stderr.strip()}")
            made.append(name)
        join(names)
        yield names
    finally:
        for name in made:
            ip("netns", "delete", name).check_returncode()


def join(names: list[str]) -> None:
    """Join two namespaces by a cable with an address at either end."""
    ip(
        "-n", names[0], "link", "add", CARD, "type", "veth", "peer", "name", CARD, "netns", names[1]
    ).check_returncode()
    for name, address in zip(names, ADDRESSES, strict=True):
        ip("-n", name, "address", "add", f"{address}/24", "dev", CARD).check_returncode()
        for card in ("lo", CARD):
            ip("-n", name, "link", "set", card, "up").check_returncode()


def ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)


def node(name: str, rank: int, folder: Path) -> subprocess.Popen[str]:
    """Start one rank of an attempt in a namespace.

    gloo would use the address of the host's name, often 127.0.0.1.
    """
    master = (f"--master-addr={ADDRESSES[0]}", f"--master-port={PORT}")
    command = torchrun(folder, "--nnodes=2", "--nproc-per-node=1", f"--node-rank={rank}", *master)
    environment = {**ENVIRONMENT, "GLOO_SOCKET_IFNAME": CARD}
    return subprocess.Popen(
        ["ip", "netns", "exec", name, *command], env=environment, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.soak
def test_two_nodes_train_as_one_process(
    tmp_path: Path, prepared: PreparedDataset, nodes: list[str]
) -> None:
    plan = plan_of(replace(pocket(2, steps=10), batch_tokens=512), prepared)
    alone = make_attempt(tmp_path / "alone", plan, prepared, micro_batch=2)
    together = make_attempt(tmp_path / "together", plan, prepared, ranks=2, micro_batch=2)
    assert train(alone, ranks=1).returncode == 0
    processes = [node(name, rank, together) for rank, name in enumerate(nodes)]
    try:
        errors = [process.communicate(timeout=600)[1] for process in processes]
    finally:
        for process in processes:
            process.terminate()
            process.wait(60)
    assert [process.returncode for process in processes] == [0, 0], errors
    one, two = ([event["loss"] for event in log(folder, "train")] for folder in (alone, together))
    assert log(together, "started")[0]["ranks"] == 2
    assert len(one) == 10
    assert two == pytest.approx(one, rel=1e-5)
