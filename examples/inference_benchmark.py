"""For those who benchmark inference: what one packed layer, and then a packed model, gains over the dense one here.

python examples/inference_benchmark.py PRUNED_FOLDER
"""

# %% Load one pruned checkpoint in both forms.
import sys
import time
from pathlib import Path
from statistics import median

import torch

import wandapp
from wandapp.inference import SparseLinear

FOLDER = sys.argv[1] if len(sys.argv) > 1 else "pruned"
ROUNDS = 7

packed = Path(FOLDER + "-packed")
if not packed.exists():
    wandapp.pack_checkpoint(FOLDER, packed)
dense, tokenizer = wandapp.load_model(FOLDER)
sparse = wandapp.load_sparse(packed)


# %% A layer: the same input through both, in turns, so that a machine that drifts drifts for both.
def milliseconds(call) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


name, layer = next((name, module) for name, module in sparse.named_modules() if isinstance(module, SparseLinear))
twin = dense.get_submodule(name)
with torch.inference_mode():
    for tokens in (1, 4, 16):
        x = torch.randn(tokens, layer.in_features, dtype=twin.weight.dtype)
        gap = (layer(x) - twin(x)).abs().max().item()
        times = [(milliseconds(lambda: twin(x)), milliseconds(lambda: layer(x))) for _ in range(ROUNDS)]  # noqa: B023
        ours, theirs = median(t[1] for t in times), median(t[0] for t in times)
        print(
            f"{name} {tokens:3} tokens: {theirs:.3f} ms dense, {ours:.3f} ms by {layer.kernel(tokens)}, gap {gap:.1e}"
        )

# %% The model: greedy decoding, best of a few turns. A loss is printed like a gain.
prompt = tokenizer("In Python, a list is", return_tensors="pt")["input_ids"]
settings = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
seconds = {"dense": [], "sparse": []}
for _ in range(3):
    for form, model in (("dense", dense), ("sparse", sparse)):
        seconds[form].append(milliseconds(lambda: model.generate(prompt, **settings)) / 1e3)  # noqa: B023
rates = {form: 16 / min(values) for form, values in seconds.items()}
print(f"tokens/s: dense {rates['dense']:.1f}, sparse {rates['sparse']:.1f}, {rates['sparse'] / rates['dense']:.2f}x")
