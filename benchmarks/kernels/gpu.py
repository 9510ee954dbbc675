"""The kernels on a GPU: Triton's and CUDA's versions against torch, torch.compile, Liger-Kernel, apex and flash-attn.

    python benchmarks/kernels/gpu.py [--ops rms_norm ...] [--rounds 30] [--write]

The cases, the checks against fp64 and the harness are those of ``run.py``; times are those between two events of the
stream with a cold L2 cache. An arm whose package is not installed is left out and named in the last line; one whose
results are wrong is not timed, and the exit code is then 1. Written for the first machine with a GPU, and not yet
executed on one. ``--write`` puts the table into docs/kernels.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

PEERS = ("triton", "cuda", "eager", "compile", "liger", "apex", "flash")


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 2 where there is no GPU."""
    from benchmarks.kernels import cases

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="*", choices=list(cases.CASES), help="names of cases (default: all)")
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds (default 30)")
    parser.add_argument("--write", action="store_true", help="write the table into docs/kernels.md")
    args = parser.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        print("benchmarks/kernels/gpu.py needs a CUDA device: run benchmarks/kernels/run.py on this machine instead")
        return 2
    setting, absent = on_gpu()
    lines, wrong = heading(torch.cuda.get_device_name()), []
    for name in args.ops or list(cases.CASES):
        line, faults = one(name, setting, args.rounds)
        print(line, flush=True)
        lines.append(line)
        wrong += faults
    lines += ["", *(f"Not timed: {fault}." for fault in wrong), f"Not there: {'; '.join(absent) or 'nothing'}."]
    print("\n" + "\n".join(lines))
    if args.write and not wrong:
        from benchmarks.kernels import docs

        docs.write("benchmarks/kernels/gpu.py", "\n".join(lines))
    return int(bool(wrong))


def on_gpu() -> tuple:
    """The setting of a GPU: versions by name where they can run, other libraries where installed; what is absent."""
    import torch

    from benchmarks.kernels.setting import BF16, Setting
    from megapre.config.schema import KernelsConfig
    from megapre.kernels import registry

    device, kernels, absent = torch.device("cuda"), {}, []
    whole = ("norm", "activation", "rope", "cross_entropy", "dropout", "optimizer", "attention", "moe")
    for arm, keys in (
        ("triton", whole), ("cuda", whole), ("apex", ("norm", "optimizer")), ("flash", ("attention",))
    ):  # fmt: skip
        named = {key for v in registry.TABLE for key in keys if v.name == arm and v.key == key}
        try:
            kernels[arm] = registry.choose(KernelsConfig(**{key: arm for key in named}), device, BF16)
        except ValueError as error:
            absent.append(str(error).split(": set")[0])
    return Setting(device, kernels, liger(absent)), absent


def liger(absent: list[str]) -> dict[str, dict[str, Callable]]:
    """Case -> Liger's function of the case's inputs."""
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
        from liger_kernel.ops.geglu import LigerGELUMulFunction
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError:
        absent.append("liger-kernel is not installed")
        return {}
    # Not its cross-entropy: that overwrites a leaf of autograd, which no arm after it could use.
    functions: dict[str, Callable] = {
        "rms_norm": lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-5),
        "layer_norm": lambda x, w, b: LigerLayerNormFunction.apply(x, w, b, 1e-5),
        "swiglu": lambda x: LigerSiLUMulFunction.apply(*(half.contiguous() for half in x.chunk(2, -1))),
        "geglu": lambda x: LigerGELUMulFunction.apply(*(half.contiguous() for half in x.chunk(2, -1))),
        "linear_cross_entropy": lambda x, w, targets: LigerFusedLinearCrossEntropyFunction.apply(x, w, targets)[0],
    }
    return {name: {"liger": function} for name, function in functions.items()}


def one(name: str, setting, rounds: int, clock: str = "events") -> tuple[str, list[str]]:
    """The row of one case, and the arms whose results are wrong."""
    from benchmarks.kernels import cases, timing

    case = cases.CASES[name](setting)
    # An arm of a library that lacks this op would time what auto picks.
    for arm in [arm for arm in case.arms if not has(setting, arm, name)]:
        del case.arms[arm]
    errors = case.errors()
    wrong = [arm for arm in case.arms if not errors[arm] <= case.tolerance and arm not in ("eager", "compile")]
    for arm in wrong:
        del case.arms[arm]
    times = timing.interleaved(case, rounds, timing.CLOCKS[clock])
    best = min((arm for arm in setting.kernels if arm in times), key=lambda arm: timing.median(times[arm]), default="")
    cells = [name, case.shape, best or "-"]
    cells += [f"{1e6 * timing.median(times[arm]):.0f}" if arm in times else "-" for arm in PEERS]
    cells += [timing.ratio(times, arm, best) for arm in ("compile", "liger", "apex", "flash")]
    faults = [f"{name} of {arm}: error {errors[arm]:.1e} over {case.tolerance:.1e}" for arm in wrong]
    return "| " + " | ".join(cells) + " |", faults


def has(setting, arm: str, name: str) -> bool:
    """Whether an arm's versions are for this case: torch's and other libraries' are; ours by the ops they chose."""
    if arm not in setting.kernels:
        return True
    chosen = setting.kernels[arm].chosen
    ops = {
        "rope_half": "rope_qk", "rope_interleaved": "rope_qk", "cross_entropy": "ce_statistics", "adamw": "adamw_",
        "linear_cross_entropy_narrow": "linear_cross_entropy",
    }  # fmt: skip
    families = {"attention": "attention", "experts": "grouped_mm", "permute": "permute"}
    op = families.get(name.split("_")[0]) or ops.get(name, name)
    return chosen[op] == arm


def heading(device: str) -> list[str]:
    """The table's first lines."""
    import torch

    ratios = ("compile", "Liger", "apex", "flash-attn")
    columns = ["op", "shape", "best of ours", *(f"{arm}, us" for arm in PEERS), *(f"x {peer}" for peer in ratios)]
    return [
        f"{device}, torch {torch.__version__}. Ratios of medians to the best of ours; quartiles in brackets.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
    ]


if __name__ == "__main__":
    sys.exit(main())
