"""One pruning job from checkpoint to checkpoint: in memory or streamed, and resumable either way."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wandapp import methods
from wandapp.card import model_card
from wandapp.checkpoint import Checkpoint
from wandapp.config import PRESETS, RECIPE_FILE, WHOLE_MODEL, PruneConfig
from wandapp.devices import resolve_device, resolve_dtype
from wandapp.distributed import Ranks, join
from wandapp.errors import Interrupted, WandappError
from wandapp.gguf_source import convert_gguf, gguf_skeleton
from wandapp.locate import source_files
from wandapp.manifest import describe_run
from wandapp.memory import free_bytes
from wandapp.models import load_model, load_skeleton, save_companions
from wandapp.pipeline import prune_store
from wandapp.report import Progress, PruneReport, block_figures, json_ready
from wandapp.run_folder import RunFolder, earlier_recipe
from wandapp.shard_store import ShardStore
from wandapp.stop import Stoppable
from wandapp.store import ModelStore

GGUF_GROWTH = 8  # fp32 bytes per byte of a 4-bit file, roughly


def prune_checkpoint(
    config: PruneConfig,
    *,
    resume: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> PruneReport:
    """Prunes the checkpoint `config.model` into the new folder `config.out`; the report.

    Each block is written as soon as it is pruned: a run that was killed goes on with `resume` and gives the same bits.

    resume       go on with what an earlier run of the same recipe left, or begin where none did
    on_progress  called after every block
    say          told what is going on, a line at a time
    raises       WandappError in one sentence; Interrupted on SIGINT or SIGTERM, with the command that continues
    """
    _ = config.source, config.target  # refused before anything else where one is missing
    methods.resolve(config.resolved().method)
    with join(resolve_device(config.device)) as ranks:
        is_streamed = ranks.first(lambda: _streamed_before(config) if resume else None)
        if is_streamed is None:
            is_streamed = any(ranks.gather(streams(config, say)))  # by all ranks, if one is short of memory
        notes: list[str] = []
        config = resolved(config, is_streamed, notes.append)
        if (Path(config.source) / RECIPE_FILE).is_file():
            notes.append(f"{config.source} is itself pruned; what the report calls dense is that checkpoint")
        run = RunFolder(config, resume=resume, ranks=ranks)
        if ranks.first(lambda: resume and run.is_complete()):
            say(f"{config.out} is complete; there is nothing to resume")
            return PruneReport.read(Path(config.target) / "wandapp" / "report.json")
        # At any moment: files are whole or absent.
        with run, Stoppable(lambda name: Interrupted(f"interrupted by {name}")):
            return _prune(config, is_streamed, run, ranks, on_progress, say, notes)


def _prune(
    config: PruneConfig,
    is_streamed: bool,
    run: RunFolder,
    ranks: Ranks,
    on_progress: Callable[[Progress], None] | None,
    say: Callable[[str], None],
    notes: list[str],
) -> PruneReport:
    """notes   warnings that were due before the report began"""
    store, tokenizer = _open(config, is_streamed, run, ranks, say)

    def begin(report: PruneReport) -> None:
        report.warnings += notes
        torch.set_num_threads(run.begin(describe_run(config, report, store, source_files(config.source))))
        if run.done:
            say(f"{run.done} of {len(store)} blocks were finished by an earlier run and are kept")

    report = prune_store(store, tokenizer, config, on_progress=on_progress, on_begin=begin, ranks=ranks)
    if ranks.is_first:
        with store.outer() as outer:
            run.finish(outer, partial(save_companions, store.model, tokenizer), companion_files(config, report))
    return report


def companion_files(config: PruneConfig, report: PruneReport) -> dict[str, str]:
    """Recipe, report and model card that lie beside the weights, by path."""
    blocks = [{"step": step, **block_figures(record)} for step, record in enumerate(report.blocks, start=1)]
    return {
        "wandapp/recipe.yaml": config.resolved().dump_yaml(),
        "wandapp/blocks.jsonl": "".join(json.dumps(json_ready(block)) + "\n" for block in blocks),
        "wandapp/report.json": json.dumps(report.to_dict(), indent=1) + "\n",
        "README.md": model_card(config, report.to_dict()),
    }


def _open(
    config: PruneConfig, is_streamed: bool, run: RunFolder, ranks: Ranks, say: Callable[[str], None]
) -> tuple[ModelStore, Any]:
    """(store, tokenizer)."""
    options: dict[str, Any] = {"skip": config.skip, "device": resolve_device(config.device), "run": run}
    if not is_streamed:
        say(f"loading {config.model}")
        model, tokenizer = load_model(config.source, dtype=config.dtype)
        return ModelStore(model, config.pattern, **options), tokenizer
    folder = _as_safetensors(config, run, ranks, say)
    try:
        checkpoint = Checkpoint(folder, dtype=config.dtype)
    except WandappError as error:  # in terms of the file that the user knows
        raise WandappError(str(error).replace(str(folder), config.source)) from error
    checkpoint.source = config.source
    return ShardStore(checkpoint, config.pattern, **options), checkpoint.tokenizer


def _as_safetensors(config: PruneConfig, run: RunFolder, ranks: Ranks, say: Callable[[str], None]) -> str | Path:
    """The model, or the folder that a .gguf file was converted to."""
    path = source_files(config.source)[0]
    if path.suffix != ".gguf":
        return config.source
    folder = run.scratch("source")
    say(f"converting {config.model}, block by block, into {folder}, which is removed at the end")
    with run.disk("could not be written"):
        ranks.first(lambda: convert_gguf(path, folder, _gguf_dtype(config)))
    return folder


def resolved(config: PruneConfig, is_streamed: bool, say: Callable[[str], None] = lambda text: None) -> PruneConfig:
    """`config.resolved()`, without what would run the model as a whole where it will not be in memory as one."""
    config = config.resolved()
    if config.calibration == "self" and is_streamed:
        raise WandappError("calibration 'self' lets the whole model write; use --no-stream, or another --calibration")
    given, preset = {name: getattr(config, name) for name in WHOLE_MODEL}, PRESETS[config.preset]
    wanted = {name: preset[name] if value is None else value for name, value in given.items()}
    named = " and ".join(f"--{name.replace('_', '-')} {value}" for name, value in wanted.items() if value)
    if not named:
        return config.model_copy(update=wanted)
    if is_streamed:
        say(f"{config.model} is streamed, so this run is without {named}")
        wanted = dict.fromkeys(wanted, 0)
    return config.model_copy(update=wanted | {"stream": is_streamed})  # a run that goes on decides alike


def _streamed_before(config: PruneConfig) -> bool | None:
    """What an earlier run into the same folder noted, where it mattered: the memory that was free then may have decided it."""
    noted = earlier_recipe(config.target) if config.stream is None else None
    return None if noted is None else noted.stream


def streams(config: PruneConfig, say: Callable[[str], None] = lambda text: None) -> bool:
    """Whether blocks are read when they are needed: as told, or where the weights exceed half of the free memory."""
    if config.stream is not None:
        return config.stream
    files = source_files(config.source)
    size = sum(path.stat().st_size * (GGUF_GROWTH if path.suffix == ".gguf" else 1) for path in files)
    free = free_bytes()
    if size <= free / 2:
        return False
    say(f"streaming {config.model}: its {size / 2**30:.1f} GiB are more than half of the free {free / 2**30:.1f} GiB")
    return True


def open_skeleton(config: PruneConfig) -> nn.Module:
    """The model without weights, on the meta device."""
    path = source_files(config.source)[0]
    if path.suffix == ".gguf":
        return gguf_skeleton(path, _gguf_dtype(config))
    return load_skeleton(config.source, dtype=config.dtype)[0].model


def _gguf_dtype(config: PruneConfig) -> torch.dtype:
    return torch.float32 if config.dtype == "auto" else resolve_dtype(config.dtype)
