"""GPUs and their links, as ``nvidia-smi -q -x``, ``nvidia-smi topo -m`` and the kernel's log tell of them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from megapre.resilience.doctor.rows import BAD, NONE, NOTE, OK, Row

HOT = 90
"""Degrees Celsius of an idle GPU above which its node is refused."""
FATAL_XIDS = {
    48: "double-bit ECC error", 62: "internal micro-controller halt", 64: "row remapping failed",
    74: "NVLink error", 79: "GPU has fallen off the bus", 95: "uncontained ECC error",
    110: "security fault", 119: "GSP timeout", 120: "GSP error", 140: "unrecovered ECC error",
}  # fmt: skip
"""NVIDIA's XID numbers that mean hardware; others (13, 31, 43, 45) are a program's own."""
LINKS = ("PIX", "PXB", "PHB", "NODE", "SYS")
"""How far a GPU is from a network card, nearest first: one switch, several, the host bridge, the NUMA node, beyond."""
THROTTLES = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown")


@dataclass(frozen=True)
class Gpu:
    """One GPU of ``nvidia-smi -q -x``; None where the driver gives no answer."""

    index: int
    bus: str
    """PCI address, such as 00000000:07:00.0."""
    name: str
    uuid: str
    link: tuple[int | None, int | None, int | None, int | None]
    """PCIe generation now and at most, lanes now and at most."""
    temperature: int | None
    clock: int | None
    """MHz of the multiprocessors now."""
    max_clock: int | None
    ecc_volatile: int | None
    """Uncorrectable errors since the driver was loaded."""
    ecc_aggregate: int | None
    remap_pending: bool
    remap_failed: bool
    throttled: tuple[str, ...]
    used: int | None
    """MiB of its memory in use."""


def parse_query(text: str) -> tuple[str, str, list[Gpu]]:
    """Driver version, CUDA version and GPUs of ``nvidia-smi -q -x``. ValueError when it is no such document."""
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"nvidia-smi -q -x gave no XML ({error})") from None
    if root.tag != "nvidia_smi_log":
        raise ValueError(f"nvidia-smi -q -x gave a document of <{root.tag}>")
    gpus = [_gpu(number, gpu) for number, gpu in enumerate(root.findall("gpu"))]
    return root.findtext("driver_version", "unknown"), root.findtext("cuda_version", "unknown"), gpus


def _gpu(index: int, gpu: ElementTree.Element) -> Gpu:
    def number(path: str) -> int | None:
        found = re.match(r"\s*(\d+)", gpu.findtext(path) or "")
        return int(found[1]) if found else None

    def errors(kind: str) -> int | None:
        counts = [
            int(entry.text or 0)
            for entry in gpu.findall(f"ecc_errors/{kind}/*")
            if "uncorrectable" in entry.tag and (entry.text or "").strip().isdigit()
        ]
        # Older drivers sum them up themselves, under double_bit.
        return sum(counts) if counts else number(f"ecc_errors/{kind}/double_bit/total")

    def yes(path: str) -> bool:
        return (gpu.findtext(path) or "").strip().lower() == "yes"

    active = [
        name
        for family in ("clocks_event_reasons", "clocks_throttle_reasons")
        for name in THROTTLES
        if (gpu.findtext(f"{family}/{family[:-1]}_{name}") or "").strip() == "Active"
    ]
    info = "pci/pci_gpu_link_info"
    return Gpu(
        index=index,
        bus=gpu.get("id", ""),
        name=(gpu.findtext("product_name") or "").strip(),
        uuid=(gpu.findtext("uuid") or "").strip(),
        link=(
            number(f"{info}/pcie_gen/current_link_gen"),
            number(f"{info}/pcie_gen/max_link_gen"),
            number(f"{info}/link_widths/current_link_width"),
            number(f"{info}/link_widths/max_link_width"),
        ),
        temperature=number("temperature/gpu_temp"),
        clock=number("clocks/sm_clock"),
        max_clock=number("max_clocks/sm_clock"),
        ecc_volatile=errors("volatile"),
        ecc_aggregate=errors("aggregate"),
        remap_pending=yes("remapped_rows/remapped_row_pending"),
        remap_failed=yes("remapped_rows/remapped_row_failure"),
        throttled=tuple(active),
        used=number("fb_memory_usage/used"),
    )


def judge(gpus: Sequence[Gpu]) -> list[Row]:
    """What each GPU's counters mean for a job: errors, links, clocks, temperature."""
    rows = []
    for gpu in gpus:
        name = f"GPU {gpu.index}"
        bad, notes = [], []
        if gpu.ecc_volatile:
            bad.append(f"{gpu.ecc_volatile} uncorrectable memory errors since the driver was loaded")
        if gpu.remap_failed:
            bad.append("its memory has no spare rows left")
        if gpu.remap_pending:
            bad.append("a memory row waits to be remapped: reset the GPU")
        if gpu.temperature is not None and gpu.temperature >= HOT:
            bad.append(f"{gpu.temperature} degrees")
        if gpu.throttled:
            bad.append(f"its clock is held down ({', '.join(gpu.throttled)})")
        lanes, most = gpu.link[2], gpu.link[3]
        if lanes is not None and most is not None and lanes < most:
            bad.append(f"PCIe with {lanes} of {most} lanes")
        if gpu.ecc_aggregate and not gpu.ecc_volatile:
            notes.append(f"{gpu.ecc_aggregate} uncorrectable memory errors in its life")
        if gpu.used is not None and gpu.used > 2048:
            notes.append(f"{gpu.used} MiB of its memory are in use")
        told = (
            f"{gpu.name} {gpu.uuid} at {gpu.bus}, {_of(gpu.clock, gpu.max_clock)} MHz, {_of(gpu.temperature)} degrees"
        )
        rows.append(Row(name, BAD if bad else NOTE if notes else OK, "; ".join([*bad, *notes, told])))
    return rows


def _of(value: int | None, most: int | None = None) -> str:
    shown = "unknown" if value is None else str(value)
    return shown if most is None else f"{shown} of {most}"


def parse_topology(text: str) -> tuple[dict[str, dict[str, str]], dict[str, tuple[str, str]], dict[str, str]]:
    """``nvidia-smi topo -m``: links by GPU and peer; CPUs and NUMA node by GPU; device behind each NIC's number.

    Rows and columns are named GPU0, NIC0 and so on; a link is X, NV18, PIX, PXB, PHB, NODE or SYS.
    """
    links: dict[str, dict[str, str]] = {}
    places: dict[str, tuple[str, str]] = {}
    header: list[str] = []
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)  # the header is underlined on some drivers
    for line in plain.splitlines():
        cells = [cell.strip() for cell in line.split("\t")]
        if not header:
            if "GPU0" in cells and not cells[0]:
                header = cells[1:]
        elif re.fullmatch(r"(GPU|NIC)\d+|mlx\w+", cells[0]):
            row = dict(zip(header, cells[1:]))
            links[cells[0]] = {k: v for k, v in row.items() if k and v and "Affinity" not in k and k != "GPU NUMA ID"}
            places[cells[0]] = (row.get("CPU Affinity", ""), row.get("NUMA Affinity", ""))
    return links, places, dict(re.findall(r"^\s*(NIC\d+): (\S+)", plain, re.MULTILINE))


def topology_rows(text: str) -> list[Row]:
    """Each GPU's nearest network card, cores and NUMA node."""
    links, places, devices = parse_topology(text)
    rows = []
    for gpu in (name for name in links if name.startswith("GPU")):
        cards = {peer: link for peer, link in links[gpu].items() if link in LINKS and not peer.startswith("GPU")}
        near = min(cards, key=lambda peer: LINKS.index(cards[peer]), default=None)
        peers = sorted({link for peer, link in links[gpu].items() if peer.startswith("GPU") and link != "X"})
        card = f"{devices.get(near, near)} by {cards[near]}" if near else "no network card"
        cores, node = places[gpu]
        text = f"{card}; other GPUs by {', '.join(peers) or 'nothing'}; cores {cores or '?'}, NUMA node {node or '?'}"
        far = near is not None and cards[near] == "SYS"
        rows.append(Row(f"{gpu} map", NOTE if far else OK, text))
    return rows


def parse_xids(text: str) -> list[tuple[str, int, str]]:
    """(PCI address, XID, message) of every line of the kernel's log such as ``NVRM: Xid (PCI:0000:07:00): 79, ...``."""
    pattern = r"NVRM: Xid \((?:PCI:)?([0-9a-fA-F:.]+)\): (\d+),?\s*(.*)"
    return [(bus, int(number), message.strip()) for bus, number, message in re.findall(pattern, text)]


def xid_rows(text: str) -> list[Row]:
    """One row for the driver's messages since the machine was started."""
    found = parse_xids(text)
    fatal = [(bus, number) for bus, number, _ in found if number in FATAL_XIDS]
    if fatal:
        bus, number = fatal[-1]
        return [Row("XID", BAD, f"XID {number} ({FATAL_XIDS[number]}) of {bus}, {len(fatal)} such since the start")]
    seen = sorted({number for _, number, _ in found})
    if seen:
        return [Row("XID", NOTE, f"{len(found)} messages (XID {', '.join(map(str, seen))}): none that means hardware")]
    return [Row("XID", OK, "no message in the kernel's log")]


Run = Callable[[Sequence[str]], str]


def output_of(command: Sequence[str]) -> str:
    """What a command prints. OSError when it is missing or fails, TimeoutExpired when it hangs, as with a dead GPU."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        told = (done.stderr or done.stdout).strip().splitlines()
        raise OSError(f"{command[0]} ended with {done.returncode}: {told[-1] if told else ''}")
    return done.stdout


def gpu_rows(wanted: int, run: Run = output_of) -> list[Row]:
    """Driver, GPUs, their map and the kernel's messages; ``wanted`` GPUs must be there (0: as many as there are)."""
    if run is output_of and shutil.which("nvidia-smi") is None:
        missing = Row("GPUs", BAD, f"nvidia-smi is not installed, and {wanted} GPUs are wanted")
        return [missing if wanted else Row("GPUs", NONE, "no nvidia-smi: this node has no NVIDIA GPUs")]
    try:
        driver, cuda, gpus = parse_query(run(["nvidia-smi", "-q", "-x"]))
    except subprocess.TimeoutExpired:
        return [Row("GPUs", BAD, "nvidia-smi has not answered for 60 s: a GPU or the driver hangs")]
    except (OSError, ValueError) as error:
        return [Row("GPUs", BAD, str(error))]
    rows = [Row("driver", OK, f"{driver}, CUDA up to {cuda}")]
    short = wanted and len(gpus) < wanted
    rows.append(Row("GPUs", BAD if short else OK, f"{len(gpus)} found" + (f", {wanted} wanted" if wanted else "")))
    if len({gpu.name for gpu in gpus}) > 1:
        rows.append(Row("GPU kinds", NOTE, f"not all alike: {', '.join(sorted({gpu.name for gpu in gpus}))}"))
    rows += judge(gpus)
    try:
        rows += topology_rows(run(["nvidia-smi", "topo", "-m"]))
    except (OSError, subprocess.SubprocessError) as error:
        rows.append(Row("GPU map", NOTE, str(error)))
    try:
        rows += xid_rows(run(["dmesg", "--kernel"]))
    except (OSError, subprocess.SubprocessError) as error:
        rows.append(Row("XID", NONE, f"the kernel's log cannot be read here ({error})"))
    return rows
