"""For those who do kernel research: run every backend of an op against its reference, bit for bit, and time it against a copy.

python examples/kernel_research.py [ROWS COLUMNS]
"""

# %% An op is a folder: `reference` is the literal equation, the others are judged by it.
import sys
import time

import torch

from wandapp.errors import BackendUnavailableError
from wandapp.kernels.pack import pack
from wandapp.kernels.select import prune_nm_, select_nm
from wandapp.kernels.sparse_linear import sparse_linear

ROWS, COLUMNS = map(int, sys.argv[1:3]) if len(sys.argv) > 2 else (1024, 1024)
torch.manual_seed(0)
weight = torch.randn(ROWS, COLUMNS)
norm = torch.rand(COLUMNS)  # s_j: the score is |W_ij| * s_j

# %% Same mask from every backend that can run here; the others say why they cannot.
expected = select_nm(weight, norm, n=2, m=4, backend="reference")
for backend in ("cpu", "triton", "cuda"):
    try:
        mask = select_nm(weight, norm, n=2, m=4, backend=backend)
    except BackendUnavailableError as error:
        print(f"{backend:8} {error}")
        continue
    print(f"{backend:8} {'bit-equal' if torch.equal(mask, expected) else 'DIFFERS'}")
    assert torch.equal(mask, expected)


# %% Score, choice and zeroing read the weight once: a copy of it is the floor.
def best_ms(call, rounds: int = 7) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return min(times)


scratch = torch.empty_like(weight)
copy_ms = best_ms(lambda: scratch.copy_(weight))
prune_ms = best_ms(lambda: prune_nm_(scratch, norm, n=2, m=4))
print(f"copy {copy_ms:.3f} ms, prune_nm_ {prune_ms:.3f} ms, {prune_ms / copy_ms:.2f}x")

# %% Pack the pruned weight and multiply by it: the sum's order is all that may differ.
bitmask = prune_nm_(weight, norm, n=2, m=4)
assert torch.equal(weight != 0, expected)
packed = pack(weight, n=2, m=4)
x = torch.randn(3, COLUMNS)
gap = (sparse_linear(x, packed) - x.double() @ weight.double().T).abs().max().item()
print(
    f"bytes: {weight.nbytes} dense, {packed.values.nbytes + packed.bitmask.nbytes} packed; largest gap to fp64 {gap:.1e}"
)
assert gap < 1e-3
