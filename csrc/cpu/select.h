// Score, choose, write: each weight is read from memory once, and where asked for also packed.
//
//   n:m, m = 2, 4, 8, 16   score and choice stay in one register of 16 lanes
//   n:m, any other m       scores of a tile go to a buffer in L2; every group is a short row
//   rows                   scores of a row go to a buffer in L2; a cut is searched there
//   very wide rows         too many scores for L2: two histograms find the cut, the weight is read three times
#pragma once

namespace wandapp {
namespace {

constexpr int64_t kTileColumns = 1 << 16;  // scores of one task, 256 KiB

// One row, or a part of it. Column indices count from its begin.
template <class T>
struct Tile {
  T* weight;
  const float* scale;
  const float* gradient;
  float alpha;
  int64_t cols;
  uint8_t* mask;
  bool in_place;
  T* values;  // where the next kept weight goes, or null
  const T* end_of_values;

  Tile(const ScoreTerms& terms, Choice choice, int64_t row, int64_t begin, int64_t end)
      : weight(static_cast<T*>(terms.weight) + row * terms.weight_stride + begin),
        scale(terms.scale ? terms.scale + begin : nullptr),
        gradient(terms.gradient ? terms.gradient + row * terms.gradient_stride + begin : nullptr),
        alpha(terms.alpha),
        cols(end - begin),
        in_place(choice.in_place),
        values(static_cast<T*>(choice.values)),
        end_of_values(nullptr) {
    mask = in_place ? choice.mask + row * ((terms.cols + 7) / 8) + begin / 8 : choice.mask + row * terms.cols + begin;
    if (!values) return;
    values += row * choice.values_per_row + begin * choice.values_per_row / terms.cols;
    end_of_values = values + cols * choice.values_per_row / terms.cols;
  }
};

inline uint32_t lanes_below(int64_t count) { return count >= 16 ? 0xffff : (1u << count) - 1; }

template <class Lanes, class T>
ALWAYS_INLINE typename Lanes::Bits score16(const T* weight, const float* scale, const float* gradient, float alpha) {
  typename Lanes::Floats factor = scale ? Lanes::load(scale) : Lanes::fill(1);
  if (gradient) factor = Lanes::add(Lanes::mul(Lanes::fill(alpha), Lanes::load(gradient)), factor);
  return Lanes::magnitude(Lanes::mul(Lanes::load(weight), factor));
}

// Score bits of columns c..c+15; beyond the tile they are 0. The part tile is a call, to keep the loop around it short.
template <class Lanes, class T>
NEVER_INLINE typename Lanes::Bits score_tail(const Tile<T>& tile, int64_t c) {
  const int64_t count = tile.cols - c;
  T weights[16] = {};
  float scales[16] = {}, gradients[16] = {};
  std::copy_n(tile.weight + c, count, weights);
  if (tile.scale) std::copy_n(tile.scale + c, count, scales);
  if (tile.gradient) std::copy_n(tile.gradient + c, count, gradients);
  return score16<Lanes>(weights, tile.scale ? scales : nullptr, tile.gradient ? gradients : nullptr, tile.alpha);
}

template <class Lanes, class T>
ALWAYS_INLINE typename Lanes::Bits score_at(const Tile<T>& tile, int64_t c) {
  if (tile.cols - c < 16) return score_tail<Lanes>(tile, c);
  const float* scale = tile.scale ? tile.scale + c : nullptr;
  const float* gradient = tile.gradient ? tile.gradient + c : nullptr;
  return score16<Lanes>(tile.weight + c, scale, gradient, tile.alpha);
}

template <class Lanes, class T>
NEVER_INLINE T* write_tail(const Tile<T>& tile, int64_t c, uint32_t keep) {
  const int64_t count = tile.cols - c;
  keep &= lanes_below(count);
  if (!tile.in_place) {
    uint8_t bools[16];
    Lanes::store_bools(bools, keep);
    std::copy_n(bools, count, tile.mask + c);
    return nullptr;
  }
  T weights[16] = {};
  std::copy_n(tile.weight + c, count, weights);
  Lanes::zero_removed(weights, keep);
  std::copy_n(weights, count, tile.weight + c);
  std::memcpy(tile.mask + c / 8, &keep, (count + 7) / 8);
  return tile.values ? Lanes::append(tile.values, tile.end_of_values, weights, keep) : nullptr;
}

template <class Lanes, class T>
ALWAYS_INLINE void write_choice(Tile<T>& tile, int64_t c, uint32_t keep) {
  if (tile.cols - c < 16) {
    tile.values = write_tail<Lanes>(tile, c, keep);
    return;
  }
  if (!tile.in_place) return Lanes::store_bools(tile.mask + c, keep);
  Lanes::zero_removed(tile.weight + c, keep);
  std::memcpy(tile.mask + c / 8, &keep, 2);
  if (tile.values) tile.values = Lanes::append(tile.values, tile.end_of_values, tile.weight + c, keep);
}

// Lane of the first score that is NaN or Inf, or -1.
template <class Lanes>
int nonfinite_lane(typename Lanes::Bits bits) {
  const uint32_t mask = Lanes::above(bits, kLargestFiniteBits);
  return __builtin_expect(mask != 0, 0) ? __builtin_ctz(mask) : -1;
}

// --- n:m ---------------------------------------------------------------------------------------------------------

// These return the column of the tile's first NaN or Inf score, or -1.
template <class Lanes, int m, class T>
int64_t select_in_registers(Tile<T> tile, int n) {
  for (int64_t c = 0; c < tile.cols; c += 16) {
    const typename Lanes::Bits bits = score_at<Lanes>(tile, c);
    const int offender = nonfinite_lane<Lanes>(bits);
    if (offender >= 0) return c + offender;
    write_choice<Lanes>(tile, c, Lanes::template keep_of_groups<m>(bits, n));
  }
  return -1;
}

template <class Lanes, class T>
int64_t score_into(const Tile<T>& tile, int32_t* bits) {
  for (int64_t c = 0; c < tile.cols; c += 16) {
    const typename Lanes::Bits scores = score_at<Lanes>(tile, c);
    const int offender = nonfinite_lane<Lanes>(scores);
    if (offender >= 0) return c + offender;
    Lanes::store_bits(bits + c, scores);
  }
  return -1;
}

// Kept: every score above `limit`, and of those equal to it the first `ties`.
struct Cut {
  int32_t limit;
  int64_t ties;
};

constexpr int32_t kTypicalBits = 0x3f800000;  // 1.0: where the search starts

struct Counts {
  int64_t at_least[3];
};

template <class Lanes>
Counts count_at_least(const int32_t* bits, int64_t count, const int32_t (&limits)[3]) {
  int32_t a = 0, b = 0, c = 0;
  const int32_t limit_a = limits[0], limit_b = limits[1], limit_c = limits[2];
  for (int32_t i = 0; i < int32_t(count); i++) {
    a += bits[i] >= limit_a;
    b += bits[i] >= limit_b;
    c += bits[i] >= limit_c;
  }
  return {{a, b, c}};
}

// The cut that keeps `keep` of `count` finite scores. The limit lies in [low, high), where at_least(low) >= keep >
// at_least(high); each pass over the buffer counts at three limits and narrows the interval. The first three stand
// around `guess`, the next where the limit would be if scores were spread evenly over the interval, which leaves about
// the square root of the scores in it. A pass that gains less than halving twice is followed by one that quarters.
template <class Lanes>
Cut find_cut(const int32_t* bits, int64_t count, int64_t keep, int32_t guess) {
  if (keep == 0) return {INT32_MAX, 0};
  int32_t low = 0, high = kLargestFiniteBits + 1;
  int64_t at_low = count, at_high = 0;
  int32_t middle = guess, step = 1 << 18;  // two percent of a score
  while (high - low > 1) {
    auto inside = [=](int64_t limit) { return int32_t(std::clamp<int64_t>(limit, low + 1, high - 1)); };
    const int32_t limits[3] = {inside(int64_t(middle) - step), inside(middle), inside(int64_t(middle) + step)};
    const int32_t width = high - low;
    const Counts counts = count_at_least<Lanes>(bits, count, limits);
    for (int i = 0; i < 3; i++) {
      if (counts.at_least[i] == keep) return {limits[i] - 1, 0};
      if (counts.at_least[i] > keep) {
        low = limits[i], at_low = counts.at_least[i];
      } else if (limits[i] < high) {
        high = limits[i], at_high = counts.at_least[i];
      }
    }
    const double inner_width = high - low, inner_count = double(at_low - at_high);
    const bool quarter = high - low > width / 4;
    middle = low + int32_t(inner_width * (quarter ? 0.5 : double(at_low - keep) / inner_count));
    step = int32_t(quarter ? inner_width / 4 : inner_width / std::sqrt(inner_count)) + 1;
  }
  return {low, keep - at_high};
}

// Writes the choice of a whole buffer and returns how many of the ties it used.
template <class Lanes, class T>
int64_t write_cut(Tile<T> tile, const int32_t* bits, Cut cut) {
  const int64_t ties = cut.ties;
  for (int64_t c = 0; c < tile.cols; c += 16) {
    const typename Lanes::Bits scores = Lanes::load_bits(bits + c);
    uint32_t keep = Lanes::above(scores, cut.limit);
    if (cut.ties > 0) {
      const uint32_t equal = Lanes::equal(scores, cut.limit) & lanes_below(tile.cols - c);
      const uint32_t first = lowest_bits(equal, int(std::min<int64_t>(cut.ties, 16)));
      cut.ties -= count_bits(first);
      keep |= first;
    }
    write_choice<Lanes>(tile, c, keep);
  }
  return ties - cut.ties;
}

// Groups of any length: each score is replaced by 1 where it is kept, by 0 where not.
template <class Lanes, class T>
int64_t select_in_buffer(const Tile<T>& tile, int n, int m, int32_t* bits) {
  const int64_t offender = score_into<Lanes>(tile, bits);
  if (offender >= 0) return offender;
  int32_t guess = kTypicalBits;
  for (int32_t* group = bits; group < bits + tile.cols; group += m) {
    if (m <= 32) {
      const uint32_t keep = keep_of_group(group, n, m);
      for (int i = 0; i < m; i++) group[i] = keep >> i & 1;
      continue;
    }
    Cut cut = find_cut<Lanes>(group, m, n, guess);
    guess = cut.limit;
    for (int i = 0; i < m; i++) group[i] = group[i] > cut.limit || (group[i] == cut.limit && cut.ties-- > 0);
  }
  write_cut<Lanes>(tile, bits, {0, 0});
  return -1;
}

template <class Lanes, class T>
int64_t select_nm_of(const ScoreTerms& terms, Choice choice, int n, int m, int threads) {
  // A tile holds whole groups and whole bytes of the bitmask.
  const int64_t unit = int64_t(m) * 16;
  const int64_t tile_cols = std::max<int64_t>(kTileColumns / unit, 1) * unit;
  const int64_t tiles_per_row = (terms.cols + tile_cols - 1) / tile_cols;
  const int64_t rows_per_task = std::max<int64_t>(kTileColumns / std::max<int64_t>(terms.cols, 1), 1);
  const int64_t row_blocks = (terms.rows + rows_per_task - 1) / rows_per_task;
  const bool buffered = m != 2 && m != 4 && m != 8 && m != 16;
  FirstOffender first;
  parallel(row_blocks * tiles_per_row, threads, [&](int64_t task) {
    const int64_t begin = task % tiles_per_row * tile_cols, end = std::min(begin + tile_cols, terms.cols);
    const int64_t first_row = task / tiles_per_row * rows_per_task;
    const int64_t end_row = std::min(first_row + rows_per_task, terms.rows);
    std::unique_ptr<int32_t[]> bits(buffered ? new int32_t[end - begin + 16] : nullptr);
    for (int64_t row = first_row; row < end_row; row++) {
      const Tile<T> tile(terms, choice, row, begin, end);
      const int64_t offender = m == 2    ? select_in_registers<Lanes, 2>(tile, n)
                               : m == 4  ? select_in_registers<Lanes, 4>(tile, n)
                               : m == 8  ? select_in_registers<Lanes, 8>(tile, n)
                               : m == 16 ? select_in_registers<Lanes, 16>(tile, n)
                                         : select_in_buffer<Lanes>(tile, n, m, bits.get());
      if (offender >= 0) return first.report(row * terms.cols + begin + offender);
    }
  });
  return first.index();
}

// --- rows --------------------------------------------------------------------------------------------------------

template <class Lanes, class T>
int64_t select_rows_of(const ScoreTerms& terms, Choice choice, int64_t keep, int threads) {
  const int64_t rows_per_task = std::max<int64_t>(kTileColumns / std::max<int64_t>(terms.cols, 1), 1);
  FirstOffender first;
  parallel((terms.rows + rows_per_task - 1) / rows_per_task, threads, [&](int64_t task) {
    std::unique_ptr<int32_t[]> bits(new int32_t[terms.cols + 16]);
    int32_t guess = kTypicalBits;  // then the limit of the row before: rows are alike
    const int64_t end_row = std::min((task + 1) * rows_per_task, terms.rows);
    for (int64_t row = task * rows_per_task; row < end_row; row++) {
      const Tile<T> tile(terms, choice, row, 0, terms.cols);
      const int64_t offender = score_into<Lanes>(tile, bits.get());
      if (offender >= 0) return first.report(row * terms.cols + offender);
      const Cut cut = find_cut<Lanes>(bits.get(), terms.cols, keep, guess);
      guess = cut.limit;
      write_cut<Lanes>(tile, bits.get(), cut);
    }
  });
  return first.index();
}

// Calls use(bits) for each column's score bits of one tile, in order; returns the first NaN or Inf score's column.
template <class Lanes, class T, class Use>
int64_t for_each_score(const Tile<T>& tile, Use use) {
  for (int64_t c = 0; c < tile.cols; c += 16) {
    const typename Lanes::Bits scores = score_at<Lanes>(tile, c);
    const int offender = nonfinite_lane<Lanes>(scores);
    if (offender >= 0) return c + offender;
    int32_t bits[16];
    Lanes::store_bits(bits, scores);
    const int count = int(std::min<int64_t>(16, tile.cols - c));
    for (int i = 0; i < count; i++) use(bits[i]);
  }
  return -1;
}

// Histograms of a very wide row, one per segment, so that threads share nothing and ties can be dealt out in order.
struct Histograms {
  int64_t segments, bins;
  std::vector<int32_t> counts;

  Histograms(int64_t segments, int64_t bins) : segments(segments), bins(bins), counts(segments * bins) {}
  int32_t* of(int64_t segment) { return counts.data() + segment * bins; }

  // The highest bin that together with those above it holds at least `keep`; `keep` is left with its share of the bin.
  int32_t bin_of(int64_t& keep) const {
    for (int64_t bin = bins - 1;; bin--) {
      int64_t here = 0;
      for (int64_t s = 0; s < segments; s++) here += counts[s * bins + bin];
      if (here >= keep) return int32_t(bin);
      keep -= here;
    }
  }
};

// The upper 16 of 31 score bits find a bin, the lower 15 a limit inside it.
template <class Lanes, class T>
int64_t select_wide_row(const ScoreTerms& terms, Choice choice, int64_t row, int64_t keep, int threads) {
  const int64_t segments = std::max(threads, 1);
  const int64_t segment_cols = (terms.cols / segments + 16) / 16 * 16;
  auto segment = [&](int64_t s) {
    const int64_t begin = std::min(s * segment_cols, terms.cols);
    return Tile<T>(terms, choice, row, begin, std::min(begin + segment_cols, terms.cols));
  };
  FirstOffender first;
  Histograms upper(segments, 1 << 16), lower(segments, 1 << 15);
  parallel(segments, threads, [&](int64_t s) {
    int32_t* counts = upper.of(s);
    const int64_t offender = for_each_score<Lanes>(segment(s), [counts](int32_t bits) { counts[bits >> 15]++; });
    if (offender >= 0) first.report(row * terms.cols + s * segment_cols + offender);
  });
  if (first.index() >= 0) return first.index();
  int64_t share = keep;
  const int32_t bin = upper.bin_of(share);
  parallel(segments, threads, [&](int64_t s) {
    int32_t* counts = lower.of(s);
    for_each_score<Lanes>(segment(s), [=](int32_t bits) {
      if (bits >> 15 == bin) counts[bits & 0x7fff]++;
    });
  });
  const int32_t low = lower.bin_of(share);
  std::vector<Cut> cuts;
  for (int64_t s = 0; s < segments; s++) {
    const int64_t ties = std::min<int64_t>(share, lower.of(s)[low]);
    cuts.push_back({bin << 15 | low, ties});
    share -= ties;
  }
  parallel(segments, threads, [&](int64_t s) {
    const Tile<T> whole = segment(s);
    std::unique_ptr<int32_t[]> bits(new int32_t[kTileColumns]);
    Cut cut = cuts[s];
    for (int64_t begin = 0; begin < whole.cols; begin += kTileColumns) {
      const int64_t offset = s * segment_cols + begin;
      const Tile<T> tile(terms, choice, row, offset, offset + std::min(kTileColumns, whole.cols - begin));
      score_into<Lanes>(tile, bits.get());
      cut.ties -= write_cut<Lanes>(tile, bits.get(), cut);
    }
  });
  return -1;
}

template <class Lanes, class T>
int64_t select_wide_rows_of(const ScoreTerms& terms, Choice choice, int64_t keep, int threads) {
  for (int64_t row = 0; row < terms.rows; row++) {
    const int64_t offender = select_wide_row<Lanes, T>(terms, choice, row, keep, threads);
    if (offender >= 0) return offender;
  }
  return -1;
}

// --- entry points ------------------------------------------------------------------------------------------------

template <class Lanes>
int64_t select_nm(const ScoreTerms& terms, Choice choice, int n, int m, int threads) {
  switch (terms.dtype) {
    case kBfloat16: return select_nm_of<Lanes, Bf16>(terms, choice, n, m, threads);
    case kFloat16: return select_nm_of<Lanes, Half>(terms, choice, n, m, threads);
    default: return select_nm_of<Lanes, float>(terms, choice, n, m, threads);
  }
}

template <class Lanes, class T>
int64_t select_rows_any(const ScoreTerms& terms, Choice choice, int64_t keep, int threads) {
  const bool wide = terms.cols > 2 * kTileColumns && keep > 0;
  return wide ? select_wide_rows_of<Lanes, T>(terms, choice, keep, threads)
              : select_rows_of<Lanes, T>(terms, choice, keep, threads);
}

template <class Lanes>
int64_t select_rows(const ScoreTerms& terms, Choice choice, int64_t keep, int threads) {
  switch (terms.dtype) {
    case kBfloat16: return select_rows_any<Lanes, Bf16>(terms, choice, keep, threads);
    case kFloat16: return select_rows_any<Lanes, Half>(terms, choice, keep, threads);
    default: return select_rows_any<Lanes, float>(terms, choice, keep, threads);
  }
}

}  // namespace
}  // namespace wandapp
