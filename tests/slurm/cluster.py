"""A real Slurm on this machine for tests: munged, slurmctld and one slurmd a node, with fake GPUs.

Debian's build lets several slurmd with names and ports of their own share a host, so jobs of several nodes, preemption,
requeueing and dependencies are Slurm's own. What it cannot show: cgroup limits, GPUs, a fabric. Works as root in a
container without systemd; nothing outside its temporary folder is touched.
"""

import os
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
FINAL = frozenset(
    ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY")
)
_CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
MinJobAge=86400
MessageTimeout=60
KillWait=30
JobRequeue=1
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports} CPUs={cpus} RealMemory=8000 Gres=gpu:{gpus}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
PartitionName=short Nodes=ALL MaxTime=10 PriorityTier=1 State=UP
"""


def missing_programs() -> list[str]:
    """Slurm's programs that are not installed; empty where a cluster can be started."""
    return [program for program in PROGRAMS if shutil.which(program, path=_PATH) is None]


def wait_until(condition: Callable[[], bool], seconds: float, what: str, pause: float = 0.2) -> None:
    """Polls until `condition` holds. Raises TimeoutError naming `what`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(pause)


def _free_ports(count: int) -> list[int]:
    """A run of `count` consecutive ports that are free now."""
    for _ in range(50):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            first = int(probe.getsockname()[1])
        if first + count < 65535 and all(_is_free(port) for port in range(first, first + count)):
            return list(range(first, first + count))
    raise OSError(f"no {count} consecutive free ports found")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


class SlurmCluster:
    """Nodes node1..nodeN; partitions `main` (preempted by `urgent`, requeues), `urgent`, and `short` (10 minutes)."""

    def __init__(self, nodes: int = 2, cpus: int = 16, gpus: int = 8) -> None:
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self.gpus = gpus
        self._cpus = cpus
        # Short: the path of munge's socket may have 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-test-", dir="/tmp"))
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))},
            "PATH": _PATH,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
        }

    def start(self) -> None:
        """Returns when all nodes are idle. Raises RuntimeError with the daemons' last words otherwise."""
        for name in ("state", "spool", "log", "run", "dev"):
            (self.folder / name).mkdir()
        self.folder.chmod(0o755)
        self._configure()
        run = self.folder / "run"
        munged = ["munged", "--force", f"--key-file={self.folder}/munge.key", f"--socket={run}/munge.sock"]
        munged += [f"--pid-file={run}/munged.pid", f"--log-file={self.folder}/log/munged.log"]
        try:
            self.run(*munged, f"--seed-file={run}/munge.seed")
            self.run("slurmctld", "-f", str(self.folder / "slurm.conf"))
            for node in self.nodes:
                self.start_node(node)
            wait_until(lambda: self.idle_nodes() == self.nodes, 60, "Slurm's nodes are idle")
        except (OSError, subprocess.SubprocessError) as error:
            logs = "".join(f"\n{log.name}: {log.read_text()[-1500:]}" for log in (self.folder / "log").glob("*.log"))
            self.stop()
            raise RuntimeError(f"Slurm did not start: {error}{logs}") from error

    def _configure(self) -> None:
        controller, *ports = _free_ports(1 + len(self.nodes))
        for number in range(self.gpus):
            device = self.folder / "dev" / f"nvidia{number}"
            try:  # only character devices get CUDA_VISIBLE_DEVICES
                os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
            except PermissionError:
                device.touch()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        host = socket.gethostname().split(".")[0]
        last = len(self.nodes)
        config = _CONFIG.format(
            host=host,
            port=controller,
            user=psutil.Process().username(),
            folder=self.folder,
            nodes=f"node[1-{last}]",
            ports=f"[{ports[0]}-{ports[-1]}]",
            cpus=self._cpus,
            gpus=self.gpus,
        )
        (self.folder / "slurm.conf").write_text(config)
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/dev/nvidia[0-{self.gpus - 1}]\n")

    def run(
        self, *command: str, check: bool = True, cwd: Path | None = None, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """A command with this cluster's environment. A client of a dead controller would hang: hence the timeout."""
        done = subprocess.run(
            command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def idle_nodes(self) -> list[str]:
        done = self.run("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N", check=False)
        return sorted(set(done.stdout.split()))

    def submit(self, *arguments: str, cwd: Path | None = None) -> int:
        """`sbatch --parsable ARGUMENTS`: the job id."""
        return int(self.run("sbatch", "--parsable", *arguments, cwd=cwd).stdout.strip().split(";")[0])

    def show(self, job: int | str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        words = self.run("scontrol", "-o", "show", "job", str(job)).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job: int | str) -> str:
        return self.show(job)["JobState"]

    def wait(self, *jobs: int | str, timeout: float = 120, skip_requeue_delay: bool = True) -> dict[str, str]:
        """Waits until all jobs are over and returns their final states by id. Slurm delays a requeued job for two
        minutes: by default it is started at once."""
        deadline = time.monotonic() + timeout
        held_since: dict[str, float] = {}
        while True:
            fields = {str(job): self.show(job) for job in jobs}
            if all(job["JobState"] in FINAL for job in fields.values()):
                return {name: job["JobState"] for name, job in fields.items()}
            for name, job in fields.items():
                if not (skip_requeue_delay and job["JobState"] == "PENDING" and job.get("Reason") == "BeginTime"):
                    held_since.pop(name, None)
                elif time.monotonic() - held_since.setdefault(name, time.monotonic()) > 2.0:
                    # Earlier, slurmd would take the new start for the one it has just ended.
                    self.start_now(name)
            if time.monotonic() > deadline:
                states = {name: f"{job['JobState']} ({job.get('Reason')})" for name, job in fields.items()}
                raise TimeoutError(f"jobs are not over after {timeout:g} s: {states}")
            time.sleep(0.3)

    def start_now(self, job: int | str) -> None:
        """Ends the delay of a requeued job."""
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)

    def start_node(self, node: str) -> None:
        self.run("slurmd", "-f", str(self.folder / "slurm.conf"), "-N", node)

    def kill_node(self, node: str) -> None:
        """As a power cut: everything of the node stops at once, Slurm learns that it is down, and nothing of it stays.

        Frozen first: tasks that were killed while Slurm thinks the node well would be a failure of the job, not of it.
        """
        daemon = self._daemon(f"slurmd-{node}.pid")
        doomed = [*([] if daemon is None else [daemon]), *self._processes_of(node)]
        for process in doomed:
            _signal(process, signal.SIGSTOP)
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=killed")
        for process in doomed:
            _signal(process, signal.SIGKILL)

    def revive_node(self, node: str) -> None:
        """Starts the node's daemon again and waits until it takes jobs."""
        self.start_node(node)
        # A node that registers returns by itself (ReturnToService=2); then there is nothing to resume.
        self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
        wait_until(lambda: self._is_up(node), 60, f"{node} is up")

    def _is_up(self, node: str) -> bool:
        state = self.run("sinfo", "-h", "-N", "-n", node, "-p", "main", "-o", "%t").stdout.strip()
        return state.rstrip("~#*") in {"idle", "mix", "alloc", "comp"} and not state.endswith("*")

    def stop(self) -> None:
        """Ends jobs, then daemons, then removes the folder; ends by force what does not go."""
        if self._daemon("slurmctld.pid") is not None:
            self._end_jobs()
        for name in (*(f"slurmd-{node}.pid" for node in self.nodes), "slurmctld.pid", "munged.pid"):
            daemon = self._daemon(name)
            if daemon is not None:
                _signal(daemon, signal.SIGTERM)
                try:
                    wait_until(lambda daemon=daemon: _is_gone(daemon), 15, name, pause=0.05)  # type: ignore[misc]
                except TimeoutError:
                    _signal(daemon, signal.SIGKILL)
        for process in self.leftovers():
            _signal(process, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _end_jobs(self) -> None:
        """Daemons leave quickly only when no job is left."""
        self.run("scancel", "--user", psutil.Process().username(), check=False)
        try:
            wait_until(lambda: not self.run("squeue", "-h", check=False).stdout, 5, "jobs are over")
        except (TimeoutError, subprocess.SubprocessError):
            daemons = [self._daemon(file.name) for file in (self.folder / "run").glob("*.pid")]
            for process in self.leftovers():
                if process not in daemons:
                    _signal(process, signal.SIGKILL)

    def _daemon(self, pid_file: str) -> psutil.Process | None:
        try:
            return psutil.Process(int((self.folder / "run" / pid_file).read_text()))
        except (OSError, ValueError, psutil.NoSuchProcess):
            return None

    def _processes_of(self, node: str) -> Iterable[psutil.Process]:
        """Step daemons and tasks of a node, found by what Slurm puts in their environment."""
        for process in self.leftovers():
            if any(word == f"SLURMD_NODENAME={node}" or f"/slurmd-{node}.log" in word for word in _words(process)):
                yield process

    def leftovers(self) -> list[psutil.Process]:
        """All processes of this cluster, by its folder in their command line, environment or open files."""
        mark = str(self.folder)
        mine = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
        return [
            process
            for process in psutil.process_iter()
            if process.pid not in mine and not _is_gone(process) and any(mark in word for word in _words(process))
        ]


def _words(process: psutil.Process) -> list[str]:
    try:
        if process.name().startswith("slurmstepd"):  # it overwrites its command line and environment
            return [str(link.readlink()) for link in Path(f"/proc/{process.pid}/fd").iterdir()]
        environment = [f"{name}={value}" for name, value in process.environ().items()]
        return [*process.cmdline(), *environment]
    except (psutil.Error, OSError):
        return []


def _is_gone(process: psutil.Process) -> bool:
    """Where process 1 of a container collects no orphans, an ended daemon stays as a zombie."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
