"""What a profile looks at: which calls of the loop and the step are phases, and every operation of every axis.

Nothing of this is there in a run without ``--profile``: calls are wrapped on the objects of this run alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from megapre.monitor.profile import Message, Profile
from megapre.parallel.comm import Around, Axis, Work
from megapre.parallel.grid import Grid
from megapre.training.trainer import Trainer

CALLS = (
    ("", "_ahead", "data"), ("", "_log", "metrics and guard"),
    ("", "evaluate", "validation"), ("", "save", "checkpoint"),
    ("step", "compute_gradients", "backward"), ("step", "_contexts", "contexts"),
    ("step", "apply_gradients", "norm and clip"), ("step.optimizer", "step", "optimizer"),
)  # fmt: skip
"""Object below the trainer, its method, the phase that it is."""
LAYERS = {"EmbeddingLayer": "embedding", "PairEmbedding": "embedding", "TwoStreamEmbedding": "embedding"}
"""Phases of layers by class; any other is a head, whose call makes the loss and its gradient, or a block."""


def observe(profile: Profile, trainer: Trainer) -> None:
    """Let ``profile`` see the phases of ``trainer``'s run."""
    for path, method, phase in CALLS:
        owner: Any = trainer
        for part in filter(None, path.split(".")):
            owner = getattr(owner, part)
        setattr(owner, method, _inside(profile, phase, getattr(owner, method)))
    for layer in trainer.step.model.layers:
        _observe_layer(profile, layer)
    begin = trainer.throughput.begin

    def turn(samples: int = 0) -> None:
        begin(samples)
        with trainer.throughput.pause():  # a trace takes seconds to write
            profile.turn()

    trainer.throughput.begin = turn  # type: ignore[method-assign]


def _inside(profile: Profile, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        with profile.span(phase):
            return call(*args, **kwargs)

    return timed


def _observe_layer(profile: Profile, layer: nn.Module) -> None:
    name = type(layer).__name__
    phase = LAYERS.get(name, "head and loss" if name.endswith("Head") else "blocks forward")
    layer.forward = _inside(profile, phase, layer.forward)  # type: ignore[method-assign]


def profiled(profile: Profile, grid: Grid) -> Grid:
    """``grid`` whose operations ``profile`` sees."""
    return grid.mapped(lambda axis: ProfiledAxis(axis, profile) if axis.size > 1 else axis)


class ProfiledWork:
    """Work whose wait is a phase."""

    def __init__(self, work: Work, profile: Profile, message: Message | None) -> None:
        self._work, self._profile, self._message = work, profile, message
        self._inner = getattr(work, "work", work)
        if message is not None and hasattr(self._inner, "get_future"):
            try:
                self._inner.get_future().add_done_callback(self._complete)
            except RuntimeError:  # messages between two ranks have no future
                pass

    def _complete(self, future: object) -> None:
        assert self._message is not None
        self._message.done = time.perf_counter()

    def wait(self) -> object:
        """As Work."""
        if self._message is None:
            return self._work.wait()
        before = time.perf_counter()
        with self._profile.span(f"wait: {self._message.name}"):
            result = self._work.wait()
        now = time.perf_counter()
        self._message.waited += now - before
        self._message.done = self._message.done or getattr(self._inner, "ended", None) or now
        return result


class ProfiledAxis(Around):
    """An axis whose operations a profile sees."""

    def __init__(self, axis: Axis, profile: Profile) -> None:
        super().__init__(axis)
        self.profile = profile

    def _seen(self, kind: str, nbytes: int, post: Callable[[], Work]) -> Work:
        message = self.profile.message(f"{self.name} {kind}", nbytes)
        return ProfiledWork(post(), self.profile, message)

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Work:
        """As Axis."""
        return self._seen("all_reduce", tensor.nbytes, lambda: self.inner.all_reduce(tensor, op))

    def all_gather(self, output: Tensor, shard: Tensor) -> Work:
        """As Axis."""
        return self._seen("all_gather", output.nbytes, lambda: self.inner.all_gather(output, shard))

    def reduce_scatter(self, shard: Tensor, tensor: Tensor) -> Work:
        """As Axis."""
        return self._seen("reduce_scatter", tensor.nbytes, lambda: self.inner.reduce_scatter(shard, tensor))

    def all_to_all(
        self, output: Tensor, tensor: Tensor, received: list[int] | None = None, sent: list[int] | None = None
    ) -> Work:
        """As Axis."""
        return self._seen("all_to_all", tensor.nbytes, lambda: self.inner.all_to_all(output, tensor, received, sent))

    def send(self, tensor: Tensor, to: int) -> Work:
        """As Axis."""
        return self._seen("send", tensor.nbytes, lambda: self.inner.send(tensor, to))

    def recv(self, tensor: Tensor, source: int) -> Work:
        """As Axis."""
        return self._seen("recv", tensor.nbytes, lambda: self.inner.recv(tensor, source))

    def exchange(self, tensor: Tensor, to: int, received: Tensor, source: int) -> Work:
        """As Axis."""
        return self._seen("exchange", tensor.nbytes, lambda: self.inner.exchange(tensor, to, received, source))
