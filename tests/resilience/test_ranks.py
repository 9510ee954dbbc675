"""Finding this process's rank in what torchrun, Slurm and Open MPI say."""

from typing import Any

import pytest

from megapre.resilience.ranks import NodePlan, Ranks, discover, launched_world

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1",
    "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip
SLURM = {
    "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NNODES": "2", "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "1234567", "SLURM_JOB_NODELIST": "node[03-04]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}  # fmt: skip
SUPERVISOR = SLURM | {
    "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}  # fmt: skip
MPI = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "prterun-host-77@1",
}  # fmt: skip


def first(nodelist: str) -> str:
    assert nodelist == "node[03-04]"
    return "node03"


def test_alone() -> None:
    assert discover({}, 4) is None
    assert discover({"RANK": "0"}, 4) is None


def test_torchrun() -> None:
    assert discover(TORCHRUN, 8) == Ranks(5, 8, 1, 4, "10.0.0.1", 29500, 1)


def test_torchrun_wins_over_slurm() -> None:
    assert discover(SLURM | TORCHRUN, 8) == Ranks(5, 8, 1, 4, "10.0.0.1", 29500, 1)


def test_slurm_one_task_per_rank() -> None:
    assert discover(SLURM, 8, first) == Ranks(5, 8, 1, 4, "node03", 24567, 1)
    uneven = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3,5", "SLURM_LOCALID": "4"}
    found = discover(uneven, 8, first)
    assert isinstance(found, Ranks) and found.local_world == 5


def test_slurm_one_supervisor_per_node() -> None:
    assert discover(SUPERVISOR, 16, first) == NodePlan(16, 2, 1, 8, "node03", 24567)


def test_slurm_one_node_needs_no_scontrol() -> None:
    one = SUPERVISOR | {"SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_PROCID": "0", "SLURM_NODEID": "0"}
    assert discover(one, 4) == NodePlan(4, 1, 0, 4, "127.0.0.1", 24567)


def test_slurm_master_address_and_port_come_first() -> None:
    assert discover(SUPERVISOR | {"MASTER_ADDR": "h", "MASTER_PORT": "7"}, 16) == NodePlan(16, 2, 1, 8, "h", 7)


@pytest.mark.parametrize("grid", [4, 12, 15])
def test_slurm_other_task_counts_are_refused(grid: int) -> None:
    env = SLURM if grid != 15 else SUPERVISOR
    with pytest.raises(ValueError, match=rf"grid has {grid} ranks but Slurm started \d tasks on 2 nodes"):
        discover(env, grid, first)


def test_batch_scripts_and_interactive_shells_count_as_alone() -> None:
    batch = {k: v for k, v in SLURM.items() if k != "SLURM_STEP_ID"} | {"SLURM_NNODES": "1", "SLURM_PROCID": "0"}
    assert discover(batch, 4) is None
    assert discover(SLURM | {"SLURM_STEP_ID": "4294967290", "SLURM_NNODES": "1"}, 4) is None
    shell = {k: v for k, v in SLURM.items() if k not in ("SLURM_PROCID", "SLURM_STEP_ID", "SLURM_LOCALID")}
    assert discover(shell, 4) is None


def test_a_batch_script_on_many_nodes_must_use_srun() -> None:
    batch = {k: v for k, v in SLURM.items() if k != "SLURM_STEP_ID"}
    with pytest.raises(ValueError, match=r"2 nodes .* srun"):
        discover(batch, 4)


def test_unknown_first_host_asks_for_master_addr() -> None:
    with pytest.raises(ValueError, match="set MASTER_ADDR"):
        discover(SLURM | {"PATH": ""}, 8)


def test_open_mpi_on_one_host_needs_no_address() -> None:
    found = discover(MPI, 4)
    assert isinstance(found, Ranks) and found.rank == 3 and found.local_world == 4 and found.address == "127.0.0.1"
    other = discover(MPI | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, 4)
    assert isinstance(other, Ranks) and other.port == found.port and 20000 <= other.port < 30000


def test_open_mpi_on_many_hosts_needs_an_address() -> None:
    spread = MPI | {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    with pytest.raises(ValueError, match="MASTER_ADDR is not set"):
        discover(spread, 4)
    assert discover(spread | {"MASTER_ADDR": "h", "MASTER_PORT": "9"}, 4) == Ranks(3, 4, 1, 2, "h", 9, 1)


@pytest.mark.parametrize("env", [TORCHRUN, SLURM, MPI | {"MASTER_ADDR": "h", "MASTER_PORT": "9"}])
def test_missing_or_odd_variables_give_one_sentence_that_names_one(env: dict[str, str]) -> None:
    """F-S07: every variable removed, emptied and spoilt in turn; never anything but a ValueError that names it."""
    refusals = 0
    for name in env:
        for value in (None, "", "x", "-1", "99999", "1.5"):
            broken: dict[str, Any] = {k: v for k, v in env.items() if k != name}
            if value is not None:
                broken[name] = value
            try:
                discover(broken, 8 if env is not MPI else 4, first_host=lambda nodelist: "h")
            except ValueError as error:
                refusals += 1
                assert "\n" not in str(error)
    assert refusals > len(env)


def test_launched_world() -> None:
    assert launched_world({}) is None
    assert launched_world(TORCHRUN) == 8
    assert launched_world(MPI) == 4
    assert launched_world(SLURM) == 8
    with pytest.raises(ValueError, match=r"set parallel\.data"):
        launched_world(SUPERVISOR)
