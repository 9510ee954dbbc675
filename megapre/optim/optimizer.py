"""The optimizer over the shards of the buckets: which rule updates which tensor, and what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from types import MappingProxyType

import torch
from torch import Tensor

from megapre.config.schema import OptimizerConfig
from megapre.kernels.registry import Kernels
from megapre.optim.adafactor import Adafactor, AdafactorVector
from megapre.optim.adamw import AdamW
from megapre.optim.lion import Lion
from megapre.optim.muon import Muon
from megapre.optim.shard import Now, Rule, Shard, Stretch
from megapre.parallel.buckets import Buffers
from megapre.parallel.layout import Bucket, Slot
from megapre.parallel.placement import Address, TensorSpec

RULES: MappingProxyType[str, type[Rule]] = MappingProxyType(
    {
        "adamw": AdamW,
        "lion": Lion,
        "muon": Muon,
        "adafactor": Adafactor,
        "adafactor-vector": AdafactorVector,
        "frozen": Rule,
    }
)


def _hidden_matrix(spec: TensorSpec) -> bool:
    """What Muon updates: matrices between features, neither embedding nor output layer nor router."""
    ends = {"embedding", "head", "router"}
    return len(spec.shape) == 2 and spec.decay and not ends.intersection(spec.name.split("."))


KINDS: MappingProxyType[str, Callable[[TensorSpec], str]] = MappingProxyType(
    {
        "adamw": lambda spec: "adamw",
        "lion": lambda spec: "lion",
        "muon": lambda spec: "muon" if _hidden_matrix(spec) else "adamw",
        "adafactor": lambda spec: "adafactor" if len(spec.shape) == 2 else "adafactor-vector",
    }
)
"""``optimizer.kind`` -> the rule of a tensor."""


class Optimizer:
    """Optimizer state of this rank's part of every bucket: all of it, or its shard under ZeRO.

    ``state["weight"]`` holds fp32 master weights (fp64 under fp64); where the model's shards have that format and live
    in the same place, it is these. State lives in, and is updated at, ``buffers.home``: the device or host memory.

    """

    def __init__(self, config: OptimizerConfig, buffers: Buffers, kernels: Kernels) -> None:
        self.config, self.buffers, self.home = config, buffers, buffers.home
        layout = buffers.layout
        rules = {slot.spec.name: self.rule(slot.spec) for slot in layout.slots}
        mine: dict[str, dict[int, list[Slot]]] = {}
        for name in rules.values():
            mine[name] = {
                index: [slot for slot in bucket.slots if rules[slot.spec.name] == name]
                for index, bucket in enumerate(layout.buckets)
            }
        self.rules: dict[str, Rule] = {
            name: RULES[name](config, buffers, kernels, slots) for name, slots in mine.items()
        }
        kinds = dict.fromkeys(kind for rule in self.rules.values() for kind in rule.states)
        self.state: dict[str, list[Tensor]] = {"weight": [], **{kind: [] for kind in kinds}}
        self.shards = [self._shard(index, bucket, rules) for index, bucket in enumerate(layout.buckets)]
        self.steps = torch.zeros((), dtype=torch.float32, device=self.home.device)

    def rule(self, spec: TensorSpec) -> str:
        """The name of the rule that updates a tensor."""
        return "frozen" if frozen(self.config, spec) else KINDS[self.config.kind](spec)

    def _shard(self, index: int, bucket: Bucket, rules: dict[str, str]) -> Shard:
        buffers, model = self.buffers, self.buffers.weights.shards[index]
        master = model
        if model.dtype != buffers.wide or buffers.weights.home is not self.home:
            master = self.home.zeros(model.numel(), buffers.wide)
            master.copy_(model)
        self.state["weight"].append(master)
        start, end = buffers.shard(bucket)
        stretches = list(_stretches(bucket, start, end, rules))
        starts: dict[str, dict[int, int]] = {kind: {} for kind in self.state}
        for kind in self.state:
            if kind == "weight":
                continue
            count = 0
            for number, stretch in enumerate(stretches):
                if kind in self.rules[stretch.rule].states:
                    starts[kind][number] = count
                    count += stretch.part.stop - stretch.part.start
            self.state[kind].append(self.home.zeros(count, buffers.wide))
        beside = model.device == master.device and model is not master
        state = {kind: held[index] for kind, held in self.state.items()}
        return Shard(index, bucket, (start, end), master, model if beside else None, stretches, state, starts)

    def step(self, lr: Tensor, divisor: Tensor, skip: Tensor) -> None:
        """Update the weights with gradient / ``divisor`` unless ``skip`` is 1; all are 0-d device tensors."""
        lr, divisor, skip = (self.home.scalar(value) for value in (lr, divisor, skip))
        self.steps += 1 - skip
        now = Now(lr, divisor, skip, self.steps)
        for gradients in self.home.visit(self.buffers.gradients.shards):
            for index, gradient in gradients.items():
                for rule in self.rules.values():
                    rule.update(self.shards[index], gradient, now)
                self._deliver(index)
        self._publish()

    def copy_to_model(self) -> None:
        """Give every rank's model the master weights."""
        for master, weights in zip(self.state["weight"], self.buffers.weights.shards):
            self.home.deliver(master, weights)
        self._publish()

    def _deliver(self, index: int) -> None:
        """Send updated weights to where the model is, unless the rules have written them there."""
        model, master = self.buffers.weights.shards[index], self.state["weight"][index]
        if model.device != master.device:
            self.home.deliver(master, model)

    def _publish(self) -> None:
        self.home.delivered()
        self.buffers.weights.publish()

    def pieces(self, *, share: bool) -> Iterator[tuple[Address, Tensor]]:
        """State as addressed flat tensors, named ``kind/tensor``.

        With ``share`` the ranks' pieces tile every logical tensor exactly once, for saving: replicas leave the
        writing to the primary, and data ranks split it as ZeRO would. Without, all that this rank updates.
        """
        self.buffers.weights.settle()
        for index, bucket in enumerate(self.buffers.layout.buckets):
            origin, end = self.buffers.shard(bucket)
            start = origin
            if share:
                start, end = self.buffers.share(bucket)
            for slot in bucket.slots:
                if share and not slot.primary:
                    continue
                yield from self._addressed(slot, start, end, index, origin)
        for rule in self.rules.values():
            yield from rule.pieces(share=share)

    def _addressed(self, slot: Slot, start: int, end: int, index: int, origin: int) -> Iterator[tuple[Address, Tensor]]:
        for kind in self.state:
            address = slot.address(start, end, prefix=f"{kind}/")
            if address is not None:
                first = slot.start + address.start - origin
                held = self.shards[index].held(kind, slice(first, first + address.end - address.start))
                if held is not None:
                    yield address, held


def frozen(config: OptimizerConfig, spec: TensorSpec) -> bool:
    """Whether ``optimizer.freeze`` holds a tensor still."""
    return any(fnmatchcase(spec.name, pattern) for pattern in config.freeze)


def _stretches(bucket: Bucket, start: int, end: int, rules: dict[str, str]) -> Iterator[Stretch]:
    """Neighbours in [start, end) of one rule that are all decayed or all not; padding joins what precedes it."""
    edges: list[tuple[int, str, bool]] = []
    for slot in bucket.slots:
        kind = (rules[slot.spec.name], slot.spec.decay)
        if not edges or edges[-1][1:] != kind:
            edges.append((slot.start, *kind))
    for (first, rule, decay), stop in zip(edges, [edge[0] for edge in edges[1:]] + [bucket.end]):
        a, b = max(first, start), min(stop, end)
        if a < b:
            yield Stretch(rule, decay, slice(a - start, b - start))
