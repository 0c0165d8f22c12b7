"""A whole Flower federation on this machine: authority, keys, SuperLink, SuperNodes.

Every command that it runs stands in docs/deployment.md. It runs until it is stopped
(Ctrl-C, SIGTERM), and says by which `flwr run` an experiment is started on it. Nothing
of it lies outside of its folder.

python dev/deployment.py /tmp/federation --supernodes 3
"""

import argparse
import ipaddress
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

REPOSITORY = Path(__file__).resolve().parents[1]
# Seconds for a process to start, and for a command: without a cache, imports are slow.
_PATIENCE = 120
# Seconds for SuperNodes to take their leave, so that they can come back at once.
_GRACE = 10


class Deployment:
    """A SuperLink, and SuperNodes with a key and a disk of their own.

    Parameters
    ----------
    folder : pathlib.Path
        Where keys, logs, the SuperLink's database and all results go.
    port : int, default 9180
        The SuperLink's; SuperNodes have those after it.
    secure : bool, default True
        Whether to encrypt (TLS) and to admit only SuperNodes whose keys are known.
    database : bool, default False
        Whether the SuperLink keeps its state on disk, so that it can be restarted.
    host : str, default "127.0.0.1"
        The address by which SuperNodes reach the SuperLink, and that it listens on.
    python : pathlib.Path, optional
        The environment's interpreter; default: this one.
    """

    def __init__(
        self,
        folder: Path,
        port: int = 9180,
        secure: bool = True,
        database: bool = False,
        host: str = "127.0.0.1",
        python: Path = Path(sys.executable),
    ) -> None:
        self.folder = folder.absolute()
        self.port = port
        self.secure = secure
        self.database = database
        self.host = host
        self.scripts = python.parent
        self.processes: dict[str, subprocess.Popen] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        home = self.folder / "flwr"
        home.mkdir(exist_ok=True)
        certificates = f'root-certificates = "{self.folder / "ca.crt"}"'
        (home / "config.toml").write_text(
            '[superlink]\ndefault = "federation"\n\n[superlink.federation]\n'
            f'address = "{host}:{port}"\n'
            f"{certificates if secure else 'insecure = true'}\n"
        )
        if secure and not (self.folder / "server.crt").exists():
            self._certify()

    # ---- keys ---------------------------------------------------------------------

    def _certify(self) -> None:
        """Make an authority, and a certificate of the SuperLink that it has signed."""
        self.call(
            "openssl req -x509 -newkey rsa:3072 -nodes -days 365 -subj /CN=authority "
            "-addext keyUsage=critical,keyCertSign,cRLSign -keyout ca.key -out ca.crt"
        )
        self.call(
            "openssl req -newkey rsa:3072 -nodes -subj /CN=superlink "
            "-keyout server.key -out server.csr"
        )
        # The server's part connects by 127.0.0.1. Python 3.13 wants the identifiers.
        (self.folder / "server.ext").write_text(
            f"subjectAltName=DNS:localhost,IP:127.0.0.1,{_alternative(self.host)}\n"
            "subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"
        )
        self.call(
            "openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial "
            "-days 365 -extfile server.ext -out server.crt"
        )

    def _key(self, name: str) -> Path:
        """Return a SuperNode's private key, made when first used, and registered."""
        key = self.folder / f"{name}.key"
        if not key.exists():
            self.call(f"ssh-keygen -q -t ecdsa -b 384 -N '' -C {name} -f {name}.key")
        registered = self.flwr("supernode", "register", f"{key}.pub", "federation")
        if registered.returncode and "already in use" not in registered.stderr:
            raise RuntimeError(f"{key}.pub: {_line(registered.stderr)}")
        return key

    # ---- processes ----------------------------------------------------------------

    def start_superlink(self) -> None:
        """Start the SuperLink, and wait until it answers."""
        options = f"--host {self.host} --port {self.port} "
        options += "--disable-runtime-dependency-installation"
        if self.secure:
            options += (
                " --ssl-ca-certfile ca.crt --ssl-certfile server.crt"
                " --ssl-keyfile server.key --enable-supernode-auth"
            )
        else:
            options += " --insecure"
        if self.database:
            options += " --database superlink.db"
        self._check_port(self.host, self.port)
        self._start("superlink", f"flower-superlink {options}", self.folder)
        deadline = time.monotonic() + _PATIENCE
        while self.flwr("supernode", "list", "federation").returncode:
            if time.monotonic() > deadline or self.ended("superlink"):
                raise RuntimeError(
                    "the SuperLink does not answer; "
                    f"{self.folder / 'superlink.log'} says why"
                )
            time.sleep(0.5)

    def start_supernode(
        self, number: int, partition: object, name: str = "", prefix: str = ""
    ) -> str:
        """Start a SuperNode.

        Parameters
        ----------
        number : int
            Which one it is: its port, and unless named its key and disk.
        partition : object
            The partition of the data that it says it serves.
        name : str, optional
            Another name.
        prefix : str, optional
            What to start it by, for example ``ip netns exec``.

        Returns
        -------
        str
            The name: of its log, its disk and its key.
        """
        name = name or f"supernode-{number}"
        disk = self.folder / name
        disk.mkdir(exist_ok=True)
        options = (
            f"--superlink {self.host}:{self.port} --port {self.port + 1 + number} "
            f"--node-config 'partition-id={partition}' "
        )
        if self.secure:
            certificate = shlex.quote(str(self.folder / "ca.crt"))
            key = shlex.quote(str(self._key(name)))
            options += f"--root-certificates {certificate} "
            options += f"--auth-supernode-private-key {key}"
        else:
            options += "--insecure"
        if not prefix:
            self._check_port("127.0.0.1", self.port + 1 + number)
        self._start(name, f"flower-supernode {options}", disk, prefix)
        return name

    def _start(self, name: str, command: str, disk: Path, prefix: str = "") -> None:
        with (self.folder / f"{name}.log").open("a") as log:
            self.processes[name] = subprocess.Popen(
                [*prefix.split(), *self._found(shlex.split(command))],
                env=self.environment(disk),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A terminal's Ctrl-C is for this script, which ends them in order.
                start_new_session=True,
            )

    @staticmethod
    def _check_port(host: str, port: int) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise RuntimeError(
                    f"port {port} of {host}: {error.strerror}"
                ) from error

    def ended(self, name: str) -> bool:
        """Tell whether a process has ended."""
        return self.processes[name].poll() is not None

    def kill(self, name: str) -> None:
        """End a process and all that it has started, as a failing machine does."""
        process = self.processes.pop(name)
        _kill(_families([process.pid]))
        process.wait()

    def stop(self) -> None:
        """End everything, SuperNodes first."""
        families = _families(process.pid for process in self.processes.values())
        nodes = [self.processes[name] for name in self.processes if name != "superlink"]
        deadline = time.monotonic() + _GRACE
        try:
            for node in nodes:
                node.terminate()
            for node in nodes:
                with suppress(subprocess.TimeoutExpired):
                    node.wait(max(0, deadline - time.monotonic()))
        finally:
            # Theirs have sessions of their own, and would go on for a while.
            _kill(families)
            for name in list(self.processes):
                self.kill(name)

    def __enter__(self) -> "Deployment":
        """Return the federation, which is stopped at the end."""
        return self

    def __exit__(self, *args: object) -> None:
        """Stop the federation."""
        self.stop()

    # ---- commands -----------------------------------------------------------------

    def environment(self, disk: Path) -> dict[str, str]:
        """Return a process's environment variables."""
        return {
            **os.environ,
            "PATH": f"{self.scripts}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(disk / "flwr"),
            "GWPF_OUTPUTS": str(disk / "outputs"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        }

    def flwr(self, *arguments: str) -> subprocess.CompletedProcess:
        """Run Flower's command line and return what it printed."""
        return self._run(["flwr", *arguments])

    def submit(self, config: Mapping[str, object]) -> str:
        """Start a run on the SuperNodes.

        Parameters
        ----------
        config : mapping of str to object
            Its run configuration.

        Returns
        -------
        str
            Its id, which names its folder, see :meth:`results`.

        Raises
        ------
        RuntimeError
            Flower refuses it.
        """
        # As TOML has it: texts in quotes.
        values = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
        options = ("--run-config", values, "--format=json")
        printed = self.flwr("run", str(REPOSITORY), "federation", *options)
        answer = json.loads(printed.stdout)
        if not answer["success"]:
            raise RuntimeError(f"flwr run: {printed.stdout}")
        return str(answer["run-id"])

    def results(self, run: str) -> Path:
        """Return the folder of a run's results on the SuperLink's disk."""
        return self.folder / "outputs" / run

    def call(self, command: str) -> None:
        """Run a command in the federation's folder."""
        done = self._run(shlex.split(command))
        if done.returncode:
            raise RuntimeError(f"{command}: {_line(done.stderr)}")

    def _run(self, words: Sequence[str]) -> subprocess.CompletedProcess:
        try:
            return subprocess.run(
                self._found(words),
                env=self.environment(self.folder),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                timeout=_PATIENCE,
            )
        except subprocess.TimeoutExpired as error:
            command = shlex.join(words[:2])
            raise RuntimeError(f"{command}: no answer in {_PATIENCE} s") from error

    def _found(self, words: Sequence[str]) -> list[str]:
        """Return a command with its program's whole path."""
        program, *arguments = words
        found = shutil.which(program, path=self.environment(self.folder)["PATH"])
        if found is None:
            raise RuntimeError(f"{program} is needed, and not on the PATH")
        return [found, *arguments]


def _alternative(host: str) -> str:
    """Return a host's name or address as a certificate has it."""
    try:
        return f"IP:{ipaddress.ip_address(host)}"
    except ValueError:
        return f"DNS:{host}"


def _line(text: str) -> str:
    """Return the last line that says anything, without what frames it."""
    lines = [line.strip("│╭╮╰╯─ ") for line in text.splitlines()]
    return next((line for line in reversed(lines) if line), "no reason given")


def _families(heads: Iterable[int]) -> list[int]:
    """Return processes and all that they have started, by the table of processes."""
    found = list(heads)
    command = ["ps", "-A", "-o", "pid=,ppid="]
    try:
        table = subprocess.run(command, check=True, capture_output=True, text=True)
    # Without it what they started ends by itself, some seconds after them.
    except (OSError, subprocess.CalledProcessError):
        return found
    rows = [tuple(map(int, row.split())) for row in table.stdout.splitlines()]
    for parent in found:
        found += [pid for pid, ppid in rows if ppid == parent and pid not in found]
    return found


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Start a federation and keep it running."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where all of it goes")
    parser.add_argument("--supernodes", type=int, default=3, help="how many (3)")
    parser.add_argument("--port", type=int, default=9180, help="the first (9180)")
    parser.add_argument("--insecure", action="store_true", help="no TLS and no keys")
    parser.add_argument("--database", action="store_true", help="a state on disk")
    options = parser.parse_args(arguments)
    if options.supernodes < 1:
        parser.error("--supernodes: at least 1")
    if not 1 <= options.port <= 65535 - options.supernodes:
        parser.error(f"--port: from 1 to {65535 - options.supernodes}")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        _serve(options)
    except KeyboardInterrupt:
        sys.exit(0)
    except (RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")


def _serve(options: argparse.Namespace) -> NoReturn:
    with Deployment(
        options.folder, options.port, not options.insecure, options.database
    ) as deployment:
        deployment.start_superlink()
        for number in range(options.supernodes):
            deployment.start_supernode(number, number)
        home = shlex.quote(str(deployment.folder / "flwr"))
        print(
            f"{options.supernodes} SuperNodes; logs and results are in "
            f"{deployment.folder}. To run an experiment:\n\n"
            f"FLWR_HOME={home} flwr run {shlex.quote(str(REPOSITORY))} federation "
            f'--stream --run-config "num_clients={options.supernodes}"\n',
            flush=True,
        )
        while not any(map(deployment.ended, deployment.processes)):
            time.sleep(1)
        ended = [name for name in deployment.processes if deployment.ended(name)]
        raise RuntimeError(
            f"{ended[0]} has ended; {deployment.folder / ended[0]}.log says why"
        )


if __name__ == "__main__":
    main()
