"""Where shards live: beside the model, or in host memory (ZeRO-Offload, arXiv 2101.06840).

Optimizer and ZeRO speak to a ``Home`` and never ask which one it is. With the model on a CPU, ``Host`` runs the same
code and its copies are copies within memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from megapre.parallel.comm import Axis, Together, Work


class Home:
    """Shards live on the model's device, and there they are used."""

    away = False
    """Whether they take no memory of the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def zeros(self, count: int, dtype: torch.dtype) -> Tensor:
        """A new flat shard."""
        return torch.zeros(count, dtype=dtype, device=self.device)

    def scalar(self, value: Tensor) -> Tensor:
        """A 0-d tensor of the model's device, here."""
        return value

    def visit(self, tensors: Sequence[Tensor]) -> Iterator[dict[int, Tensor]]:
        """The model's ``tensors`` here, by their index: all at once, or a few at a time.

        What one turn gave is gone in the next.
        """
        yield dict(enumerate(tensors))

    def deliver(self, source: Tensor, target: Tensor) -> None:
        """Give the model's ``target`` the values of the shard ``source``, in its own format."""
        if target is not source:
            target.copy_(source)

    def delivered(self) -> None:
        """Let what runs on the device from here on see all deliveries."""

    def gather(self, axis: Axis, output: Tensor, part: slice, shard: Tensor) -> Work:
        """All ranks' shards into ``output`` on the model's device; this rank's belongs to ``part`` of it."""
        return axis.all_gather(output, shard)


class Host(Home):
    """Shards live in host memory, pinned where the model is on a GPU; they travel one bucket at a time.

    Copies run on a stream of their own, two staging buffers deep, beside the update of the bucket before.
    """

    away = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(torch.device("cpu"))
        self._pinned = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._pinned else None
        self._incoming, self._outgoing = _Staging(self, self._stream), _Staging(self, self._stream)

    def zeros(self, count: int, dtype: torch.dtype) -> Tensor:
        """A new flat shard."""
        return torch.zeros(count, dtype=dtype, pin_memory=self._pinned)

    def scalar(self, value: Tensor) -> Tensor:
        """A 0-d tensor of the model's device, here; waits for it."""
        return value.to(self.device)

    def visit(self, tensors: Sequence[Tensor]) -> Iterator[dict[int, Tensor]]:
        """One tensor a turn, while the next one is on its way."""
        coming = [self._fetch(tensor) for tensor in tensors[:1]]
        for index in range(len(tensors)):
            coming += [self._fetch(tensor) for tensor in tensors[index + 1 : index + 2]]
            here, event = coming.pop(0)
            event.passed()
            yield {index: here}

    def deliver(self, source: Tensor, target: Tensor) -> None:
        """Cast on the host, then send."""
        if self._stream is None or target.device.type == "cpu":
            super().deliver(source, target)
            return
        ready = source
        event = _Event(self._stream)
        if source.dtype != target.dtype:
            ready, event = self._outgoing.take(target.numel(), target.dtype)
            ready.copy_(source)
        with self._aside():
            target.copy_(ready, non_blocking=True)
            event.record()

    def delivered(self) -> None:
        """Make the device's current stream wait for the copies."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def gather(self, axis: Axis, output: Tensor, part: slice, shard: Tensor) -> Work:
        """Copy the shard to its place on the device and gather it from there."""
        with self._aside():
            output[part].copy_(shard, non_blocking=True)
            copied = _Event(self._stream)
            copied.record()
            return Together([axis.all_gather(output, output[part]), copied])

    def _fetch(self, tensor: Tensor) -> tuple[Tensor, _Event]:
        here, event = self._incoming.take(tensor.numel(), tensor.dtype)
        with self._aside():
            here.copy_(tensor, non_blocking=True)
            event.record()
        return here, event

    def _aside(self) -> AbstractContextManager[object]:
        """The copies' own stream, from where the current one is now."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._stream)


class _Staging:
    """Two host buffers, used in turn; each is handed out when its last copy has ended."""

    def __init__(self, home: Host, stream: torch.cuda.Stream | None) -> None:
        self._home = home
        self._held = [(torch.empty(0), _Event(stream)) for _ in range(2)]

    def take(self, count: int, dtype: torch.dtype) -> tuple[Tensor, _Event]:
        """A buffer of ``count`` elements, and the event to record behind its next copy."""
        buffer, event = self._held.pop(0)
        event.passed()
        if buffer.numel() < count:
            buffer = self._home.zeros(count, dtype)
        self._held.append((buffer, event))
        return buffer[:count], event


class _Event:
    """A place in a stream of copies; without a stream, copies end before they return."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._event = None if stream is None else torch.cuda.Event()

    def record(self) -> None:
        """Mark the current stream's present end."""
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Make the current stream wait."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)

    def passed(self) -> None:
        """Make the host wait."""
        if self._event is not None:
            self._event.synchronize()
