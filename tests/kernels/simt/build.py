"""The SIMT tier's libraries: csrc/cuda compiled by g++ against csrc/simt, kept under build/ by content."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megapre.kernels import cuda

ROOT = Path(__file__).resolve().parents[3]
HEALTHY = Path(os.environ.get("MEGAPRE_HEALTHY_CSRC", ROOT / "csrc"))
"""The sources from which calls are recorded; those under test are another copy when a bug is planted in them."""
COMMON = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fno-strict-aliasing", "-fvisibility=hidden", "-Wall", "-Werror",
          "-Wno-unknown-pragmas", "-Wno-unused-function"]  # fmt: skip
SANITIZERS = {
    "plain": [],
    "asan": ["-fsanitize=address", "-fno-omit-frame-pointer", "-DSIMT_ASAN"],
    "tsan": ["-fsanitize=thread", "-fno-omit-frame-pointer", "-DSIMT_TSAN"],
    "count": ["-fsanitize=thread"],
}
"""Kinds of the library; ``count`` has functions of its own (count.cpp) where TSan's are called."""
ORDERS = {"forward": 0, "reverse": 1, "random": 2}
SHARED_LIMIT = 227 << 10


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def missing() -> str:
    """Why the tier cannot be built here, or ""."""
    if compiler() is None:
        return "no g++: the SIMT tier is not built here"
    return "" if platform.system() == "Linux" else "the SIMT tier needs Linux"


def build(kind: str = "plain", csrc: Path = ROOT / "csrc") -> Path:
    """Path of the library of the given kind; compiled when no library of the same sources is there."""
    sources = sorted((csrc / "cuda").glob("*.cu"))
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(repr((COMMON, SANITIZERS, version, platform.machine())).encode())
    folder = ROOT / "build" / "simt"
    folder.mkdir(parents=True, exist_ok=True)
    # An object per source, by what it includes, so that a mutant compiles few files.
    jobs = []
    own_sources = [path for path in (csrc / "simt").glob("*.cpp") if kind == "count" or path.name != "count.cpp"]
    for path in [*sorted(own_sources), *sources]:
        own = digest.copy()
        own.update(kind.encode())
        for file in included(path, csrc):
            own.update(file.name.encode() + file.read_bytes())
        jobs.append((path, folder / f"{path.stem}-{kind}-{own.hexdigest()[:16]}.o"))
    whole = hashlib.sha256(repr([target.name for _, target in jobs]).encode()).hexdigest()[:16]
    library = folder / f"simt-{kind}-{whole}.so"
    if not library.exists():
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda job: _compile(kind, csrc, *job), jobs))
        partial = library.with_suffix(f".{os.getpid()}")
        objects = [str(target) for _, target in jobs]
        flags = SANITIZERS[kind][:1] if kind != "count" else []
        subprocess.run([compiler(), "-shared", *flags, *objects, "-o", str(partial)], check=True)
        partial.replace(library)
    return library


def included(source: Path, csrc: Path) -> list[Path]:
    """The source and every header of csrc that it includes, directly or not."""
    found, left = {source}, [source]
    while left:
        for name in re.findall(r'#include ["<]([\w./]+)[">]', left.pop().read_text()):
            for path in (csrc / "cuda" / name, csrc / "simt" / name):
                if path.exists() and path not in found:
                    found.add(path)
                    left.append(path)
    return sorted(found)


def _compile(kind: str, csrc: Path, source: Path, target: Path) -> None:
    if target.exists():
        return
    flags = [*COMMON, *SANITIZERS[kind], "-I", str(csrc / "simt")]
    if source.suffix == ".cpp":  # the engine is not watched, only what kernels do
        flags = [flag for flag in flags if not flag.startswith("-fsanitize")]
    partial = target.with_suffix(f".{os.getpid()}")
    result = subprocess.run(
        [compiler(), "-x", "c++", *flags, "-c", str(source), "-o", str(partial)], capture_output=True, text=True
    )
    if result.returncode:
        raise RuntimeError(f"{source.name} does not compile for the SIMT tier:\n{result.stderr[-4000:]}")
    partial.replace(target)


def load(path: Path) -> ctypes.CDLL:
    """A library of kind plain, ready to be called."""
    library = cuda.declare(ctypes.CDLL(str(path)))
    library.simt_configure.argtypes = [ctypes.c_int, ctypes.c_uint, ctypes.c_int, ctypes.c_int]
    library.simt_take_error.restype = ctypes.c_char_p
    return library
