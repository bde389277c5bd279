// What the bindings call: one table of functions per instruction set.
#pragma once
#include <cstdint>
#include <string>

namespace wandapp {

enum Dtype { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kInt8 = 3 };

// score_ij = |weight_ij| * (alpha * gradient_ij + scale_j); scale and gradient may be null, meaning 1 and 0.
struct ScoreTerms {
  void* weight;
  int64_t weight_stride;
  Dtype dtype;
  const float* scale;
  const float* gradient;
  int64_t gradient_stride;
  float alpha;
  int64_t rows, cols;
};

// Where the choice goes. in_place: the weight is zeroed and `mask` takes one bit per column; else one bool per column.
// `values`, n:m in place only: the kept weights in row order, n for every m columns; or null.
struct Choice {
  uint8_t* mask;
  bool in_place;
  void* values;
  int64_t values_per_row;
};

// One column block of SparseGPT. n = 0: given_mask says what stays; else n of every m is chosen. `mask` takes what was used.
struct CompensateArgs {
  float* weight;
  int64_t weight_stride;
  int64_t rows, width;
  const float* factor;
  int n, m;
  const uint8_t* given_mask;
  uint8_t* mask;
  float* error;
};

struct PackArgs {
  const void* weight;
  int64_t weight_stride;
  Dtype dtype;
  int64_t rows, cols;
  void* values;
  uint8_t* bitmask;
};

// n:m, or rows of row_offsets where m is 0. dtype is that of the values; int8 values stand for weights scale[row] * value,
// for all others scale is null.
struct PackedWeight {
  const void* values;
  const uint8_t* bitmask;
  const int64_t* row_offsets;
  const float* scale;
  int64_t value_count;
  int64_t n, m;
  Dtype dtype;
  int64_t rows, cols;

  // Inside the values, whatever the offsets say.
  int64_t row_begin(int64_t row) const {
    return m ? row * (cols / m * n) : row_offsets[row] < 0 ? 0 : row_offsets[row] < value_count ? row_offsets[row] : value_count;
  }
};

// y [tokens, rows] = x [tokens, cols] W^T + bias, all three of `dtype`; bias may be null.
struct LinearArgs {
  Dtype dtype;
  const void* x;
  int64_t tokens;
  const void* bias;
  void* y;
};

// v = decay v + (1 - decay) g^2;  w -= lr g / (sqrt(v) + epsilon)
struct RmspropRates {
  float lr, decay, epsilon;
};

struct Kernels {
  void (*column_sumsq)(const void* x, Dtype, int64_t batches, int64_t tokens, int64_t features, int64_t batch_stride,
                       int64_t token_stride, float* out, int threads);
  // Both return the flat index of the first score that is NaN or Inf, else -1.
  int64_t (*select_nm)(const ScoreTerms&, Choice, int n, int m, int threads);
  int64_t (*select_rows)(const ScoreTerms&, Choice, int64_t keep, int threads);
  // The flat index of the first error that is NaN or Inf, else -1.
  int64_t (*compensate_block)(const CompensateArgs&, int threads);
  // The flat index of the first column of the first group with more than n non-zeros, else -1.
  int64_t (*pack_nm)(const PackArgs&, int n, int m, int threads);
  void (*count_nonzeros)(const PackArgs&, int64_t* counts, int threads);
  void (*pack_nonzeros)(const PackArgs&, const int64_t* row_offsets, int threads);
  // `out` has the values' dtype, or any floating-point one where the values are int8.
  void (*unpack)(const PackedWeight&, Dtype out_dtype, int64_t first_row, int64_t end_row, void* out, int threads);
  void (*sparse_linear)(const PackedWeight&, const LinearArgs&, int threads);
  // The same product on a dense row-major weight: what benchmarks compare with.
  void (*dense_linear)(const void* weight, int64_t rows, int64_t cols, const LinearArgs&, int threads);
  void (*rmsprop)(float* weight, const void* gradient, Dtype, float* mean_square, int64_t count, RmspropRates, int threads);
  // out [left_rows, right_rows] = sum over columns of max(left, right), rows of both contiguous.
  void (*pairwise_max_sum)(const float* left, int64_t left_rows, const float* right, int64_t right_rows, int64_t cols,
                           float* out, int threads);
};

extern const Kernels portable_kernels;
#ifdef __x86_64__
extern const Kernels avx2_kernels, avx512_kernels;
// What the AVX-512 kernels do better with VBMI2.
extern void (*const sparse_linear_vbmi2)(const PackedWeight&, const LinearArgs&, int threads);
extern void (*const unpack_vbmi2)(const PackedWeight&, Dtype, int64_t first_row, int64_t end_row, void* out, int threads);
extern void (*const sparse_linear_bf16)(const PackedWeight&, const LinearArgs&, int threads);
#endif

// The table of `isa`: "portable", "avx2", "avx512", "avx512vbmi2", "avx512bf16", or "auto", the widest this machine runs.
// Throws std::invalid_argument when it cannot run here.
const Kernels& kernels_of(const std::string& isa);
const char* best_isa();
bool isa_runs_here(const std::string& isa);

}  // namespace wandapp
