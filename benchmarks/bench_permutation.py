"""What --permute gives and costs: score kept, errors, seconds, and perplexity, with and without it.

    python benchmarks/bench_permutation.py --calibration C4.jsonl --text wiki.test.raw      # SmolLM2-135M, whole
    python benchmarks/bench_permutation.py --calibration C4.jsonl --blocks 4                # its first four blocks, no perplexity
    python benchmarks/bench_permutation.py --search 4096 11008                              # the search alone, one weight

layer errors are ||X W^T - X W'^T|| / ||X W^T|| of the maps whose inputs are permuted, on the first sample's leading tokens.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import torch

import wandapp
from wandapp.blocks import find_blocks
from wandapp.channel_order import best_order
from wandapp.models import load_model


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--methods", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument("--sparsity", default="2:4")
    parser.add_argument("--calibration", default="pydoc")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--blocks", type=int, help="leading blocks to prune; default: all")
    parser.add_argument("--text", help="source of text for the perplexity of the whole model")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument(
        "--search", type=int, nargs=2, metavar=("ROWS", "COLUMNS"), help="time the search for one weight"
    )
    parser.add_argument("--out", help="append the rows to this .jsonl file")
    return parser.parse_args()


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def measured(options: argparse.Namespace, method: str, permute: bool, names: set[str]) -> dict:
    """One run; `names`, filled by a run that permutes, are the maps whose errors count."""
    model, tokenizer = load_model(options.model)
    if options.blocks:
        prefix, blocks = find_blocks(model)
        model.set_submodule(prefix, blocks[: options.blocks])
    report = wandapp.prune(
        model, tokenizer, method=method, sparsity=options.sparsity, calibration=options.calibration,
        samples=options.samples, seq_len=options.seq_len, permute=permute,
    )  # fmt: skip
    names |= {name for block in report.blocks for name in block.kept_score}
    row = {"method": method, "sparsity": options.sparsity, "samples": options.samples, "blocks": len(report.blocks)}
    row |= {"permute": permute, "seconds": report.seconds, "permute_s": sum(b.permute_seconds for b in report.blocks)}
    for kind in sorted({name.rpartition(".")[2] for name in names if not name[-1].isdigit()}):
        of_kind = [name for name in names if name.endswith(kind)]
        row[f"layer error {kind}"] = mean(e for b in report.blocks for n, e in b.layer_errors.items() if n in of_kind)
        if permute:
            kept = [pair for block in report.blocks for name, pair in block.kept_score.items() if name in of_kind]
            row[f"kept {kind}"] = [mean(pair[place] for pair in kept) for place in (0, 1)]
    row["block error"] = mean(block.error for block in report.blocks)
    if options.text and not options.blocks:
        result = wandapp.perplexity(
            model, tokenizer, text=options.text, seq_len=options.seq_len, windows=options.windows
        )
        row |= {"perplexity": result.perplexity, "windows": options.windows, "text": result.text}
    return row


def searched(rows: int, columns: int) -> dict:
    """The search on scores of random heavy-tailed weights, as the MLP's last map of a large model has them."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.randn(columns, 1, generator=generator).mul_(0.5).exp_()
    score = torch.randn(columns, rows, generator=generator).abs_().mul_(scale)
    start = time.perf_counter()
    order = best_order(score, n=2, m=4)
    kept = [order.kept_before / order.total, order.kept / order.total]
    return {"search": [rows, columns], "seconds": time.perf_counter() - start, "kept": kept}


def main() -> None:
    options = parse_arguments()
    machine = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    machine |= {"load": os.getloadavg()[0], "cores": os.cpu_count()}
    print(machine, flush=True)
    rows = []
    if options.search:
        rows.append(searched(*options.search) | machine)
        print(json.dumps(rows[-1]))
    for method in [] if options.search else options.methods:
        names: set[str] = set()
        for permute in (True, False):
            rows.append(measured(options, method, permute, names) | machine)
            print(json.dumps(rows[-1]), flush=True)
    if options.out:
        with Path(options.out).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
