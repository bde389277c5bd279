"""wandapp beside the original implementations on the same model, tokens, threads and machine: seconds, masks, perplexity.

    python benchmarks/bench_peers.py --model smollm2 --tokens c4.safetensors --wanda ../wanda --sparsegpt ../sparsegpt \\
        --wandaplus ../wandaplus --samples 16 --blocks 2

--wanda, --sparsegpt and --wandaplus are git checkouts of locuslab/wanda, IST-DASLab/sparsegpt and TTTTTTris/wandaplus;
a row is made for every method whose checkout is given. The model is a Llama; only its first --blocks blocks exist for
either side. Each run is a process of its own that loads the model in fp32, prunes on the CPU and is timed without loading
and imports; sides take turns. Wanda++ runs as published on both sides: alpha 100, learning rate 3e-7, the same rounds and
samples. `equal masks`: share of weights that are zero, or not, on both sides; in the first block / in all.
`matmul` is the rate of square products around each run, which drifts on shared machines: where the two sides differ, so
do the seconds. CPU seconds (of all threads; set OMP_WAIT_POLICY=passive, or idle threads spin) suffer less from other load.
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from peer_code import CPU, ORIGINALS, Job, at_home
from safetensors import safe_open
from safetensors.torch import save_file

import wandapp
from wandapp.blocks import find_blocks, find_linears
from wandapp.calibration import load_calibration
from wandapp.memory import peak_resident_bytes
from wandapp.models import load_model
from wandapp.pattern import SparsityPattern
from wandapp.report import MachineRate, versions

HEADER = """\
                  seconds                 CPU seconds       matmul GFLOP/s      peak MiB       equal masks      perplexity
method      original    ours  ratio original    ours  ratio original  ours original  ours   first     all original    ours"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a Llama: folder, hub id or .gguf file")
    parser.add_argument("--tokens", required=True, help=".safetensors or .npy file of token ids [samples, seq_len]")
    parser.add_argument("--samples", type=int, help="use the first so many; default: all")
    parser.add_argument("--blocks", type=int, help="keep only the model's first so many blocks; default: all")
    for name, repository in (
        ("wanda", "locuslab/wanda"),
        ("sparsegpt", "IST-DASLab/sparsegpt"),
        ("wandaplus", "TTTTTTris/wandaplus"),
    ):
        parser.add_argument(f"--{name}", metavar="FOLDER", help=f"git checkout of {repository}")
    parser.add_argument("--methods", nargs="+", choices=ORIGINALS, help="default: all whose checkout is given")
    parser.add_argument("--sparsity", default="2:4")
    parser.add_argument("--ro-rounds", type=int, default=5)
    parser.add_argument("--ro-samples", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=1, help="runs of each side, in turns; medians are shown")
    parser.add_argument("--text", help="also measure both perplexities on this text")
    parser.add_argument("--windows", type=int, default=80, help="of --text, each as long as a sample")
    parser.add_argument("--out", help="append the rows to this .jsonl file")
    arguments = parser.parse_args()
    given = [name for name, original in ORIGINALS.items() if getattr(arguments, original.option)]
    arguments.methods = arguments.methods or given
    if not arguments.methods or set(arguments.methods) - set(given):
        parser.error("each method needs its checkout: --wanda, --sparsegpt or --wandaplus")
    if "wanda++" in arguments.methods and not SparsityPattern.parse(arguments.sparsity).is_structured:
        parser.error("the Wanda++ reproduction removes whole columns where unstructured: give an n:m --sparsity")
    return arguments


def run(side: str, job: Job, arguments: argparse.Namespace, weights: str) -> dict:
    """One side's figures, in a process of its own; the pruned maps are written to the file `weights`."""
    model, tokenizer = load_model(arguments.model, dtype="float32")
    name, blocks = find_blocks(model)
    if arguments.blocks:
        del blocks[arguments.blocks :]
        model.config.num_hidden_layers = len(blocks)
    rate = MachineRate(CPU, torch.float32)
    rate.sample()
    figures = prune_original(model, job, arguments) if side == "original" else prune_ours(model, job)
    rate.sample()
    figures |= {"matmul_gflops": rate.gflops, "peak_mib": peak_resident_bytes() / 2**20}
    save_file({key: view.weight.contiguous() for key, view in find_linears(blocks, name).items()}, weights)
    if arguments.text:
        options = {"text": arguments.text, "seq_len": job.tokens.shape[1], "windows": arguments.windows}
        figures["perplexity"] = wandapp.perplexity(model, tokenizer, **options).perplexity
    return figures


def prune_original(model: torch.nn.Module, job: Job, arguments: argparse.Namespace) -> dict:
    original = ORIGINALS[job.method]
    checkout = str(Path(getattr(arguments, original.option)).resolve())
    with at_home(checkout), original.prepared(model, job) as prune:
        return timed(prune)


def prune_ours(model: torch.nn.Module, job: Job) -> dict:
    options = {"method": job.method, "sparsity": job.pattern, "preset": "paper", "seed": job.seed, "device": "cpu"}
    if job.method == "wanda++":
        options |= {"ro_rounds": job.ro_rounds, "ro_samples": job.ro_samples}
    return timed(partial(wandapp.prune, model, calibration=job.tokens, **options))


def timed(prune: Callable[[], object]) -> dict:
    """Wall time, and CPU time of all threads, which other programs' load changes less."""
    start, cpu_start = time.perf_counter(), time.process_time()
    prune()
    return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}


def equal_masks(first: str, second: str) -> tuple[float, float]:
    """Share of weights that both files have as zero or both have not: in the first block, and in all."""
    equal, total = Counter(), Counter()
    with safe_open(first, "pt") as ours, safe_open(second, "pt") as theirs:
        for name in ours.keys():
            same = (ours.get_tensor(name) == 0) == (theirs.get_tensor(name) == 0)
            block = name.split(".")[2]  # model.layers.0.mlp.up_proj
            equal[block] += same.sum().item()
            total[block] += same.numel()
    return equal["0"] / total["0"], equal.total() / total.total()


def compare(job: Job, arguments: argparse.Namespace) -> dict:
    """One row: both sides in turns."""
    runs: dict[str, list[dict]] = {"original": [], "ours": []}
    with tempfile.TemporaryDirectory() as folder:
        weights = {side: f"{folder}/{side}.safetensors" for side in runs}
        for _ in range(arguments.repeats):
            for side, done in runs.items():
                spawn = multiprocessing.get_context("spawn")
                with ProcessPoolExecutor(1, spawn) as process:
                    done.append(process.submit(run, side, job, arguments, weights[side]).result())
        first, all_blocks = equal_masks(*weights.values())
    medians = {side: {key: statistics.median(d[key] for d in done) for key in done[0]} for side, done in runs.items()}
    return {
        "method": job.method,
        "ratio": medians["original"]["seconds"] / medians["ours"]["seconds"],
        "cpu_ratio": medians["original"]["cpu_seconds"] / medians["ours"]["cpu_seconds"],
        **medians,
        "equal_masks": all_blocks,
        "equal_masks_first_block": first,
        "all_seconds": {side: [figures["seconds"] for figures in done] for side, done in runs.items()},
    }


def circumstances(job: Job, arguments: argparse.Namespace) -> dict:
    """What a row depends on beside the machine."""
    original = ORIGINALS[job.method]
    checkout = getattr(arguments, original.option)
    describe = ["git", "-C", checkout, "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip() or "no git checkout"
    return {
        "sparsity": str(job.pattern), "samples": len(job.tokens), "seq_len": job.tokens.shape[1],
        "blocks": arguments.blocks or "all", "model": Path(arguments.model).name, "threads": torch.get_num_threads(),
        "ro": [job.ro_rounds, job.ro_samples] if job.method == "wanda++" else None,
        "text": [Path(arguments.text).name, arguments.windows] if arguments.text else None,
        "original_code": original.whose, "commit": commit, "shims": original.shims, "versions": versions(),
    }  # fmt: skip


def main() -> None:
    arguments = parse_arguments()
    tokens = load_calibration(arguments.tokens, None, samples=arguments.samples).tokens
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(
        f"{arguments.model}, {arguments.blocks or 'all'} blocks, fp32, {arguments.sparsity}, tokens {list(tokens.shape)}\n"
    )
    print(HEADER)
    rows = []
    for method in arguments.methods:
        job = Job(
            method, SparsityPattern.parse(arguments.sparsity), tokens, arguments.seed, arguments.ro_rounds,
            min(arguments.ro_samples, len(tokens)),
        )  # fmt: skip
        row = compare(job, arguments) | circumstances(job, arguments)
        rows.append(row)
        print(line(row), flush=True)
        if arguments.out:
            with open(arguments.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    print()
    for row in rows:
        print(f"{row['method']}: code of {row['original_code']}, {row['commit']}; " + "; ".join(row["shims"]))
    for row in rows:
        print(json.dumps(row))


def line(row: dict) -> str:
    """A row of the table."""
    theirs, ours = row["original"], row["ours"]
    perplexities = "".join(f" {side['perplexity']:8.2f}" for side in (theirs, ours) if "perplexity" in side)
    return (
        f"{row['method']:10} {theirs['seconds']:9.2f} {ours['seconds']:7.2f} {row['ratio']:5.2f}x "
        f"{theirs['cpu_seconds']:8.2f} {ours['cpu_seconds']:7.2f} {row['cpu_ratio']:5.2f}x "
        f"{theirs['matmul_gflops']:8.1f} {ours['matmul_gflops']:5.1f} {theirs['peak_mib']:8.0f} {ours['peak_mib']:5.0f} "
        f"{row['equal_masks_first_block']:7.4f} {row['equal_masks']:7.4f}{perplexities}"
    )


if __name__ == "__main__":
    main()
