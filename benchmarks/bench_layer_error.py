"""Error that second-order methods leave in each linear map of one dense block, and their seconds, on the same Gram matrices.

    python benchmarks/bench_layer_error.py --model smollm2 --block 14 --calibration c4.jsonl --samples 16 --seq-len 512

Error: ||X W'^T - X W^T|| / ||X W^T|| over the samples that the methods saw, and over as many others ("other"): half of the
given samples each. Seconds: of the solver, factorisation included, all maps together. The last line is JSON.
"""

import argparse
import json
import platform
import time

import torch
from torch import Tensor

from wandapp import methods
from wandapp.blocks import DecoderBlock
from wandapp.calibration import load_calibration
from wandapp.config import PruneConfig
from wandapp.distributed import Ranks
from wandapp.methods.base import BlockRecord
from wandapp.methods.refiner import Snapshot, linear_parameters
from wandapp.models import load_model
from wandapp.statistics import Measurements, measure
from wandapp.store import ModelStore

NEEDS = frozenset({"hessian"})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--block", type=int, default=0)
    parser.add_argument("--sparsity", default="2:4")
    parser.add_argument("--calibration", default="pydoc")
    parser.add_argument("--samples", type=int, default=32, help="half of them to prune with, half to test on")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--iterations", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    return parser.parse_args()


@torch.no_grad()
def error(block: DecoderBlock, name: str, dense: Tensor, measured: Measurements) -> float:
    """Relative error of a map's products on the tokens that `measured` is of."""
    hessian, difference = measured.hessians[name].value, block.linears[name].weight - dense
    return ((difference @ hessian * difference).sum() / (dense @ hessian * dense).sum()).sqrt().item()


@torch.no_grad()
def main() -> None:
    arguments = parse_arguments()
    model, tokenizer = load_model(arguments.model, dtype="float32")
    options = dict(samples=arguments.samples, seq_len=arguments.seq_len, seed=0)
    tokens = load_calibration(arguments.calibration, tokenizer, model=model, **options).tokens
    half = len(tokens) // 2
    jobs = [PruneConfig(method="sparsegpt", sparsity=arguments.sparsity)]
    jobs += [jobs[0].model_copy(update={"method": "admm", "admm_iterations": count}) for count in arguments.iterations]
    store = ModelStore(model.eval(), jobs[0].pattern, device=next(model.parameters()).device)
    hidden = store.record(tokens, batch_size=1)
    for index in range(arguments.block):
        with store.open_block(index) as block:
            block.run_(hidden)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{arguments.model}, block {arguments.block}, {arguments.sparsity}, {half} x {arguments.seq_len} tokens\n")
    rows = []
    with store.open_block(arguments.block) as block:
        seen, other = (measure(block, part, NEEDS, Ranks(), outputs=0) for part in (hidden[:half], hidden[half:]))
        dense = Snapshot(linear_parameters(block))
        weights = {name: view.weight.clone() for name, view in block.linears.items()}
        for job in jobs:
            start = time.perf_counter()
            methods.create(job, Ranks()).apply(block, seen, job.pattern, BlockRecord(block.name))
            row = {"method": job.method, "seconds": time.perf_counter() - start}
            row |= {"iterations": job.admm_iterations} if job.method == "admm" else {}
            for label, measured in (("error", seen), ("other", other)):
                row[label] = {name.rpartition(".")[2]: error(block, name, w, measured) for name, w in weights.items()}
            rows.append(row)
            dense.restore()
    maps = list(rows[0]["error"])
    print(f"{'method':12} {'seconds':>8} " + " ".join(f"{name:>15}" for name in maps))
    for row in rows:
        title = f"{row['method']} {row.get('iterations', '')}"
        cells = (f"{row['error'][name]:.4f} ({row['other'][name]:.4f})" for name in maps)
        print(f"{title:12} {row['seconds']:8.2f} " + " ".join(f"{cell:>15}" for cell in cells))
    print(
        json.dumps({"model": arguments.model, "block": arguments.block, "sparsity": arguments.sparsity, "rows": rows})
    )


if __name__ == "__main__":
    main()
