"""`megapre doctor`: what it reads out of recorded outputs, what it refuses, how it ends.

The recordings are written by hand from NVIDIA's documented formats; no GPU has been asked.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from megapre.resilience.doctor import host
from megapre.resilience.doctor.gpu import (
    FATAL_XIDS,
    gpu_rows,
    judge,
    parse_query,
    parse_topology,
    topology_rows,
    xid_rows,
)
from megapre.resilience.doctor.rows import BAD, NONE, NOTE, OK, Row, guarded
from megapre.resilience.doctor.run import show
from megapre.resilience.doctor.speed import rows_of

RECORDED = Path(__file__).with_name("recorded")
XML, TOPOLOGY, DMESG = (RECORDED.joinpath(n).read_text() for n in ("h100.xml", "topology.txt", "dmesg.txt"))


def answers(xml: str = XML, topology: str = TOPOLOGY, dmesg: str = "") -> object:
    def run(command: Sequence[str]) -> str:
        return dmesg if command[0] == "dmesg" else topology if "topo" in command else xml

    return run


def test_a_healthy_node_of_gpus() -> None:
    rows = gpu_rows(2, answers())  # type: ignore[arg-type]
    assert {row.name: row.status for row in rows} == {
        "driver": OK, "GPUs": OK, "GPU 0": OK, "GPU 1": OK, "GPU0 map": OK, "GPU1 map": NOTE, "XID": OK,
    }  # fmt: skip
    told = {row.name: row.text for row in rows}
    assert told["driver"] == "550.90.07, CUDA up to 12.4" and told["GPUs"] == "2 found, 2 wanted"
    assert "345 of 1980 MHz, 33 degrees" in told["GPU 0"] and "00000000:07:00.0" in told["GPU 0"]
    assert told["GPU0 map"] == "mlx5_0 by PIX; other GPUs by NV18; cores 0-47,96-143, NUMA node 0"


@pytest.mark.parametrize(
    "old,new,told",
    [
        (
            "<dram_uncorrectable>0<",
            "<dram_uncorrectable>2<",
            "2 uncorrectable memory errors since the driver was loaded",
        ),
        ("parity>0<", "parity>1<", "1 uncorrectable memory errors"),
        ("<remapped_row_failure>No", "<remapped_row_failure>Yes", "its memory has no spare rows left"),
        ("<remapped_row_pending>No", "<remapped_row_pending>Yes", "waits to be remapped"),
        ("<gpu_temp>33 C", "<gpu_temp>95 C", "95 degrees"),
        ("hw_slowdown>Not Active", "hw_slowdown>Active", "its clock is held down (hw_slowdown)"),
        ("<current_link_width>16x", "<current_link_width>8x", "PCIe with 8 of 16 lanes"),
    ],
)
def test_each_fault_of_a_gpu_refuses_the_node(old: str, new: str, told: str) -> None:
    # The first place is that of the volatile counters of GPU 0.
    rows = judge(parse_query(XML.replace(old, new, 1))[2])
    assert rows[0].status == BAD and told in rows[0].text and rows[1].status == OK
    if "Active" in new:  # the name before driver 535
        older = XML.replace(old, new, 1).replace("clocks_event_reason", "clocks_throttle_reason")
        assert judge(parse_query(older)[2])[0].status == BAD


def test_errors_of_long_ago_and_busy_memory_are_notes() -> None:
    text = XML[: XML.index("<aggregate>")] + XML[XML.index("<aggregate>") :].replace(
        "<dram_uncorrectable>0<", "<dram_uncorrectable>4<", 1
    )
    row = judge(parse_query(text.replace("<used>17 MiB", "<used>70000 MiB"))[2])[0]
    assert row.status == NOTE and "4 uncorrectable memory errors in its life" in row.text and "70000 MiB" in row.text


def test_a_missing_gpu_a_dead_driver_and_garbage_refuse_the_node() -> None:
    assert next(r for r in gpu_rows(8, answers()) if r.status == BAD).text == "2 found, 8 wanted"  # type: ignore[arg-type]
    for text in (
        "",
        "NVIDIA-SMI has failed because it couldn't communicate with the driver",
        "<html></html>",
        XML[:900],
    ):
        rows = gpu_rows(0, answers(text))  # type: ignore[arg-type]
        assert [row.status for row in rows] == [BAD] and "nvidia-smi -q -x gave" in rows[0].text

    def dead(command: Sequence[str]) -> str:
        raise subprocess.TimeoutExpired(command, 60)

    assert "a GPU or the driver hangs" in gpu_rows(0, dead)[0].text

    def broken(command: Sequence[str]) -> str:
        raise OSError("nvidia-smi ended with 15: Unable to determine the device handle for GPU0000:0A:00.0")

    assert gpu_rows(0, broken)[0].status == BAD


def test_topology_with_and_without_cards() -> None:
    links, places, devices = parse_topology("\x1b[4m" + TOPOLOGY.replace("\nGPU0", "\x1b[0m\nGPU0", 1))
    assert links["GPU0"] == {"GPU0": "X", "GPU1": "NV18", "NIC0": "PIX", "NIC1": "SYS"}
    assert places["GPU1"] == ("48-95,144-191", "1") and devices == {"NIC0": "mlx5_0", "NIC1": "mlx5_1"}
    alone = "\tGPU0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\nGPU0\t X \t0-15\t0\t\tN/A\n"
    assert topology_rows(alone)[0].text == "no network card; other GPUs by nothing; cores 0-15, NUMA node 0"


def test_xids_of_hardware_refuse_and_those_of_programs_do_not() -> None:
    assert xid_rows(DMESG)[0].status == BAD
    assert xid_rows(DMESG)[0].text == "XID 79 (GPU has fallen off the bus) of 0000:0a:00, 1 such since the start"
    ours = "\n".join(line for line in DMESG.splitlines() if "): 79" not in line)
    assert xid_rows(ours)[0].status == NOTE and "XID 31" in xid_rows(ours)[0].text
    for number in FATAL_XIDS:
        assert xid_rows(f"NVRM: Xid (PCI:0000:07:00): {number}, pid=1")[0].status == BAD


def card(root: Path, name: str, state: str, phys: str, downs: int) -> None:
    port = root / "class/infiniband" / name / "ports/1"
    (port / "counters").mkdir(parents=True)
    (port.parents[1] / "device").mkdir()
    for path, text in (
        (port / "state", state), (port / "phys_state", phys), (port / "rate", "400 Gb/sec (4X NDR)"),
        (port / "link_layer", "InfiniBand"), (port / "counters/link_downed", str(downs)),
        (port.parents[1] / "device/numa_node", "1"),
    ):  # fmt: skip
        path.write_text(text + "\n")


def test_network_cards_of_a_made_up_sysfs(tmp_path: Path) -> None:
    card(tmp_path, "mlx5_0", "4: ACTIVE", "5: LinkUp", 0)
    card(tmp_path, "mlx5_1", "4: ACTIVE", "5: LinkUp", 7)
    card(tmp_path, "mlx5_2", "1: DOWN", "3: Disabled", 0)
    card(tmp_path, "mlx5_3", "2: INIT", "5: LinkUp", 0)
    rows = host.card_rows(tmp_path)
    assert [row.status for row in rows] == [OK, NOTE, NOTE, BAD]
    assert rows[0].text == "ACTIVE, 400 Gb/sec (4X NDR), InfiniBand, NUMA node 1" and "lost 7 times" in rows[1].text
    assert host.card_rows(tmp_path / "none")[0].status == NONE


def test_memory_errors_of_the_host(tmp_path: Path) -> None:
    controller = tmp_path / "devices/system/edac/mc/mc0"
    controller.mkdir(parents=True)
    for lost, mended, status in ((0, 0, OK), (0, 5, NOTE), (1, 5, BAD)):
        (controller / "ue_count").write_text(str(lost))
        (controller / "ce_count").write_text(str(mended))
        assert host.ecc_rows(tmp_path)[0].status == status


def test_the_file_system_is_written_read_and_left_as_it_was(tmp_path: Path) -> None:
    rows = host.disk_rows(tmp_path, 8)
    assert [row.name for row in rows] == ["write rate", "read rate"] and {row.status for row in rows} == {OK}
    assert list(tmp_path.iterdir()) == []
    assert [row.status for row in host.disk_rows(tmp_path, 4, (1e9, 0))] == [BAD, OK]
    assert host.disk_rows(tmp_path / "missing", 4)[0].status == BAD
    assert host.space_rows(tmp_path, 2**60)[0].status == BAD and host.space_rows(tmp_path, 0)[0].status == OK


def test_a_look_that_fails_is_a_row() -> None:
    rows = guarded("it", lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    assert rows[0].status == NOTE and "ZeroDivisionError" in rows[0].text


def test_slow_ranks_are_named_and_refused_on_gpus_alone() -> None:
    reports = [{"host": f"n{r // 2}", "tflops": 400.0, "axes": {"data": 90.0, "tied": 0.0}} for r in range(6)]
    assert [row.name for row in rows_of(reports, "cuda")] == ["matrix product", "all-reduce over data"]
    assert {row.status for row in rows_of(reports, "cuda")} == {OK}
    reports[3]["tflops"] = 250.0
    reports[5]["axes"] = {"data": 20.0, "tied": 0.0}
    product, reduce = rows_of(reports, "cuda")
    assert product.status == reduce.status == BAD
    assert "slow on n1 (ranks 3)" in product.text and "slow on n2 (ranks 5)" in reduce.text
    assert (product.nodes, reduce.nodes) == (("n1",), ("n2",))
    assert {row.status for row in rows_of(reports, "cpu")} == {NOTE}


def test_the_verdict_names_each_node_once(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Row("one", BAD, "slow", ("n1", "n2")), Row("two", BAD, "slow", ("n2",)), Row("three", OK, "fine")]
    assert show(rows, ["n0", "n1", "n2", "n3"]) == 1
    said = capsys.readouterr()
    assert said.out.splitlines()[3:] == ["fit: n0 n3", "refused: n1 n2"]
    assert said.err == "megapre: nodes n1, n2 are refused: one: slow (and 1 more)\n"
    assert show(rows[2:], ["n0", "n1"]) == 0 and capsys.readouterr().out.splitlines()[1:] == ["fit: n0 n1"]
    assert show([Row("one", BAD, "hot")], ["n5"]) == 1
    assert "megapre: node n5 is refused: one: hot\n" in capsys.readouterr().err


def doctor(*arguments: str, folder: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    command = f"{before} exec {sys.executable} -m megapre doctor {' '.join(arguments)}"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True, timeout=120)


def test_the_command_on_this_node(tmp_path: Path) -> None:
    fit = doctor("--mib", "4", folder=tmp_path)
    assert fit.returncode == 0 and fit.stderr == "", fit
    rows = [re.split(r"\s{2,}", line, maxsplit=2) for line in fit.stdout.splitlines()[1:-1]]
    assert fit.stdout.splitlines()[-1] == f"fit: {os.environ.get('SLURMD_NODENAME') or socket.gethostname()}"
    told = {name: (status, text) for status, name, text in rows}
    names = ("torch", "GPUs", "cores", "NICs", "ulimit -n", "/dev/shm", "memory", "free space", "write rate")
    assert all(told[name][1] for name in names)
    if told["GPUs"][0] == NONE:
        assert "no nvidia-smi" in told["GPUs"][1]
    unfit = doctor("--gpus", "640", "--mib", "4", folder=tmp_path, before="export SLURMD_NODENAME=n17;")
    assert unfit.returncode == 1 and "megapre: node n17 is refused: GPUs: " in unfit.stderr
    assert unfit.stderr.count("\n") == 1 and unfit.stdout.splitlines()[-1] == "refused: n17", unfit
    poor = doctor("--mib", "4", folder=tmp_path, before="ulimit -n 64;")
    assert poor.returncode == 1 and "ulimit -n: 64 open files, at most 64: raise it to 4096" in poor.stderr
    assert doctor("--mib", "0", folder=tmp_path).returncode == 2
    assert doctor("--only", "ranks", folder=tmp_path).returncode == 2


def test_with_a_job_its_axes_are_measured(tmp_path: Path) -> None:
    settings = "model.layers=2 model.hidden=32 model.heads=4 model.vocab_size=64 model.sequence=16"
    (tmp_path / "job.toml").write_text("[parallel]\ntensor = 2\n")
    node = doctor("job.toml", settings, f"train.run_dir={tmp_path}/run", "--mib 4 --only node", folder=tmp_path)
    assert node.returncode == 0 and "free space" in node.stdout and "matrix product" not in node.stdout
    done = doctor("job.toml", settings, f"train.run_dir={tmp_path}/run", "--mib 4 --only ranks", folder=tmp_path)
    assert done.returncode == 0 and "free space" not in done.stdout, done.stdout + done.stderr
    assert "right on every rank and axis" in done.stdout and done.stdout.splitlines()[-1].startswith("fit: ")
    assert "matrix product" in done.stdout and "all-reduce over tensor" in done.stdout, done.stdout
    assert "all-reduce over pipeline" not in done.stdout
