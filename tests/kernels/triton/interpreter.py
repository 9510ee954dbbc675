"""Triton's interpreter made fit to test kernels: bf16 by value, and every access checked.

As shipped (3.7.1) it computes bf16 on the bit patterns of 16-bit integers, truncates where a GPU rounds to nearest, and
reads and writes whatever an address points to. ``install`` changes that:

- bf16 operands are widened to fp32, results rounded to nearest even; reductions and atomics of bf16 are refused.
- A load or store outside the memory of the tensors that the launch was given raises IndexError, and so does one in the
  gap between the rows of a view with strides.
- Two programs of a launch that write one address raise RuntimeError, and so do one that writes and one that reads it:
  on a device the order is not defined. So does one store with an address in two lanes.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

Handle, Builder, Executor = interpreter.TensorHandle, interpreter.InterpreterBuilder, interpreter.GridExecutor
COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16 bit patterns as fp32 values."""
    return (np.asarray(bits, dtype=np.uint32) << np.uint32(16)).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """fp32 values as bf16 bit patterns, rounded to nearest even; NaN stays NaN."""
    bits = np.array(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def _is_bf16(handle) -> bool:
    return isinstance(handle, Handle) and handle.dtype.scalar == tl.bfloat16


def _by_value(plain):
    """An operation of the builder on fp32 values instead of bf16 patterns."""

    def method(self, *args, **options):
        if not any(_is_bf16(a) for a in args):
            return plain(self, *args, **options)
        out = plain(self, *(Handle(widen(a.data), tl.float32) if _is_bf16(a) else a for a in args), **options)
        return out if out.data.dtype == np.bool_ else Handle(narrow(out.data), tl.bfloat16)

    return method


def _comparing(plain):
    """Comparisons of floating-point values give booleans; as shipped they give 0.0 and 1.0, which ``&`` cannot take."""

    def method(self, a, b, op):
        out = plain(self, a, b, op)
        return Handle(out.data.astype(bool), tl.int1) if op in COMPARISONS else out

    return method


def _cast(plain):
    def method(self, source, target):
        old, new = source.dtype.scalar, target.scalar
        if old == new or tl.bfloat16 not in (old, new):
            return plain(self, source, target)
        if new == tl.bfloat16:
            return Handle(narrow(source.data.astype(np.float32)), tl.bfloat16)
        return plain(self, Handle(widen(source.data), tl.float32), target)

    return method


def _no_bf16(plain, what):
    def method(self, *args):
        flat = [h for a in args for h in (a if isinstance(a, tuple | list) else [a])]
        if any(_is_bf16(h) or getattr(h, "dtype", None) == tl.bfloat16 for h in flat):
            raise TypeError(f"{what} of bf16: widen it first")
        return plain(self, *args)

    return method


class Memory:
    """What one launch may touch, and which program wrote or read what; one array for each storage."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.spans: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        for t in tensors:
            storage = t.untyped_storage()
            if not t.numel():
                continue
            if storage.data_ptr() not in self.spans:
                n = storage.nbytes()
                self.spans[storage.data_ptr()] = (np.zeros(n, bool), np.zeros(n, np.int32), np.zeros(n, np.int32))
            touchable, size = self.spans[storage.data_ptr()][0], t.element_size()
            for byte in range(size):  # a view that has gaps leaves them untouchable
                strides, offset = [size * stride for stride in t.stride()], size * t.storage_offset() + byte
                torch.from_numpy(touchable).as_strided(t.shape, strides, offset).fill_(True)

    def check(self, pointers, mask, grid: tuple, store: bool) -> None:
        """Raise where a lane is outside or in another program's way."""
        shape = np.broadcast_shapes(pointers.data.shape, mask.data.shape)
        lanes = np.broadcast_to(pointers.data, shape)[np.broadcast_to(mask.data.astype(bool), shape)].astype(np.int64)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        word, program = "store" if store else "load", 1 + grid[0] + 10_000 * (grid[1] + 100 * grid[2])
        if store and len(np.unique(lanes)) < lanes.size:
            raise RuntimeError(f"one store writes an address twice, program {grid}")
        outside = np.ones(lanes.shape, dtype=bool)
        for start, (touchable, writer, reader) in self.spans.items():
            at = lanes - start
            within = (at >= 0) & (at + size <= len(touchable))
            outside[within] &= ~touchable[at[within]]
            at = at[within]
            others = (writer[at] != 0) & (writer[at] != program)
            if store:
                others |= (reader[at] != 0) & (reader[at] != program)
            if others.any():
                raise RuntimeError(f"race: {word} of program {grid} where another program reads or writes")
            if store:
                writer[at] = program
            else:
                reader[at] = np.where((reader[at] == 0) | (reader[at] == program), program, -1)
        if outside.any():
            raise IndexError(f"{word} out of bounds: {outside.sum()} of {outside.size} lanes, program {grid}")


def install() -> None:
    """Change the interpreter of this process; a second call would change it twice."""
    for name in ("unary_op", "create_fma", "create_rsqrt", "create_fabs", "ternary_op"):
        setattr(Builder, name, _by_value(getattr(Builder, name)))
    Builder.binary_op = _by_value(_comparing(Builder.binary_op))
    Builder.cast_impl = _cast(Builder.cast_impl)
    plain_round = Builder.create_fp_to_fp
    Builder.create_fp_to_fp = lambda self, source, target, rounding: (
        self.cast_impl(source, target)
        if tl.bfloat16 in (source.dtype.scalar, target.scalar)
        else plain_round(self, source, target, rounding)
    )
    plain_dot = Builder.create_dot

    def dot(self, a, b, total, *rest):  # products of bf16 are exact in fp32, where they are added
        a, b = (Handle(widen(x.data), tl.float32) if _is_bf16(x) else x for x in (a, b))
        return plain_dot(self, a, b, total, *rest)

    Builder.create_dot = dot
    interpreter.ReduceOps.apply_impl = _no_bf16(interpreter.ReduceOps.apply_impl, "reduction")
    interpreter.ScanOps.apply_impl = _no_bf16(interpreter.ScanOps.apply_impl, "scan")
    Builder.create_atomic_rmw = _no_bf16(Builder.create_atomic_rmw, "atomic")
    _install_checks()


def _install_checks() -> None:
    plain_arguments = Executor._init_args_hst
    load, store = Builder.create_masked_load, Builder.create_masked_store

    def arguments(self, args, options):
        host = plain_arguments(self, args, options)
        values = [*host[0], *host[1].values()]
        interpreter.interpreter_builder.memory = Memory([v for v in values if isinstance(v, torch.Tensor)])
        return host

    def checked_load(self, pointers, mask, *rest):
        self.memory.check(pointers, mask, tuple(self.grid_idx), store=False)
        return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        self.memory.check(pointers, mask, tuple(self.grid_idx), store=True)
        return store(self, pointers, value, mask, *rest)

    Executor._init_args_hst = arguments
    Builder.create_masked_load, Builder.create_masked_store = checked_load, checked_store
