"""Replay a tape on a sanitized library: python replay.py TAPE LIBRARY ORDER SEED EARLY. No imports beyond the standard
library, so that the sanitizer's runtime, loaded first by LD_PRELOAD, watches a small process."""

import ctypes
import pickle
import sys

tape, path, order, seed, early = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
library, libc = ctypes.CDLL(path), ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
library.simt_configure.argtypes = [ctypes.c_int, ctypes.c_uint, ctypes.c_int, ctypes.c_int]
library.simt_take_error.restype = ctypes.c_char_p
with open(tape, "rb") as file:
    kinds, calls = pickle.load(file)
library.simt_configure(order, seed, early, 227 << 10)
for name, arguments, buffers in calls:
    function = getattr(library, name)
    function.argtypes = [getattr(ctypes, kind) for kind in kinds[name]]
    memory = [libc.malloc(max(1, len(buffer))) for buffer in buffers]
    for address, buffer in zip(memory, buffers):
        ctypes.memmove(address, buffer, len(buffer))
    values = [memory[a[1]] + a[2] if a[0] == "buffer" else a[1] for a in arguments]
    code = function(*values, None)
    error = library.simt_take_error().decode()
    if error or code not in (0, -1):
        sys.exit(f"{name}: code {code} {error}")
    for address in memory:
        libc.free(address)
print("replayed", len(calls), "calls")
