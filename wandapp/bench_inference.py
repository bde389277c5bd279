"""How fast and how small is the packed model? Dense and sparse side by side, with the same prompts, through `generate`.

The two take turns, round by round, so that a machine that drifts drifts for both: compare figures of one run only.
"""

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from wandapp.bench_inference_loading import measure_loading
from wandapp.bench_inference_output import plot_inference, show_inference
from wandapp.bench_inference_runners import Runner, TorchModel, agreement, in_turns, seconds_of, wait_for
from wandapp.bench_llama_cpp import LlamaCpp, require_llama_cpp
from wandapp.console import Output
from wandapp.corpus import builtin_text
from wandapp.devices import resolve_device
from wandapp.doctor import describe_machine, examine
from wandapp.errors import WandappError
from wandapp.inference import dense_fallbacks, load_either
from wandapp.modules import SparseLinear, TokenLinear
from wandapp.packing import pack_checkpoint, unpack_checkpoint
from wandapp.tokenizer import check_room, load_tokenizer
from wandapp.weight_files import is_packed

COPY_BYTES = 256 << 20


def bench_inference(
    folder: str | Path,
    output: Output,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    batches: Sequence[int] = (1, 4, 16),
    rounds: int = 3,
    require_sparse: bool = False,
    compare: bool = False,
    plot: Path | None = None,
) -> dict[str, Any]:
    """Figures of the checkpoint in `folder`, packed or pruned, as they are printed; the other form is made in passing.

    compare  measure llama.cpp too, on the dense weights at the same precision
    """
    if compare:
        require_llama_cpp()
    place = resolve_device(device)
    if not Path(folder).is_dir():
        raise WandappError(f"{folder}: no such folder; give a pruned or a packed checkpoint")
    result: dict[str, Any] = {"model": str(folder), "machine": _show_machine(output)}
    with tempfile.TemporaryDirectory() as scratch:
        folders = _both_forms(Path(folder), Path(scratch))
        loading = {name: measure_loading(path, dtype, place) for name, path in folders.items()}
        dense = load_either(str(folders["dense"]), dtype=dtype, device=str(place)).model
        sparse = load_either(
            str(folders["sparse"]), dtype=dtype, device=str(place), require_sparse=require_sparse
        ).model
        models = {"dense": dense, "sparse": sparse}
        check_room(dense, prompt_tokens, new_tokens, "--new-tokens")
        tokens = _prompts(load_tokenizer(folder), dense, max(batches), prompt_tokens).to(place)
        runners: dict[str, Runner] = {name: TorchModel(model) for name, model in models.items()}
        if compare:
            runners["llama.cpp"] = llama = LlamaCpp(dense, Path(scratch), prompt_tokens + new_tokens)
            loading["llama.cpp"] = {"load_seconds": llama.load_seconds}
            result["llama.cpp"] = {
                "version": llama.version,
                "precision": _dtype_name(dense),
                "weights": "dense, as GGUF",
            }
    result |= {"dtype": _dtype_name(dense), "device": str(place), "ceiling": _show_ceiling(models, place, output)}
    result["rows"] = _rows(runners, models, loading, tokens, new_tokens, batches, rounds)
    result["kernels"], result["dense_fallbacks"] = _kernels(models), dense_fallbacks(sparse)
    few = tokens[: min(4, len(tokens))]
    result["agreement"] = {name: agreement(runners["dense"], runners[name], few, new_tokens) for name in runners}
    del result["agreement"]["dense"]
    show_inference(result, output, prompt_tokens, new_tokens)
    if plot:
        plot_inference(result, plot)
        output.result(f"plot: {plot}")
    return result


def _dtype_name(model: nn.Module) -> str:
    return str(model.dtype).removeprefix("torch.")


def _both_forms(folder: Path, scratch: Path) -> dict[str, Path]:
    if is_packed(folder):
        unpack_checkpoint(folder, scratch / "dense")
        return {"dense": scratch / "dense", "sparse": folder}
    pack_checkpoint(folder, scratch / "packed")
    return {"dense": folder, "sparse": scratch / "packed"}


def _prompts(tokenizer: Any, model: nn.Module, batch: int, length: int) -> Tensor:
    """[batch, length] consecutive pieces of the built-in text; random tokens where there is no tokenizer."""
    if tokenizer is None:
        vocabulary = model.get_input_embeddings().weight.shape[0]
        return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
    text = builtin_text("evaluation")[: batch * length * 12]
    return torch.tensor(tokenizer(text)["input_ids"][: batch * length]).view(batch, length)


def _show_machine(output: Output) -> dict[str, str]:
    machine = describe_machine(examine())
    machine["torch threads"] = str(torch.get_num_threads())
    output.rows(machine)
    return machine


def _show_ceiling(models: dict[str, nn.Module], device: torch.device, output: Output) -> dict[str, float]:
    """What the bytes allow: every weight but the input embedding is read once per step."""
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = source.clone()

    def copy() -> None:
        target.copy_(source)
        wait_for(device)

    copy()
    copies = [seconds_of(copy) for _ in range(5)]
    ceiling = {"copy_gb_per_s": 2 * COPY_BYTES / min(copies) / 1e9}
    output.rows({"copy bandwidth": f"{ceiling['copy_gb_per_s']:.1f} GB/s (read and written)"})
    for name, model in models.items():
        step = ceiling[f"{name}_mib_per_step"] = _bytes_per_step(model) / 2**20
        rate = ceiling[f"{name}_steps_per_s"] = ceiling["copy_gb_per_s"] * 1e9 / (step * 2**20)
        output.rows({f"ceiling, {name}": f"{step:.1f} MiB per step, at most {rate:.1f} steps/s at that bandwidth"})
    ceiling["speedup"] = ceiling["dense_mib_per_step"] / ceiling["sparse_mib_per_step"]
    output.result(f"fewer bytes allow a speedup of {ceiling['speedup']:.2f}")
    return ceiling


def _bytes_per_step(model: nn.Module) -> int:
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    tensors = {id(tensor): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensors.values()) - (0 if embedding is head else embedding.nbytes)


def _kernels(models: dict[str, nn.Module]) -> list[dict[str, Any]]:
    """Which kernel multiplies each shape of the sparse model, and how often a step needs it."""
    linears = [module for module in models["sparse"].modules() if isinstance(module, (SparseLinear, nn.Linear))]
    count = Counter((type(module).__name__, module.out_features, module.in_features) for module in linears)
    one_of = {(type(module).__name__, module.out_features, module.in_features): module for module in linears}
    rows = []
    for (kind, out_features, in_features), times in count.items():
        module = one_of[kind, out_features, in_features]
        kernels = {f"{tokens} tokens": _kernel_of(module, tokens) for tokens in (1, 16, 256)}
        rows.append({"out": out_features, "in": in_features, "count": times, **kernels})
    return rows


def _kernel_of(module: nn.Module, tokens: int) -> str:
    if isinstance(module, SparseLinear):
        return module.kernel(tokens)
    return "dense, wandapp" if isinstance(module, TokenLinear) and tokens == 1 else "dense, torch"


def _rows(
    runners: dict[str, Runner],
    models: dict[str, nn.Module],
    loading: dict[str, dict[str, float]],
    tokens: Tensor,
    new_tokens: int,
    batches: Sequence[int],
    rounds: int,
) -> dict[str, dict[str, float]]:
    """Figures by runner; milliseconds of a step are over all rounds' steps."""
    rows = {name: dict(figures) for name, figures in loading.items()}
    for name, model in models.items():
        rows[name]["weights_mib"] = _weight_bytes(model) / 2**20
    prefill = in_turns(runners, rounds, lambda runner: [seconds_of(lambda: runner.prefill(tokens[:1])) * 1e3])
    for name, milliseconds in prefill.items():
        rows[name]["prefill_ms"] = median(milliseconds)
    for batch in batches:
        able = {name: runner for name, runner in runners.items() if runner.max_batch >= batch}
        steps = in_turns(able, rounds, lambda runner: runner.generate(tokens[:batch], new_tokens)[1])  # noqa: B023
        for name, milliseconds in steps.items():
            rows[name][f"step_ms_batch_{batch}"] = median(milliseconds)
            rows[name][f"step_p90_ms_batch_{batch}"] = sorted(milliseconds)[int(0.9 * len(milliseconds))]
            rows[name][f"tokens_per_s_batch_{batch}"] = 1e3 * batch / median(milliseconds)
    return rows


def _weight_bytes(model: nn.Module) -> int:
    return sum({id(tensor): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}.values())
