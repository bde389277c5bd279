"""The original implementations of magnitude, Wanda, SparseGPT and Wanda++, each imported from its own git checkout.

None of their code is here and none of it is changed on disk. What stands between it and a CPU, fp32 weights, given tokens
and today's transformers is written in a row's `shims`, which `bench_peers.py` prints beside the figures. A context manager
here imports the code, gives the call that prunes `model` (a transformers Llama) in place, and tidies up afterwards. One
process runs one of them, for checkouts share module names.
"""

import argparse
import copy
import importlib
import os
import random
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from wandapp.config import PRESETS
from wandapp.pattern import SparsityPattern

CPU = torch.device("cpu")
PAPER = PRESETS["paper"]


@dataclass(frozen=True)
class Job:
    """What both sides are asked for; rounds and samples are those of regional optimisation."""

    method: str
    pattern: SparsityPattern
    tokens: Tensor  # [samples, seq_len]
    seed: int
    ro_rounds: int
    ro_samples: int

    @property
    def removed(self) -> dict[str, int]:
        """The pattern as the authors of Wanda and SparseGPT give it: n are *removed* of every m; 0 where unstructured."""
        n, m = (self.pattern.m - self.pattern.n, self.pattern.m) if self.pattern.is_structured else (0, 0)
        return {"prune_n": n, "prune_m": m}

    def loaders(self, *_, **__) -> tuple[list[tuple[Tensor, None]], None]:
        """What the originals' get_loaders return, for the given tokens."""
        return [(row[None], None) for row in self.tokens], None


Prepared = AbstractContextManager[Callable[[], object]]


@dataclass(frozen=True)
class Original:
    """One row: whose code, which option names its checkout, what it needs to run here, and how it is called."""

    whose: str
    option: str
    shims: tuple[str, ...]
    prepared: Callable[[nn.Module, Job], Prepared]


@contextmanager
def at_home(checkout: str) -> Iterator[None]:
    """Imports come from the checkout first, CUDA calls do nothing, and what is printed is dropped."""
    sys.path.insert(0, checkout)
    torch.cuda.synchronize = lambda *_: None
    Tensor.cuda = nn.Module.cuda = lambda self, *_, **__: self
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


@contextmanager
def magnitude(model: nn.Module, job: Job) -> Iterator[Callable]:
    arguments = argparse.Namespace(sparsity_ratio=job.pattern.sparsity)
    yield partial(importlib.import_module("lib.prune").prune_magnitude, arguments, model, None, CPU, **job.removed)


@contextmanager
def wanda(model: nn.Module, job: Job) -> Iterator[Callable]:
    prune = importlib.import_module("lib.prune")
    prune.get_loaders = job.loaders
    model.seqlen, model.hf_device_map = job.tokens.shape[1], {}
    arguments = argparse.Namespace(
        nsamples=len(job.tokens), seed=job.seed, sparsity_ratio=job.pattern.sparsity, use_variant=False
    )
    with rotary_embeddings(model, job.tokens.shape[1]):
        yield partial(prune.prune_wanda, arguments, model, None, CPU, **job.removed)


@contextmanager
def sparsegpt(model: nn.Module, job: Job) -> Iterator[Callable]:
    llama = importlib.import_module("llama")
    model.seqlen = job.tokens.shape[1]
    llama.args = argparse.Namespace(
        nsamples=len(job.tokens), sparsity=job.pattern.sparsity, percdamp=0.01, blocksize=128,
        prunen=job.removed["prune_n"], prunem=job.removed["prune_m"],
        true_sequential=False, minlayer=-1, maxlayer=10**6, prune_only="", invert=False, wbits=16,
    )  # fmt: skip
    with rotary_embeddings(model, job.tokens.shape[1]):
        yield partial(llama.llama_sequential, model, job.loaders()[0], CPU)


@contextmanager
def wanda_plus_plus(model: nn.Module, job: Job) -> Iterator[Callable]:
    import transformers.optimization

    transformers.optimization.AdamW = torch.optim.AdamW
    prune = importlib.import_module("lib.prune")
    prune.get_loaders = job.loaders
    wrapper = importlib.import_module("lib.wandaplus_wrapper")
    wrapper.torch = types.SimpleNamespace(**vars(torch) | {"float16": torch.float32})
    model.seqlen, model.hf_device_map = job.tokens.shape[1], {}
    arguments = argparse.Namespace(
        nsamples=len(job.tokens), seed=job.seed, sparsity_ratio=job.pattern.sparsity, use_ro=True,
        num_ro_iters=job.ro_rounds, nums_ro_samples=job.ro_samples, rgs_scaling=PAPER["alpha"], lr_ro=PAPER["ro_lr"],
    )  # fmt: skip
    blocks, config = list(model.model.layers), model.config
    model.config = config_of_2024(config)
    random.seed(job.seed)
    yield partial(
        prune.prune_wandaplus, arguments, model, None, CPU, prune_n=job.pattern.n or 0, prune_m=job.pattern.m or 0
    )
    model.config = config
    for index, block in enumerate(blocks):
        block.load_state_dict(model.model.layers[index].state_dict())
        model.model.layers[index] = block


@contextmanager
def rotary_embeddings(model: nn.Module, seq_len: int) -> Iterator[None]:
    """Blocks that are called without position embeddings get those of positions 0 to seq_len - 1, computed once."""
    hidden = torch.empty(1, seq_len, model.config.hidden_size, dtype=model.dtype)
    embeddings = {"position_embeddings": model.model.rotary_emb(hidden, torch.arange(seq_len)[None])}
    hooks = [
        block.register_forward_pre_hook(lambda module, args, kwargs: (args, embeddings | kwargs), with_kwargs=True)
        for block in model.model.layers
    ]
    yield
    for hook in hooks:
        hook.remove()


def config_of_2024(config):
    """A copy that gives the rotary base where transformers 4 kept it."""
    if config.rope_parameters["rope_type"] != "default":
        raise SystemExit(
            f"{config.rope_parameters['rope_type']} rotary embeddings are not known to the Wanda++ reproduction"
        )
    copied = copy.deepcopy(config)
    copied.rope_theta, copied.rope_parameters = config.rope_parameters["rope_theta"], None
    return copied


ON_CPU = "calls to CUDA do nothing; progress output is dropped"
TOKENS = "get_loaders returns the given tokens"
ROTARY = "blocks are given their rotary embeddings, which transformers 4 computed in every block and call"

ORIGINALS = {
    "magnitude": Original("Wanda's authors", "wanda", (ON_CPU,), magnitude),
    "wanda": Original("the authors", "wanda", (ON_CPU, TOKENS, ROTARY), wanda),
    "sparsegpt": Original("the authors", "sparsegpt", (ON_CPU, TOKENS, ROTARY), sparsegpt),
    "wanda++": Original(
        "a community reproduction",
        "wandaplus",
        (
            ON_CPU,
            TOKENS,
            "float16 means float32 in its wrapper: fp16 products are slow on a CPU, and the other side is fp32",
            "transformers' AdamW, gone since, is torch's; it only clears gradients",
            "config.rope_theta is where transformers 4 had it; blocks are its own copy of Llama's",
            "afterwards the pruned weights are put into today's blocks, untimed",
        ),
        wanda_plus_plus,
    ),
}
