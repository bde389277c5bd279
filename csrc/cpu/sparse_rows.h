// y = x W^T + b for few tokens: bound by the bytes of W, so rows are read one after another, each of them once.
#pragma once

#include "cpu/sparse_ways.h"

namespace wandapp {
namespace {

constexpr int64_t kTaskRows = 32;

// x [tokens, words of a row] in the order in which Way hands columns out.
template <class Way, class T>
std::vector<float> arrange_rows(const T* x, int64_t tokens, int64_t cols) {
  const int64_t words = words_of<Way>(cols);
  std::vector<float> arranged(tokens * words);
  for (int64_t t = 0; t < tokens; t++) arrange_token<Way>(x + t * cols, cols, arranged.data() + t * words, 1);
  return arranged;
}

// sums[t] = product of the row and token t.
template <class Way, int tokens, bool guarded>
void multiply_row(typename Way::Row row, int64_t cols, const float* x, float* sums) {
  using Lanes = typename Way::Lanes;
  constexpr int parts = tokens < 4 ? 4 / tokens : 1;  // sums that do not wait for each other
  const int64_t words = words_of<Way>(cols);
  typename Lanes::Floats sum[parts][tokens];
  for (int t = 0; t < tokens; t++) {
    for (int part = 0; part < parts; part++) sum[part][t] = Lanes::fill(0);
  }
  auto step = [&](int64_t c, int64_t end, int part) __attribute__((always_inline)) {
    const auto piece = row.template next<guarded>(c, end);
    for (int t = 0; t < tokens; t++) {
      typename Lanes::Floats x_of_piece[Way::kVectors];
      for (int i = 0; i < Way::kVectors; i++) {
        x_of_piece[i] = Lanes::load(x + t * words + c / 32 * (16 * Way::kVectors) + 16 * i);
      }
      sum[part][t] = Way::add_products(sum[part][t], piece, x_of_piece);
    }
  };
  int64_t c = 0;
  for (; c + kPrefetchColumns <= cols; c += kPrefetchColumns) {
    row.prefetch(c);
#pragma GCC unroll 4
    for (int i = 0; i < int(kPrefetchColumns / 32); i++) step(c + 32 * i, c + 32 * i + 32, i % parts);
  }
  for (; c < cols; c += 32) step(c, cols, 0);
  for (int t = 0; t < tokens; t++) {
    for (int part = 1; part < parts; part++) sum[0][t] = Lanes::add(sum[0][t], sum[part][t]);
    sums[t] = Lanes::total(sum[0][t]);
  }
}

// As many tokens as the registers hold share one reading of the row; then half as many, and so on.
template <class Way, int at_once, bool guarded>
void multiply_tokens(const typename Way::Row& row, int64_t cols, const float* x, int64_t tokens, float* sums) {
  for (; tokens >= at_once; tokens -= at_once, x += at_once * words_of<Way>(cols), sums += at_once) {
    multiply_row<Way, at_once, guarded>(row, cols, x, sums);
  }
  if constexpr (at_once > 1) multiply_tokens<Way, at_once / 2, guarded>(row, cols, x, tokens, sums);
}

// At most `most` tokens. T: the type of x, bias and y.
template <class Way, class T, int most>
void multiply_by_rows(const PackedWeight& packed, const LinearArgs& args, int threads) {
  const auto x = arrange_rows<Way>(static_cast<const T*>(args.x), args.tokens, packed.cols);
  parallel((packed.rows + kTaskRows - 1) / kTaskRows, threads, [&](int64_t task) {
    std::vector<uint64_t> scratch;
    float sums[most];
    for (int64_t r = task * kTaskRows; r < std::min((task + 1) * kTaskRows, packed.rows); r++) {
      typename Way::Row row;
      if (row.start(packed, r, scratch)) {
        multiply_tokens<Way, most, false>(row, packed.cols, x.data(), args.tokens, sums);
      } else {
        multiply_tokens<Way, most, true>(row, packed.cols, x.data(), args.tokens, sums);
      }
      for (int64_t t = 0; t < args.tokens; t++) store_output<T>(packed, args, t, r, sums[t]);
    }
  });
}

}  // namespace
}  // namespace wandapp
