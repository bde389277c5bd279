"""The command `wandapp bench kernels`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from wandapp.cli_options import Device, Json, writable
from wandapp.cli_packed import bench
from wandapp.console import Output
from wandapp.errors import WandappError, nearest

MAX_WEIGHTS = 1 << 30  # several copies of them, in 4 bytes each, are in memory at once


@bench.command("kernels")
def bench_kernels_command(
    model: Annotated[
        str | None, typer.Argument(help="whose layer shapes: llama-7b (default), smollm2, ..., or a local folder")
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="a shape, OUTxIN, instead of a model; may be repeated")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="a group of ops, e.g. selection; may be repeated")] = None,
    backend: Annotated[list[str] | None, typer.Option(help="cpu, triton or cuda; left out: all that run here")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="of the weights [float32 bfloat16]; may be repeated")] = None,
    device: Device = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="torch's threads on the CPU")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="turns that every case gets, slow ones fewer")] = 15,
    out: Annotated[Path | None, typer.Option(help="write the figures to this file, as JSON", callback=writable)] = None,
    json_only: Json = False,
) -> None:
    """Time every op and backend on a model's real layer shapes, beside a copy and beside torch's operations."""
    import torch

    from wandapp.bench_kernel_cases import GROUPS
    from wandapp.bench_kernels import bench_kernels
    from wandapp.devices import resolve_device, resolve_dtype
    from wandapp.kernels.dispatch import forced_backend
    from wandapp.layer_shapes import layer_shapes

    output = Output(json_only)
    for name in only or ():
        if name not in GROUPS:
            raise WandappError(f"--only {name}: no such group of ops; {nearest(name, GROUPS)}")
    if model and shape:
        raise WandappError(f"give a model or --shape, not both; got {model} and --shape {shape[0]}")
    shapes = {_shape(text): [] for text in shape} if shape else layer_shapes(model or "llama-7b")
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    result = bench_kernels(
        shapes,
        output,
        dtypes=[resolve_dtype(name) for name in dtype or ("float32", "bfloat16")],
        device=resolve_device(device),
        groups=only or (),
        backends=[name for name in map(forced_backend, backend or ()) if name],
        rounds=rounds,
    )
    result = {"model": model or (None if shape else "llama-7b"), **result}
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    output.finish(result)


def _shape(text: str) -> tuple[int, int]:
    sides = [int(side) for side in text.split("x") if side.isdecimal()]
    if len(sides) != 2 or not all(sides) or sides[1] % 8:
        raise WandappError(f"--shape is OUTxIN with IN divisible by 8, such as 11008x4096, got {text}")
    if sides[0] * sides[1] > MAX_WEIGHTS:
        raise WandappError(f"--shape {text}: {sides[0] * sides[1]:.1e} weights, of which {MAX_WEIGHTS} are the most")
    return sides[0], sides[1]
