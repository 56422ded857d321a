"""Two hosts on one machine: network namespaces with a cable between them and one disk.

    with two_hosts() as (first, second):
        jobs = [host.torchrun("-m", "training.finetune", "recipe.yaml") for host in ...]
        second.kill()      # the power goes: all that runs there ends at once (SIGKILL)
        second.unplug()    # the cable: nothing arrives, nobody is told; plug_in() mends it
        first.finish(jobs[0])

Needs root and `ip`; `two_hosts` skips with a word where namespaces are not permitted. The fixture
`hosts` of conftest.py is the same.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IP = shutil.which("ip", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
PORT = 29511  # a namespace has ports of its own
WAIT_S = 400  # on a busy machine; nothing here may wait for ever


def _ip(*arguments: str) -> str:
    return subprocess.run([IP, *arguments], check=True, capture_output=True, text=True).stdout


@dataclass(frozen=True)
class Host:
    """A network namespace.

    name: as `ip netns` knows it. address: on the cable. rank: torchrun's number of the node.
    """

    name: str
    address: str
    rank: int
    master: str

    def popen(self, *command: str, **environment: str) -> subprocess.Popen:
        """Starts a command here; stderr comes with stdout, as text."""
        variables = {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "GLOO_SOCKET_IFNAME": "eth0",
            "NCCL_SOCKET_IFNAME": "eth0",
        }
        return subprocess.Popen(
            [IP, "netns", "exec", self.name, *command],
            cwd=ROOT,
            env=os.environ | variables | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def torchrun(
        self, *arguments: str, processes: int = 1, n_hosts: int = 2, **environment: str
    ) -> subprocess.Popen:
        """Starts torchrun's part of this host; to be started on each of the `n_hosts`."""
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(n_hosts)]
        command += ["--node-rank", str(self.rank), "--nproc-per-node", str(processes)]
        command += ["--master-addr", self.master, "--master-port", str(PORT)]
        return self.popen(*command, "--local-addr", self.address, *arguments, **environment)

    def kill(self) -> None:
        """Ends all that runs here, as a power cut does."""
        while pids := _ip("netns", "pids", self.name).split():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
            time.sleep(0.02)

    def unplug(self) -> None:
        _ip("-n", self.name, "link", "set", "eth0", "down")

    def plug_in(self) -> None:
        _ip("-n", self.name, "link", "set", "eth0", "up")

    @staticmethod
    def finish(process: subprocess.Popen, wait_s: float = WAIT_S) -> tuple[int, str]:
        """Waits for its end: (status, what it said)."""
        said, _ = process.communicate(timeout=wait_s)
        return process.returncode, said


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Both hosts; all that still runs there is killed at the end."""
    if IP is None:
        pytest.skip("ip is not here: no network namespaces")
    addresses = ("10.77.0.1", "10.77.0.2")
    names = [f"fastconformer-{os.getpid()}-{number}" for number in (1, 2)]
    hosts = tuple(
        Host(name, address, rank, addresses[0])
        for rank, (name, address) in enumerate(zip(names, addresses, strict=True))
    )
    with contextlib.ExitStack() as stack:
        try:
            for name in names:
                _ip("netns", "add", name)
                stack.callback(_ip, "netns", "delete", name)
            ends = ["name", "eth0", "netns", names[0], "type", "veth"]
            _ip("link", "add", *ends, "peer", "name", "eth0", "netns", names[1])
            for host in hosts:
                _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
                for device in ("lo", "eth0"):
                    _ip("-n", host.name, "link", "set", device, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted: {error.stderr.strip()}")
        for host in hosts:
            stack.callback(host.kill)
        yield hosts
