"""The loop: open a block, let the method prune it, check the pattern, feed its outputs to the next.

It knows neither the method nor where the weights live. Start reading here.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wandapp import methods
from wandapp.allocation import allocate
from wandapp.blocks import DecoderBlock
from wandapp.calibration import (
    DEFAULT_SAMPLES,
    DEFAULT_SEQ_LEN,
    Calibration,
    as_ids,
    kept_calibration,
    load_calibration,
    save_tokens,
)
from wandapp.config import PruneConfig
from wandapp.devices import resolve_device
from wandapp.distributed import RankError, Ranks
from wandapp.errors import WandappError
from wandapp.locate import source_files
from wandapp.manifest import fingerprint
from wandapp.memory import kept_pages
from wandapp.methods.base import BlockRecord, Method
from wandapp.pattern import SparsityPattern
from wandapp.report import MachineRate, Progress, PruneReport, block_figures, peak_gib, versions
from wandapp.skipping import skipping_zeros
from wandapp.store import ModelStore
from wandapp.tuning import Tuned, tune
from wandapp.verify import offence

TOKENS_PER_FORWARD = {"cpu": 2048, "cuda": 16384}


def prune(
    model: nn.Module,
    tokenizer: Any | None = None,
    *,
    config: PruneConfig | None = None,
    calibration: str | os.PathLike | Tensor | np.ndarray | Sequence[Sequence[int]] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    ranks: Ranks | None = None,
    **options: Any,
) -> PruneReport:
    """Report of pruning `model`, a loaded transformers causal language model, in place.

    config        all options; or give them as keywords, e.g. sparsity="2:4", method="wanda" (see PruneConfig)
    calibration   a name or path as in PruneConfig, or token ids [samples, seq_len], as a tensor, an array or lists (then
                  `tokenizer` may be None); it wins over config's
    on_progress   called after every block
    ranks         the processes that share the samples, each with its own copy of the model (see `distributed.join`)
    raises        WandappError with the place, the rule and the way out; checks that need no forward come before any change
    """
    if not isinstance(model, nn.Module):
        raise WandappError(f"prune needs a loaded model, got {type(model).__name__}; load_model gives one")
    if isinstance(calibration, str | os.PathLike):
        options["calibration"], calibration = os.fspath(calibration), None
    elif calibration is not None:
        calibration = as_ids(calibration)
    if config is None:
        config = PruneConfig(**options)
    elif options:
        config = PruneConfig(**{name: getattr(config, name) for name in config.model_fields_set} | options)
    config = config.resolved()
    store = ModelStore(model, config.pattern, skip=config.skip, device=resolve_device(config.device))
    return prune_store(store, tokenizer, config, calibration=calibration, on_progress=on_progress, ranks=ranks)


def prune_store(
    store: ModelStore,
    tokenizer: Any | None,
    config: PruneConfig,
    *,
    calibration: Tensor | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_begin: Callable[[PruneReport], None] | None = None,
    ranks: Ranks | None = None,
) -> PruneReport:
    """`prune` for blocks wherever they live. on_begin is told samples, batch size and the like before the work begins."""
    ranks, model, device = ranks or Ranks(), store.model, store.device
    method = methods.create(config, ranks)
    clock = _Clock({})
    calibrated, own = _calibrate(store, tokenizer, config, calibration, method, clock)
    if config.save_calibration:
        ranks.first(lambda: save_tokens(calibrated.tokens, config.save_calibration, calibrated.description))
    tokens = calibrated.tokens if method.reads_samples else calibrated.tokens[:1]  # others only probe the error
    # One size for all ranks, whatever each one's number of samples: refiners step through batches together.
    batch_size = min(config.batch_size or auto_batch_size(device, tokens.shape[1]), max(1, len(tokens) // ranks.size))
    report = PruneReport(
        method=config.method,
        pattern=str(config.pattern),
        samples=tokens.shape[0],
        seq_len=tokens.shape[1],
        calibration=calibrated.description,
        calibration_sha256=calibrated.sha256,
        device=str(device),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        batch_size=batch_size,
        ranks=ranks.size,
        self_samples=own,
        seconds_by_phase=clock.seconds,
        versions=versions(),
    )
    if on_begin:
        on_begin(report)
    with _frozen(model), kept_pages():
        _run(store, method, tokens, config, report, clock, on_progress)
    report.join(ranks)
    return report


def _calibrate(
    store: ModelStore,
    tokenizer: Any | None,
    config: PruneConfig,
    calibration: Tensor | None,
    method: Method,
    clock: "_Clock",
) -> tuple[Calibration, int]:
    """The samples, token ids [samples, seq_len], alike on all ranks; and how many of them the dense model wrote.

    A method that reads no samples has none written but the one that its block errors are probed with.
    """
    ranks = method.ranks

    def write(samples: int, seq_len: int, seed: int) -> Calibration:
        with clock("own text"):
            return ranks.first(lambda: _own_text(store, tokenizer, config, samples, seq_len, seed))

    source = config.calibration if calibration is None else calibration
    if isinstance(source, str) and source == "self":
        own = config.samples or DEFAULT_SAMPLES if method.reads_samples else 1
        calibrated = write(own, config.seq_len or DEFAULT_SEQ_LEN, config.seed)
    else:
        own = 0
        calibrated = ranks.first(
            lambda: load_calibration(
                source,
                tokenizer,
                samples=config.samples,
                seq_len=config.seq_len,
                seed=config.seed,
                text_field=config.text_field,
                model=store.model,
            )
        )
    more = config.self_samples or 0
    if not more or not method.reads_samples:
        return calibrated, own
    return calibrated.followed_by(write(more, calibrated.tokens.shape[1], config.seed + 1)), own + more


def _own_text(
    store: ModelStore, tokenizer: Any | None, config: PruneConfig, samples: int, seq_len: int, seed: int
) -> Calibration:
    """Samples that the dense model writes. A run that goes on reads those that it wrote when it began."""
    kept = None
    if store.run:
        kept = store.run.scratch("own-text") / f"{_origin(config, samples, seq_len, seed)}.safetensors"
    if kept and kept.exists():
        return kept_calibration(kept)
    try:
        with store.whole_model() as model:
            own = load_calibration(
                "self",
                tokenizer,
                samples=samples,
                seq_len=seq_len,
                seed=seed,
                temperature=config.self_temperature or 1.0,
                model=model,
            )
    except torch.OutOfMemoryError:
        way_out = "another --calibration" if config.calibration == "self" else "--self-samples 0"
        raise WandappError(
            f"the whole model does not fit {store.device} to write samples for its own calibration; use {way_out}"
        ) from None
    if kept:
        with store.run.disk("cannot be written"):
            kept.parent.mkdir(parents=True, exist_ok=True)
        save_tokens(own.tokens, kept, own.description)
    return own


def _origin(config: PruneConfig, samples: int, seq_len: int, seed: int) -> str:
    """Tells what this model writes with these options from what another run may have left."""
    source = [fingerprint(path).model_dump() for path in source_files(config.source)]
    what = [source, config.dtype, samples, config.self_temperature, seq_len, seed, versions()]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def _run(
    store: ModelStore,
    method: Method,
    tokens: Tensor,
    config: PruneConfig,
    report: PruneReport,
    clock: "_Clock",
    on_progress: Callable[[Progress], None] | None,
) -> None:
    own = tokens[method.ranks.deal(len(tokens))]
    rate = MachineRate(store.device, next(store.model.parameters()).dtype)
    with clock("record"):
        hidden = _first_states(store, tokens, own, report)
    pattern = config.pattern
    if config.is_allocated:
        with clock("allocate"):
            pattern, report.allocation, flops = allocate(store, method, config, hidden)
            report.flops += flops
    with clock("prepare"):
        if store.done < len(store):
            report.flops += method.prepare(store, own, hidden)
    follows = method.follows_dense_path and store.done < len(store) or config.tune_passes
    dense_path = store.copy(hidden) if follows else None
    waited = store.io_seconds
    for index in range(len(store)):
        rate.sample()
        record = store.finished(index)  # by an earlier run that was interrupted
        if record is not None and record.tuned and store.done < len(store):
            raise WandappError(
                f"{record.name} is tuned already, so block {store.done}, which is missing behind it, cannot be pruned as it "
                f"was; delete {store.run.partial} to start over"
            )
        if record is not None and dense_path is not None:
            with store.open_block(index) as block, clock("dense path"):
                block.run_(dense_path)
        with store.open_block(index, pruned=record is not None) as block:
            if record is None:
                record = _prune_block(block, hidden, dense_path, pattern, method, clock)
                store.keep(block, record)
            else:
                _recheck(block, record)
            with clock("forward"):
                if index + 1 < len(store) and store.done < len(store):
                    with skipping_zeros(view.weight for view in block.linears.values()):
                        block.run_(hidden)
                    clock.synchronize(hidden)
            written = report.self_samples * report.seq_len if method.ranks.is_first else 0
            report.add(block.flops + written * block.forward_flops_per_token, record)
        report.seconds_by_phase["disk"] = store.io_seconds - waited
        report.close(clock.total, rate.gflops, peak_gib(store.device))
        if on_progress:
            on_progress(_progress(report, record, index + 1, len(store)))
    if config.tune_passes and dense_path is not None:
        del hidden  # the last block's inputs, of which no second set is wanted
        with clock("tune"):
            _tune(store, own, _first_states(store, tokens, own, report), dense_path, config, report, method.ranks)
        report.close(clock.total, rate.gflops, peak_gib(store.device))
    report.kept_dense, report.dense_weights = store.kept_dense()


def _first_states(store: ModelStore, tokens: Tensor, own: Tensor, report: PruneReport) -> Tensor:
    """The first block's inputs of this rank's samples; one without a sample borrows one to learn the calls' arguments."""
    return store.record(own if len(own) else tokens[:1], report.batch_size)[: len(own)]


def _tune(
    store: ModelStore,
    tokens: Tensor,
    hidden: Tensor,
    dense: Tensor,
    config: PruneConfig,
    report: PruneReport,
    ranks: Ranks,
) -> None:
    """Trains what is cheap in all blocks together, and writes it into those that do not have it yet."""
    kept = store.run.scratch("tuning") / "learnt.safetensors" if store.run else None
    tuned = ranks.first(lambda: Tuned.read(kept) if kept and kept.exists() else None)
    if tuned is None:
        try:
            tuned = tune(store, tokens, hidden, dense, config, ranks)
        except torch.OutOfMemoryError:
            reason = f"the whole model does not fit {store.device}"
            if ranks.size > 1:  # the others are in the midst of it
                raise RankError(f"{reason} to be tuned end to end; use --tune-passes 0") from None
            report.warnings.append(f"not tuned end to end: {reason}")
            return
        report.flops += tuned.flops
        if tuned.left_out:
            report.warnings.append(f"tuning: {tuned.left_out} steps were left out, as their gradients overflow float16")
        if kept and tuned.is_better:
            with store.run.disk("cannot be written"):
                ranks.first(lambda: tuned.write(kept))
    before, after = tuned.divergence_before, tuned.divergence_after
    report.tuning = {"divergence_before": before, "divergence_after": after}
    if not tuned.is_better:
        report.warnings.append(
            f"not tuned end to end: no pass left less than the {before:.4g} nats per token before it"
        )
        return
    for index, record in enumerate(report.blocks):
        if not record.tuned:
            with store.open_block(index) as block:
                tuned.apply(block)
                _recheck(block, record)
                ranks.require_equal(partial(checksum, block), block.name)
                record.tuned = True
                store.keep(block, record)


def _prune_block(
    block: DecoderBlock,
    hidden: Tensor,
    dense_path: Tensor | None,
    pattern: SparsityPattern,
    method: Method,
    clock: "_Clock",
) -> BlockRecord:
    if dense_path is not None:
        with clock("dense path"):
            block.run_(dense_path)
    with clock("prune"):
        record = method.prune_block(block, hidden, pattern, dense_path if method.follows_dense_path else None)
    with clock("verify"):
        for view in block.linears.values():
            view.weight.add_(0.0)  # -0.0, to which a small weight rounds in 16 bits, becomes +0.0
        _check(block, pattern, record)
        method.ranks.require_equal(lambda: checksum(block), block.name)
    return record


def checksum(block: DecoderBlock) -> str:
    """sha256 over the sums of every row's bits of all its parameters: tells differing weights apart where they lie."""
    digest = hashlib.sha256()
    for parameter in block.module.parameters():
        bits = parameter.data.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.itemsize])
        rows = bits.sum(dim=-1, dtype=torch.int64) if bits.dim() > 1 else bits
        digest.update(rows.cpu().numpy().tobytes())
    return digest.hexdigest()


class _Clock:
    """Adds up the seconds spent in named phases."""

    def __init__(self, seconds: dict[str, float]):
        self.seconds = seconds

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @staticmethod
    def synchronize(tensor: Tensor) -> None:
        if tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)


def _check(block: DecoderBlock, pattern: SparsityPattern, record: BlockRecord) -> None:
    """Notes each map's sparsity; a method that broke its own pattern must never go unseen."""
    for view in block.linears.values():
        weight = view.weight
        zeros = weight.numel() - torch.count_nonzero(weight).item()
        record.sparsity[view.name] = zeros / weight.numel()
        record.zeros, record.weights = record.zeros + zeros, record.weights + weight.numel()
        broken = offence(view, weight, pattern)
        if broken:
            raise RuntimeError(f"{broken}; this is an error in wandapp, please report it")
    if not math.isfinite(record.error):
        record.warnings.append(f"{block.name}: the outputs of the calibration samples are not finite")


def _recheck(block: DecoderBlock, record: BlockRecord) -> None:
    """Raises where a block that an earlier run finished is not as sparse as that run noted."""
    for view in block.linears.values():
        zeros = view.weight.numel() - torch.count_nonzero(view.weight).item()
        if zeros / view.weight.numel() != record.sparsity.get(view.name):
            raise WandappError(
                f"{view.name}: {zeros} zeros in a block that an interrupted run finished, which it did not leave so; delete the "
                "block's file in OUT.partial to prune it again"
            )


def _progress(report: PruneReport, record: BlockRecord, done: int, blocks: int) -> Progress:
    before = "" if record.error_before is None else f"{record.error_before:.4f} -> "
    figures = block_figures(record)
    kept = "score kept {kept_score_before:.1%} -> {kept_score:.1%}, ".format(**figures) if record.kept_score else ""
    return Progress(
        done,
        blocks,
        record.name,
        report.seconds,
        report.seconds / done * (blocks - done),
        report.peak_gib,
        f"{kept}block error {before}{record.error:.4f}",
        {**figures, "seconds": report.seconds, "peak_gib": report.peak_gib},
    )


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no parameter gradients, experts in the form whose products can be watched; restored after."""
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    training, experts = model.training, getattr(model.config, "_experts_implementation", None)
    model.eval().requires_grad_(False)
    if experts is not None:
        model.config._experts_implementation = "eager"
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        if experts is not None:
            model.config._experts_implementation = experts
        model.train(training)
        for parameter, requires_grad in wanted.items():
            parameter.requires_grad_(requires_grad)


def auto_batch_size(device: torch.device, seq_len: int) -> int:
    """Samples per forward: enough tokens to fill the machine, few enough that activations stay in its caches."""
    return max(1, TOKENS_PER_FORWARD[device.type] // seq_len)
