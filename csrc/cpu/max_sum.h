// A matrix product with max in the place of the multiplication: out[i][j] = sum over r of max(left[i][r], right[j][r]).
#pragma once

#include "cpu/load_up_to_16.h"

namespace wandapp {
namespace {

constexpr int64_t kSide = 64;   // rows of `left` and of `right` in one task
constexpr int64_t kDepth = 512;  // columns summed before the sums are added to the totals: both blocks stay in L2

// Adds sixteen columns, or the `count` that are left, of side x side pairs of rows to their sums.
template <class Lanes, int side, bool is_whole>
ALWAYS_INLINE void add_max(const float* const* left, const float* const* right, int64_t r, int64_t count,
                           typename Lanes::Floats (&sums)[side][side]) {
  typename Lanes::Floats a[side];
  for (int i = 0; i < side; i++) a[i] = is_whole ? Lanes::load(left[i] + r) : load_up_to_16<Lanes>(left[i] + r, count);
  for (int j = 0; j < side; j++) {
    const auto b = is_whole ? Lanes::load(right[j] + r) : load_up_to_16<Lanes>(right[j] + r, count);
    for (int i = 0; i < side; i++) sums[i][j] = Lanes::add(sums[i][j], Lanes::max(a[i], b));
  }
}

// Adds `depth` columns of side x side pairs of rows to totals[kSide * i + j]; the sums stay in registers.
template <class Lanes, int side>
void add_max_tile(const float* const* left, const float* const* right, int64_t depth, float* totals) {
  typename Lanes::Floats sums[side][side];
  for (auto& row : sums) {
    for (auto& sum : row) sum = Lanes::fill(0);
  }
  int64_t r = 0;
  for (; r + 16 <= depth; r += 16) add_max<Lanes, side, true>(left, right, r, 16, sums);
  if (r < depth) add_max<Lanes, side, false>(left, right, r, depth - r, sums);
  for (int i = 0; i < side; i++) {
    for (int j = 0; j < side; j++) totals[kSide * i + j] += Lanes::total(sums[i][j]);
  }
}

// Rows first, first + 1, ... at `column`; beyond the last row that row again, whose sums nobody reads.
template <int side>
void rows_of_tile(const float* matrix, int64_t stride, int64_t first, int64_t last, int64_t column, const float** rows) {
  for (int i = 0; i < side; i++) rows[i] = matrix + std::min(first + i, last) * stride + column;
}

template <class Lanes>
void pairwise_max_sum(const float* left, int64_t left_rows, const float* right, int64_t right_rows, int64_t cols,
                      float* out, int threads) {
  constexpr int side = 2 * Lanes::kTileVectors;
  const int64_t across = (right_rows + kSide - 1) / kSide, down = (left_rows + kSide - 1) / kSide;
  parallel(down * across, threads, [=](int64_t task) {
    const int64_t first = task / across * kSide, end = std::min(first + kSide, left_rows);
    const int64_t first_right = task % across * kSide, end_right = std::min(first_right + kSide, right_rows);
    float totals[kSide * kSide] = {};
    for (int64_t column = 0; column < cols; column += kDepth) {
      for (int64_t i = first; i < end; i += side) {
        const float *a[side], *b[side];
        rows_of_tile<side>(left, cols, i, left_rows - 1, column, a);
        for (int64_t j = first_right; j < end_right; j += side) {
          rows_of_tile<side>(right, cols, j, right_rows - 1, column, b);
          add_max_tile<Lanes, side>(a, b, std::min(kDepth, cols - column), totals + kSide * (i - first) + j - first_right);
        }
      }
    }
    for (int64_t i = first; i < end; i++) {
      std::copy_n(totals + kSide * (i - first), end_right - first_right, out + i * right_rows + first_right);
    }
  });
}

}  // namespace
}  // namespace wandapp
