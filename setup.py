"""Builds `wandapp._C` and `wandapp._CUDA` and lists the packages; everything else stands in pyproject.toml.

The extensions know buffers, not torch: they need a C++17 compiler and pybind11, and one binary serves every torch. No
`-march`: each kernel carries AVX-512, AVX2 and portable code and picks at run time. `_CUDA` is built where nvcc is
found ($CUDA_HOME/bin, then PATH), GPU or not; WANDAPP_CUDA=0 leaves it out.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import ninja
import pybind11
from ninja import ninja_syntax
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
OPS = ["column_sumsq", "select", "compensate", "pack", "sparse_linear", "rmsprop", "max_sum"]

CXX_SOURCES = ["csrc/bindings.cpp", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cpu/*.cpp"))]
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # a fused multiply-add changes scores by one ulp, and so masks
    "-pthread",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-uninitialized",  # gcc 12 raises these two inside its own AVX-512 header
    "-Wno-maybe-uninitialized",
    "-Icsrc",
    f"-I{pybind11.get_include()}",
    f"-I{sysconfig.get_path('include')}",
]
LINK_FLAGS = ["-shared", "-pthread", *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [])]

CUDA_SOURCES = sorted(
    str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cuda/*.c*") if path.suffix in (".cpp", ".cu")
)
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "--fmad=false",
    "--threads=2",  # one for each architecture
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=[sm_90,compute_90]",  # PTX too: newer GPUs compile it when they load it
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Icsrc",
]


def find_nvcc() -> Path | None:
    if os.environ.get("WANDAPP_CUDA") == "0":
        return None
    in_home = Path(os.environ.get("CUDA_HOME", "/nowhere"), "bin", "nvcc")
    found = str(in_home) if in_home.exists() else shutil.which("nvcc")
    return Path(found) if found else None


NVCC = find_nvcc()


class NinjaBuild(build_ext):
    """Compiles through a build.ninja of a few rules, so that only changed files are compiled again."""

    def run(self) -> None:
        if NVCC is None:
            print("wandapp: no nvcc in CUDA_HOME or PATH (or WANDAPP_CUDA=0): built without CUDA kernels")
        super().run()

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = ROOT / "build" / f"ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / extension.name
        folder.mkdir(parents=True, exist_ok=True)
        executable = Path(ninja.BIN_DIR) / "ninja"
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of two builds at once, as in the Makefile, the second finds the objects
            with open(folder / "build.ninja", "w", encoding="utf-8") as file:
                write_rules(ninja_syntax.Writer(file, width=120), folder, target, extension.sources)
            # cwd is the root, so that compiler messages name files as the repository does
            subprocess.run([executable, "-f", folder / "build.ninja"], cwd=ROOT, check=True)


def write_rules(writer: ninja_syntax.Writer, folder: Path, target: Path, sources: list[str]) -> None:
    """One rule per compiler, one build line per object, one link."""
    compiler = (sysconfig.get_config_var("CXX") or "c++").split()[0]
    writer.variable("builddir", str(folder))
    writer.rule("cxx", f"{compiler} -MMD -MF $out.d {' '.join(CXX_FLAGS)} -c $in -o $out", depfile="$out.d", deps="gcc")
    writer.rule("nvcc", f"{NVCC} -MMD -MF $out.d {' '.join(NVCC_FLAGS)} -c $in -o $out", depfile="$out.d", deps="gcc")
    writer.rule("link", f"{compiler} {' '.join(LINK_FLAGS)} $in -o $out")
    writer.rule("link_cuda", f"{NVCC} -shared -cudart static $in -o $out")  # loads beside whichever CUDA torch brought
    objects = []
    for source in sources:
        objects += writer.build(f"{folder}/{source}.o", "nvcc" if source.endswith(".cu") else "cxx", source)
    writer.build(str(target), "link_cuda" if sources == CUDA_SOURCES else "link", objects)


setup(
    packages=["wandapp", "wandapp.kernels", "wandapp.methods", *(f"wandapp.kernels.{op}" for op in OPS)],
    package_dir={f"wandapp.kernels.{op}": f"kernels/{op}" for op in OPS},
    ext_modules=[Extension("wandapp._C", CXX_SOURCES), *([Extension("wandapp._CUDA", CUDA_SOURCES)] if NVCC else [])],
    cmdclass={"build_ext": NinjaBuild},
)
