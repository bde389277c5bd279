"""The shapes of a model's linear maps, by the name of a well-known model or from a local folder's config.json."""

from pathlib import Path
from typing import NamedTuple

from wandapp.errors import WandappError, nearest

Shape = tuple[int, int]  # (out_features, in_features)


class Dimensions(NamedTuple):
    """What the linear maps of a Llama-like decoder block follow from."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int


MODELS = {
    "smollm2": Dimensions(576, 1536, 9, 3, 64),
    "qwen2.5-0.5b": Dimensions(896, 4864, 14, 2, 64),
    "llama-3.2-1b": Dimensions(2048, 8192, 32, 8, 64),
    "llama-7b": Dimensions(4096, 11008, 32, 32, 128),
    "llama-13b": Dimensions(5120, 13824, 40, 40, 128),
    "llama-3-8b": Dimensions(4096, 14336, 32, 8, 128),
    "llama-3-70b": Dimensions(8192, 28672, 64, 8, 128),
    "mistral-7b": Dimensions(4096, 14336, 32, 8, 128),
    "qwen2.5-7b": Dimensions(3584, 18944, 28, 4, 128),
    "qwen3-8b": Dimensions(4096, 12288, 32, 8, 128),
    "gemma-2-9b": Dimensions(3584, 14336, 16, 8, 256),
}


def layer_shapes(model: str) -> dict[Shape, list[str]]:
    """The distinct shapes of one decoder block's linear maps, and the maps that have each.

    model   a name in MODELS, or a local folder with a config.json (its weights are not read)
    raises  WandappError for an unknown name, or a config that describes no supported model
    """
    if model.lower() in MODELS:
        return _distinct(_llama_like(MODELS[model.lower()]))
    if not (Path(model) / "config.json").is_file():
        raise WandappError(f"{model}: neither a folder with config.json nor a known model; {nearest(model, MODELS)}")
    from wandapp.blocks import find_blocks, find_linears
    from wandapp.skeleton import skeleton

    _, blocks = find_blocks(skeleton(model))
    return _distinct(
        [
            (_last_word(name), (view.weight.shape[0], view.weight.shape[1]))
            for name, view in find_linears(blocks[0], "").items()
        ]
    )


def _last_word(name: str) -> str:
    """ "down_proj" of "mlp.down_proj" and of "mlp.experts.down_proj.5"."""
    return next(word for word in reversed(name.split(".")) if not word.isdigit())


def _llama_like(d: Dimensions) -> list[tuple[str, Shape]]:
    query, key = d.heads * d.head_dim, d.kv_heads * d.head_dim
    return [
        ("q_proj", (query, d.hidden)),
        ("k_proj", (key, d.hidden)),
        ("v_proj", (key, d.hidden)),
        ("o_proj", (d.hidden, query)),
        ("gate_proj", (d.intermediate, d.hidden)),
        ("up_proj", (d.intermediate, d.hidden)),
        ("down_proj", (d.hidden, d.intermediate)),
    ]


def _distinct(maps: list[tuple[str, Shape]]) -> dict[Shape, list[str]]:
    found: dict[Shape, list[str]] = {}
    for name, shape in maps:
        names = found.setdefault(shape, [])
        if name not in names:
            names.append(name)
    return found
