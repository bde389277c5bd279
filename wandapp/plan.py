"""What a run will need, said before it starts: memory, disk and time.

Memory is the largest of five moments: the model writes samples of its own, calls are recorded (embeddings and head are in
memory), a block is in work, all blocks are tuned, and the end, when embeddings and head are written. A block in work holds,
for P weights in it and N samples of T tokens:

    weights        P, twice where blocks are streamed (the next is being read); all blocks where they are in memory
    hidden states  N x T x hidden_size, again for the dense outputs that regional optimisation aims at
    statistics     sparsegpt, admm: H per distinct input, 4 in^2 bytes; of one input at a time its factorisation, 20 in^2,
                   and fp32 copies of the maps that it feeds
                   rgs: 4 P bytes of squared gradients;  +ro, +reconstruct: fp32 masters, gradients, the optimiser's
                   state, and copies of the weights to go back to
    a forward      a few times tokens x width of the widest layers; with gradients, every layer's inputs and outputs

The process itself, with its libraries, is measured, and LATER_BYTES is what they add once they compute.
"""

import math
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from wandapp import methods
from wandapp.allocation import SAMPLES as ALLOCATION_SAMPLES
from wandapp.blocks import LinearView, find_blocks, sub_module
from wandapp.calibration import (
    DEFAULT_SAMPLES,
    DEFAULT_SEQ_LEN,
    OWN_TEXT_BATCH,
    OWN_TEXT_LEN,
    check_seq_len,
    is_token_file,
    load_calibration,
)
from wandapp.config import PruneConfig
from wandapp.devices import resolve_device
from wandapp.distributed import Ranks
from wandapp.job import open_skeleton, resolved, streams
from wandapp.memory import free_bytes, resident_bytes
from wandapp.methods.base import ERROR_SAMPLES
from wandapp.methods.second_order import SecondOrder
from wandapp.pipeline import auto_batch_size
from wandapp.report import MachineRate
from wandapp.store import ModelStore, attention_flops_per_token, key_value_width

LATER_BYTES = 60 << 20  # thread pools, kernels and code pages that the first products bring in; an estimate
SLOWER_THAN_MATMUL = 1.6  # a run against its FLOPs at the rate of square products (README, Measured on two CPU cores)


@dataclass(frozen=True)
class Plan:
    """Bytes, seconds and what they are made of. On a GPU memory means the GPU's, without the libraries'."""

    blocks: int
    streams: bool
    samples: int
    seq_len: int
    peak_bytes: int
    free_bytes: int
    disk_bytes: int
    free_disk_bytes: int | None
    flops: float
    seconds: float
    matmul_gflops: float
    parts: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """Plain JSON types."""
        return asdict(self)


class _Sizes:
    """What the formulas read of a model on the meta device."""

    def __init__(self, store: ModelStore):
        model, blocks = store.model, store.blocks
        self.itemsize = model.dtype.itemsize
        self.count = len(blocks)
        sizes = list(map(_bytes, blocks))
        largest = max(range(len(blocks)), key=lambda index: (bool(store.linears[index]), sizes[index]))
        self.views: list[LinearView] = list(store.linears[largest].values())
        every = list(store.all_linears[largest].values())
        self.block = max(sizes)
        self.all = _bytes(model)
        self.outer = self.all - sum(sizes)
        self.weights = sum(view.weight.numel() for view in self.views)
        self.largest = max(view.weight.numel() for view in self.views)
        shared = _distinct_inputs(self.views)
        self.inputs = [width for width, _ in shared]
        self.together = max(width * rows for width, rows in shared)  # weights of maps that one input feeds
        self.inputs_and_rows = shared
        self.hidden = model.config.get_text_config().hidden_size
        self.vocabulary = model.get_input_embeddings().weight.shape[0]
        self.widest = max(max(view.weight.shape) for view in every)
        experts = [view for view in every if view.is_expert]
        text = model.config.get_text_config()
        share = (
            getattr(text, "num_experts_per_tok", 0) / max(len({view.index for view in experts}), 1) if experts else 0
        )
        self.met = sum(view.weight.numel() * (share if view.is_expert else 1) for view in every)
        block = f"{store.prefix}.{largest}"
        first = sub_module(every[0].name, block)
        self.first_module = sum(view.weight.numel() for view in every if sub_module(view.name, block) == first)
        self.crossing = sum(sum(view.weight.shape) for view in every if not view.is_expert)


def plan_run(config: PruneConfig) -> Plan:
    """The plan of `wandapp prune` with these options; reads no weights.

    raises  WandappError as the run itself would, as far as that needs no weights
    """
    is_streamed = streams(config)
    config = resolved(config, is_streamed)
    method, device = methods.create(config, Ranks()), resolve_device(config.device)
    model = open_skeleton(config)
    store = ModelStore(model, config.pattern, skip=config.skip, device=device)
    given, seq_len = _calibration_shape(config, model)
    more = (config.self_samples or 0) if method.reads_samples else 0
    used = given + more if method.reads_samples else 1
    written = used if config.calibration == "self" else more
    batch = min(config.batch_size or auto_batch_size(device, seq_len), used)
    sizes, own = _Sizes(store), resident_bytes() + LATER_BYTES if device.type == "cpu" else 0
    rate = MachineRate(device, model.dtype)
    rate.sample(repeats=4)
    parts = {
        "libraries": own,
        "weights": sizes.block * 2 if is_streamed else sizes.all,
        "hidden states": _hidden_bytes(config, sizes, used, seq_len),
        "method": _method_bytes(config, sizes, used, batch * seq_len, seq_len),
    }
    recording = (
        own + (sizes.outer + sizes.block if is_streamed else sizes.all) + used * seq_len * sizes.hidden * sizes.itemsize
    )
    writing = own + sizes.all + _cache_bytes(model, written, seq_len)
    tuning = own + sizes.all + parts["hidden states"] + _tuning_bytes(sizes, seq_len)
    flops = _flops(config, sizes, used, written, seq_len, attention_flops_per_token(model.config, seq_len))
    out = Path(config.out or ".").absolute()
    return Plan(
        blocks=sizes.count,
        streams=is_streamed,
        samples=used,
        seq_len=seq_len,
        peak_bytes=max(sum(parts.values()), recording, writing if written else 0, tuning if config.tune_passes else 0),
        free_bytes=free_bytes() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0],
        disk_bytes=sizes.all + _scratch_bytes(config, sizes, used, seq_len, is_streamed),
        free_disk_bytes=shutil.disk_usage(next(path for path in out.parents if path.exists())).free,
        flops=flops,
        seconds=SLOWER_THAN_MATMUL * flops / (rate.gflops * 1e9),
        matmul_gflops=rate.gflops,
        parts=parts,
    )


def _calibration_shape(config: PruneConfig, model: nn.Module) -> tuple[int, int]:
    if is_token_file(config.calibration):
        given = load_calibration(
            config.calibration, None, samples=config.samples, seq_len=config.seq_len, model=model
        ).tokens
        return len(given), given.shape[1]
    seq_len = config.seq_len or DEFAULT_SEQ_LEN
    check_seq_len(model, seq_len)
    return config.samples or DEFAULT_SAMPLES, seq_len


def _cache_bytes(model: nn.Module, samples: int, seq_len: int) -> int:
    """Keys and values of the texts that the model writes at once, the copy that a token's are appended to, and logits."""
    pieces = math.ceil(seq_len / OWN_TEXT_LEN)
    texts, length = min(samples * pieces, OWN_TEXT_BATCH), math.ceil(seq_len / pieces)
    states = 2 * len(find_blocks(model)[1]) * key_value_width(model.config)  # of one token
    one_block_again = 2 * key_value_width(model.config)
    cached = texts * length * (states + one_block_again) * model.dtype.itemsize
    # In fp32: the logits, their softmax, its sum over tokens, and that of the token before.
    return cached + 16 * texts * model.get_input_embeddings().weight.shape[0]


def _tuning_bytes(sizes: _Sizes, seq_len: int) -> int:
    """One sample's inputs of all blocks, a block's inputs and outputs of every map, and logits in fp32: both models', their
    log-softmax, the products that make the divergence, gradients."""
    return seq_len * ((sizes.count * sizes.hidden + 2 * sizes.crossing) * sizes.itemsize + 24 * sizes.vocabulary)


def _hidden_bytes(config: PruneConfig, sizes: _Sizes, samples: int, seq_len: int) -> int:
    method = methods.create(config, Ranks())
    sets = 1 + (method.outputs_read is None) + (method.follows_dense_path or bool(config.tune_passes))
    sets += _trains_sub_blocks(config)
    return sets * samples * seq_len * sizes.hidden * sizes.itemsize


def _trains_sub_blocks(config: PruneConfig) -> bool:
    return config.reconstruct_region == "sub-block" and "reconstruct" in methods.resolve(config.method)[1:]


def _method_bytes(config: PruneConfig, sizes: _Sizes, samples: int, batch_tokens: int, seq_len: int) -> int:
    """Beside weights and hidden states, the most that is alive at once while a block is pruned.

    Statistics stay until the block is done; measuring and choosing, reordering, and each refiner come one after another.
    """
    name, *refiners = methods.resolve(config.method)
    size = sizes.itemsize
    norms = 4 * samples * sum(sizes.inputs)
    statistics = {
        "sparsegpt": 4 * sum(width**2 for width in sizes.inputs),
        "admm": 4 * sum(width**2 for width in sizes.inputs),
        "rgs": norms + 4 * sizes.weights,
        "gblm": norms + 4 * sizes.weights,  # pages of the files that hold a block's gradients
    }.get(name, norms)
    forward = batch_tokens * (4 * sizes.widest + 6 * sizes.hidden) * size
    with_gradients = batch_tokens * 2 * sizes.crossing * size
    factorising = 20 * max(sizes.inputs) ** 2
    # One sample's gradient of a map, and of products in 16 bits an fp32 copy.
    gradient = (4 if size == 4 else size + 4) * sizes.largest
    # gblm: the inputs of all blocks; logits in fp32, their copies without the last position, softmax and gradients.
    whole_model = batch_tokens * (sizes.count * sizes.hidden * size + 24 * sizes.vocabulary)
    choosing = {
        "wanda-cumulative": 0 if config.pattern.is_structured else 22 * sizes.largest,  # sorted scores, order, sums
        "sparsegpt": factorising + 4 * sizes.together,
        "admm": factorising + 12 * sizes.together + 17 * sizes.largest,
        "rgs": gradient + with_gradients,
        "gblm": gradient + with_gradients + whole_model,
    }.get(name, 0)
    # A sample's inputs and outputs of all maps, before and after; a map's score, its transpose and a third of that again.
    permuting = 4 * seq_len * sizes.crossing * size + 12 * sizes.largest if config.permute else 0
    masters = 0 if size == 4 else 4  # of fp32 storage the parameter is its own
    snapshots = size if methods.METHODS[name].compensates else 2 * size  # before the refiner, and before any pruning
    step = seq_len * 2 * sizes.crossing * size  # of one sample
    refining = {
        "ro": (snapshots + masters + 4 + size) * sizes.weights + step,
        # Adam's two moments, gradient, mask; the best weights so far, and the next while both are there
        "reconstruct": (snapshots + masters + 8 + 4 + 4 + 2 * size) * sizes.weights + step,
    }
    return statistics + max(forward + choosing, permuting, *(refining.get(refiner, 0) for refiner in refiners))


def _scratch_bytes(config: PruneConfig, sizes: _Sizes, samples: int, seq_len: int, is_streamed: bool) -> int:
    sets = 1 + (methods.create(config, Ranks()).follows_dense_path or bool(config.tune_passes))
    hidden = sets * samples * seq_len * sizes.hidden * sizes.itemsize if config.activations == "disk" else 0
    gblm = 4 * sizes.count * sizes.weights if methods.resolve(config.method)[0] == "gblm" else 0
    is_gguf = is_streamed and (config.model == "smollm2" or str(config.model).endswith(".gguf"))
    return hidden + gblm + (sizes.all if is_gguf else 0)


def _flops(config: PruneConfig, sizes: _Sizes, samples: int, written: int, seq_len: int, attention: float) -> float:
    """Floating-point operations of all blocks; a backward counts as two forwards, writing samples as one."""
    method = methods.create(config, Ranks()).scorer
    forward = 2.0 * sizes.met + attention
    forwards = {"rgs": 4.0, "gblm": 6.0}.get(methods.resolve(config.method)[0], 2.0)
    forwards += methods.create(config, Ranks()).follows_dense_path or bool(config.tune_passes)
    flops = (samples * forwards + written) * seq_len * forward
    if isinstance(method, SecondOrder):
        flops += samples * seq_len * 2.0 * sum(width**2 for width in sizes.inputs)
        flops += sum(method.flops(rows, width) for width, rows in sizes.inputs_and_rows)
    if config.permute:
        flops += 3 * seq_len * forward  # before, and after either renaming
    if config.is_allocated:
        flops += min(ALLOCATION_SAMPLES, samples) * seq_len * (1 if config.allocate == "owl" else 3) * forward
    refiners = methods.resolve(config.method)[1:]
    probes = min(ERROR_SAMPLES, samples)
    trained = samples - probes * (samples > 2 * ERROR_SAMPLES)
    if config.tune_passes:  # two forwards and a backward of activations per step; divergences before and after
        flops += seq_len * forward * (3.0 * config.tune_passes * trained + 2.0 * probes)
    passes = config.passes_of_reconstruction(samples)
    # A refiner's steps, each with a backward, and the forwards of errors before, between and after
    trained_and_probed = {
        "ro": (config.ro_rounds * min(config.ro_samples, samples), 4 * probes),
        "reconstruct": (passes * trained, (5 + passes) * probes),
    }
    for refiner in refiners:
        steps, errors = trained_and_probed.get(refiner, (0, 4 * probes))
        flops += seq_len * forward * (3.0 * steps + errors)
    if _trains_sub_blocks(config):  # the first once before it is pruned; then it is in the other's forwards, too
        steps, errors = trained_and_probed["reconstruct"]
        flops += seq_len * (2.0 * sizes.first_module + attention) * (samples + steps + errors - 4 * probes)
    return sizes.count * flops


def _distinct_inputs(views: list[LinearView]) -> list[tuple[int, int]]:
    """(width, rows of its maps) of each tensor that feeds maps: q, k and v share one, gate and up another; an expert's own."""
    shared: list[tuple[int, int]] = []
    previous = None
    for view in views:
        (rows, width), group = view.weight.shape, (view.name.rpartition(".")[0], view.weight.shape[1], view.index)
        if group == previous and not view.is_expert:
            rows += shared.pop()[1]
        shared.append((width, rows))
        previous = group
    return shared


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.dtype.itemsize for p in dict.fromkeys(module.parameters()))
