"""The processes of one launch of a tool: mpi4py when a launcher started it and it is installed, else files.

Under ``srun`` or ``mpirun`` every process runs the same command. Without MPI they meet through small files in a folder
that all of them see, named by the launch.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

LAUNCHES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PRTE_LAUNCHED")),
    ("PMI_RANK", "PMI_SIZE", ("PMI_JOBID",)),
    ("SLURM_PROCID", "SLURM_NTASKS", ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")),
)
"""Variables of rank and size, and those that name the launch."""
NAMED = "MEGAPRE_LAUNCH"
"""Variable by which a user names the launch where the launcher does not, as MPICH's."""
POLL = 0.05
T = TypeVar("T")


class TeamError(RuntimeError):
    """Another process of the launch failed."""


class Team:
    """A process alone."""

    rank, size = 0, 1
    start_method = "fork"
    """How its workers may start."""

    def broadcast(self, name: str, value: Any) -> Any:
        """Rank 0's ``value``, plain JSON, on every rank."""
        return value

    def gather(self, name: str, value: Any) -> list[Any]:
        """Every rank's ``value``, by rank, on rank 0; elsewhere an empty list."""
        return [value]

    def close(self) -> None:
        """The work is done on every rank."""

    def fail(self, reason: str) -> None:
        """Tell the others that this process cannot go on."""


class FileTeam(Team):
    """Processes that share a folder. A value is a file, complete when it has its name."""

    def __init__(self, folder: Path, rank: int, size: int) -> None:
        self.folder, self.rank, self.size = folder, rank, size
        folder.mkdir(parents=True, exist_ok=True)

    def broadcast(self, name: str, value: Any) -> Any:
        """Rank 0's ``value`` on every rank; TeamError when another process failed."""
        if self.rank == 0:
            self._put(f"{name}.all", value)
            return value
        return self._get(f"{name}.all")

    def gather(self, name: str, value: Any) -> list[Any]:
        """Every rank's ``value`` on rank 0; TeamError when another process failed."""
        self._put(f"{name}.{self.rank}", value)
        return [self._get(f"{name}.{rank}") for rank in range(self.size)] if self.rank == 0 else []

    def close(self) -> None:
        """Rank 0 waits for all and removes the folder."""
        if self.gather("closed", True):
            shutil.rmtree(self.folder, ignore_errors=True)

    def fail(self, reason: str) -> None:
        """Leave word for those who wait."""
        self._put("failed", f"rank {self.rank}: {reason}")

    def _put(self, name: str, value: Any) -> None:
        temporary = self.folder / f"{name}.tmp-{self.rank}"
        temporary.write_text(json.dumps(value))
        os.replace(temporary, self.folder / name)

    def _get(self, name: str) -> Any:
        path, failed = self.folder / name, self.folder / "failed"
        while True:
            try:
                return json.loads(path.read_text())
            except FileNotFoundError:
                if failed.exists():
                    raise TeamError(
                        f"stopped, because another process failed: {json.loads(failed.read_text())}"
                    ) from None
            time.sleep(POLL)


class MpiTeam(Team):
    """Ranks of ``MPI.COMM_WORLD``."""

    start_method = "forkserver"  # memory that a network card is reading may move when a rank is copied

    def __init__(self, communicator: Any) -> None:
        self._world = communicator
        self.rank, self.size = communicator.Get_rank(), communicator.Get_size()

    def broadcast(self, name: str, value: Any) -> Any:
        """Rank 0's ``value`` on every rank."""
        return self._world.bcast(value, root=0)

    def gather(self, name: str, value: Any) -> list[Any]:
        """Every rank's ``value`` on rank 0."""
        return self._world.gather(value, root=0) or []

    def fail(self, reason: str) -> None:
        """End all ranks: others may be waiting in a collective."""
        if self.size > 1:
            print(f"rank {self.rank}: {reason}", file=sys.stderr, flush=True)
            self._world.Abort(2)


def find_team(folder: str, log: Callable[[str], None]) -> Team:
    """The team of this launch; ``folder`` is where processes without MPI meet. ValueError on half a launch."""
    for rank_name, size_name, names in LAUNCHES:
        if rank_name in os.environ and size_name in os.environ:
            rank, size = int(os.environ[rank_name]), int(os.environ[size_name])
            if not 0 <= rank < size:
                raise ValueError(f"{rank_name} = {rank} is not below {size_name} = {size}.")
            if size == 1:
                return Team()
            if rank_name != "SLURM_PROCID" and (world := _mpi()) is not None and world.Get_size() == size:
                if rank == 0:
                    log(f"{size} ranks meet by MPI")
                return MpiTeam(world)
            launch = "-".join(os.environ[name] for name in (*names, NAMED) if name in os.environ)
            if not launch:
                raise ValueError(
                    f"{rank_name} = {rank} is of a launch that nothing names, so its ranks cannot meet by files: "
                    f"install mpi4py, or set {NAMED} to a name that no other launch has."
                )
            safe = "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in launch)
            if rank == 0:
                log(f"{size} ranks meet by files in {folder}-{safe}")
            return FileTeam(Path(f"{folder}-{safe}"), rank, size)
    return Team()


def _mpi() -> Any:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):
        return None
    return MPI.COMM_WORLD
