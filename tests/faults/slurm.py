"""A real Slurm on this host: slurmctld and two slurmd with eight GPUs each by name, no systemd, no cgroups.

Debian's packages slurmctld, slurmd, slurm-client and munge (`make slurm`), as root. What it listens on is loopback.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType

NEEDED = ("slurmctld", "slurmd", "sbatch", "scontrol", "munged")
CONF = """ClusterName=ci
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/munge.socket,cred_expire=6
CredType=cred/munge
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/slurmd.%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,batch_sched_delay=0
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
KillWait=5
MinJobAge=600
JobRequeue=1
GresTypes=gpu
SlurmdParameters=config_overrides
TreeWidth=65533
"""
NODE = "NodeName=n{n} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=96 RealMemory=4000 Gres=gpu:8\n"
PARTITION = "PartitionName=debug Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO\n"


class Cluster:
    """Daemons that live in ``folder`` while it is entered."""

    def __init__(self, folder: Path) -> None:
        missing = [name for name in NEEDED if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
        assert not missing, f"{', '.join(missing)} not installed: make slurm"
        assert os.geteuid() == 0, "slurmctld changes users: run as root"
        self.folder = folder
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _start(self) -> None:
        host = socket.gethostname().partition(".")[0]
        for name in ("state", "slurmd.n1", "slurmd.n2", "munge"):
            (self.folder / name).mkdir(parents=True)
        for parent in (self.folder, *self.folder.parents):  # munged refuses a path that others may not search
            if parent.stat().st_uid == os.geteuid() and str(parent) not in ("/", "/tmp"):
                parent.chmod(parent.stat().st_mode | 0o755)
        key = self.folder / "munge" / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        for path in (key.parent, key):
            shutil.chown(path, "munge", "munge")
        ports = _free_ports(3)
        text = CONF.format(host=host, folder=self.folder, port=ports[0])
        text += "".join(NODE.format(n=n, host=host, port=ports[n]) for n in (1, 2))
        (self.folder / "slurm.conf").write_text(text + PARTITION)
        for n in range(8):  # a device that nobody opens
            (self.folder / f"gpu{n}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-7]\n")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        munge = ["--key-file=munge.key", "--socket=munge.socket", "--pid-file=munged.pid", "--log-file=munged.log"]
        options = [re.sub("=", f"={key.parent}/", option) for option in [*munge, "--seed-file=seed"]]
        self.run("runuser", "-u", "munge", "--", "munged", *options, "--force")
        self.run("slurmctld")
        for n in (1, 2):
            self.run("slurmd", "-N", f"n{n}")
        self.until(lambda: self.run("sinfo", "-h", "-o", "%D %T") == "2 idle", 30)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.run("scancel", "--user=root", check=False)
        end = time.monotonic() + 10
        while time.monotonic() < end and self.run("squeue", "-h", check=False):
            time.sleep(0.2)
        for path in (
            *self.folder.glob("slurmd.*.pid"),
            self.folder / "slurmctld.pid",
            self.folder / "munge/munged.pid",
        ):
            if path.exists():
                os.kill(int(path.read_text()), signal.SIGTERM)

    def run(self, *command: str, check: bool = True, cwd: Path | None = None) -> str:
        """A command's output."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60, cwd=cwd)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, folder: Path, *arguments: object, **env: str) -> int:
        """The number of a job that was submitted from ``folder``."""
        before, self.env = self.env, {**self.env, **env}
        try:
            return int(self.run("sbatch", "--parsable", *map(str, arguments), cwd=folder).split(";")[0])
        finally:
            self.env = before

    def state(self, job: int | str) -> dict[str, str]:
        """Fields of a job, such as JobState, ExitCode and Restarts."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", "-o", str(job))))

    def until(self, condition: object, seconds: float = 90.0, told: object = str) -> None:
        """Wait for ``condition()``."""
        end = time.monotonic() + seconds
        while not condition():  # type: ignore[operator]
            assert time.monotonic() < end, f"it never happened: {told()}"  # type: ignore[operator]
            time.sleep(0.1)

    def ended(self, job: int | str, seconds: float = 240.0) -> dict[str, str]:
        """Fields of a job that has ended for good."""
        final = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
        self.until(lambda: self.state(job)["JobState"] in final, seconds, lambda: self.state(job))
        return self.state(job)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
