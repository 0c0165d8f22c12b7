"""A federation over a slow network, really: wall time and bytes beside their models.

Three SuperNodes, each in a network namespace behind token buckets (`tc tbf`), and a
SuperLink: real processes, real sockets. Per method and round, the wall time stands
beside the history's `modelled_seconds`, and the bytes that passed a node's interface,
whatever they were for, beside those that the history counts.

Wants Linux and root. docs/results/network.md has what it printed.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from _common import REPOSITORY, add_data_option, announced, parser, show

sys.path.insert(0, str(REPOSITORY / "dev"))
# pylint: disable-next=wrong-import-position
from deployment import Deployment  # noqa: E402

METHODS = ("fedavg", "apf", "gwpf")
NODES = 3
# Seconds without a round after which a run is taken for one that has failed.
_PATIENCE = 900
_BRIDGE = "gwpf-slow"
_SERVER = "10.123.0.1"


def ip(command: str, check: bool = True) -> None:
    """Run a command of iproute2, which by default must succeed."""
    subprocess.run(command.split(), check=check, capture_output=True)


@contextmanager
def namespaces(up: float, down: float) -> Iterator[None]:
    """Give each node a namespace, behind links of so many megabits a second."""
    remove()
    ip(f"ip link add {_BRIDGE} type bridge")
    ip(f"ip addr add {_SERVER}/24 dev {_BRIDGE}")
    ip(f"ip link set {_BRIDGE} up")
    for node in range(NODES):
        space, outside = f"{_BRIDGE}-{node}", f"gwpf-out{node}"
        ip(f"ip netns add {space}")
        ip(f"ip link add {outside} type veth peer name eth0 netns {space}")
        ip(f"ip link set {outside} master {_BRIDGE} up")
        inside = f"ip netns exec {space}"
        ip(f"{inside} ip addr add 10.123.0.{10 + node}/24 dev eth0")
        ip(f"{inside} ip link set eth0 up")
        ip(f"{inside} ip link set lo up")
        # A bucket shapes what leaves an interface: up inside, down outside.
        for place, rate in (
            (f"{inside} tc qdisc add dev eth0", up),
            (f"tc qdisc add dev {outside}", down),
        ):
            ip(f"{place} root tbf rate {rate}mbit burst 32kbit latency 400ms")
    try:
        yield
    finally:
        remove()


def remove() -> None:
    """Remove what :func:`namespaces` has made."""
    for node in range(NODES):
        # A namespace lives on while a process does that somebody has left in it.
        ip(f"ip link del gwpf-out{node}", check=False)
        ip(f"ip netns del {_BRIDGE}-{node}", check=False)
    ip(f"ip link del {_BRIDGE}", check=False)


class Wire(NamedTuple):
    """Bytes that have passed the nodes' interfaces."""

    up: int
    down: int


def passed() -> Wire:
    """Read the counters of all nodes' interfaces, from outside."""
    up = down = 0
    for node in range(NODES):
        counters = Path(f"/sys/class/net/gwpf-out{node}/statistics")
        up += int((counters / "rx_bytes").read_text())
        down += int((counters / "tx_bytes").read_text())
    return Wire(up, down)


def play(nodes: Deployment, config: dict[str, object]) -> list[tuple]:
    """Run an experiment; return its history's rows and the counters at their ends."""
    run = nodes.submit(config)
    history = nodes.results(run) / "history.csv"
    found: list[tuple] = []
    heard = time.monotonic()
    while len(found) < config["num_rounds"]:  # type: ignore[operator]
        time.sleep(0.2)
        if nodes.ended("superlink"):
            log = nodes.folder / "superlink.log"
            sys.exit(f"the SuperLink has ended: {log.read_text()[-2000:]}")
        if time.monotonic() > heard + _PATIENCE:
            log = nodes.flwr("log", run, "--show").stdout
            sys.exit(f"no round has ended for {_PATIENCE} s: {log[-2000:]}")
        if history.exists():
            with open(history, newline="", encoding="utf-8") as file:
                new = list(csv.DictReader(file))[len(found) :]
            if new:
                heard = time.monotonic()
            found += [(row, passed()) for row in new]
    return found


def summary(found: list[tuple]) -> list[float]:
    """Return means over the rounds after the first, as the table has them."""
    (first, before), (last, after) = found[0], found[-1]
    rounds = len(found) - 1
    messages = rounds * NODES

    def mean(column: str) -> float:
        return (float(last[column]) - float(first[column])) / rounds

    columns = ("cumulative_uplink_bytes", "cumulative_downlink_bytes")
    up, down = (mean(column) / NODES for column in columns)
    wire_up = (after.up - before.up) / messages
    wire_down = (after.down - before.down) / messages
    return [
        mean("seconds"),
        mean("modelled_seconds"),
        up / 1e3,
        wire_up / 1e3,
        down / 1e3,
        wire_down / 1e3,
    ]


def main() -> None:
    """Run every method over the slow network and print the table."""
    options = parser(__doc__, rounds=5, seed=0, local_steps=5)
    options.add_argument("--up", type=float, default=3.0, help="Mbps (3)")
    options.add_argument("--down", type=float, default=9.0, help="Mbps (9)")
    options.add_argument("--methods", nargs="*", default=METHODS, help="(all three)")
    options.add_argument("--model", default="mnist_cnn", help="(mnist_cnn)")
    options.add_argument("--overhead", type=int, default=0, help="bytes a message (0)")
    add_data_option(options)
    chosen: argparse.Namespace = options.parse_args()
    if os.name != "posix" or os.geteuid():
        sys.exit("error: network namespaces want Linux and root")
    rows = []
    with tempfile.TemporaryDirectory() as folder, namespaces(chosen.up, chosen.down):
        nodes = Deployment(Path(folder), 39500, secure=False, host=_SERVER)
        with nodes:
            nodes.start_superlink()
            for node in range(NODES):
                space = f"ip netns exec {_BRIDGE}-{node}"
                nodes.start_supernode(node, node, prefix=space)
            for method in announced(chosen.methods):
                config = {
                    "method": method,
                    "model": chosen.model,
                    "dataset": "mnist",
                    "overrides": f"dataset.path={chosen.data / 'mnist'}",
                    "num_clients": NODES,
                    "num_rounds": chosen.rounds,
                    "local_steps": chosen.local_steps,
                    "seed": chosen.seed,
                    "network.uplink_mbps": chosen.up,
                    "network.downlink_mbps": chosen.down,
                    "network.overhead_bytes": chosen.overhead,
                }
                rows.append((method, *summary(play(nodes, config))))
    columns = (
        "method",
        "seconds a round",
        "modelled",
        "kB up, history",
        "on the wire",
        "kB down, history",
        "on the wire",
    )
    title = (
        f"{chosen.model} over {chosen.up} and {chosen.down} Mbps, a client and round"
    )
    show(title, columns, rows, chosen)


if __name__ == "__main__":
    main()
