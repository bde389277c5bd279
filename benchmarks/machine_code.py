"""Reads what compilers made of a GPU kernel: registers, spills, instructions, and the widths of its loads and stores."""

import importlib.util
import math
import re
import subprocess
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"  # Triton's wheel brings NVIDIA's disassembler


class Code(NamedTuple):
    """One kernel: `listing` has an (address, mnemonic, operands) per instruction."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    listing: list[tuple[int, str, str]]


def read_cubin(cubin: bytes) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        (code,) = read_file(Path(file.name)).values()
    return code


def read_extension(arch: int) -> dict[str, Code]:
    """The kernels of wandapp._CUDA by mangled name; none where it is not built."""
    spec = importlib.util.find_spec("wandapp._CUDA")
    return read_file(Path(spec.origin), f"-arch=sm_{arch}") if spec else {}


def read_file(path: Path, *options: str) -> dict[str, Code]:
    command = [TOOLS / "cuobjdump", "-sass", "--dump-resource-usage", *options, path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    listings = {part.split(maxsplit=1)[0]: part for part in text.split("Function : ")[1:]}
    return {name: Code(*map(int, numbers), instructions(listings[name])) for name, *numbers in usage}


def instructions(sass: str) -> list[tuple[int, str, str]]:
    """NOPs are dropped."""
    pattern = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)([^;]*);"
    found = [(int(address, 16), name, rest) for address, name, rest in re.findall(pattern, sass)]
    return [entry for entry in found if entry[1] != "NOP"]


def widths(code: Code, mnemonic: str) -> dict[int, int]:
    """Bits -> how many instructions of `mnemonic`, LDG or STG, move that many a thread."""
    found: Counter[int] = Counter()
    for _, name, _ in code.listing:
        if name.split(".")[0] in (mnemonic, f"{mnemonic}STS"):  # LDGSTS: to shared memory, past the registers
            bits = re.search(r"\.(128|64|U16|S16|U8|S8)(?:\.|$)", name)
            found[int(re.sub(r"\D", "", bits[1])) if bits else 32] += 1
    return dict(found)


def executed(code: Code, trips: tuple) -> float:
    """Instructions one thread executes. Loops count `trips` times, in the order of their addresses. Left out is the rare
    path: what a forward branch skips and holds no loop, unless it ends the program and a loop of no trips follows it: then
    that is the rare one."""
    jumps, loops = _jumps(code), _loops(code)
    counts = {loop: trip for loop, trip in zip(loops, [*trips, *[1] * len(loops)], strict=False)}
    taken = [loop for loop, trip in counts.items() if trip]
    exits = {to for (_, name, _), (to, _, _) in pairwise(code.listing) if name == "EXIT"}  # what an EXIT stands before
    skipped = []
    for at, to in jumps:
        if to > at and to in exits and any(first >= to for (first, _), trip in counts.items() if not trip):
            skipped.append((to - 1, math.inf))
        elif to > at and not any(at < first and last < to for first, last in taken):
            skipped.append((at, to))
    total = 0.0
    for at, _, _ in code.listing:
        if any(start < at < end for start, end in skipped):
            continue
        weight = 1.0
        for (first, last), trip in counts.items():
            weight *= trip if first <= at <= last else 1
        total += weight
    return total


def innermost_loop(code: Code, mnemonic: str) -> tuple[int, int]:
    """(instructions, those of them that are `mnemonic`) of the smallest loop that has any."""
    bodies = [[name for at, name, _ in code.listing if first <= at <= last] for first, last in _loops(code)]
    counts = [(len(body), sum(name.startswith(mnemonic) for name in body)) for body in bodies]
    return min(entry for entry in counts if entry[1])


def _jumps(code: Code) -> list[tuple[int, int]]:
    """(from, to) addresses of the branches."""
    return [(at, int(re.search(r"0x([0-9a-f]+)", rest)[1], 16)) for at, name, rest in code.listing if name == "BRA"]


def _loops(code: Code) -> list[tuple[int, int]]:
    """(first, last) address of each loop: the endless one behind the last EXIT is none."""
    return sorted((target, at) for at, target in _jumps(code) if target < at)
