"""Perplexity of methods x patterns x seeds on one model, as a table of the papers' shape, JSON lines and a plot.

    python benchmarks/bench_quality.py --model smollm2 --calibration c4.jsonl --holdout 400 \\
        --text wikitext2:wiki.test.raw --samples 64 --seq-len 512 --windows 80 --out benchmarks/results/quality.jsonl

A run is one method, pattern and seed; a run that the output file already holds is not repeated. `--holdout D` sets the
last D documents of a .jsonl calibration file aside: calibration never sees them, and they are evaluated as "held-out".
A method may carry options: "wanda++@preset=paper,alpha=5".
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

import wandapp
from wandapp.config import PruneConfig
from wandapp.evaluate import perplexity
from wandapp.models import load_model
from wandapp.pipeline import prune

PAPER_METHODS = (
    "magnitude sparsegpt wanda gblm wanda+ro@preset=paper rgs@preset=paper wanda++@preset=paper wanda++".split()
)
PLOT_METHODS = 12


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--methods", nargs="+", default=PAPER_METHODS)
    parser.add_argument("--patterns", nargs="+", default=["0.5", "4:8", "2:4"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--calibration", default="pydoc")
    parser.add_argument("--holdout", type=int, default=0, help="last documents of a .jsonl kept for evaluation")
    parser.add_argument("--text", nargs="+", default=["pydoc"], help="evaluation texts")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=80)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after this time")
    parser.add_argument("--out", default="quality.jsonl")
    parser.add_argument("--plot", help="write a plot (.png or .svg)")
    return parser.parse_args()


def split_documents(path: str, holdout: int, folder: str) -> tuple[str, str]:
    """Paths of two .jsonl files: the documents before the last `holdout`, and these as one text file."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    calibration, held_out = Path(folder, "calibration.jsonl"), Path(folder, "held-out.txt")
    calibration.write_text("\n".join(lines[:-holdout]) + "\n", encoding="utf-8")
    held_out.write_text("\n\n".join(json.loads(line)["text"] for line in lines[-holdout:]), encoding="utf-8")
    return str(calibration), str(held_out)


def options_of(method: str) -> dict:
    """Options of "name@key=value,key=value"."""
    name, _, rest = method.partition("@")
    return {"method": name} | dict(pair.split("=", 1) for pair in filter(None, rest.split(",")))


class Bench:
    """One loaded model whose dense weights are put back before every run."""

    def __init__(self, arguments: argparse.Namespace, calibration: str, texts: list[str]):
        self.arguments, self.calibration, self.texts = arguments, calibration, texts
        device = PruneConfig(device=arguments.device).device
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        loaded = load_model(arguments.model, dtype=arguments.dtype, device=self.device)
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.dense = {name: value.clone() for name, value in self.model.state_dict().items()}

    def perplexities(self) -> dict[str, float]:
        a = self.arguments
        return {
            Path(text).name: perplexity(
                self.model, self.tokenizer, text=text, seq_len=a.seq_len, windows=a.windows
            ).perplexity
            for text in self.texts
        }

    def run(self, method: str, pattern: str, seed: int) -> dict:
        """One row: perplexities, seconds, FLOPs and errors of one pruning run."""
        row = {"method": method, "pattern": pattern, "seed": seed}
        self.model.load_state_dict(self.dense)
        if method != "dense":
            a = self.arguments
            config = PruneConfig(
                sparsity=pattern, calibration=self.calibration, samples=a.samples, seq_len=a.seq_len, seed=seed,
                device=self.device, **options_of(method),
            )  # fmt: skip
            report = prune(self.model, self.tokenizer, config=config)
            row |= {
                "seconds": round(report.seconds, 2),
                "gflop": round(report.flops / 1e9, 1),
                "matmul_gflops": round(report.matmul_gflops, 1),
                "block_error": statistics.fmean(block.error for block in report.blocks),
                "warnings": len(report.warnings),
            }
        return row | {"perplexity": self.perplexities()} | self.circumstances()

    def circumstances(self) -> dict:
        a = self.arguments
        name = torch.cuda.get_device_name() if self.device.startswith("cuda") else "cpu"
        return {
            "model": Path(a.model).name, "dtype": a.dtype, "samples": a.samples, "seq_len": a.seq_len, "windows": a.windows,
            "device": name, "torch": torch.__version__, "wandapp": wandapp.__version__,
        }  # fmt: skip


def key_of(row: dict) -> tuple:
    return tuple(row[name] for name in ("method", "pattern", "seed", "model", "dtype", "samples", "seq_len", "windows"))


def print_table(rows: list[dict]) -> None:
    """Mean and standard deviation over seeds, one line per pattern and method."""
    texts = list(rows[-1]["perplexity"])
    print(f"\n{'pattern':8} {'method':44} {'seeds':>5} " + " ".join(f"{text[:22]:>22}" for text in texts) + "  seconds")
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["pattern"], row["method"]), []).append(row)
    for (pattern, method), group in groups.items():
        cells = []
        for text in texts:
            values = [row["perplexity"][text] for row in group if text in row["perplexity"]]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.2f}{spread}")
        seconds = statistics.fmean(row.get("seconds", 0.0) for row in group)
        print(
            f"{pattern:8} {method:44} {len(group):5} " + " ".join(f"{cell:>22}" for cell in cells) + f"  {seconds:7.1f}"
        )


def plot(rows: list[dict], path: str) -> None:
    """Perplexity (log axis) by method, one colour per pattern, on the first text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    text = next(iter(rows[-1]["perplexity"]))
    methods = [m for m in dict.fromkeys(row["method"] for row in rows) if m != "dense"][:PLOT_METHODS]
    patterns = [p for p in dict.fromkeys(row["pattern"] for row in rows) if p != "-"]
    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    for offset, pattern in enumerate(patterns):
        for position, method in enumerate(methods):
            values = [r["perplexity"][text] for r in rows if r["method"] == method and r["pattern"] == pattern]
            axes.scatter([position + 0.15 * offset] * len(values), values, color=f"C{offset}", s=18)
        axes.scatter([], [], color=f"C{offset}", label=pattern)
    axes.set_xticks(range(len(methods)), methods, rotation=25, ha="right")
    axes.set(yscale="log", ylabel=f"perplexity, {text}", title=f"{rows[-1]['model']}, one dot per seed")
    axes.legend(title="pattern")
    figure.savefig(path, dpi=120)


def main() -> None:
    arguments = parse_arguments()
    started = time.perf_counter()
    out = Path(arguments.out)
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        calibration, texts = arguments.calibration, list(arguments.text)
        if arguments.holdout:
            calibration, held_out = split_documents(calibration, arguments.holdout, folder)
            texts.append(held_out)
        bench = Bench(arguments, calibration, texts)
        done = {key_of(row) for row in rows}
        jobs = [("dense", "-", 0)] + [
            (method, pattern, seed)
            for seed in arguments.seeds
            for pattern in arguments.patterns
            for method in arguments.methods
        ]
        for method, pattern, seed in jobs:
            probe = {"method": method, "pattern": pattern, "seed": seed} | bench.circumstances()
            if key_of(probe) in done or time.perf_counter() - started > arguments.minutes * 60:
                continue
            row = bench.run(method, pattern, seed)
            rows.append(row)
            with out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(pattern, method, seed, row["perplexity"], row.get("seconds"), flush=True)
    print_table(rows)
    if arguments.plot:
        plot(rows, arguments.plot)
    print(json.dumps({"runs": len(rows), "out": str(out)}))


if __name__ == "__main__":
    main()
