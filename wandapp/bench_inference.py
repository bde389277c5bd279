"""How fast and how small is the packed model? Dense and sparse side by side, with the same prompts, through `generate`.

The two take turns, round by round, so that a machine that drifts drifts for both: compare figures of one run only.
Loading is measured in a process of its own per form, because memory that one has touched would hide in the other's.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from wandapp.bench_inference_output import plot_inference, show_inference
from wandapp.bench_llama_cpp import LlamaCpp, require_llama_cpp
from wandapp.console import Output
from wandapp.corpus import builtin_text
from wandapp.doctor import describe_machine, examine
from wandapp.errors import WandappError
from wandapp.inference import dense_fallbacks, load_either
from wandapp.kernels.pack import pack
from wandapp.models import load_tokenizer, resolve_device, skeleton
from wandapp.modules import SparseLinear, TokenLinear
from wandapp.packing import pack_checkpoint, unpack_checkpoint
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
        loading = {name: _measure_loading(path, dtype, place) for name, path in folders.items()}
        dense = load_either(str(folders["dense"]), dtype=dtype, device=str(place)).model
        sparse = load_either(
            str(folders["sparse"]), dtype=dtype, device=str(place), require_sparse=require_sparse
        ).model
        models = {"dense": dense, "sparse": sparse}
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
    result["agreement"] = {name: _agreement(runners["dense"], runners[name], few, new_tokens) for name in runners}
    del result["agreement"]["dense"]
    show_inference(result, output, prompt_tokens, new_tokens)
    if plot:
        plot_inference(result, plot)
        output.result(f"plot: {plot}")
    return result


def _dtype_name(model: nn.Module) -> str:
    return str(model.dtype).removeprefix("torch.")


class Runner(Protocol):
    """A model that reads a prompt [batch, tokens] and continues it."""

    max_batch: int

    def prefill(self, tokens: Tensor) -> None: ...

    def generate(self, tokens: Tensor, new_tokens: int) -> tuple[Tensor, list[float]]: ...


class TorchModel:
    """A transformers model, run by its own `generate`."""

    max_batch = sys.maxsize

    def __init__(self, model: nn.Module):
        self.model = model

    @torch.inference_mode()
    def prefill(self, tokens: Tensor) -> None:
        self.model(tokens, logits_to_keep=1)
        _wait_for(tokens.device)

    def generate(self, tokens: Tensor, new_tokens: int) -> tuple[Tensor, list[float]]:
        """Greedy continuation [batch, new_tokens], and the milliseconds from each forward's end to the next one's."""
        ends: list[float] = []

        def on_forward(*_: Any) -> None:
            _wait_for(tokens.device)
            ends.append(time.perf_counter())

        hook = self.model.register_forward_hook(on_forward)
        try:
            with torch.inference_mode():
                written = self.model.generate(
                    tokens,
                    attention_mask=torch.ones_like(tokens),
                    max_new_tokens=new_tokens,
                    min_new_tokens=new_tokens,
                    do_sample=False,
                    pad_token_id=0,
                )
        finally:
            hook.remove()
        return written[:, tokens.shape[1] :], [(later - earlier) * 1e3 for earlier, later in pairwise(ends)]


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _both_forms(folder: Path, scratch: Path) -> dict[str, Path]:
    if is_packed(folder):
        unpack_checkpoint(folder, scratch / "dense")
        return {"dense": scratch / "dense", "sparse": folder}
    pack_checkpoint(folder, scratch / "packed")
    return {"dense": folder, "sparse": scratch / "packed"}


def _measure_loading(folder: Path, dtype: str, device: torch.device) -> dict[str, float]:
    options = [str(folder), dtype, str(device), str(torch.get_num_threads())]
    child = subprocess.run([sys.executable, "-m", "wandapp.bench_inference", *options], capture_output=True, text=True)
    if child.returncode:
        raise WandappError(f"{folder}: loading it in a process of its own failed: {child.stderr.strip()[-300:]}")
    return json.loads(child.stdout.splitlines()[-1])


def _load_and_tell(folder: str, dtype: str, device: str, threads: str) -> None:
    """The child of `_measure_loading`."""
    torch.set_num_threads(int(threads))
    _warm_up(skeleton(folder))  # libraries and their threads are not the model's memory
    before, start = _resident_mib(device), time.perf_counter()
    model = load_either(folder, dtype=dtype, device=device).model
    seconds = time.perf_counter() - start
    with torch.inference_mode():
        model(torch.zeros(1, 1, dtype=torch.int64, device=device))  # mapped files become resident when they are read
    print(json.dumps({"load_seconds": seconds, "resident_mib": _resident_mib(device) - before}))


def _warm_up(skeleton: nn.Module) -> None:
    """Has torch and our kernels load what any first product loads."""
    for dtype in (torch.float32, skeleton.dtype):
        x = torch.ones(1, 4, 32, 32, dtype=dtype)
        nn.functional.scaled_dot_product_attention(nn.functional.linear(x, x[0, 0]), x, x)
        SparseLinear(pack(torch.eye(32, dtype=dtype), n=2, m=4))(x)


def _resident_mib(device: str) -> float:
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


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
        _wait_for(device)

    copy()
    copies = [_seconds(copy) for _ in range(5)]
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
        kernels = {f"{tokens} tokens": _kernel_of(module, tokens) for tokens in (1, 16, 17)}
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
    prefill = _in_turns(runners, rounds, lambda runner: [_seconds(lambda: runner.prefill(tokens[:1])) * 1e3])
    for name, milliseconds in prefill.items():
        rows[name]["prefill_ms"] = median(milliseconds)
    for batch in batches:
        able = {name: runner for name, runner in runners.items() if runner.max_batch >= batch}
        steps = _in_turns(able, rounds, lambda runner: runner.generate(tokens[:batch], new_tokens)[1])  # noqa: B023
        for name, milliseconds in steps.items():
            rows[name][f"step_ms_batch_{batch}"] = median(milliseconds)
            rows[name][f"step_p90_ms_batch_{batch}"] = sorted(milliseconds)[int(0.9 * len(milliseconds))]
            rows[name][f"tokens_per_s_batch_{batch}"] = 1e3 * batch / median(milliseconds)
    return rows


def _weight_bytes(model: nn.Module) -> int:
    return sum({id(tensor): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}.values())


def _in_turns(
    runners: dict[str, Runner], rounds: int, measure: Callable[[Runner], list[float]]
) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(rounds + 1):  # the first turn warms up
        for name, runner in runners.items():
            found = measure(runner)
            if turn:
                taken[name] += found
    return taken


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _agreement(reference: Runner, other: Runner, tokens: Tensor, new_tokens: int) -> dict[str, float]:
    """How far the two write the same: a text that has parted once does not come together again."""
    tokens = tokens[: other.max_batch]
    together = (reference.generate(tokens, new_tokens)[0] == other.generate(tokens, new_tokens)[0]).int().cumprod(1)
    return {
        "texts": len(tokens),
        "identical_texts": int(together[:, -1].sum()),
        "tokens_until_they_part": float(together.sum(1).float().mean()),
        "of_tokens": new_tokens,
    }


if __name__ == "__main__":
    _load_and_tell(*sys.argv[1:])
