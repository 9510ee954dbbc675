"""Build the native libraries: C++ kernels and data helpers always, CUDA kernels where nvcc is found.

``megapre/_C*.so``: csrc/cpu, ops of ``torch.ops.megapre``. The kernels are compiled once per instruction set and picked
at run time, so the library runs on any machine of the architecture. ``megapre/_data.so``: csrc/data,
``megapre/_host.so``: csrc/host, and ``megapre/_cuda.so``: csrc/cuda, plain C functions without torch; the last loads
without a GPU too. Objects are kept and rebuilt when a source, header, command or torch changes.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
FLAGS = ["-fPIC", "-fopenmp", "-fvisibility=hidden"]
# -Wno-psabi: vector types never cross a function that is not inlined.
MATH = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
# The generator's bits must not depend on whether a multiply and an add are fused.
KERNELS = {
    "kernels.cpp": ["-ffp-contract=fast"],
    "philox.cpp": ["-ffp-contract=off"],
    "attention.cpp": ["-ffp-contract=fast"],
    "moe.cpp": ["-ffp-contract=fast"],
    "tiles.cpp": ["-ffp-contract=fast"],
}
VARIANTS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": [
        "-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512",
    ],
}  # fmt: skip
# AMX: tiles of bf16, for products.
VARIANTS["amx"] = [*VARIANTS["avx512"], "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
TILED = ("attention.cpp", "moe.cpp", "tiles.cpp")
UNTILED = ("kernels.cpp", "philox.cpp", "attention.cpp", "moe.cpp")
Job = tuple[list[str], Path, Path]
"""Command without its output, source, object."""


def cpp_jobs(objects: Path) -> tuple[list[Job], list[str]]:
    """Compilations of the C++ library and its link flags."""
    from torch import compiled_with_cxx11_abi
    from torch.utils.cpp_extension import include_paths, library_paths

    compiler = shlex.split(os.environ.get("CXX", "g++"))
    gcc = "clang" not in subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    x86 = platform.machine() in ("x86_64", "AMD64") and gcc
    jobs: list[Job] = []
    for source, extra in KERNELS.items():
        for variant, flags in VARIANTS.items():
            if source not in (TILED if variant == "amx" else UNTILED):
                continue
            if variant == "portable" or x86:
                command = [*compiler, *FLAGS, *MATH, *extra, *flags, f"-DMEGAPRE_VARIANT={variant}"]
                jobs.append((command, CSRC / "cpu" / source, objects / f"{source}.{variant}.o"))
    includes = [flag for path in include_paths() for flag in ("-isystem", path)]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(compiled_with_cxx11_abi())}"
    torch_flags = [*compiler, *FLAGS, "-O2", "-std=c++20", abi, "-DAT_PARALLEL_OPENMP=1", *includes]
    for source in sorted((CSRC / "cpu").glob("ops*.cpp")):
        jobs.append((torch_flags, source, objects / f"{source.parent.name}.{source.name}.o"))
    jobs.sort(key=lambda job: job[0] is not torch_flags)  # the slow ones first
    link = [*compiler, "-shared", "-fopenmp", *(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch_cpu"]
    return jobs, link


def plain_jobs(folder: str, objects: Path) -> tuple[list[Job], list[str]]:
    """Compilations of one folder's C functions, which need no torch, and their link flags."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    command = [*compiler, "-O3", "-std=c++17", "-fPIC", "-pthread", "-fvisibility=hidden"]
    sources = sorted((CSRC / folder).glob("*.cpp"))
    return [(command, source, objects / f"{folder}.{source.name}.o") for source in sources], [*compiler, "-shared"]


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME or of the PATH."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    inside = [str(Path(home) / "bin" / "nvcc") for home in homes if home]
    return next((path for path in inside if os.access(path, os.X_OK)), None) or shutil.which("nvcc")


def cuda_jobs(nvcc: str, objects: Path) -> tuple[list[Job], list[str]]:
    """Compilations of the CUDA library and its link flags. MEGAPRE_CUDA_ARCH: e.g. "80 90", the default."""
    archs = os.environ.get("MEGAPRE_CUDA_ARCH", "80 90").replace(",", " ").replace("sm_", "").split()
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    code.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")  # newer GPUs compile this at load
    command = [nvcc, "-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "static", *code]
    jobs = [(command, source, objects / f"{source.name}.o") for source in sorted((CSRC / "cuda").glob("*.cu"))]
    return jobs, [nvcc, "-shared", "-cudart", "static", *code]


def fresh(job: Job) -> bool:
    """Whether the object is newer than its source and headers and was made by the same command."""
    _, source, target = job
    recipe = target.with_suffix(".cmd")
    if not target.exists() or not recipe.exists() or recipe.read_text() != recipe_of(job):
        return False
    inputs = [source, *source.parent.glob("*.h"), *source.parent.glob("*.cuh")]
    return max(path.stat().st_mtime for path in inputs) < target.stat().st_mtime


def recipe_of(job: Job) -> str:
    """The command and the versions behind it."""
    import torch

    return shlex.join(job[0]) + f"\ntorch {torch.__version__}\n"


def compile_one(job: Job) -> None:
    """Compile one source, showing the command when it fails."""
    command, source, target = job
    whole = [*command, "-c", str(source), "-o", str(target)]
    print("megapre: compiling", source.relative_to(ROOT), target.name, flush=True)
    if subprocess.run(whole).returncode:
        raise SystemExit(f"megapre: this command failed: {shlex.join(whole)}")
    target.with_suffix(".cmd").write_text(recipe_of(job))


def build(jobs: list[Job], link: list[str], target: Path) -> None:
    """Compile what is stale, two or more at a time, and link when anything changed."""
    stale = [job for job in jobs if not fresh(job)]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(compile_one, stale))
    newest = max(job[2].stat().st_mtime for job in jobs)
    if target.exists() and not stale and target.stat().st_mtime > newest:
        return
    partial = target.with_name(target.name + ".partial")
    first, rest = link[0], link[1:]
    subprocess.run([first, *(str(job[2]) for job in jobs), *rest, "-o", str(partial)], check=True)
    partial.replace(target)  # a process that has the old library mapped keeps it


class BuildNative(build_ext):
    """Builds both libraries in place of setuptools' own compilation."""

    def run(self) -> None:
        """Build beside the package's sources for an editable install, in the build folder for a wheel."""
        package = ROOT / "megapre" if self.inplace or self.editable_mode else Path(self.build_lib) / "megapre"
        objects = ROOT / "build" / f"native-{sysconfig.get_platform()}-py{sys.version_info[0]}{sys.version_info[1]}"
        for folder in (package, objects):
            folder.mkdir(parents=True, exist_ok=True)
        build(*cpp_jobs(objects), package / Path(self.get_ext_filename("megapre._C")).name)
        for folder in ("data", "host"):
            build(*plain_jobs(folder, objects), package / f"_{folder}.so")
        nvcc = find_nvcc()
        if nvcc is None:
            print("megapre: no nvcc on PATH or in CUDA_HOME, so no CUDA kernels (the CPU kernels are built)")
        else:
            build(*cuda_jobs(nvcc, objects), package / "_cuda.so")


setup(ext_modules=[Extension("megapre._C", sources=[])], cmdclass={"build_ext": BuildNative})
