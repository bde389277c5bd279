"""Roofline of every GPU kernel without a GPU: its sm_90 (or sm_80) machine code, read for registers, spills and instructions.

A streaming kernel reaches the memory's bandwidth when it spends fewer thread-instructions per byte than an SM can issue
in the time that byte takes: an H100 SM issues 4 warp instructions a cycle (128 threads) and receives 3.35 TB/s / 132
/ 1.755 GHz = 14.5 bytes a cycle, so 8.8 thread-instructions per byte. Triton kernels are compiled here with the tiles that
their launchers choose, loops weighted by trip counts; what a forward branch skips and holds no loop is the rare path (it
names a NaN) and is left out. CUDA kernels are read from the built wandapp._CUDA. The predicted share of peak bandwidth
is the least that instructions, bytes in flight and bytes beyond the minimum allow: a ceiling, not a measurement.

    python benchmarks/static_roofline.py [--arch 80|90] [--only NAME] [--json]
"""

import argparse
import json
import re
from dataclasses import asdict, dataclass, field

import triton
from machine_code import Code, executed, innermost_loop, read_cubin, read_extension, widths
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from wandapp.kernels import triton_groups
from wandapp.kernels.column_sumsq import triton_impl as column_sumsq
from wandapp.kernels.compensate import triton_impl as compensate
from wandapp.kernels.max_sum import triton_impl as max_sum
from wandapp.kernels.pack import triton_impl as pack
from wandapp.kernels.rmsprop import triton_impl as rmsprop
from wandapp.kernels.select import triton_impl as select
from wandapp.kernels.sparse_linear import triton_impl as sparse_linear

INSTRUCTIONS_PER_BYTE = 8.8
BYTES_IN_FLIGHT = 16_500  # 3.35 TB/s * 650 ns / 132 SMs: what each SM must have asked for
REGISTERS, THREADS, PROGRAMS = 65536, 2048, 32  # of one SM
LAYOUTS = ("neutral", "CUTLASS", "cuSPARSELt")
SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024}


@dataclass
class Case:
    """One kernel at one shape. `weights`: elements one program handles; bytes are per element, at the memory."""

    name: str
    kernel: object
    pointers: dict  # argument -> Triton type; arguments in neither dict are int32
    constants: dict
    weights: int
    bytes_minimum: float
    bytes_moved: float
    trips: tuple = ()  # of the loops, in the order of their addresses
    warps: int = 4
    stages: int = 3
    fusion: bool = False
    registers: int | None = None
    undivisible: tuple = ()
    bytes_asked: int = 0  # loads a program has in flight at once


@dataclass
class Report:
    name: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    programs_per_sm: int = 0
    load_bits: dict = field(default_factory=dict)
    store_bits: dict = field(default_factory=dict)
    instructions_per_byte: float = 0.0
    bytes_ratio: float = 1.0
    bandwidth_fraction: float = 0.0


def cases() -> list[Case]:
    return [*statistics_cases(), *select_cases(), *wide_row_cases(), *pack_cases(), *row_pack_cases(), *decode_cases()]


def statistics_cases() -> list[Case]:
    tile = column_sumsq.sumsq_tile(4096, 2)
    tokens, features = column_sumsq.TOKENS_PER_PROGRAM, tile["BLOCK_FEATURES"]
    moved = 2 + 8 / tokens  # the partial sums are written and read once
    sumsq = Case(
        "column_sumsq bf16", column_sumsq._column_sumsq_kernel, {"x_ptr": "*bf16", "partial_ptr": "*fp32"},
        {"TOKENS": tokens, **tile}, tokens * features, 2, moved, trips=(tokens // tile["BLOCK_TOKENS"],), fusion=True,
        undivisible=("tokens",), bytes_asked=tile["BLOCK_TOKENS"] * features * 2,
    )  # fmt: skip
    pointers = {"weight_ptr": "*fp32", "factor_ptr": "*fp32", "used_ptr": "*u8", "error_ptr": "*fp32"}
    block = Case(
        "compensate 2:4 fp32", compensate._compensate_block_kernel, {**pointers, "offender_ptr": "*u64"},
        {"mask_ptr": None, "N": 2, "M": 4, "BLOCK_ROWS": compensate.BLOCK_ROWS, "BLOCK_COLS": 128},
        compensate.BLOCK_ROWS * 128, 13, 13, trips=(128, 4), bytes_asked=compensate.BLOCK_ROWS * 512,
    )  # fmt: skip
    pointers = {"weight_ptr": "*fp32", "gradient_ptr": "*bf16", "mean_square_ptr": "*fp32"}
    rates = dict.fromkeys(("lr", "decay", "rest", "epsilon"), "fp32")
    step = Case(
        "rmsprop_ bf16 gradient", rmsprop._rmsprop_kernel, pointers | rates, {"BLOCK": rmsprop.BLOCK}, rmsprop.BLOCK, 18, 18,
        warps=8, bytes_asked=10 * rmsprop.BLOCK,
    )  # fmt: skip
    depth, side = 1024, max_sum.BLOCK_ROWS
    moved = 4 + 2 * depth * 4 / side  # a program reads a row of both sides for its 64 x 64 sums
    sums = Case(
        "pairwise_max_sum fp32", max_sum._max_sum_kernel, {"left_ptr": "*fp32", "right_ptr": "*fp32", "out_ptr": "*fp32"},
        {"BLOCK_ROWS": side, "BLOCK_OTHER": max_sum.BLOCK_OTHER}, side * max_sum.BLOCK_OTHER, moved, moved,
        trips=(depth,), warps=8, registers=max_sum.REGISTERS, fusion=True, bytes_asked=2 * side * 4,
    )  # fmt: skip
    return [sumsq, block, step, sums]


def select_cases() -> list[Case]:
    found = []
    for function, n, m, terms in [
        ("prune_nm_", 2, 4, "s"),
        ("prune_nm_", 4, 8, "s"),
        ("prune_nm_", 8, 16, "s"),
        ("prune_nm_", 2, 4, "sg"),
        ("prune_pack_nm_", 2, 4, "s"),
        ("prune_pack_nm_", 4, 8, "s"),
        ("select_nm", 2, 4, "s"),
        ("select_nm", 4, 8, "s"),
    ]:
        prune, packs = function != "select_nm", function == "prune_pack_nm_"
        tile = select.nm_tile(4096, m, 2, prune)
        warps = tile.pop("num_warps")
        weights = tile["BLOCK_ROWS"] * tile["BLOCK_GROUPS"] * m
        moved = 2 + (2 + 1 / 8 if prune else 1) + (2 * n / m if packs else 0) + (4 if "g" in terms else 0)
        moved += 4 / 4096  # column_scale: once a matrix
        pointers = select_pointers(terms, "*i16" if prune and m == 16 else "*u8")
        pointers |= {"values_ptr": "*bf16"} if packs else {}
        constants = {"N": n, "M": m, "PRUNE": prune, "BITS": prune, **no_gradient(terms), **tile}
        constants |= {} if packs else {"values_ptr": None}
        name = f"{function} {n}:{m} bf16{' gradient' if 'g' in terms else ''}"
        kernel = select._select_nm_kernel
        asked = weights * 2
        found.append(Case(name, kernel, pointers, constants, weights, moved, moved, warps=warps, bytes_asked=asked))
    steps = 7  # of the search: the mean over rows of normal weights and log-normal scales
    for cols in (4096, 11008):
        tile = select.row_tile(cols, 2)
        warps, registers = tile.pop("num_warps"), tile.pop("maxnreg", None)
        constants = {"ZERO_BITS": 0, "PRUNE": True, **no_gradient("s"), **tile}
        found.append(
            Case(
                f"prune_rows_ {cols} bf16", select._select_rows_kernel, select_pointers("s", "*u8"), constants, cols,
                4.125, 4.125 + 4 / 4096, trips=(steps, 0), warps=warps, registers=registers, undivisible=("keep",),
                bytes_asked=cols * 2,
            )
        )  # fmt: skip
    return found


def wide_row_cases() -> list[Case]:
    """The radix search of rows wider than one program: it reads the weight six times."""
    block, steps = select.WIDE_BLOCK, select.WIDE_STEPS
    shared = {"gradient_ptr": None, "BLOCK_COLS": block}
    source = {"weight_ptr": "*bf16", "column_scale_ptr": "*fp32", "found_ptr": "*i32", "alpha": "fp32"}
    options = {"bytes_asked": 2 * block}
    count, ties = source | {"counts_ptr": "*i32", "offender_ptr": "*u64"}, source | {"ties_ptr": "*i64"}
    write = source | {"output_ptr": "*u8", "before_ptr": "*i64", "wanted_ptr": "*i64"}
    digits = {**shared, "DIGIT_SHIFT": 16, "STEPS": steps}
    return [
        Case("wide rows: digits", select._count_digits_kernel, count, digits, block * steps, 2, 2, trips=(steps,), **options),
        Case("wide rows: ties", select._count_ties_kernel, ties, shared, block, 2, 2, **options),
        Case("wide rows: writing", select._write_wide_rows_kernel, write, {**shared, "PRUNE": True}, block, 4.125, 4.125,
             **options),
    ]  # fmt: skip


def select_pointers(terms: str, output: str) -> dict:
    pointers = {"weight_ptr": "*bf16", "column_scale_ptr": "*fp32", "output_ptr": output, "offender_ptr": "*u64"}
    return {**pointers, "alpha": "fp32", **({"gradient_ptr": "*fp32"} if "g" in terms else {})}


def no_gradient(terms: str) -> dict:
    return {} if "g" in terms else {"gradient_ptr": None}


def pack_cases() -> list[Case]:
    found = []
    for n, m in [(2, 4), (4, 8)]:
        tile = pack.pack_tile(4096, m, 2)
        weights = tile["BLOCK_ROWS"] * tile["BLOCK_GROUPS"] * m
        pointers = {"weight_ptr": "*bf16", "values_ptr": "*bf16", "output_ptr": "*u8", "offender_ptr": "*u64"}
        constants = {"N": n, "M": m, "BITS": True, **tile}
        moved = 2 + 2 * n / m + 1 / 8
        kernel = pack._pack_nm_kernel
        found.append(
            Case(f"pack {n}:{m} bf16", kernel, pointers, constants, weights, moved, moved, bytes_asked=weights * 2)
        )
    return found


def row_pack_cases() -> list[Case]:
    """Packing by row offsets, two passes, and unpacking; a program takes a row of 4096."""
    cols, block = 4096, pack.BLOCK_COLS
    constants, options = {"BLOCK_COLS": block}, {"trips": (cols // block,), "bytes_asked": 2 * block}
    mark = {"weight_ptr": "*bf16", "bitmask_ptr": "*u8", "counts_ptr": "*i32"}
    write = {"weight_ptr": "*bf16", "row_offsets_ptr": "*i64", "values_ptr": "*bf16"}
    unpack = {"values_ptr": "*bf16", "bitmask_ptr": "*u8", "dense_ptr": "*bf16"}
    dense = {**constants, "row_offsets_ptr": None}
    return [
        Case("pack 50%: marking", pack._mark_nonzeros_kernel, mark, constants, cols, 2.125, 2.125, **options),
        Case("pack 50%: writing", pack._write_nonzeros_kernel, write, constants, cols, 3, 3, **options),
        Case("unpack 2:4 bf16", pack._unpack_kernel, unpack, dense, cols, 3.125, 3.125, **options),
        Case(
            "bits of a bool mask", triton_groups._pack_mask_kernel, {"mask_ptr": "*u8", "bitmask_ptr": "*u8"},
            {"BLOCK_COLS": 2048}, 2048, 1.125, 1.125, bytes_asked=2048,
        ),
    ]  # fmt: skip


def decode_cases() -> list[Case]:
    found = []
    for tokens, rows, cols in [(1, 4096, 4096), (8, 11008, 4096), (16, 4096, 11008), (16, 11008, 4096)]:
        config = sparse_linear.decode_24_config(tokens, rows, cols)
        stages, registers, splits = config.pop("num_stages"), config.pop("maxnreg", None), config["SPLITS"]
        quarters = sparse_linear.QUARTERS
        steps = -(-cols // (quarters * config["BLOCK_COLS"])) // splits
        least = 1.125 + 2 * tokens * (rows + cols) / rows / cols
        constants = {"bias_ptr": None, "WORD_COLS": 32, "TOKENS": 8 if tokens <= 8 else 16, "QUARTERS": quarters}
        pointers = {"x_ptr": "*bf16", "values_ptr": "*bf16", "bitmask_ptr": "*i32", "y_ptr": "*bf16"}
        in_step = config["BLOCK_ROWS"] * config["BLOCK_COLS"] * quarters
        found.append(
            Case(
                f"sparse_linear 2:4 bf16 {tokens} x {cols} -> {rows}", sparse_linear._decode_24_kernel, pointers,
                {**constants, "WIDEN": False, **config}, config["BLOCK_ROWS"] * cols // splits, least,
                least + (8 * tokens * splits / cols if splits > 1 else 0), trips=(steps,), stages=stages,
                registers=registers, fusion=True, undivisible=("tokens",), bytes_asked=int(in_step * 1.125 * (stages - 1)),
            )
        )  # fmt: skip
    found.append(
        Case(
            "sparse_linear 2:4 bf16: adding two splits", sparse_linear._add_splits_kernel,
            {"partial_ptr": "*fp32", "y_ptr": "*bf16"}, {"bias_ptr": None, "SPLITS": 2, "BLOCK": 512}, 512, 10, 10,
            bytes_asked=4096,
        )
    )  # fmt: skip
    constants = {"bias_ptr": None, "BLOCK_ROWS": 8, "BLOCK_COLS": 256, "BLOCK_TOKENS": 1}
    pointers = {"x_ptr": "*bf16", "values_ptr": "*bf16", "bitmask_ptr": "*u8", "row_offsets_ptr": "*i64"}
    found.append(
        Case(
            "sparse_linear 50% bf16 1 x 4096 -> 4096", sparse_linear._decode_gather_kernel, {**pointers, "y_ptr": "*bf16"},
            constants, 8 * 4096, 1.125, 1.127, trips=(16,), fusion=True, undivisible=("tokens", "values_per_row"),
            bytes_asked=8 * 256,
        )
    )  # fmt: skip
    return found


def analyse(case: Case, arch: int = 90) -> Report:
    """Compiles one case and reads its machine code."""
    types = {name: case.pointers.get(name, "i32") for name in case.kernel.arg_names}
    types |= dict.fromkeys(case.constants, "constexpr")
    aligned = [i for i, name in enumerate(types) if types[name] == "i32" or types[name].startswith("*")]
    undivisible = [list(types).index(name) for name in case.undivisible]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned if i not in undivisible}
    options = {"num_warps": case.warps, "num_stages": case.stages, "enable_fp_fusion": case.fusion}
    if case.registers:
        options["maxnreg"] = case.registers
    compiled = triton.compile(
        ASTSource(case.kernel, signature=types, constexprs=case.constants, attrs=attributes),
        target=GPUTarget("cuda", arch, 32),
        options=options,
    )
    code = read_cubin(compiled.asm["cubin"])
    report = Report(case.name, code.registers, code.stack_bytes, compiled.metadata.shared)
    report.programs_per_sm = programs_per_sm(report, case.warps, arch)
    report.load_bits, report.store_bits = widths(code, "LDG"), widths(code, "STG")
    bytes_per_thread = case.weights * case.bytes_moved / (32 * case.warps)
    report.instructions_per_byte = round(executed(code, case.trips) / bytes_per_thread, 2)
    report.bytes_ratio = round(case.bytes_moved / case.bytes_minimum, 3)
    in_flight = report.programs_per_sm * case.bytes_asked
    fraction = min(1.0, INSTRUCTIONS_PER_BYTE / report.instructions_per_byte, in_flight / BYTES_IN_FLIGHT)
    report.bandwidth_fraction = round(fraction / report.bytes_ratio, 2)
    return report


def programs_per_sm(report: Report, warps: int, arch: int) -> int:
    by_registers = REGISTERS // (-(-report.registers // 8) * 8 * 32 * warps)
    by_shared = SHARED_BYTES[arch] // (report.shared_bytes + 1024)
    return min(by_registers, by_shared, THREADS // (32 * warps), PROGRAMS)


def cuda_reports(arch: int = 90) -> list[Report]:
    """The kernels of wandapp._CUDA, none where it is not built."""
    found = []
    for symbol, code in read_extension(arch).items():
        compress = re.search(r"compress24_kernelI(.)LNS_6LayoutE(\d)ELb(\d)E", symbol)
        product = re.search(r"sparse_linear24_(walking_)?kernelINS_\d+(B?Float16)ELi(\d)E", symbol)
        read = read_compress24(code, *compress.groups()) if compress else read_product(code, *product.groups())
        name, threads, programs, instructions, bytes_asked = read
        report = Report(f"cuda {name}", code.registers, code.stack_bytes, code.shared_bytes)
        report.programs_per_sm = min(programs, programs_per_sm(report, threads // 32, arch))
        report.load_bits, report.store_bits = widths(code, "LDG"), widths(code, "STG")
        report.instructions_per_byte = round(instructions, 2)
        in_flight = report.programs_per_sm * threads * bytes_asked
        fraction = min(1.0, INSTRUCTIONS_PER_BYTE / instructions, in_flight / BYTES_IN_FLIGHT)
        report.bandwidth_fraction = round(fraction, 2)
        found.append(report)
    return found


def read_compress24(code: Code, word: str, layout: str, wide: str) -> tuple[str, int, int, float, float]:
    """(name, threads, programs on an SM, instructions a byte, bytes a thread asks for at once).

    No loop is on its main path: a thread takes 4 rows of 16 columns. Every instruction counts, rare paths too.
    """
    itemsize = 4 if word == "j" else 2
    asked, moved = 4 * 16 * itemsize, 4 * (24 * itemsize + 2)
    name = f"compress24 {8 * itemsize}-bit {LAYOUTS[int(layout)]}{'' if wide == '1' else ', odd rows'}"
    return name, 256, PROGRAMS, len(code.listing) / moved, asked


def read_product(code: Code, walking: str | None, dtype: str, tiles: str) -> tuple[str, int, int, float, float]:
    """The same of a product with 8 tokens a tile: its loop over W, whose bytes are all but a few of those it reads.

    A step of a warp takes 16 rows of 64 columns, 36 bytes a lane, and two mma.sp a tile. Dynamic shared memory
    leaves room for two programs, or a walking one.
    """
    instructions, products = innermost_loop(code, "HMMA")
    step_bytes = 36 * products / (2 * int(tiles))
    name = f"sparse_linear {dtype}, {8 * int(tiles)} tokens{', walking' if walking else ''}"
    return name, 1024 if walking else 512, 1 if walking else 2, instructions / step_bytes, step_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description="Static roofline of the GPU kernels; needs no GPU.")
    parser.add_argument("--arch", type=int, choices=(80, 90), default=90)
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    parser.add_argument("--only", action="append", help="kernels whose name begins so; may be repeated")
    options = parser.parse_args()
    wanted = tuple(options.only or [""])
    reports = [analyse(case, options.arch) for case in cases() if case.name.startswith(wanted)]
    reports += [report for report in cuda_reports(options.arch) if report.name.startswith(wanted)]
    if not options.json:
        print(
            f"triton {triton.__version__}, sm_{options.arch}; limit {INSTRUCTIONS_PER_BYTE} thread-instructions a byte"
        )
        print(f"{'kernel':50} reg spill shared prog/SM instr/B bytes/min of peak  loads, stores (bits: count)")
        for r in reports:
            print(
                f"{r.name:50} {r.registers:3} {r.spill_bytes:5} {r.shared_bytes:6} {r.programs_per_sm:7} "
                f"{r.instructions_per_byte:7} {r.bytes_ratio:9} {r.bandwidth_fraction:7}  {r.load_bits} {r.store_bits}"
            )
        if not options.only and not any(r.name.startswith("cuda") for r in reports):
            print("wandapp._CUDA is not built: CUDA kernels left out")
    print(json.dumps({"triton": triton.__version__, "arch": options.arch, "kernels": [asdict(r) for r in reports]}))


if __name__ == "__main__":
    main()
