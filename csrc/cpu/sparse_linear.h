// y = x W^T + b for few tokens, reading W in packed form.
//
// One token is bound by the bytes of W, as long as few instructions are spent on each. There are two ways to bring the
// kept values and their x together, 32 columns at a time:
//
//   Spread, any pattern                        Pick, 2:4
//   bitmask   1 0 0 1 1 0 ...                  bitmask   1 0 0 1   0 1 1 0 ...
//   values    a b c ...                        values    a b c d ...
//   spread    a 0 0 b c 0 ...                  picked    x0 x3 x5 x6 ...
//   times     x0 x1 x2 x3 x4 x5 ...            products are half as many, and nothing is counted
//
// Memory is safe whatever the bitmask and the row offsets hold: no load leaves the values.
#pragma once

#include "cpu/sparse_ways.h"

namespace wandapp {
namespace {

constexpr int64_t kMaxTokens = 16;
constexpr int64_t kLinearRows = 32;  // rows of one task

// x in fp32 [tokens, stride], padded to whole 32 columns, in the order in which Way hands columns out.
struct Tokens {
  std::vector<float> x;
  int64_t stride;
};

template <class Way, class T>
Tokens arrange_tokens(const T* x, int64_t tokens, int64_t cols) {
  const int64_t stride = (cols + 31) / 32 * 32;
  Tokens arranged{std::vector<float>(tokens * stride), stride};
  for (int64_t t = 0; t < tokens; t++) {
    for (int64_t c = 0; c < stride; c += 32) {
      T columns[32] = {};
      std::copy_n(x + t * cols + c, std::min<int64_t>(32, cols - c), columns);
      for (int place = 0; place < 32; place++) {
        arranged.x[t * stride + c + place] = widen(columns[Way::column_of_place(place)]);
      }
    }
  }
  return arranged;
}

// sums[r * kMaxTokens + t] = product of row r and token t. Rows together share the loads of x.
template <class Way, int rows, int tokens, bool guarded>
void multiply_block(const typename Way::Row* first_row, int64_t cols, const float* x, int64_t x_stride, float* sums) {
  using Lanes = typename Way::Lanes;
  constexpr int parts = rows * tokens < 4 ? 4 / (rows * tokens) : 1;  // sums that do not wait for each other
  typename Lanes::Floats sum[parts][rows][tokens];
  typename Way::Row row[rows];
  for (int r = 0; r < rows; r++) {
    row[r] = first_row[r];
    for (int t = 0; t < tokens; t++) {
      for (int part = 0; part < parts; part++) sum[part][r][t] = Lanes::fill(0);
    }
  }
  auto step = [&](int64_t c, int64_t end, int part) __attribute__((always_inline)) {
    typename Way::Piece piece[rows];
    for (int r = 0; r < rows; r++) piece[r] = row[r].template next<guarded>(c, end);
    for (int t = 0; t < tokens; t++) {
      const auto x_low = Lanes::load(x + t * x_stride + c), x_high = Lanes::load(x + t * x_stride + c + 16);
      for (int r = 0; r < rows; r++) sum[part][r][t] = Way::add_products(sum[part][r][t], piece[r], x_low, x_high);
    }
  };
  int64_t c = 0;
  for (; c + kPrefetchColumns <= cols; c += kPrefetchColumns) {
    for (int r = 0; r < rows; r++) row[r].prefetch(c);
#pragma GCC unroll 4
    for (int i = 0; i < int(kPrefetchColumns / 32); i++) step(c + 32 * i, c + 32 * i + 32, i % parts);
  }
  for (; c < cols; c += 32) step(c, cols, 0);
  for (int r = 0; r < rows; r++) {
    for (int t = 0; t < tokens; t++) {
      for (int part = 1; part < parts; part++) sum[0][r][t] = Lanes::add(sum[0][r][t], sum[part][r][t]);
      sums[r * kMaxTokens + t] = Lanes::total(sum[0][r][t]);
    }
  }
}

// As many tokens as the registers hold share one reading of the rows; then half as many, and so on.
template <class Way, int rows, int at_once, bool guarded>
void multiply_tokens(const typename Way::Row* row, int64_t cols, const float* x, int64_t x_stride, int64_t tokens,
                     float* sums) {
  for (; tokens >= at_once; tokens -= at_once, x += at_once * x_stride, sums += at_once) {
    multiply_block<Way, rows, at_once, guarded>(row, cols, x, x_stride, sums);
  }
  if constexpr (at_once > 1) {
    multiply_tokens<Way, rows, at_once / 2, guarded>(row, cols, x, x_stride, tokens, sums);
  }
}

template <class T>
void store_outputs(const LinearArgs& args, int64_t row, int64_t rows, float scale, const float* sums) {
  const float bias = args.bias ? widen(static_cast<const T*>(args.bias)[row]) : 0;
  for (int64_t t = 0; t < args.tokens; t++) {
    const float y = scale * sums[t];
    narrow(args.bias ? y + bias : y, static_cast<T*>(args.y)[t * rows + row]);
  }
}

template <class Way, class T, int rows, bool guarded>
void multiply_rows(const PackedWeight& packed, const LinearArgs& args, const Tokens& tokens,
                   const typename Way::Row* row, int64_t first) {
  float sums[rows * kMaxTokens];
  multiply_tokens<Way, rows, Way::Lanes::kTokens, guarded>(row, packed.cols, tokens.x.data(), tokens.stride, args.tokens,
                                                           sums);
  for (int r = 0; r < rows; r++) {
    const float scale = packed.scale ? packed.scale[first + r] : 1;
    store_outputs<T>(args, first + r, packed.rows, scale, sums + r * kMaxTokens);
  }
}

// T: the type of x, bias and y.
template <class Way, class T, int rows_at_once>
void sparse_linear_by(const PackedWeight& packed, const LinearArgs& args, int threads) {
  const Tokens tokens = arrange_tokens<Way>(static_cast<const T*>(args.x), args.tokens, packed.cols);
  parallel((packed.rows + kLinearRows - 1) / kLinearRows, threads, [&](int64_t task) {
    typename Way::Row row[rows_at_once];
    std::vector<uint64_t> scratch[rows_at_once];
    const int64_t end = std::min((task + 1) * kLinearRows, packed.rows);
    for (int64_t first = task * kLinearRows; first < end; first += rows_at_once) {
      const int count = int(std::min<int64_t>(rows_at_once, end - first));
      bool inside = true;
      for (int r = 0; r < count; r++) inside &= row[r].start(packed, first + r, scratch[r]);
      if (count == rows_at_once && inside) {
        multiply_rows<Way, T, rows_at_once, false>(packed, args, tokens, row, first);
      } else {
        for (int r = 0; r < count; r++) multiply_rows<Way, T, 1, true>(packed, args, tokens, row + r, first + r);
      }
    }
  });
}

// Few tokens are bound by memory, which likes one stream; many by arithmetic, and rows together share the loads of x.
template <class Way, class T>
void sparse_linear_in(const PackedWeight& packed, const LinearArgs& args, int threads) {
  if (args.tokens < 4) return sparse_linear_by<Way, T, 1>(packed, args, threads);
  return sparse_linear_by<Way, T, Way::Lanes::kRows>(packed, args, threads);
}

template <class Lanes, class V, class T>
void sparse_linear_of(const PackedWeight& packed, const LinearArgs& args, int threads) {
  if (Pick<Lanes, V>::can_multiply(packed)) return sparse_linear_in<Pick<Lanes, V>, T>(packed, args, threads);
  return sparse_linear_in<Spread<Lanes, V>, T>(packed, args, threads);
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
  parallel((rows + kLinearRows - 1) / kLinearRows, threads, [&](int64_t task) {
    for (int64_t row = task * kLinearRows; row < std::min((task + 1) * kLinearRows, rows); row++) {
      typename Lanes::Floats sums[4] = {Lanes::fill(0), Lanes::fill(0), Lanes::fill(0), Lanes::fill(0)};
      for (int64_t c = 0; c < cols; c += 64) {
        prefetch_ahead(weight + row * cols + c);
        for (int i = 0; i < 4; i++) {
          sums[i] = Lanes::add_product(sums[i], Lanes::load(weight + row * cols + c + 16 * i), Lanes::load(&x[c + 16 * i]));
        }
      }
      const float sum = Lanes::total(Lanes::add(Lanes::add(sums[0], sums[1]), Lanes::add(sums[2], sums[3])));
      store_outputs<T>(args, row, rows, 1, &sum);
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
