// What the bindings call. Addresses of device memory, sizes, strides in elements, dtype codes (0 fp32, 1 bf16, 2 fp16), a
// CUDA stream; the result is a cudaError_t, 0 when the launch was accepted.
#pragma once

#include <cstdint>

namespace wandapp {

enum DtypeCode { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// layout: 0 neutral, 1 CUTLASS, 2 cuSPARSELt (metadata only; both for 16-bit types and 16-byte aligned rows). keep: bitmask
// or 0.
int compress24(uintptr_t weight, int64_t row_stride, uintptr_t keep, int64_t rows, int64_t cols, int dtype, int layout,
               uintptr_t values, uintptr_t metadata, uintptr_t offender, int device, uintptr_t stream);

// x [tokens, cols] contiguous, 1 to 16 tokens; values [rows, cols / 2], bitmask [rows, cols / 8], cols a multiple of 64;
// bias [rows] or 0; y [tokens, rows]. walking: one block per multiprocessor that lays down x once, where x fits.
int sparse_linear24(uintptr_t x, uintptr_t values, uintptr_t bitmask, uintptr_t bias, uintptr_t y, int64_t tokens,
                    int64_t rows, int64_t cols, int dtype, bool walking, int device, uintptr_t stream);

const char* error_text(int error);

}  // namespace wandapp
