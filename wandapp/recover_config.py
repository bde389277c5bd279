"""Every option of recovery training, its default, and where the default comes from."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from wandapp.errors import WandappError
from wandapp.options import Options


class RecoverConfig(Options):
    """The options of one recovery run; an unknown name or a bad value raises `WandappError`."""

    # Text. Wanda's authors train on C4 in blocks of 1024 tokens, 30,000 samples, once (arXiv:2306.11695)
    text: str = Field("c4", description="text to train on: c4, wikitext2, pydoc, self, a file, or a hub dataset")
    samples: int = Field(30000, ge=1, description="training samples, each seen once")
    seq_len: int = Field(1024, ge=2, description="tokens per sample")
    held_out: int = Field(16, ge=1, description="more samples of the same text, for perplexity before and after only")
    eval_text: tuple[str, ...] = Field((), description="another text for perplexity before and after; may be repeated")
    eval_windows: int | None = Field(None, ge=1, description="windows of each such text; all when left out")
    text_field: str = Field("text", description="name of the text column in .jsonl, .parquet and hub datasets")
    seed: int = Field(0, ge=0, description="seed of every random choice")

    # What trains. A field that is None takes the preset's value (PRESETS below)
    preset: Literal["papers", "strong"] = Field("papers", description="values of the options left open")
    full: bool = Field(False, description="train every weight of the decoder blocks instead of LoRA; zeros stay zero")
    targets: str | None = Field(
        None, description="LoRA: qv, all, or a regular expression searched in linear maps' dotted names"
    )
    rank: int | None = Field(None, ge=1, description="LoRA: inner dimension r")
    alpha: float | None = Field(None, gt=0, description="LoRA: the update is scaled by alpha / r")
    dropout: float | None = Field(None, ge=0, lt=1, description="LoRA: share of inputs the update does not see")
    lr: float | None = Field(None, gt=0, description="highest learning rate of AdamW")
    schedule: Literal["linear", "cosine", "constant"] | None = Field(
        None, description="how the learning rate falls to 0"
    )
    warmup: float | None = Field(None, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    batch_size: int = Field(1, ge=1, description="samples per forward")
    accumulate: int = Field(1, ge=1, description="forwards per step")

    # How
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="type of the products; what is trained is float32 either way"
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N; auto: cuda where there is one")
    gradient_checkpointing: bool = Field(
        False, description="recompute a block's activations: less memory, a third slower"
    )
    save_every: int = Field(100, ge=1, description="steps between two saved states, which --resume continues from")

    @model_validator(mode="after")
    def _full_training_has_no_adapters(self) -> Self:
        given = [name for name in ("targets", "rank", "alpha", "dropout") if getattr(self, name) is not None]
        given += ["preset"] if self.preset == "strong" else []
        if self.full and given:
            raise WandappError(f"{given[0]}: is an option of LoRA, and full trains every weight; leave one of them out")
        return self

    def resolved(self) -> "RecoverConfig":
        """The same with every open option filled in from the preset."""
        return self.with_values(FULL if self.full else PRESETS[self.preset])


# papers: arXiv:2306.11695 (its repository's lora_ft) and arXiv:2503.04992.
# strong, FULL: what lowered held-out perplexity most among the settings tried on SmolLM2 (docs/recovery.md)
PRESETS: dict[str, dict[str, Any]] = {
    "papers": {
        "targets": "qv",
        "rank": 8,
        "alpha": 16.0,
        "dropout": 0.05,
        "lr": 1e-4,
        "schedule": "linear",
        "warmup": 0.0,
    },
    "strong": {
        "targets": "all",
        "rank": 32,
        "alpha": 64.0,
        "dropout": 0.0,
        "lr": 1e-3,
        "schedule": "cosine",
        "warmup": 0.05,
    },
}
FULL: dict[str, Any] = {"lr": 3e-4, "schedule": "cosine", "warmup": 0.05}
