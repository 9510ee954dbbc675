"""Published training runs as jobs of the planner.

``python benchmarks/planner/rows.py TABLE.csv`` reads a table with one row per published run (its columns are in
``RAW``) and writes ``runs.csv``, every field resolved, and ``dropped.csv``, the rows left out with their reasons.
What a table does not print is inferred from what it does (device, year, framework, memory) and named in ``assumed``.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from shapes import known
from sources import SITES, Site, dropped

from megapre.planner import hardware
from megapre.planner.job import Job, Layout, Shape, Stack
from megapre.planner.memory import fullest

HERE = Path(__file__).parent
RUNS, DROPPED = HERE / "runs.csv", HERE / "dropped.csv"
RAW = (
    "id", "source", "model_name", "layers", "hidden", "heads", "kv_heads", "ffn_hidden", "ffn_type", "vocab",
    "seq_len", "arch", "experts", "topk", "gpu", "inter_node_network", "num_gpus", "tp", "pp", "vpp_interleave", "dp",
    "cp", "ep", "zero_stage", "sequence_parallel", "recompute", "micro_batch", "global_batch", "precision",
    "attention_impl", "step_time_s", "tokens_per_sec_per_gpu", "memory_gb_per_gpu",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A measured run."""

    id: str
    family: str
    source: str
    model: str
    job: Job
    seconds: float
    """Of a step; 0 when it was not measured."""
    memory: float
    """GiB of the fullest device; 0 when it was not measured."""


def number(text: Any, default: float | None = None) -> float | None:
    """``text`` as a number, or the default."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return default


FSDP, JAX = ("fsdp", "llm-foundry", "torchtitan", "composer"), ("pax", "maxtext", "jax")


class Refused(Exception):
    """Why a row cannot be used."""


class Reader:
    """One raw row -> a job."""

    def __init__(self, row: dict[str, str]) -> None:
        self.row, self.assumed = row, []
        self.family = row.get("source_family") or row["id"].rsplit("-", 1)[0]
        self.name = row["model_name"].lower()
        self.text = " ".join((self.family, row["source"], row["model_name"])).lower()
        self.year = int(number(row.get("year"), 2024) or 2024)
        self.device = self._device()

    def value(self, column: str) -> float | None:
        """A numeric field."""
        return number(self.row.get(column))

    def assume(self, name: str) -> None:
        self.assumed.append(name)

    def _device(self) -> hardware.Device:
        gpu = self.row["gpu"].upper()
        for words, key in (
            (("A800",), "a800-80"), (("A100-40",), "a100-40"), (("A100",), "a100-80"), (("H200",), "h200"),
            (("H100", "VARIANT"), "h100-96-500w"), (("H100", "500W"), "h100-96-500w"), (("H100",), "h100"),
            (("H800",), "h100"), (("B200",), "b200"),
        ):  # fmt: skip
            if all(word in gpu for word in words):
                return hardware.load(key)
        raise Refused(f"device {self.row['gpu'] or 'not printed'} is out of scope")

    # ------------------------------------------------------------------------------------------------ model
    def shape(self) -> Shape:
        row = self.row
        if row["arch"] == "t5" or "hybrid" in self.name:
            raise Refused("architecture outside the model (encoder-decoder or state space)")
        sizes, more = known(row["model_name"]) or (None, {})
        more = dict(more)
        hidden = self._pick("hidden", sizes, 1)
        if not hidden:
            raise Refused("no model shape")
        vocab = 250880 if row["vocab"].startswith("250k") else int(self._pick("vocab", sizes, 5) or 51200)
        heads = int(self._pick("heads", sizes, 2) or self._assume_heads(hidden))
        layers = self._pick("layers", sizes, 0)
        if not layers and self.value("params_b"):
            layers = round(((self.value("params_b") or 0) * 1e9 - vocab * hidden) / (12 * hidden**2))
            self.assume("layers")
        if not layers:
            raise Refused("number of layers not printed")
        length = self.value("seq_len") or self._assume_length()
        arch = row["arch"]
        if arch in ("llama", "moe") or "swiglu" in row["ffn_type"]:
            more.setdefault("gated", True)
            more.setdefault("tied", arch not in ("llama", "moe"))
        if arch == "bert":
            more["causal"] = False
        ffn = int(self._pick("ffn_hidden", sizes, 4) or 4 * hidden)
        if self.value("experts") and not more.get("experts"):
            more.update(experts=int(self.value("experts") or 0), experts_per_token=int(self.value("topk") or 2))
            more["expert_ffn"] = ffn
        more.setdefault("layer_norm", not more.get("gated"))
        kv = int(self._pick("kv_heads", sizes, 3) or heads)
        more.setdefault("head_dim", int(hidden) // heads)
        return Shape(int(layers), int(hidden), heads, kv, ffn=ffn, vocab=vocab, sequence=int(length), **more)

    def _pick(self, column: str, sizes: tuple[int, ...] | None, index: int) -> float | None:
        found = self.value(column)
        return found if found is not None else sizes[index] if sizes else None

    def _assume_heads(self, hidden: float) -> int:
        self.assume("heads")
        return {14400: 96, 13824: 64, 12288: 96}.get(int(hidden), max(1, int(hidden) // 128))

    def _assume_length(self) -> int:
        if self.family.startswith("simumax"):  # the page's title says 4096
            return 4096
        if "megatron-lm" in self.family and "gpt-2" in self.name:
            return 1024
        self.assume("seq_len")
        if self.device.generation == "ampere":
            raise Refused("sequence length not printed")
        return 8192

    # ------------------------------------------------------------------------------------------------ software
    def stack(self) -> Stack:
        row, text = self.row, self.text
        attention = row["attention_impl"].lower()
        precision = row["precision"]
        dtype = "fp8" if re.search("fp8|float8", precision.lower()) else "fp16" if "fp16" in precision else "bf16"
        new = self.device.generation != "ampere"
        fsdp = any(word in text for word in FSDP)
        jax = any(word in text for word in JAX)
        modern = self._modern()
        kind = self._attention(attention, new, jax)
        engine = "megatron" if kind != "unfused" or modern else "classic"
        fusion = "fused"
        if jax:
            fusion = "fused" if re.search(r"\bte\b", self.name) else "compiled"
        elif fsdp and "compile" not in f"{text} {attention}":
            fusion = "eager"
        deepspeed = "bigscience" in text
        held = (6.0 if dtype == "bf16" else 2.0) if deepspeed else 2.0 if fsdp or jax else 4.0
        if self.family == "korthikanti22" or (new and re.search("nemo|dgxc|bridge", text)):
            held = 2.0  # NeMo's recipes: grad_reduce_in_fp32 = False
        # Megatron's stacks and DeepSpeed reduce the fp32 sums of bf16 gradients, FSDP the gradients themselves.
        wire = 4 if dtype != "fp16" and held >= 4.0 else 2
        site = self.site()
        apart = deepspeed or self.year <= 2021
        return Stack(
            dtype, kind, fusion, overlap=modern and site.overlap, tensor_overlap=new, engine=engine, reduced_bytes=wire,
            gradient_bytes=held, separate_sum=apart, extra_memory=site.extra_memory,
        )  # fmt: skip

    def _modern(self) -> bool:
        """Software that overlaps its traffic and shards its optimizer unless told otherwise."""
        return self.device.generation != "ampere" or any(word in self.text for word in (*FSDP, *JAX, "nemo"))

    def _attention(self, printed: str, new: bool, jax: bool) -> str:
        if any(words in printed for words in ("no flash", "fused softmax", "unfused")):
            return "unfused"
        if "flash1" in printed or "flash v1" in printed or "attn_impl: flash" in printed:
            return "flash1"  # llm-foundry's tables were made with FlashAttention 1
        if any(words in printed for words in ("flash3", "flash-3", "flashattention-3", "fa3", "cudnn")):
            return "flash3"
        if printed:
            return "flash2"
        self.assume("attention")
        if jax and not new:  # XLA had no fused attention before cuDNN's on Hopper
            return "unfused"
        if new:
            return "flash3"
        forks = ("vtrain", "nemo-launcher", "megatron-lm", "zero-bubble")  # Megatron-LM's default until 2024
        old = self.family.startswith(forks) or self.year <= 2022
        return "unfused" if old else "flash2"

    def site(self) -> Site:
        return next((site for words, site in SITES.items() if words in self.text), Site())

    def nic(self) -> float:
        """Bytes/s between nodes per device: printed, else the site's, else 0."""
        printed = self.row.get("inter_node_network", "")
        if match := re.search(r"(\d+) ?\* ?(\d+) ?gb", printed.lower()):
            return int(match[1]) * int(match[2]) / 64 * 1e9
        if match := re.search(r"([\d.]+) ?gbps ?(?:/ ?node|node-node|per node)", printed.lower()):
            return float(match[1]) / 64 * 1e9
        if match := re.search(r"([\d.]+) ?gbps ?(?:/ ?gpu|per gpu)", printed.lower()):
            return float(match[1]) / 8 * 1e9
        if "infiniband 100" in printed.lower():
            return 12.5e9
        return self.site().nic

    # ------------------------------------------------------------------------------------------------ layout
    def layout(self, shape: Shape, stack: Stack) -> Layout:
        row = self.row
        ranks = self.value("num_gpus")
        if not ranks:
            raise Refused("number of GPUs not printed")
        for column in ("tp", "pp"):
            if self.value(column) is None:
                self.assume(column)
        tp, pp, cp, ep = (int(self.value(column) or 1) for column in ("tp", "pp", "cp", "ep"))
        dp = int(self.value("dp") or max(1, ranks // (tp * pp * cp)))
        if tp * pp * cp * dp != ranks:
            if ranks % (tp * pp * cp):
                raise Refused("the layout does not multiply to the GPUs")
            dp = int(ranks // (tp * pp * cp))  # printed without the expert axis
        chunks = self._chunks(shape, pp)
        zero, shard = self._zero()
        schedule = "interleaved" if chunks > 1 else "1f1b"
        for words, name in (("zb-2p", "zb-h2"), ("zb-h2", "zb-h2"), ("zb-1p", "zb-h1"), ("zb-h1", "zb-h1"),
                            ("zb-v", "zb-v")):  # fmt: skip
            if words in row["source"].lower() + " " + self.name:
                schedule, chunks = name, 2 if name == "zb-v" else 1
        micro, batch = self.value("micro_batch"), self.value("global_batch")
        if micro is None:
            self.assume("micro_batch")
        if batch is None:
            self.assume("global_batch")
            batch = (micro or 1) * dp * (1 if pp == 1 else 4 * pp)
        sequence = row["sequence_parallel"] == "yes" or (row["sequence_parallel"] != "no" and self._modern() and tp > 1)
        recompute, share = self._recompute()
        return Layout(
            tp, pp, dp, cp, ep, 1 if ep > 1 else tp, chunks, schedule, (), sequence, zero, shard, "none", recompute,
            share, int(micro or 1), int(batch),
        )  # fmt: skip

    def _chunks(self, shape: Shape, pp: int) -> int:
        printed = self.row["vpp_interleave"]
        if "per chunk" in printed:
            return max(1, shape.layers // pp)
        chunks = 2 if printed.startswith(">") else int(number(printed, 1) or 1)
        if "not given" in printed:
            self.assume("chunks")
        if not printed and pp >= 8 and self.family == "dgxc":  # its READMEs say one layer a chunk
            self.assume("chunks")
            chunks = max(1, -(-shape.layers // pp))
        if chunks > 1 and shape.layers < pp * chunks:
            chunks = max(1, shape.layers // pp)
        return chunks if pp > 1 else 1

    def _zero(self) -> tuple[int, int]:
        printed = self.row["zero_stage"].lower()
        shard = 8 if "hsdp" in printed or "fsdp=8" in printed else 0
        if match := re.search(r"zero1=(\d+)", printed):
            shard = int(match[1])
        if "not resharded" in printed:
            return 2, shard
        if printed[:1] in ("0", "1", "2", "3"):
            return int(printed[0]), shard
        if "fsdp" in printed or "hsdp" in printed:
            return 3, shard
        return (1 if self._modern() else 0), shard

    def _recompute(self) -> tuple[str, float]:
        printed = self.row["recompute"]
        if printed.startswith("full"):
            return "full", 1.0
        if printed.startswith("sel") and "torchtitan" in self.text:  # it saves every second matrix product
            self.assume("recompute_share")
            return "full", 0.5
        if printed.startswith("sel"):
            return "selective", 1.0
        if printed.startswith("yes"):
            self.assume("recompute_share")
            return "full", 0.5
        return ("none", 1.0) if printed == "none" else ("", 1.0)

    # ------------------------------------------------------------------------------------------------ all of it
    def job(self) -> Job:
        shape = self.shape()
        stack = self.stack()
        layout = self.layout(shape, stack)
        job = Job(shape, layout, stack, self.device, self.nic(), self.site().nvlink)
        if not layout.recompute:
            self.assume("recompute")
            job = least_recompute(job)
        return replace(job, assumed=tuple(self.assumed))


TOLERANCE = 1.05
"""Memory is predicted no better than this."""


def least_recompute(job: Job) -> Job:
    """The job with what it must recompute to fit, as its authors will have chosen."""
    old = job.stack.engine == "classic"
    if old and job.stack.attention == "unfused" and job.layout.pipeline == job.layout.tensor == 1:
        return job.on(recompute="full")
    policies = ["none"]
    if job.stack.attention == "unfused":
        policies.append("selective")
    if job.shape.experts:
        policies.append("light")
    for recompute in policies:
        tried = job.on(recompute=recompute)
        if fullest(tried).total <= job.device.memory * TOLERANCE:
            return tried
    return job.on(recompute="full")


POLICIES = ("none", "selective", "light", "full")
"""From least to most that is recomputed."""


def one_policy(runs: list[Run]) -> list[Run]:
    """Where a page scales one layout over data-parallel ranks, its runs recompute what the tightest of them must.

    Only runs whose recomputation was inferred change.
    """
    most: dict[tuple[object, ...], str] = {}
    keys = []
    for run in runs:
        job = run.job
        layout = replace(job.layout, data=1, global_batch=1, recompute="", expert=1)
        keys.append((run.source.partition(":")[0], run.model, job.shape, job.stack, job.device.key, layout))
        if "recompute" in job.assumed:
            most[keys[-1]] = max(most.get(keys[-1], "none"), job.layout.recompute, key=POLICIES.index)
    return [
        replace(run, job=run.job.on(recompute=most[key])) if "recompute" in run.job.assumed else run
        for run, key in zip(runs, keys)
    ]


def measured(row: dict[str, str], job: Job) -> float:
    """Seconds of a step, from the printed step time or tokens per second; 0 when neither is printed."""
    seconds, tokens = number(row["step_time_s"]), number(row["tokens_per_sec_per_gpu"])
    if seconds:
        return seconds
    if tokens:
        return job.tokens / (tokens * job.layout.ranks)
    flops, convention = number(row.get("measured_tflops_per_gpu")), row.get("flops_convention", "")
    for word, share in (("FULL", 1.0), ("no causal halving", 1.0), ("CAUSAL", 0.5)):
        if flops and word in convention:
            return job.shape.model_flops(job.tokens, attention=share) / (flops * 1e12 * job.layout.ranks)
    if flops and ("SC21" in convention or "incl. full-recompute" in convention):
        s, h, layers, v = job.shape.sequence, job.shape.hidden, job.shape.layers, job.shape.vocab
        work = 96.0 * job.tokens * layers * h**2 * (1 + s / (6 * h) + v / (16 * layers * h))
        return work / (flops * 1e12 * job.layout.ranks)
    return 0.0


NEEDED = {"micro_batch", "global_batch", "layers", "seq_len", "tp", "pp"}
"""Fields without which a step time means nothing."""


def read_raw(path: Path) -> tuple[list[Run], list[tuple[str, str]]]:
    """(usable runs, (id, reason) of the rest) of a raw table. A run dropped for time alone keeps its memory."""
    runs, rest = [], []
    with path.open(newline="") as stream:
        for row in csv.DictReader(stream):
            reason = dropped(row)
            memory = number(row["memory_gb_per_gpu"], 0.0) or 0.0
            if reason and not memory:
                rest.append((row["id"], reason))
                continue
            try:
                reader = Reader(row)
                job = reader.job()
            except Refused as refusal:
                rest.append((row["id"], reason or str(refusal)))
                continue
            seconds = 0.0 if reason else measured(row, job)
            missing = NEEDED.intersection(job.assumed)
            if seconds and missing:
                rest.append((row["id"], f"time not used: {', '.join(sorted(missing))} not printed"))
                seconds = 0.0
            if seconds or memory:
                if reason:
                    rest.append((row["id"], f"time not used: {reason}"))
                runs.append(Run(row["id"], reader.family, row["source"], row["model_name"], job, seconds, memory))
            elif not missing:
                rest.append((row["id"], reason or "neither time nor memory"))
    return one_policy(runs), rest


PARTS = (("shape", Shape), ("layout", Layout), ("stack", Stack))


def flat(run: Run) -> dict[str, Any]:
    """A run as a row of ``runs.csv``."""
    values: dict[str, Any] = {"id": run.id, "family": run.family, "model": run.model, "device": run.job.device.key}
    for name, _ in PARTS:
        values |= {f"{name}.{key}": value for key, value in asdict(getattr(run.job, name)).items()}
    for key in ("layout.layers_per_stage", "stack.moment_bytes"):  # tuples, the default in every run: even, and Adam's
        values.pop(key)
    values |= {"nic": run.job.nic, "nvlink": run.job.nvlink, "assumed": " ".join(run.job.assumed)}
    return values | {"seconds": f"{run.seconds:.6g}", "memory_gib": run.memory, "source": run.source}


def read(path: Path = RUNS) -> list[Run]:
    """The runs of a table, raw or resolved."""
    with path.open(newline="") as stream:
        columns = next(csv.reader(stream))
    if "layout.tensor" not in columns:
        return read_raw(path)[0]
    with path.open(newline="") as stream:
        return list(_resolved(csv.DictReader(stream)))


def _resolved(rows: Iterator[dict[str, str]] | Any) -> Iterator[Run]:
    kinds = {"int": int, "float": float, "str": str, "bool": lambda text: text == "True"}
    for row in rows:
        parts = {}
        for name, kind in PARTS:
            known_fields = [f for f in fields(kind) if f"{name}.{f.name}" in row]
            parts[name] = kind(**{f.name: kinds[str(f.type)](row[f"{name}.{f.name}"]) for f in known_fields})
        job = Job(
            parts["shape"], parts["layout"], parts["stack"], hardware.load(row["device"]), float(row["nic"]),
            float(row["nvlink"]), tuple(row["assumed"].split()),
        )  # fmt: skip
        yield Run(row["id"], row["family"], row["source"], row["model"], job, float(row["seconds"]),
                  float(row["memory_gib"]))  # fmt: skip


def main() -> None:
    runs, rest = read_raw(Path(sys.argv[1]))
    rows = [flat(run) for run in runs]
    with RUNS.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with DROPPED.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", "reason"])
        writer.writerows(rest)
    print(f"{len(runs)} runs, {len(rest)} rows left out or used for memory alone")


if __name__ == "__main__":
    main()
