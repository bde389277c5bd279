// Sum over tokens of x^2.
#pragma once

#include "cpu/load_up_to_16.h"

namespace wandapp {
namespace {

constexpr int64_t kStripe = 256;       // columns of one task: their sums stay in L1
constexpr int64_t kBlockTokens = 256;  // tokens summed before their sum is added to the total, to bound rounding

// Adds the squares of `tokens` (at most four) rows, so that the sum is loaded and stored once for all of them.
template <class Lanes, class T>
void add_squares(const T* x, int64_t token_stride, int64_t tokens, int64_t columns, float* sum) {
  for (int64_t c = 0; c < columns; c += 16) {
    typename Lanes::Floats squares = Lanes::fill(0);
    for (int64_t t = 0; t < tokens; t++) {
      typename Lanes::Floats value = load_up_to_16<Lanes>(x + t * token_stride + c, columns - c);
      squares = Lanes::add(squares, Lanes::mul(value, value));
    }
    Lanes::store(sum + c, Lanes::add(Lanes::load(sum + c), squares));
  }
}

template <class Lanes, class T>
void sum_stripe(const T* x, int64_t token_stride, int64_t tokens, int64_t columns, float* out) {
  float total[kStripe] = {};
  for (int64_t block = 0; block < tokens; block += kBlockTokens) {
    float sum[kStripe] = {};
    const int64_t end = std::min(block + kBlockTokens, tokens);
    int64_t t = block;
    for (; t + 4 <= end; t += 4) add_squares<Lanes>(x + t * token_stride, token_stride, 4, columns, sum);
    add_squares<Lanes>(x + t * token_stride, token_stride, end - t, columns, sum);
    for (int64_t c = 0; c < columns; c++) total[c] += sum[c];
  }
  std::copy_n(total, columns, out);
}

template <class Lanes, class T>
void column_sumsq_of(const T* x, int64_t batches, int64_t tokens, int64_t features, int64_t batch_stride,
                     int64_t token_stride, float* out, int threads) {
  const int64_t stripes = (features + kStripe - 1) / kStripe;
  parallel(batches * stripes, threads, [=](int64_t task) {
    const int64_t batch = task / stripes, column = task % stripes * kStripe;
    sum_stripe<Lanes>(x + batch * batch_stride + column, token_stride, tokens, std::min(kStripe, features - column),
                      out + batch * features + column);
  });
}

template <class Lanes>
void column_sumsq(const void* x, Dtype dtype, int64_t batches, int64_t tokens, int64_t features, int64_t batch_stride,
                  int64_t token_stride, float* out, int threads) {
  auto run = [&](auto* typed) {
    column_sumsq_of<Lanes>(typed, batches, tokens, features, batch_stride, token_stride, out, threads);
  };
  if (dtype == kFloat32) run(static_cast<const float*>(x));
  if (dtype == kBfloat16) run(static_cast<const Bf16*>(x));
  if (dtype == kFloat16) run(static_cast<const Half*>(x));
}

}  // namespace
}  // namespace wandapp
