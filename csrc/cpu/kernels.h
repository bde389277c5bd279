// What the bindings call: one table of functions per instruction set.
#pragma once
#include <cstdint>
#include <string>

namespace wandapp {

enum Dtype { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

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
struct Choice {
  uint8_t* mask;
  bool in_place;
};

struct Kernels {
  void (*column_sumsq)(const void* x, Dtype, int64_t batches, int64_t tokens, int64_t features, int64_t batch_stride,
                       int64_t token_stride, float* out, int threads);
  // Both return the flat index of the first score that is NaN or Inf, else -1.
  int64_t (*select_nm)(const ScoreTerms&, Choice, int n, int m, int threads);
  int64_t (*select_rows)(const ScoreTerms&, Choice, int64_t keep, int threads);
};

extern const Kernels portable_kernels;
#ifdef __x86_64__
extern const Kernels avx2_kernels, avx512_kernels;
#endif

// The table of `isa` ("auto" = the widest this machine runs). Throws std::invalid_argument when it cannot run here.
const Kernels& kernels_of(const std::string& isa);
// "avx512", "avx2" or "portable": the widest this machine runs.
const char* best_isa();
bool isa_runs_here(const std::string& isa);

}  // namespace wandapp
