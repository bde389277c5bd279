"""The commands around packed checkpoints: pack, unpack, bench inference."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from wandapp import cli_hub
from wandapp.cli_options import (
    Device,
    Dtype,
    Json,
    Overwrite,
    Private,
    PrunedFolder,
    PushToHub,
    RequireSparse,
    Skip,
    Sparsity,
    picture,
)
from wandapp.console import Output

commands = typer.Typer()


@commands.command("pack")
def pack_command(
    folder: PrunedFolder,
    out: Annotated[Path, typer.Argument(help="folder for the packed checkpoint")],
    sparsity: Sparsity = None,
    skip: Skip = None,
    storage: Annotated[
        str, typer.Option(help="same, or int8: a byte per kept weight and a scale per row; lossy")
    ] = "same",
    overwrite: Overwrite = False,
    push_to_hub: PushToHub = None,
    private: Private = False,
    json_only: Json = False,
) -> None:
    """Store a pruned checkpoint as kept weights and bitmasks, about half the size."""
    output = Output(json_only)
    cli_hub.check_push(push_to_hub, private)
    sizes = pack_and_show(folder, out, output, sparsity, tuple(skip) if skip else None, overwrite, storage)
    output.finish({**sizes, **cli_hub.push_and_show(out, push_to_hub, private, output)})


def pack_and_show(
    folder: Path,
    out: Path,
    output: Output,
    sparsity: str | None = None,
    skip: tuple[str, ...] | None = None,
    overwrite: bool = False,
    storage: str = "same",
) -> dict[str, Any]:
    """Pack `folder` into `out`, showing the file in work and then the sizes; the figures."""
    from wandapp.packing import pack_checkpoint

    with output.progress("packing: file") as update:
        options: dict[str, Any] = {"sparsity": sparsity, "skip": skip, "storage": storage, "overwrite": overwrite}
        summary = pack_checkpoint(folder, out, **options, on_progress=update)
    if summary.negative_zeros:
        output.warn(f"{summary.negative_zeros} weights were -0.0; unpacked they are +0.0")
    return _show(summary, out, output)


def check_packed_output(recipe: Any, resume: bool) -> tuple[Path | None, bool]:
    """Where `prune --pack` writes the packed form, after a check that it can, and whether it replaces what is there.

    A run that was killed after its last rename and is resumed finds its own packed form; it is made again.
    """
    from wandapp.output import check_output

    if recipe.out is None:
        return None, False  # pruning will say that it needs one
    out, packed = Path(recipe.out), Path(f"{recipe.out}-packed")
    recipes = [folder / "wandapp" / "recipe.yaml" for folder in (out, packed)]
    is_own = resume and all(file.is_file() for file in recipes) and recipes[0].read_bytes() == recipes[1].read_bytes()
    check_output(packed, recipe.overwrite or is_own, recipe.model)
    return packed, recipe.overwrite or is_own


@commands.command("unpack")
def unpack_command(
    packed: Annotated[Path, typer.Argument(help="folder of a packed checkpoint")],
    out: Annotated[Path, typer.Argument(help="folder for the dense checkpoint")],
    overwrite: Overwrite = False,
    json_only: Json = False,
) -> None:
    """Restore the dense checkpoint that was packed: bit for bit, or from int8 storage its rounded weights."""
    from wandapp.packing import unpack_checkpoint

    output = Output(json_only)
    with output.progress("unpacking: file") as update:
        summary = unpack_checkpoint(packed, out, overwrite=overwrite, on_progress=update)
    if summary.storage == "int8":
        output.warn("int8 storage is lossy: these are the rounded weights, not those that were packed")
    output.finish(_show(summary, out, output))


def _show(summary: Any, out: Path, output: Output) -> dict[str, Any]:
    output.rows(
        {
            "pattern": f"{summary.pattern}, {summary.linears} linear maps packed, {summary.kept_dense} tensors dense",
            "linear maps": _sizes(summary.linear_dense_bytes, summary.linear_packed_bytes),
            "all tensors": _sizes(summary.dense_bytes, summary.packed_bytes),
            **_rounding(summary),
            "saved": str(out),
        }
    )
    return {"out": str(out), **vars(summary)}


def _rounding(summary: Any) -> dict[str, str]:
    if summary.worst_error is None:
        return {}
    worst = f"worst {summary.worst_error:.2%} in {summary.worst_linear}"
    return {"rounded to int8": f"||W - W'|| / ||W|| is {summary.mean_error:.2%} in the mean, {worst}"}


def _sizes(dense: int, packed: int) -> str:
    return f"{dense / 2**20:.1f} MiB dense, {packed / 2**20:.1f} MiB packed ({packed / max(dense, 1):.2%})"


bench = typer.Typer(help="Measure on this machine.", no_args_is_help=True)  # cli_bench.py adds to it


class Peer(StrEnum):
    """Runtimes to compare with."""

    llama_cpp = "llama.cpp"


@bench.command("inference")
def bench_inference_command(
    folder: Annotated[Path, typer.Argument(help="folder of a packed or a pruned checkpoint")],
    dtype: Dtype = "auto",
    device: Device = "auto",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="tokens of each prompt")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, help="tokens to write")] = 32,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="batch sizes [1 4 16]")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="turns that dense and sparse take")] = 3,
    require_sparse: RequireSparse = False,
    compare: Annotated[list[Peer] | None, typer.Option(help="measure another runtime too: llama.cpp")] = None,
    plot: Annotated[Path | None, typer.Option(help="write a plot (.png or .svg)", callback=picture)] = None,
    json_only: Json = False,
) -> None:
    """Compare dense and sparse: load time, memory, prefill, decode, kernels, agreement.

    wandapp bench inference packed --plot decode.png
    """
    from wandapp.bench_inference import bench_inference

    output = Output(json_only)
    options: dict[str, Any] = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "rounds": rounds, "plot": plot}
    options |= {"dtype": dtype, "device": device, "require_sparse": require_sparse, "compare": bool(compare)}
    result = bench_inference(folder, output, batches=batch or (1, 4, 16), **options)
    output.finish(result)
