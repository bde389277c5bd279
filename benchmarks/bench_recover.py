"""Perplexity of pruned checkpoints before and after recovery training, as a table of the papers' shape and JSON lines.

    python benchmarks/bench_recover.py --checkpoints wanda=out/wanda wanda++=out/wandapp --text c4.jsonl --samples 64 \\
        --seq-len 512 --eval wikitext2:wiki.test.raw held-out.txt --windows 80 --out benchmarks/results/recover.jsonl

A row is one checkpoint and one training; a row that the output file already holds is not made again, and a training that
was killed goes on from its last saved state (OUT.work). `dense` is measured beside them. `--text` is trained on and must not
hold the evaluation texts. Seconds are wall time of the steps alone. The first line states the budget beside the papers'.
"""

import argparse
import json
import os
import platform
import shutil
import time
from pathlib import Path

import torch

from wandapp.evaluate import perplexity
from wandapp.models import load_model
from wandapp.recovery import recover
from wandapp.report import versions

PAPERS_TOKENS = 30_000 * 1024  # arXiv:2306.11695
TRAININGS = {"none": None, "papers": {"preset": "papers"}, "strong": {"preset": "strong"}, "full": {"full": True}}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", default="smollm2", help="the model that was pruned")
    parser.add_argument("--checkpoints", nargs="+", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--trainings", nargs="+", default=["none", "papers", "strong"], choices=TRAININGS)
    parser.add_argument("--text", default="pydoc", help="text to train on")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512, help="of training samples and of evaluation windows")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--accumulate", type=int, default=1, help="forwards per step")
    parser.add_argument("--eval", nargs="+", default=["pydoc"], help="evaluation texts")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", default="recover.jsonl")
    return parser.parse_args()


def measure(reference: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Perplexity by text."""
    model, tokenizer = load_model(reference, device=arguments.device)
    options = {"seq_len": arguments.seq_len, "windows": arguments.windows}
    return {
        Path(text).name: round(perplexity(model, tokenizer, text=text, **options).perplexity, 4)
        for text in arguments.eval
    }


def run(name: str, reference: str, training: str, arguments: argparse.Namespace) -> dict:
    """One row."""
    row = {"checkpoint": name, "training": training, **circumstances(arguments)}
    options = TRAININGS[training]
    if options is None:
        return row | {"perplexity": measure(reference, arguments)}
    work = Path(f"{arguments.out}.work")
    out = work / f"{name}-{training}"
    finished = out / "wandapp" / "recover.json"
    if not finished.is_file():  # else a run that was stopped while it measured
        recover(
            reference, out, text=arguments.text, samples=arguments.samples, seq_len=arguments.seq_len, held_out=1,
            batch_size=arguments.batch_size, accumulate=arguments.accumulate, device=arguments.device, save_every=5,
            resume=True, overwrite=True, **options,
        )  # fmt: skip
    report = json.loads(finished.read_text(encoding="utf-8"))
    figures = ("how", "trained_weights", "tokens", "steps", "seconds", "last_loss", "zeros")
    row |= {name: report[name] for name in figures} | {"share_of_papers_tokens": report["tokens"] / PAPERS_TOKENS}
    row["perplexity"] = measure(str(out), arguments)
    shutil.rmtree(work)
    return row


def circumstances(arguments: argparse.Namespace) -> dict:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "dense": arguments.dense,
        "text": Path(arguments.text).name,
        "samples": arguments.samples,
        "seq_len": arguments.seq_len,
        "batch_size": arguments.batch_size,
        "accumulate": arguments.accumulate,
        "windows": arguments.windows,
        "device": f"{device}, {torch.get_num_threads()} threads",
        "versions": versions("peft"),
    }


def key_of(row: dict, texts: list[str]) -> tuple:
    """What must agree for a row to be the same; of a checkpoint that nobody trains, only what is evaluated."""
    training = (row["text"], row["samples"], row["batch_size"], row.get("accumulate", 1))
    evaluated = (row["checkpoint"], row["training"], row["seq_len"], row["windows"], *sorted(texts))
    return evaluated if row["training"] == "none" else evaluated + training


def print_table(rows: list[dict]) -> None:
    texts = list(rows[-1]["perplexity"])
    print(f"\n{'checkpoint':14} {'training':10} " + " ".join(f"{t[:22]:>22}" for t in texts) + "    tokens  minutes")
    for row in rows:
        cells = " ".join(f"{row['perplexity'].get(text, float('nan')):22.2f}" for text in texts)
        cost = f"{row['tokens']:9} {row['seconds'] / 60:8.1f}" if "tokens" in row else f"{'-':>9} {'-':>8}"
        print(f"{row['checkpoint']:14} {row['training']:10} {cells} {cost}")


def main() -> None:
    arguments = parse_arguments()
    out = Path(arguments.out)
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    print(
        f"{platform.machine()}, {os.cpu_count()} processors, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    tokens = arguments.samples * arguments.seq_len
    print(
        f"budget of a training: {arguments.samples} samples of {arguments.seq_len} tokens = {tokens:,} tokens, "
        f"{tokens / PAPERS_TOKENS:.3%} of the papers' {PAPERS_TOKENS:,}; {arguments.windows} windows of each text"
    )
    texts = [Path(text).name for text in arguments.eval]
    jobs = [("dense", arguments.dense, "none")]
    for pair in arguments.checkpoints:
        name, _, folder = pair.partition("=")
        jobs += [(name, folder, training) for training in arguments.trainings]
    for name, reference, training in jobs:
        probe = {"checkpoint": name, "training": training, **circumstances(arguments)}
        if key_of(probe, texts) in {key_of(row, list(row["perplexity"])) for row in rows}:
            continue
        started = time.perf_counter()
        row = run(name, reference, training, arguments)
        rows.append(row)
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(name, training, row["perplexity"], f"{time.perf_counter() - started:.0f} s", flush=True)
    print_table(rows)
    print(json.dumps({"rows": len(rows), "out": str(out)}))


if __name__ == "__main__":
    main()
