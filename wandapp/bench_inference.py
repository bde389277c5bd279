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
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from wandapp.console import Output
from wandapp.corpus import builtin_text
from wandapp.doctor import describe_machine, examine
from wandapp.errors import WandappError
from wandapp.inference import load_either
from wandapp.models import load_tokenizer, skeleton
from wandapp.modules import SparseLinear, TokenLinear
from wandapp.packing import pack_checkpoint, unpack_checkpoint
from wandapp.weight_files import is_packed

COPY_BYTES = 256 << 20


def bench_inference(
    folder: str | Path,
    output: Output,
    *,
    dtype: str = "auto",
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    batches: Sequence[int] = (1, 4, 16),
    rounds: int = 3,
    plot: Path | None = None,
) -> dict[str, Any]:
    """Figures of the checkpoint in `folder`, packed or pruned, as they are printed; the other form is made in passing."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = _both_forms(Path(folder), Path(scratch))
        loading = {name: _measure_loading(place, dtype) for name, place in folders.items()}
        models = {name: load_either(str(place), dtype=dtype).model for name, place in folders.items()}
        tokens = _prompts(load_tokenizer(folder), models["dense"], max(batches), prompt_tokens)
    result = {"model": str(folder), "dtype": str(models["dense"].dtype).removeprefix("torch.")}
    result |= {"machine": _show_machine(output), "ceiling": _show_ceiling(models, output), "kernels": _kernels(models)}
    result["rows"] = _rows(models, loading, tokens, new_tokens, batches, rounds)
    result["agreement"] = _agreement(models, tokens[: min(4, len(tokens))], new_tokens)
    _show(result, output, prompt_tokens, new_tokens)
    if plot:
        _plot(result, plot)
        output.result(f"plot: {plot}")
    return result


def _both_forms(folder: Path, scratch: Path) -> dict[str, Path]:
    if is_packed(folder):
        unpack_checkpoint(folder, scratch / "dense")
        return {"dense": scratch / "dense", "sparse": folder}
    if not folder.is_dir():
        raise WandappError(f"{folder}: no such folder; give a pruned or a packed checkpoint")
    pack_checkpoint(folder, scratch / "packed")
    return {"dense": folder, "sparse": scratch / "packed"}


def _measure_loading(folder: Path, dtype: str) -> dict[str, float]:
    command = [sys.executable, "-m", "wandapp.bench_inference", str(folder), dtype, str(torch.get_num_threads())]
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode:
        raise WandappError(f"{folder}: loading it in a process of its own failed: {child.stderr.strip()[-300:]}")
    return json.loads(child.stdout.splitlines()[-1])


def _load_and_tell(folder: str, dtype: str, threads: str) -> None:
    """The child of `_measure_loading`."""
    torch.set_num_threads(int(threads))
    skeleton(folder)  # the libraries that the model needs are not its memory
    before, start = _resident_mib(), time.perf_counter()
    model = load_either(folder, dtype=dtype).model
    seconds = time.perf_counter() - start
    with torch.inference_mode():
        model(torch.zeros(1, 1, dtype=torch.int64))  # mapped files become resident when they are read
    print(json.dumps({"load_seconds": seconds, "resident_mib": _resident_mib() - before}))


def _resident_mib() -> float:
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


def _show_ceiling(models: dict[str, nn.Module], output: Output) -> dict[str, float]:
    """What the bytes allow: every weight but the input embedding is read once per step."""
    source, target = torch.ones(COPY_BYTES // 4), torch.empty(COPY_BYTES // 4)
    target.copy_(source)
    copies = [_seconds(lambda: target.copy_(source)) for _ in range(5)]
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
    models: dict[str, nn.Module],
    loading: dict[str, dict[str, float]],
    tokens: Tensor,
    new_tokens: int,
    batches: Sequence[int],
    rounds: int,
) -> dict[str, dict[str, float]]:
    """Figures by form; milliseconds of a step are medians over all rounds' steps."""
    rows = {name: dict(loading[name]) | {"weights_mib": _weight_bytes(model) / 2**20} for name, model in models.items()}
    prefill = _in_turns(models, rounds, lambda model: [_seconds(lambda: _forward(model, tokens[:1])) * 1e3])
    for name, milliseconds in prefill.items():
        rows[name]["prefill_ms"] = median(milliseconds)
    for batch in batches:
        steps = _in_turns(models, rounds, lambda model: _generate(model, tokens[:batch], new_tokens)[1])  # noqa: B023
        for name, milliseconds in steps.items():
            rows[name][f"step_ms_batch_{batch}"] = median(milliseconds)
            rows[name][f"step_p90_ms_batch_{batch}"] = sorted(milliseconds)[int(0.9 * len(milliseconds))]
            rows[name][f"tokens_per_s_batch_{batch}"] = 1e3 * batch / median(milliseconds)
    return rows


def _weight_bytes(model: nn.Module) -> int:
    return sum({id(tensor): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}.values())


def _in_turns(
    models: dict[str, nn.Module], rounds: int, measure: Callable[[nn.Module], list[float]]
) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):  # the first turn warms up
        for name, model in models.items():
            found = measure(model)
            if turn:
                taken[name] += found
    return taken


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@torch.inference_mode()
def _forward(model: nn.Module, tokens: Tensor) -> None:
    model(tokens, logits_to_keep=1)


def _generate(model: nn.Module, tokens: Tensor, new_tokens: int) -> tuple[Tensor, list[float]]:
    """Greedy continuation [batch, new_tokens], and the milliseconds from each forward's end to the next one's."""
    ends: list[float] = []
    hook = model.register_forward_hook(lambda *_: ends.append(time.perf_counter()))
    try:
        with torch.inference_mode():
            written = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
    finally:
        hook.remove()
    steps = [(later - earlier) * 1e3 for earlier, later in zip(ends, ends[1:], strict=False)]
    return written[:, tokens.shape[1] :], steps


def _agreement(models: dict[str, nn.Module], tokens: Tensor, new_tokens: int) -> dict[str, float]:
    """How far the two write the same: a text that has parted once does not come together again."""
    dense, sparse = (_generate(models[name], tokens, new_tokens)[0] for name in ("dense", "sparse"))
    together = (dense == sparse).int().cumprod(1)
    return {
        "texts": len(tokens),
        "identical_texts": int(together[:, -1].sum()),
        "tokens_until_they_part": float(together.sum(1).float().mean()),
        "of_tokens": new_tokens,
    }


def _show(result: dict[str, Any], output: Output, prompt_tokens: int, new_tokens: int) -> None:
    output.result(f"\n{result['model']}, {result['dtype']}: {prompt_tokens} tokens of prompt, {new_tokens} written")
    dense, sparse = result["rows"]["dense"], result["rows"]["sparse"]
    rows = []
    for name in dense:
        faster = "tokens" in name
        gain = sparse[name] / dense[name] if faster else dense[name] / max(sparse[name], 1e-9)
        rows.append([name, f"{dense[name]:.1f}", f"{sparse[name]:.1f}", f"{gain:.2f}x"])
    output.table(["", "dense", "sparse", "sparse is better by"], rows)
    output.result("")
    kernels = result["kernels"]
    output.table(list(kernels[0]), [[str(value) for value in row.values()] for row in kernels])
    a = result["agreement"]
    output.result(
        f"\ngreedy: {a['identical_texts']} of {a['texts']} texts identical, together for {a['tokens_until_they_part']:.1f} "
        f"of {a['of_tokens']} tokens"
    )


def _plot(result: dict[str, Any], path: Path) -> None:
    """Tokens per second by batch size, dense beside sparse."""
    try:
        import matplotlib
    except ImportError:
        raise WandappError("--plot needs matplotlib, which is not installed; run: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    prefix = "tokens_per_s_batch_"
    batches = [name.removeprefix(prefix) for name in result["rows"]["dense"] if name.startswith(prefix)]
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for offset, (form, rows) in enumerate(result["rows"].items()):
        rates = [rows[prefix + batch] for batch in batches]
        bars = axes.bar([index + 0.4 * offset for index in range(len(batches))], rates, 0.38, label=form)
        axes.bar_label(bars, fmt="%.0f")
    axes.set_xticks([index + 0.2 for index in range(len(batches))], batches)
    title = f"{Path(result['model']).name}, {result['dtype']}, {result['machine']['torch threads']} threads"
    axes.set(xlabel="batch", ylabel="tokens / s", title=title)
    axes.margins(y=0.1)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    _load_and_tell(*sys.argv[1:])
