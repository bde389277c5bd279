// y = x W^T + b, reading W in packed form: by rows for few tokens, by tiles of rows for more, and
// skipping what is not kept for very many where the products are in fp32.
//
// Memory is safe whatever the bitmask and the row offsets hold: no load leaves the values.
#pragma once

#include "cpu/sparse_rows.h"
#include "cpu/sparse_skip.h"
#include "cpu/sparse_tiles.h"

namespace wandapp {
namespace {

// Rows are cheaper for few tokens, since tiles cost their turning; skipping turns x and y. How few was measured on Zen 4.
template <class Lanes, class V, class T>
void sparse_linear_of(const PackedWeight& packed, const LinearArgs& args, int threads) {
  constexpr bool pairs = Lanes::kMultipliesPairs && std::is_same<T, Bf16>::value;
  using Spreading = std::conditional_t<pairs, SpreadPairs<Lanes, V>, Spread<Lanes, V>>;
  using Picking = Pick<Lanes, V>;
  constexpr int by_rows = 4, by_picks = pairs ? 1 : by_rows, by_tiles = 255;
  const bool skips = !pairs && packed.value_count < 0.7 * packed.rows * packed.cols;
  if (args.tokens > by_tiles && skips) return multiply_skipping<Lanes, V, T>(packed, args, threads);
  if (args.tokens > by_rows) return multiply_by_tiles<Spreading, T>(packed, args, threads);
  if (args.tokens <= by_picks && Picking::can_multiply(packed)) {
    return multiply_by_rows<Picking, T, by_picks>(packed, args, threads);
  }
  return multiply_by_rows<Spreading, T, by_rows>(packed, args, threads);
}

template <class Lanes>
void sparse_linear(const PackedWeight& packed, const LinearArgs& args, int threads) {
  const bool int8 = packed.dtype == kInt8;  // otherwise the values are of x's type
  switch (args.dtype) {
    case kBfloat16:
      if (int8) return sparse_linear_of<Lanes, int8_t, Bf16>(packed, args, threads);
      return sparse_linear_of<Lanes, Bf16, Bf16>(packed, args, threads);
    case kFloat16:
      if (int8) return sparse_linear_of<Lanes, int8_t, Half>(packed, args, threads);
      return sparse_linear_of<Lanes, Half, Half>(packed, args, threads);
    default:
      if (int8) return sparse_linear_of<Lanes, int8_t, float>(packed, args, threads);
      return sparse_linear_of<Lanes, float, float>(packed, args, threads);
  }
}

// The dense product of one token, written with the same care: the baseline of the benchmarks. cols divisible by 64.
template <class Lanes, class T>
void dense_linear_of(const T* weight, int64_t rows, int64_t cols, const LinearArgs& args, int threads) {
  std::vector<float> x(cols);
  for (int64_t c = 0; c < cols; c++) x[c] = widen(static_cast<const T*>(args.x)[c]);
  PackedWeight unscaled{};
  unscaled.rows = rows;
  parallel((rows + kTaskRows - 1) / kTaskRows, threads, [&](int64_t task) {
    for (int64_t row = task * kTaskRows; row < std::min((task + 1) * kTaskRows, rows); row++) {
      typename Lanes::Floats sums[4] = {Lanes::fill(0), Lanes::fill(0), Lanes::fill(0), Lanes::fill(0)};
      for (int64_t c = 0; c < cols; c += 64) {
        prefetch_ahead(weight + row * cols + c);
        for (int i = 0; i < 4; i++) {
          sums[i] = Lanes::add_product(sums[i], Lanes::load(weight + row * cols + c + 16 * i), Lanes::load(&x[c + 16 * i]));
        }
      }
      const float sum = Lanes::total(Lanes::add(Lanes::add(sums[0], sums[1]), Lanes::add(sums[2], sums[3])));
      store_output<T>(unscaled, args, 0, row, sum);
    }
  });
}

template <class Lanes>
void dense_linear(const void* weight, int64_t rows, int64_t cols, const LinearArgs& args, int threads) {
  switch (args.dtype) {
    case kBfloat16: return dense_linear_of<Lanes>(static_cast<const Bf16*>(weight), rows, cols, args, threads);
    case kFloat16: return dense_linear_of<Lanes>(static_cast<const Half*>(weight), rows, cols, args, threads);
    default: return dense_linear_of<Lanes>(static_cast<const float*>(weight), rows, cols, args, threads);
  }
}

}  // namespace
}  // namespace wandapp
