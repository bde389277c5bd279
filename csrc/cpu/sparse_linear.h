// y = x W^T + b for few tokens, reading W in packed form.
//
// One token is bound by the bytes of W. A row's values are loaded in order, spread to the places of the bitmask's bits
// (zeros elsewhere), and multiplied with x, 32 columns at a time:
//
//   bitmask   1 0 0 1 1 0 ...          values   a b c ...
//   spread    a 0 0 b c 0 ...          times    x0 x1 x2 x3 x4 x5 ...
//
// Where the values of the next 32 columns begin follows from counting bits, so every pattern takes the same path.
#pragma once

namespace wandapp {
namespace {

// x in fp32, padded to whole 32 columns, in the order in which Lanes::expand hands columns out.
template <class Lanes, class T>
std::vector<float> arrange_tokens(const T* x, int64_t tokens, int64_t cols) {
  const int64_t padded = (cols + 31) / 32 * 32;
  std::vector<float> arranged(tokens * padded);
  for (int64_t t = 0; t < tokens; t++) {
    for (int64_t place = 0; place < padded; place++) {
      const int64_t c = place / 32 * 32 + Lanes::template column_of_place<T>(int(place % 32));
      if (c < cols) arranged[t * padded + place] = widen(x[t * cols + c]);
    }
  }
  return arranged;
}

// The hardware's prefetcher stops at every page of 4 KiB, and the values are one long stream over all rows.
constexpr int64_t kPrefetchBytes = 2048;

// sums[t] = the row's product with token t.
template <class Lanes, int tokens, bool guarded, class T>
void multiply_row(const T* values, const uint8_t* row_mask, int64_t cols, const float* x, int64_t x_stride, float* sums) {
  typename Lanes::Floats low_sum[tokens], high_sum[tokens];
  for (int t = 0; t < tokens; t++) low_sum[t] = high_sum[t] = Lanes::fill(0);
  auto add = [&](int64_t c, uint32_t mask) {
    typename Lanes::Floats low, high;
    __builtin_prefetch(reinterpret_cast<const char*>(values) + kPrefetchBytes);
    Lanes::template expand<guarded>(values, mask, low, high);
    values += count_bits(mask);
    for (int t = 0; t < tokens; t++) {
      low_sum[t] = Lanes::add_product(low_sum[t], low, Lanes::load(x + t * x_stride + c));
      high_sum[t] = Lanes::add_product(high_sum[t], high, Lanes::load(x + t * x_stride + c + 16));
    }
  };
  int64_t c = 0;
  for (; c + 32 <= cols; c += 32) {
    uint32_t mask;
    std::memcpy(&mask, row_mask + c / 8, 4);
    add(c, mask);
  }
  if (c < cols) add(c, mask_at(row_mask, c, cols));
  for (int t = 0; t < tokens; t++) sums[t] = Lanes::total(Lanes::add(low_sum[t], high_sum[t]));
}

// As many tokens as the registers hold share one reading of the row; then half as many, and so on.
template <class Lanes, int at_once, bool guarded, class T>
void multiply_tokens(const T* values, const uint8_t* row_mask, int64_t cols, const float* x, int64_t x_stride,
                     int64_t tokens, float* sums) {
  for (; tokens >= at_once; tokens -= at_once, x += at_once * x_stride, sums += at_once) {
    multiply_row<Lanes, at_once, guarded>(values, row_mask, cols, x, x_stride, sums);
  }
  if constexpr (at_once > 1) {
    multiply_tokens<Lanes, at_once / 2, guarded>(values, row_mask, cols, x, x_stride, tokens, sums);
  }
}

constexpr int64_t kMaxTokens = 16;
constexpr int64_t kLinearRows = 32;  // rows of one task

template <class T>
void store_outputs(const LinearArgs& args, int64_t row, int64_t rows, const float* sums) {
  const float bias = args.bias ? widen(static_cast<const T*>(args.bias)[row]) : 0;
  for (int64_t t = 0; t < args.tokens; t++) {
    narrow(args.bias ? sums[t] + bias : sums[t], static_cast<T*>(args.y)[t * rows + row]);
  }
}

template <class Lanes, class T>
void sparse_linear_of(const PackedWeight& packed, const LinearArgs& args, int threads) {
  const std::vector<float> x = arrange_tokens<Lanes>(static_cast<const T*>(args.x), args.tokens, packed.cols);
  const int64_t x_stride = (packed.cols + 31) / 32 * 32;
  const int64_t end_of_values = packed.row_begin(packed.rows);
  parallel((packed.rows + kLinearRows - 1) / kLinearRows, threads, [&](int64_t task) {
    for (int64_t row = task * kLinearRows; row < std::min((task + 1) * kLinearRows, packed.rows); row++) {
      const T* values = static_cast<const T*>(packed.values) + packed.row_begin(row);
      const uint8_t* row_mask = packed.bitmask + row * ((packed.cols + 7) / 8);
      float sums[kMaxTokens];
      // Loads may run 32 values past a row's end, but not past the last row's.
      if (packed.row_begin(row + 1) + 32 <= end_of_values) {
        multiply_tokens<Lanes, Lanes::kTokens, false>(values, row_mask, packed.cols, x.data(), x_stride, args.tokens, sums);
      } else {
        multiply_tokens<Lanes, Lanes::kTokens, true>(values, row_mask, packed.cols, x.data(), x_stride, args.tokens, sums);
      }
      store_outputs<T>(args, row, packed.rows, sums);
    }
  });
}

template <class Lanes>
void sparse_linear(const PackedWeight& packed, const LinearArgs& args, int threads) {
  switch (packed.dtype) {
    case kBfloat16: return sparse_linear_of<Lanes, Bf16>(packed, args, threads);
    case kFloat16: return sparse_linear_of<Lanes, Half>(packed, args, threads);
    default: return sparse_linear_of<Lanes, float>(packed, args, threads);
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
        for (int i = 0; i < 4; i++) {
          const T* next = weight + row * cols + c + 16 * i;
          __builtin_prefetch(reinterpret_cast<const char*>(next) + kPrefetchBytes);
          sums[i] = Lanes::add_product(sums[i], Lanes::load(next), Lanes::load(&x[c + 16 * i]));
        }
      }
      const float sum = Lanes::total(Lanes::add(Lanes::add(sums[0], sums[1]), Lanes::add(sums[2], sums[3])));
      store_outputs<T>(args, row, rows, &sum);
    }
  });
}

template <class Lanes>
void dense_linear(const void* weight, Dtype dtype, int64_t rows, int64_t cols, const LinearArgs& args, int threads) {
  switch (dtype) {
    case kBfloat16: return dense_linear_of<Lanes>(static_cast<const Bf16*>(weight), rows, cols, args, threads);
    case kFloat16: return dense_linear_of<Lanes>(static_cast<const Half*>(weight), rows, cols, args, threads);
    default: return dense_linear_of<Lanes>(static_cast<const float*>(weight), rows, cols, args, threads);
  }
}

}  // namespace
}  // namespace wandapp
