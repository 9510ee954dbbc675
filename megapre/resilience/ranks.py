"""Which rank is this process? torchrun, Slurm and Open MPI each say it in their own variables.

Imports no torch: a launch that cannot work is refused before torch is loaded.
"""

from __future__ import annotations

import subprocess
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

LOOPBACK = "127.0.0.1"
SLURM_FIRST_SPECIAL_STEP = 4294967290
"""Slurm numbers the steps of interactive shells, batch scripts and prologs from here on."""


@dataclass(frozen=True)
class Ranks:
    """One process of a launch whose ranks all exist already."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    address: str
    """Host of rank 0, where the store listens."""
    port: int
    node: int = 0
    """Number of this host among the hosts of the launch."""


@dataclass(frozen=True)
class NodePlan:
    """One supervisor per host: this process starts ``local_world`` of the ``world`` ranks."""

    world: int
    nodes: int
    node: int
    local_world: int
    address: str
    port: int


ALONE = Ranks(rank=0, world=1, local_rank=0, local_world=1, address=LOOPBACK, port=0)
"""A run of one rank; port 0 lets the system choose one."""


def discover(
    env: Mapping[str, str], grid_world: int, first_host: Callable[[str], str] | None = None
) -> Ranks | NodePlan | None:
    """Read the launch from the environment ``env``; None when this process was started alone.

    ``grid_world`` is tensor x pipeline x data, or tensor x pipeline when ``parallel.data`` is 0; under Slurm
    it tells one task per rank from one supervisor per node. ``first_host`` names the first host of a
    Slurm node list (``scontrol show hostnames``). Raises `ValueError` in one sentence when the variables are
    incomplete or fit no way of launching.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        return _torchrun(env)
    if "OMPI_COMM_WORLD_RANK" in env:
        return _open_mpi(env)
    if _is_slurm_task(env):
        return _slurm(env, grid_world, first_host or _scontrol_first_host)
    if "SLURM_PROCID" in env and grid_world > 1 and _integer(env, "SLURM_NNODES", 1) > 1:
        raise ValueError(
            f"this batch script has {env['SLURM_NNODES']} nodes but megapre was started on the first alone: start it "
            f"with srun"
        )
    return None


def launched_world(env: Mapping[str, str]) -> int | None:
    """World size of the launch, for resolving ``parallel.data = 0``; None when started alone.

    Raises ValueError under Slurm with one task on each of several nodes: how many ranks each node is to
    hold is then for ``parallel.data`` to say.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        return _integer(env, "WORLD_SIZE")
    if "OMPI_COMM_WORLD_RANK" in env:
        return _integer(env, "OMPI_COMM_WORLD_SIZE")
    if not _is_slurm_task(env):
        return None
    tasks, nodes = _integer(env, "SLURM_NTASKS"), _integer(env, "SLURM_NNODES")
    if tasks == nodes > 1:
        raise ValueError(
            f"parallel.data = 0 cannot be resolved with one Slurm task on each of {nodes} nodes: set parallel.data"
        )
    return None if tasks == 1 else tasks


def _is_slurm_task(env: Mapping[str, str]) -> bool:
    """Whether ``srun`` started this process; a batch script and an interactive shell count as alone."""
    if "SLURM_PROCID" not in env or "SLURM_STEP_ID" not in env:
        return False
    return _integer(env, "SLURM_STEP_ID") < SLURM_FIRST_SPECIAL_STEP


def _torchrun(env: Mapping[str, str]) -> Ranks:
    rank, world = _integer(env, "RANK"), _integer(env, "WORLD_SIZE")
    return _checked(
        Ranks(
            rank=rank,
            world=world,
            local_rank=_integer(env, "LOCAL_RANK", rank if world == 1 else None),
            local_world=_integer(env, "LOCAL_WORLD_SIZE", 1 if world == 1 else None),
            address=_address(env, world),
            port=_port(env, world),
            node=_integer(env, "GROUP_RANK", 0),
        ),
        "RANK and WORLD_SIZE",
    )


def _open_mpi(env: Mapping[str, str]) -> Ranks:
    rank, world = _integer(env, "OMPI_COMM_WORLD_RANK"), _integer(env, "OMPI_COMM_WORLD_SIZE")
    local_rank = _integer(env, "OMPI_COMM_WORLD_LOCAL_RANK", 0)
    local_world = _integer(env, "OMPI_COMM_WORLD_LOCAL_SIZE", world)
    if local_world == world:
        address, port = env.get("MASTER_ADDR", LOOPBACK), _single_host_port(env)
    else:
        address, port = _address(env, world), _port(env, world)
    ranks = Ranks(rank, world, local_rank, local_world, address, port, node=rank // max(local_world, 1))
    return _checked(ranks, "OMPI_COMM_WORLD_RANK and OMPI_COMM_WORLD_SIZE")


def _single_host_port(env: Mapping[str, str]) -> int:
    """A port all ranks of one ``mpirun`` agree on without speaking, spread by what they inherit from it."""
    if "MASTER_PORT" in env:
        return _port(env, 2)
    name = env.get("PMIX_NAMESPACE") or env.get("OMPI_MCA_ess_base_jobid", "0")
    return 20000 + zlib.crc32(name.encode()) % 10000


def _slurm(env: Mapping[str, str], grid_world: int, first_host: Callable[[str], str]) -> Ranks | NodePlan:
    tasks, nodes = _integer(env, "SLURM_NTASKS"), _integer(env, "SLURM_NNODES")
    rank, node = _integer(env, "SLURM_PROCID"), _integer(env, "SLURM_NODEID", 0)
    # Jobs that share a host must not share a port; Slurm numbers jobs upwards.
    port = _port(env, 2) if "MASTER_PORT" in env else 20000 + _integer(env, "SLURM_JOB_ID", 0) % 10000
    if "MASTER_ADDR" in env:
        address = env["MASTER_ADDR"]
    else:
        address = LOOPBACK if nodes == 1 else first_host(_text(env, "SLURM_JOB_NODELIST"))
    if tasks == grid_world:
        local = Ranks(rank, tasks, _integer(env, "SLURM_LOCALID"), _slurm_local_world(env, tasks), address, port, node)
        return _checked(local, "SLURM_PROCID and SLURM_NTASKS")
    if tasks == nodes and grid_world % nodes == 0:
        return NodePlan(grid_world, nodes, node, grid_world // nodes, address, port)
    raise ValueError(
        f"the grid has {grid_world} ranks but Slurm started {tasks} tasks on {nodes} nodes: set --ntasks to "
        f"{grid_world} (one task per rank) or to the number of nodes (one supervisor per node, each with an equal "
        f"share of the ranks), or change parallel.data"
    )


def _slurm_local_world(env: Mapping[str, str], tasks: int) -> int:
    """Tasks on this host, from SLURM_STEP_TASKS_PER_NODE such as ``4(x2),3`` and SLURM_NODEID."""
    text = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or str(tasks)
    counts: list[int] = []
    for part in text.split(","):
        count, _, times = part.partition("(x")
        try:
            counts += [int(count)] * int(times.rstrip(")") or 1)
        except ValueError:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}, which is no list of task counts") from None
    node = _integer(env, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else counts[-1]


def _scontrol_first_host(nodelist: str) -> str:
    command = ["scontrol", "show", "hostnames", nodelist]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return result.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise ValueError(
            f"the first host of SLURM_JOB_NODELIST={nodelist} is unknown because scontrol failed "
            f"({type(error).__name__}): set MASTER_ADDR"
        ) from None


def _checked(ranks: Ranks, source: str) -> Ranks:
    if not (0 <= ranks.rank < ranks.world and 0 <= ranks.local_rank < ranks.local_world <= ranks.world):
        raise ValueError(
            f"{source} describe an impossible launch: rank {ranks.rank} of {ranks.world}, local rank "
            f"{ranks.local_rank} of {ranks.local_world}"
        )
    return ranks


def _text(env: Mapping[str, str], name: str) -> str:
    if not env.get(name):
        raise ValueError(f"{name} is not set although the other variables of its launcher are: set it")
    return env[name]


def _integer(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    if default is not None and not env.get(name):
        return default
    text = _text(env, name)
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"{name} must be a whole number, not {text!r}")
    return int(text)


def _address(env: Mapping[str, str], world: int) -> str:
    return env.get("MASTER_ADDR", LOOPBACK) if world == 1 else _text(env, "MASTER_ADDR")


def _port(env: Mapping[str, str], world: int) -> int:
    port = _integer(env, "MASTER_PORT", 0 if world == 1 else None)
    if port > 65535:
        raise ValueError(f"MASTER_PORT must be at most 65535, not {port}")
    return port
