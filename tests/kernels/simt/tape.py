"""Calls of the CUDA library as data: recorded with their buffers, replayed by replay.py under a sanitizer."""

from __future__ import annotations

import ctypes
import pickle
from pathlib import Path

from torch import Tensor

from megapre.kernels import cuda


def raw(arguments):
    return [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]


class Tape:
    """Calls in order; a buffer is the bytes of one tensor storage, so that views and aliases stay what they are."""

    def __init__(self) -> None:
        self.calls = []

    def add(self, name, arguments) -> None:
        buffers, places, plain = [], {}, []
        for argument in arguments:
            if not isinstance(argument, Tensor):
                plain.append(("number", argument))
                continue
            storage = argument.untyped_storage()
            if storage.data_ptr() not in places:
                places[storage.data_ptr()] = len(buffers)
                size = storage.nbytes()
                buffers.append(ctypes.string_at(storage.data_ptr(), size) if size else b"")
            plain.append(("buffer", places[storage.data_ptr()], argument.data_ptr() - storage.data_ptr()))
        self.calls.append((name, plain, buffers))

    def write(self, path: Path) -> None:
        kinds = {name: [kind.__name__ for kind in kinds] for name, kinds in cuda.SIGNATURES.items()}
        path.write_bytes(pickle.dumps((kinds, self.calls)))


