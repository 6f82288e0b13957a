"""A Slurm of two nodes on this machine: one controller and two `slurmd`, with keys, ports and files of their own."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from support import PROJECT

NODES = ("n1", "n2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "setpriv")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
START_TIMEOUT_S = 60.0

# A requeued job waits for cred_expire seconds, then for the scheduler; a node silent for SlurmdTimeout seconds is down.
CONFIGURATION = """
ClusterName=eva-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/%n/slurmd.pid
SlurmdLogFile={folder}/%n/slurmd.log
SlurmdSpoolDir={folder}/%n/spool
SlurmdParameters=config_overrides
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SlurmdTimeout=10
KillWait=20
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class NoSlurmError(Exception):
    """Slurm is not installed, or does not start here."""


@dataclass
class SlurmCluster:
    """A running cluster in `folder`, whose path must be short: sockets lie in it. Ends with the process that made it,
    at the latest."""

    folder: Path
    environment: dict[str, str] = field(init=False)
    _daemons: dict[str, subprocess.Popen[bytes]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self) -> None:
        """Starts the daemons. Raises NoSlurmError with the reason if that is not possible here."""
        missing = [program for program in PROGRAMS if not shutil.which(program, path=PATH)]
        if missing:
            raise NoSlurmError(f"not installed: {', '.join(missing)}")
        self.folder.chmod(0o755)
        for name in ("state", *NODES):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        host = socket.gethostname().partition(".")[0]
        user = psutil.Process().username()
        text = CONFIGURATION.format(folder=self.folder, host=host, user=user, ports=_free_ports(3))
        (self.folder / "slurm.conf").write_text(text)
        paths = {"--key-file": key, "--socket": "munge.socket", "--pid-file": "munged.pid"}
        paths |= {"--log-file": "munged.log", "--seed-file": "munged.seed"}
        self._start("munged", ["--foreground", *(f"{name}={self.folder / path}" for name, path in paths.items())])
        self._wait_for("munged", (self.folder / "munge.socket").exists)
        self._start("slurmctld", ["-D", "-c"])
        for node in NODES:
            self.start_node(node)
        self._wait_for("slurmctld", lambda: set(self._node_states()) == {"idle"})

    def start_node(self, node: str) -> None:
        """Starts a node, at first or again."""
        self._start(node, ["-D", "-N", node])

    def kill_node(self, node: str) -> None:
        """What a power cut does: nothing of the node is left, and nobody is told."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.name() == "slurmstepd" and process.cwd() == str(self.folder / node):
                    _kill_family(process)

    def stop(self) -> None:
        """Ends all daemons and jobs."""
        if "slurmctld" in self._daemons:
            self.run("scancel", "--signal=KILL", "--full", "--user", psutil.Process().username(), expect=None)
        for node in NODES:
            if node in self._daemons:
                self.kill_node(node)
        for daemon in self._daemons.values():
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def run(self, *command: str, expect: int | None = 0) -> str:
        """Runs a command that talks to this cluster; returns what it printed."""
        done = subprocess.run(
            command, cwd=PROJECT, env=self.environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert expect in (None, done.returncode), f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def job(self, job: str) -> dict[str, str]:
        """What Slurm says about a job: JobState, Restarts, ExitCode, ..."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, *states: str, timeout: float = 150.0) -> dict[str, str]:
        """Waits until a job is in one of `states`."""
        deadline = time.monotonic() + timeout
        while (found := self.job(job))["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {job} is not {states} after {timeout:g} s: {found}"
            time.sleep(0.2)
        return found

    def _start(self, name: str, arguments: list[str]) -> None:
        program = "slurmd" if name in NODES else name
        folder = self.folder / name if name in NODES else self.folder
        with (folder / f"{program}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", program, *arguments],
                cwd=folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the tests, which then end these
            )

    def _node_states(self) -> list[str]:
        return self.run("sinfo", "--noheader", "--Node", "--format=%t", expect=None).split()

    def _wait_for(self, name: str, is_ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not is_ready():
            dead = next((key for key, daemon in self._daemons.items() if daemon.poll() is not None), None)
            if dead or time.monotonic() > deadline:
                logs = [path for path in sorted(self.folder.rglob("*.out")) if path.stat().st_size]
                said = "\n".join(path.read_text(errors="replace").strip().splitlines()[-1] for path in logs)
                raise NoSlurmError(f"{dead or name} does not start here:\n{said}")
            time.sleep(0.1)


def _kill_family(process: psutil.Process) -> None:
    for member in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            member.kill()


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
