"""What `wandapp bench inference` prints and draws of its figures."""

from pathlib import Path
from typing import Any

from wandapp.console import Output
from wandapp.errors import WandappError


def show_inference(result: dict[str, Any], output: Output, prompt_tokens: int, new_tokens: int) -> None:
    """Figures of every runner, kernels by shape, and how far the texts agree."""
    output.result(f"\n{result['model']}, {result['dtype']}: {prompt_tokens} tokens of prompt, {new_tokens} written")
    runners = result["rows"]
    dense, sparse = runners["dense"], runners["sparse"]
    rows = []
    for name in dense:
        faster = "tokens" in name
        gain = sparse[name] / dense[name] if faster else dense[name] / max(sparse[name], 1e-9)
        figures = [f"{runner[name]:.1f}" if name in runner else "-" for runner in runners.values()]
        rows.append([name, *figures, f"{gain:.2f}x"])
    output.table(["", *runners, "sparse is better than dense by"], rows)
    output.result("")
    kernels = result["kernels"]
    output.table(list(kernels[0]), [[str(value) for value in row.values()] for row in kernels])
    for tokens, (run_dense, every) in result["dense_fallbacks"].items():
        output.warn(f"{tokens} tokens: {run_dense} of {every} packed linear maps run dense, which was faster here")
    output.result("")
    for name, a in result["agreement"].items():
        output.result(
            f"greedy, {name} beside dense: {a['identical_texts']} of {a['texts']} texts identical, together for "
            f"{a['tokens_until_they_part']:.1f} of {a['of_tokens']} tokens"
        )
    if compared := result.get("llama.cpp"):
        output.result(
            f"llama.cpp: llama-cpp-python {compared['version']}, {compared['weights']}, {compared['precision']}"
        )


def plot_inference(result: dict[str, Any], path: Path) -> None:
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
