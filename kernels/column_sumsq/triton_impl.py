"""column_sumsq in Triton: each program sums a strip of tokens for a strip of features; the strips' partial sums are
added in a fixed order, so that equal inputs give equal bits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS_PER_PROGRAM = 1024  # bounds the fp32 chains of one thread and gives the GPU enough programs


def column_sumsq_triton(x: Tensor) -> Tensor:
    batch, tokens, features = x.shape
    splits = max(1, triton.cdiv(tokens, TOKENS_PER_PROGRAM))
    partial = torch.empty(batch, splits, features, dtype=torch.float32, device=x.device)
    if partial.numel():
        tile = sumsq_tile(features, x.element_size())
        grid = (triton.cdiv(features, tile["BLOCK_FEATURES"]), splits, batch)
        _column_sumsq_kernel[grid](
            x,
            partial,
            tokens,
            features,
            *x.stride()[:2],
            TOKENS=TOKENS_PER_PROGRAM,
            **tile,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return partial.sum(dim=1) if splits > 1 else partial[:, 0]


def sumsq_tile(features: int, itemsize: int) -> dict:
    """16 bytes a thread, 32 threads along the features; each thread has 4 rows of tokens in flight."""
    return {"BLOCK_TOKENS": 16, "BLOCK_FEATURES": min(512 // itemsize, triton.next_power_of_2(features))}


@triton.jit
def _column_sumsq_kernel(
    x_ptr,
    partial_ptr,
    tokens,
    features,
    stride_x_batch,
    stride_x_token,
    TOKENS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    batch, split = tl.program_id(2), tl.program_id(1)
    offs_features = tl.program_id(0) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    keep_features = offs_features < features
    x_ptr += batch.to(tl.int64) * stride_x_batch
    sumsq = tl.zeros((BLOCK_TOKENS, BLOCK_FEATURES), tl.float32)
    for first_token in range(0, TOKENS, BLOCK_TOKENS):
        offs_tokens = split * TOKENS + first_token + tl.arange(0, BLOCK_TOKENS)
        x_ptrs = x_ptr + offs_tokens.to(tl.int64)[:, None] * stride_x_token + offs_features[None, :]
        keep_x = (offs_tokens < tokens)[:, None] & keep_features[None, :]
        x_tile = tl.load(x_ptrs, mask=keep_x, other=0.0).to(tl.float32)
        sumsq += x_tile * x_tile
    partial_ptrs = partial_ptr + (batch * tl.num_programs(1) + split).to(tl.int64) * features + offs_features
    tl.store(partial_ptrs, tl.sum(sumsq, axis=0), mask=keep_features)
