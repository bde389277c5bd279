"""Every option of a pruning run, its default, and where the default comes from.

The command line, a recipe file and `wandapp.prune(...)` all end in one `PruneConfig`. `OUT/wandapp/recipe.yaml` is its
resolved form: `wandapp prune --config OUT/wandapp/recipe.yaml --out NEW` repeats the run.
"""

import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator

from wandapp.errors import WandappError, compiled, nearest_folder
from wandapp.options import Options
from wandapp.pattern import SparsityPattern
from wandapp.yaml_file import read_mapping

RECIPE_FILE = "wandapp/recipe.yaml"
MAX_COUNT = 10**7  # of samples, and of tokens in one: what a typing error exceeds, and a mistake may ask memory for
# More samples want fewer passes: what matters is the number of steps (docs/methods.md), and cost grows with it
RECONSTRUCT_STEPS, FEWEST_PASSES, MOST_PASSES = 256, 2, 4
_DTYPE_SYNONYMS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "half": "float16", "float": "float32"}
WHOLE_MODEL = ("self_samples", "tune_passes")  # options that run the model as a whole, which a streamed one cannot


class PruneConfig(Options):
    """The options of one pruning run; an unknown name or a bad value raises `WandappError`."""

    # Which model, and where the result goes
    model: str | None = Field(None, description="hub id, local folder, .gguf file, or 'smollm2'")
    out: str | None = Field(None, description="folder for the pruned checkpoint")
    overwrite: bool = Field(False, description="replace an output folder that wandapp wrote earlier")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="type of the weights in memory and on disk; auto: the checkpoint's own, float32 for .gguf"
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N; auto: cuda where there is one")

    stream: bool | None = Field(
        None,
        description="read blocks from the disk as they are needed; default: where the model exceeds half of the memory",
    )
    activations: Literal["memory", "disk"] = Field(
        "memory", description="where hidden states are kept; disk: in a mapped file in OUT.partial"
    )

    # What is pruned
    method: str = Field("wanda", description="a method, or method+refiner such as rgs+ro; wanda: arXiv:2306.11695")
    sparsity: str = Field("2:4", description="n:m (keeps n of every m inputs) or a fraction of zeros")
    skip: tuple[str, ...] = Field(
        (), description="regular expression; linear maps whose dotted name has a match stay dense; may be repeated"
    )
    permute: bool | None = Field(
        None,
        description="n:m: first let channels change places inside the MLP and inside attention heads, where the dense "
        "model stays the same, so that the choice keeps more score; default: the preset's",
    )
    allocate: Literal["uniform", "owl", "error"] | None = Field(
        None,
        description="how a fraction of zeros is spread over blocks. uniform: all alike; owl: by outliers of the score "
        "(arXiv:2310.05175); error: by the blocks' errors; default: the preset's",
    )
    allocate_spread: float = Field(
        0.08, gt=0, lt=1, description="lambda of owl; with error, how far a block may be from the target"
    )
    owl_outlier: float = Field(5.0, gt=0, description="M of owl: scores above M times the block's mean are outliers")
    magnitude_group: Literal["row", "matrix"] = Field(
        "matrix", description="comparison group of unstructured magnitude; matrix: as in the Wanda authors' code"
    )

    # Calibration: 128 samples x 2048 tokens of C4, seed 0, is the setting of Wanda's authors (arXiv:2306.11695)
    calibration: str = Field("c4", description="c4, wikitext2, pydoc, self, a file, or a hub dataset")
    samples: int | None = Field(
        None,
        ge=1,
        le=MAX_COUNT,
        description="number of calibration samples; default 128, or all rows of a file of token ids",
    )
    seq_len: int | None = Field(
        None,
        ge=2,
        le=MAX_COUNT,
        description="tokens per sample; default 2048 whatever the model's context is, or the token file's width",
    )
    self_samples: int | None = Field(
        None,
        ge=0,
        le=MAX_COUNT,
        description="more samples, which the dense model writes itself before it is pruned (arXiv:2410.17170); default: the "
        "preset's",
    )
    self_temperature: float | None = Field(
        None,
        ge=0.1,
        le=10,
        description="temperature at which the model writes samples, for self_samples and for calibration self; above 1 rare "
        "tokens come more often; default: the preset's",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of every random choice")
    text_field: str = Field("text", description="name of the text column in .jsonl, .parquet and hub datasets")
    save_calibration: str | None = Field(None, description=".safetensors or .npy file for the tokens that were used")
    batch_size: int | None = Field(None, ge=1, description="samples per forward; default: as many as the machine likes")

    # Methods. Wanda++: arXiv:2503.04992. A field that is None takes the preset's value (PRESETS below)
    preset: Literal["paper", "robust", "best"] = Field(
        "robust", description="values of the method options left open; best: of the method too"
    )
    alpha: float | None = Field(None, ge=0, description="weight of the gradient in the score of rgs and gblm")
    alpha_unit: Literal["absolute", "relative"] | None = Field(
        None,
        description="rgs: whether alpha multiplies G as it is, or G brought to the input norms' mean in each layer",
    )
    regional_loss: Literal["frobenius", "token"] | None = Field(
        None, description="rgs: norm of a block's outputs as they are, or with each token divided by its RMS"
    )
    ro_rounds: int = Field(5, ge=0, description="rounds of regional optimisation (K)")
    ro_samples: int = Field(32, ge=1, description="samples drawn per round (M)")
    ro_lr: float | None = Field(None, gt=0, description="learning rate of regional optimisation")
    ro_lr_unit: Literal["absolute", "weight-rms"] | None = Field(
        None, description="whether ro_lr is a step in weight units or a fraction of each matrix's root mean square"
    )
    ro_loss: Literal["frobenius", "token"] | None = Field(
        None, description="ro: squared error of the outputs as they are, or with each token divided by its target's RMS"
    )
    reconstruct_passes: int | None = Field(
        None,
        ge=0,
        description="passes of +reconstruct over all calibration samples; default: as many as make 256 steps of a sample "
        "each, but 2 to 4",
    )
    reconstruct_lr: float = Field(
        1e-2,
        gt=0,
        description="highest learning rate of +reconstruct, as a fraction of each parameter's root mean square",
    )
    reconstruct_loss: Literal["frobenius", "token"] = Field(
        "token",
        description="+reconstruct: squared error of the outputs as they are, or each token's by its target's RMS",
    )
    reconstruct_target: Literal["pruned-path", "dense-path"] = Field(
        "dense-path",
        description="+reconstruct: aim at the dense block's outputs on the pruned model's states, or at the dense model's",
    )
    reconstruct_region: Literal["block", "sub-block"] = Field(
        "block",
        description="+reconstruct: train a block as a whole, or first attention, towards the dense one on the pruned model's "
        "states, and then the rest of the block",
    )
    reconstruct_compute: Literal["storage", "bfloat16", "auto"] | None = Field(
        None,
        description="type of the products in the steps of +reconstruct and of tuning, auto: bfloat16 where the device multiplies "
        "it; masters and losses are fp32",
    )
    tune_passes: int | None = Field(
        None,
        ge=0,
        description="passes over all samples in which, after all blocks are pruned, row scales of the pruned maps, norm weights "
        "and biases learn to give the dense model's next-token distribution; default: the preset's",
    )
    tune_lr: float = Field(
        2e-3, gt=0, description="highest learning rate of that, as a fraction of each parameter's root mean square"
    )
    gblm_norm: Literal["l2", "l1"] = Field("l2", description="how gblm joins gradients of samples (arXiv:2311.04902)")
    gblm_cache: str | None = Field(
        None, description="folder where gblm keeps the dense model's gradients for runs with other patterns"
    )
    damping: float = Field(
        0.01,
        gt=0,
        description="added to the Hessian's diagonal; sparsegpt: as a fraction of its mean (arXiv:2301.00774), admm: of each "
        "of its elements",
    )
    admm_iterations: int = Field(16, ge=1, description="iterations of admm; each costs one product with the Hessian")

    @classmethod
    def of_checkpoint(cls, folder: str | Path) -> Self:
        """What a pruned checkpoint says of itself in wandapp/recipe.yaml.

        raises  WandappError where the folder or its recipe is not there
        """
        folder = Path(folder)
        if not folder.is_dir():
            rule = "a file, and a folder is needed" if folder.is_file() else "no such folder"
            raise WandappError(f"{folder}: {rule}; {nearest_folder(folder) or 'check the path'}")
        if not (folder / RECIPE_FILE).is_file():
            raise WandappError(
                f"{folder}: no {RECIPE_FILE} says what was pruned; take a folder that wandapp prune wrote, or (verify, pack) "
                "give --sparsity, e.g. --sparsity 2:4"
            )
        return cls.from_yaml(folder / RECIPE_FILE)

    @property
    def source(self) -> str:
        """`model`, where a command cannot do without it."""
        if self.model is None:
            raise WandappError("prune needs model; give it, e.g. wandapp prune smollm2 ...")
        return self.model

    @property
    def target(self) -> str:
        """`out`, where a command cannot do without it."""
        if self.out is None:
            raise WandappError("prune needs out; give it, e.g. --out pruned-model")
        return self.out

    @property
    def pattern(self) -> SparsityPattern:
        """The parsed `sparsity`."""
        return SparsityPattern.parse(self.sparsity)

    @property
    def is_allocated(self) -> bool:
        """Whether blocks differ in sparsity, so that `sparsity` is that of all together."""
        return self.allocate not in (None, "uniform")

    def passes_of_reconstruction(self, samples: int) -> int:
        """`reconstruct_passes`, or its default for that many samples."""
        if self.reconstruct_passes is not None:
            return self.reconstruct_passes
        return min(MOST_PASSES, max(FEWEST_PASSES, round(RECONSTRUCT_STEPS / samples)))

    def resolved(self) -> "PruneConfig":
        """The same with every open option filled in from the preset, and the method if none was named.

        Where blocks are streamed, WHOLE_MODEL options stay open: `job.resolved` says what the run is without.
        """
        values = _preset_values(self.preset, self.pattern)
        if self.stream:
            values = {name: value for name, value in values.items() if name not in WHOLE_MODEL}
        named = "method" in self.model_fields_set or "method" not in values
        return (self if named else self.model_copy(update={"method": values["method"]})).with_values(values)

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> Self:
        """The options in a YAML file; an override wins over the file's value.

        Another preset or sparsity also takes back what the file's own filled in, but for the method.
        """
        found = read_mapping(path, "recipe")
        if overrides.keys() & {"preset", "sparsity"}:
            own = cls._of_file(path, found, {})
            filled = _preset_values(own.preset, own.pattern)
            filled.pop("method", None)
            found = {name: found[name] for name in found if name not in filled or getattr(own, name) != filled[name]}
        return cls._of_file(path, found, overrides)

    @field_validator("sparsity", mode="before")
    @classmethod
    def _normalise_sparsity(cls, value: Any) -> str:
        return str(SparsityPattern.parse(value))

    @field_validator("allocate")
    @classmethod
    def _fits_the_pattern(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value not in (None, "uniform") and ":" in info.data.get("sparsity", ""):
            raise WandappError(
                f"allocate {value}: {info.data['sparsity']} keeps as many of every group in all blocks, so there is nothing to "
                "spread; give a fraction of zeros such as 0.6, or leave out --allocate"
            )
        return value

    @field_validator(*WHOLE_MODEL)
    @classmethod
    def _is_in_memory(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and info.data.get("stream"):
            option = str(info.field_name)
            raise WandappError(
                f"{option} {value}: the whole model must be in memory for that; use --no-stream, or "
                f"--{option.replace('_', '-')} 0"
            )
        return value

    @field_validator("dtype", mode="before")
    @classmethod
    def _normalise_dtype(cls, value: Any) -> Any:
        name = str(value).removeprefix("torch.")
        return _DTYPE_SYNONYMS.get(name, name)

    @field_validator("model", "out", "calibration", "save_calibration", "gblm_cache")
    @classmethod
    def _possible_path(cls, value: str | None) -> str | None:
        if value is not None and ("\0" in value or not value.strip()):
            raise ValueError("must be a name without NUL characters, and not empty")
        return value

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", value):
            raise ValueError("must be auto, cpu, cuda or cuda:N")
        return value

    @field_validator("skip", mode="before")
    @classmethod
    def _list_of_expressions(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("skip")
    @classmethod
    def _valid_expressions(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for expression in value:
            compiled(expression)
        return value


# paper: as published. robust: what lowered perplexity on every text, seed and model family tried (README, Quality)
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "alpha": 100.0,
        "alpha_unit": "absolute",
        "regional_loss": "frobenius",
        "ro_lr": 3e-7,
        "ro_lr_unit": "absolute",
        "ro_loss": "frobenius",
        "tune_passes": 0,
        "self_samples": 0,
        "self_temperature": 1.0,
        "permute": False,
        "allocate": "uniform",
        "reconstruct_compute": "storage",
    },
    "robust": {
        "alpha": 1.0,
        "alpha_unit": "absolute",
        "regional_loss": "token",
        "ro_lr": 3e-3,
        "ro_lr_unit": "weight-rms",
        "ro_loss": "token",
        "tune_passes": 0,
        "self_samples": 0,
        "self_temperature": 1.0,
        "permute": False,
        "allocate": "uniform",
        "reconstruct_compute": "storage",
    },
}
# The lowest perplexity measured so far (docs/methods.md, Presets)
PRESETS["best"] = PRESETS["robust"] | {
    "method": "wanda+ro+reconstruct",
    "self_samples": 64,
    "self_temperature": 1.3,
    "permute": True,
    "allocate": "error",
    "reconstruct_compute": "auto",
}


def _preset_values(preset: str, pattern: SparsityPattern) -> dict[str, Any]:
    """What a preset gives to open options, less what cannot serve the pattern."""
    return PRESETS[preset] | ({"allocate": "uniform"} if pattern.is_structured else {"permute": False})
