"""What pages and the documentation of clusters say beside the rows: links, software, rows not to use."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """What the documentation of a cluster says that a row does not print."""

    nic: float = 0.0
    nvlink: float = 0.0
    extra_memory: float = 0.0
    overlap: bool = True
    """False: its launchers switch the overlap of traffic and computation off."""
    source: str = ""


SITES = {
    "bigscience": Site(6.25e9, 78e9, 10 * 2**30, True,
        "Jean Zay: 4 NVLinks per pair of GPUs, 4 Omni-Path links of 100 Gb/s a node of 8 (project README); "
        "DeepSpeed's flat ZeRO-1 buffers"),
    "fms-fsdp": Site(6.25e9, 0.0, 0.0, True,
        "A100 80GB and 400Gbps interconnect (PyTorch blog on training throughput with FSDP)"),
    "simumax": Site(0.0, 0.0, 0.0, False,
        "launchers keep overlap off (SimuMax docs/b200/b200_real_repro_guide.md)"),
}  # fmt: skip


def dropped(row: dict[str, str]) -> str:
    """Why a row is left out, or "": what its page says about it."""
    family, _, tail = row["id"].rpartition("-")
    index = int(tail) if tail.isdigit() else -1
    for reason, table in BY_HAND.items():
        if index in table.get(family, ()) or 0 in table.get(family, ()):
            return reason
    return ""


BY_HAND: dict[str, dict[str, tuple[int, ...]]] = {
    "fine-tuning run": {"nemo-docs": (13, 14, 15, 28, 29, 30, 43, 44, 45), "dgxc": tuple(range(281, 287)),
                        "megatron-bridge": (4,)},
    "debug run": {"megatron-bridge-skills": (0,)},
    "1.3 to 2 times slower than rows of the same description": {"megatron-bridge": (24, 30, 37)},
    "state-space hybrid": {"megatron-bridge": (3, 10, 15, 20)},
    "expert run with fields that its page contradicts": {"megatron-bridge": (35,)},
    "heads or layers not printed": {"bigscience-tr11": (*range(1, 34), 95)},
    "the layout does not multiply to the GPUs": {"bigscience-tr11": (45,)},
    "no time (out of memory or failed)": {"bigscience-tr11": (83, 90, 91, 126, 127, 141, 148),
                                          "megatron-lm": (13, 14)},
    "layout, batch or sequence length not printed": {"pythia": (0,), "llama1-paper": (0,), "llama2-paper": (0,),
        "fa2-e2e": (0,), "nemo-docs": tuple(range(46, 55))},
    "no micro-batch": {"megatron-lm": (*range(4, 13), *range(19, 27))},
    "encoder-decoder": {"nemo-launcher-a100": tuple(range(12, 24))},
    "fields not printed": {"nemo-launcher-a100": tuple(range(29, 37))},
    "no shapes": {"simumax-b200": (5, 6, 7, 8, 13, 14, 15, 16, 21, 22, 23, 24)},
    "time of one layer": {"korthikanti22": tuple(range(17, 24))},
}  # fmt: skip
