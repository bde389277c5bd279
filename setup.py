"""Builds `wandapp._C` and lists the packages; everything else about the project stands in pyproject.toml.

The extension knows buffers, not torch: it needs a C++17 compiler and pybind11, and one binary serves every torch. No
`-march`: each kernel carries AVX-512, AVX2 and portable code and picks at run time.
"""

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
OPS = ["column_sumsq", "select", "compensate", "pack", "sparse_linear"]

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
    "-Icsrc",
    f"-I{pybind11.get_include()}",
    f"-I{sysconfig.get_path('include')}",
]
LINK_FLAGS = ["-shared", "-pthread", *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [])]


class NinjaBuild(build_ext):
    """Compiles through a build.ninja of a few rules, so that only changed files are compiled again."""

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = ROOT / "build" / f"ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "build.ninja", "w", encoding="utf-8") as file:
            write_rules(ninja_syntax.Writer(file, width=120), folder, target)
        # cwd is the root, so that compiler messages name files as the repository does
        executable = Path(ninja.BIN_DIR) / "ninja"
        subprocess.run([executable, "-f", folder / "build.ninja"], cwd=ROOT, check=True)


def write_rules(writer: ninja_syntax.Writer, folder: Path, target: Path) -> None:
    """One rule per compiler, one build line per object, one link."""
    compiler = (sysconfig.get_config_var("CXX") or "c++").split()[0]
    writer.variable("builddir", str(folder))
    writer.rule("cxx", f"{compiler} -MMD -MF $out.d {' '.join(CXX_FLAGS)} -c $in -o $out", depfile="$out.d", deps="gcc")
    writer.rule("link", f"{compiler} {' '.join(LINK_FLAGS)} $in $libraries -o $out")
    objects = []
    for source in CXX_SOURCES:
        objects += writer.build(f"{folder}/{source}.o", "cxx", source)
    writer.build(str(target), "link", objects)


setup(
    packages=["wandapp", "wandapp.kernels", "wandapp.methods", *(f"wandapp.kernels.{op}" for op in OPS)],
    package_dir={f"wandapp.kernels.{op}": f"kernels/{op}" for op in OPS},
    ext_modules=[Extension("wandapp._C", CXX_SOURCES)],
    cmdclass={"build_ext": NinjaBuild},
)
