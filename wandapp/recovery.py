"""Recovery training: a pruned checkpoint in, the same pattern with better weights out.

    load, verify -> perplexity before -> LoRA behind masks, or masked weights -> train -> merge, verify -> after -> save

Training state lies in OUT.recover until the run is done, so that a run that is killed continues with `resume`.
"""

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wandapp.blocks import find_blocks
from wandapp.calibration import load_calibration, save_tokens
from wandapp.card import model_card
from wandapp.config import PruneConfig
from wandapp.devices import resolve_device
from wandapp.errors import WandappError
from wandapp.evaluate import perplexity
from wandapp.models import LoadedModel, load_model, save_pruned
from wandapp.output import check_output
from wandapp.recover_config import RecoverConfig
from wandapp.report import json_ready, peak_gib, versions
from wandapp.training import LOSS_FILE, STATE_FILE, Step, TrainingState, recomputed_blocks, train
from wandapp.verify import verify_model
from wandapp.weight_files import checkpoint_files

_NOT_IDENTITY = {"device", "save_every", "eval_text", "eval_windows"}


@dataclasses.dataclass
class RecoverReport:
    """Result and cost of one run.

    before, after    perplexity by text, of the checkpoint as it was read and as it was written; "held-out" is text of the
                     training source that no step saw
    tokens, seconds  of all steps, also of those taken before a resume; evaluation excluded
    zeros            of all linear maps in the decoder blocks, the same before and after
    """

    checkpoint: str
    pattern: str
    how: str
    text: str
    tokens_sha256: str
    trained_weights: int
    linears: int
    frozen_experts: int
    samples: int
    seq_len: int
    steps: int = 0
    tokens: int = 0
    seconds: float = math.nan
    first_loss: float = math.nan
    last_loss: float = math.nan
    before: dict[str, dict] = dataclasses.field(default_factory=dict)
    after: dict[str, dict] = dataclasses.field(default_factory=dict)
    zeros: int = 0
    peak_gib: float = math.nan
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict:
        """Plain JSON types; NaN becomes null."""
        return json_ready(dataclasses.asdict(self))


def recover(
    folder: str | Path,
    out: str | Path,
    *,
    config: RecoverConfig | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_step: Callable[[Step, int], None] | None = None,
    on_note: Callable[[str], None] = lambda note: None,
    **options: Any,
) -> RecoverReport:
    """Trains the pruned checkpoint in `folder` (wandapp's, with its recipe) and writes the result to `out`.

    config   all options; or give them as keywords, e.g. preset="strong", samples=256 (see RecoverConfig)
    resume   continue from the state that a killed run left in OUT.recover; begin where there is none
    on_step  called with (step, steps in all); on_note with a sentence on what is being done
    raises   WandappError where the checkpoint does not hold its pattern, and where the result would not
    """
    config = (config or RecoverConfig(**options)).resolved()
    folder, out = Path(folder), Path(out)
    recipe = PruneConfig.of_checkpoint(folder)
    check_output(out, overwrite, folder)
    state_folder = _state_folder(out, resume)
    device = resolve_device(config.device)
    on_note(f"loading {folder}")
    with _removed_if_empty(state_folder):
        loaded = load_model(folder, device=str(device))
        zeros = _verified(loaded.model, recipe, f"{folder}: the checkpoint does not hold its pattern")
        drawn = load_calibration(
            config.text,
            loaded.tokenizer,
            samples=config.samples + config.held_out,
            seq_len=config.seq_len,
            seed=config.seed,
            text_field=config.text_field,
            model=loaded.model,
        )
    texts = _evaluation_texts(drawn.tokens[config.samples :], config, state_folder)
    report = RecoverReport(
        str(folder), str(recipe.pattern), "", drawn.description, drawn.sha256, 0, 0, 0, config.samples, config.seq_len
    )
    on_note("perplexity before")
    report.before = _perplexities(loaded, texts, config)
    identity = {"checkpoint": _sha256_of(checkpoint_files(folder)), "tokens": drawn.sha256} | {
        name: str(value) for name, value in config.model_dump().items() if name not in _NOT_IDENTITY
    }
    _train(loaded.model, drawn.tokens[: config.samples], config, TrainingState(state_folder, identity), report, on_step)
    report.zeros = _verified(loaded.model, recipe, "the trained weights do not hold the pattern; please report this")
    if report.zeros < zeros:
        raise WandappError(f"{zeros - report.zeros} of {zeros} zeros were lost in training; please report this")
    on_note("perplexity after")
    report.after = _perplexities(loaded, texts, config)
    report.peak_gib, report.versions = peak_gib(device), versions("peft")
    _save(loaded, out, overwrite, recipe, config, report, folder, state_folder)
    return report


def _train(
    model: nn.Module,
    tokens: Tensor,
    config: RecoverConfig,
    state: TrainingState,
    report: RecoverReport,
    on_step: Callable[[Step, int], None] | None,
) -> None:
    """Puts on what trains, trains, merges, and gives every weight the type it had."""
    from wandapp import masked

    types = {name: parameter.dtype for name, parameter in model.named_parameters()}
    if config.dtype == "float32":
        model.float()
    torch.manual_seed(config.seed)
    masks: dict[str, Tensor] = {}
    views = list(masked.linear_views(model))
    linear = {id(view.parameter) for view in views}
    if config.full:
        masks = masked.train_blocks(model)
        report.linears, report.how = len(views), f"every weight of the blocks behind masks, lr {config.lr:g}"
    else:
        report.linears = len(masked.add_adapters(model, config))
        report.frozen_experts = sum(view.is_expert for view in views)
        report.how = f"LoRA behind masks, r {config.rank}, alpha {config.alpha:g}, {config.targets}, lr {config.lr:g}"
    report.trained_weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with recomputed_blocks(find_blocks(model)[1]) if config.gradient_checkpointing else nullcontext():
        train(model, tokens, config, state, on_step)
    masked.merge_(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(types[name])
            if name in masks:
                masked.require_zeros(name, parameter, masks[name])
            if id(parameter) in linear:
                parameter.data += 0.0  # -0.0, to which a tiny weight may round, becomes +0.0
    _sum_up(report, state.folder / LOSS_FILE)


def _sum_up(report: RecoverReport, loss_file: Path) -> None:
    """The figures of all steps, also of those before a resume."""
    steps = [json.loads(line) for line in loss_file.read_text(encoding="utf-8").splitlines()]
    report.steps, report.tokens = len(steps), sum(step["tokens"] for step in steps)
    report.seconds = sum(step["seconds"] for step in steps)
    tenth = max(1, len(steps) // 10)
    report.first_loss = sum(step["loss"] for step in steps[:tenth]) / tenth
    report.last_loss = sum(step["loss"] for step in steps[-tenth:]) / tenth


def _state_folder(out: Path, resume: bool) -> Path:
    folder = out.with_name(f"{out.name}.recover")
    if (folder / STATE_FILE).is_file() and not resume:
        raise WandappError(f"{folder}: holds the state of an unfinished run; continue it with --resume, or remove it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WandappError(f"{folder}: cannot be made ({error.strerror}); choose another name") from None
    return folder


@contextmanager
def _removed_if_empty(folder: Path) -> Iterator[None]:
    """Where the body fails, a folder without files goes."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            folder.rmdir()
        raise


def _verified(model: nn.Module, recipe: PruneConfig, complaint: str) -> int:
    """Zeros in the pruned linear maps, after a check that the pattern holds and no zero is negative."""
    found = verify_model(model, recipe.pattern, recipe.skip, together=recipe.is_allocated)
    if not found.ok:
        raise WandappError(f"{complaint} ({found.first_offence})")
    return found.zeros


def _evaluation_texts(held_out: Tensor, config: RecoverConfig, folder: Path) -> dict[str, dict]:
    """Options of `perplexity` by name of the text."""
    path = folder / "held-out.safetensors"
    save_tokens(held_out, path)
    more = {"seq_len": config.seq_len, "windows": config.eval_windows, "text_field": config.text_field}
    names = [Path(text).name for text in config.eval_text]
    alike = {name for name in names if names.count(name) > 1}
    named = {text if name in alike else name: text for name, text in zip(names, config.eval_text, strict=True)}
    return {"held-out": {"text": path}} | {name: {"text": text} | more for name, text in named.items()}


def _perplexities(loaded: LoadedModel, texts: dict[str, dict], config: RecoverConfig) -> dict[str, dict]:
    measured = {name: perplexity(loaded.model, loaded.tokenizer, **text).to_dict() for name, text in texts.items()}
    measured["held-out"]["text"] = f"{config.held_out} samples of {config.text} that training never sees"
    return measured


def _sha256_of(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _save(
    loaded: LoadedModel,
    out: Path,
    overwrite: bool,
    recipe: PruneConfig,
    config: RecoverConfig,
    report: RecoverReport,
    folder: Path,
    state_folder: Path,
) -> None:
    """Checkpoint, recipe, report and card as prune writes them, and what the training did beside them."""
    pruned = folder / "wandapp" / "report.json"
    pruned_report = json.loads(pruned.read_text(encoding="utf-8")) if pruned.is_file() else {}
    files = {
        "wandapp/recipe.yaml": (folder / "wandapp" / "recipe.yaml").read_text(encoding="utf-8"),
        "wandapp/recover.yaml": config.dump_yaml(),
        "wandapp/recover.json": json.dumps(report.to_dict(), indent=1) + "\n",
        "wandapp/recover-loss.jsonl": (state_folder / LOSS_FILE).read_text(encoding="utf-8"),
        "README.md": model_card(recipe, pruned_report, recovered=report.to_dict()),
    }
    if pruned_report:
        files["wandapp/report.json"] = pruned.read_text(encoding="utf-8")
    save_pruned(loaded.model, loaded.tokenizer, out, files=files, overwrite=overwrite)
    _plot_losses(out / "wandapp")
    shutil.rmtree(state_folder)


def _plot_losses(folder: Path) -> None:
    """The loss curve as PNG, where matplotlib is installed; the JSONL file beside it holds the same."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    steps = [json.loads(line) for line in (folder / "recover-loss.jsonl").read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([step["step"] for step in steps], [step["loss"] for step in steps], linewidth=0.8)
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.grid(alpha=0.3)
    figure.savefig(folder / "recover-loss.png", dpi=120)
