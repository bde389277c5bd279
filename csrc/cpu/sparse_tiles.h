// y = x W^T + b for many tokens: bound by arithmetic. A tile of W is unpacked once, turned, and meets every token.
//
//   tile   word 0 of rows 0 1 2 ... 31 | word 1 of rows 0 1 2 ... 31 | ...     512 words, in the second-level cache
//   x      word 0 of tokens 0 ... 13   | word 1 of tokens 0 ... 13   | ...     one such stretch after another
//   sums   14 tokens x 32 rows, in registers: a step multiplies a word of all rows by the same word of each token
//
// A word is one column in fp32, or two in bf16 where the processor multiplies these.
#pragma once

#include "cpu/sparse_ways.h"

namespace wandapp {
namespace {

constexpr int64_t kTileWords = 512;  // of a row, and of one sum: sums of such sums have smaller rounding errors

// Tokens in stretches of as equal a length as can be, none longer than the registers hold.
struct Stretches {
  int64_t tokens, count;
  int64_t begin(int64_t i) const { return i * tokens / count; }
  int length(int64_t i) const { return int(begin(i + 1) - begin(i)); }
};

template <class Way, class T>
std::unique_ptr<float[]> arrange_stretches(const T* x, Stretches stretches, int64_t cols, int threads) {
  const int64_t words = words_of<Way>(cols);
  std::unique_ptr<float[]> arranged(new float[stretches.tokens * words]);  // its pages are first touched on all threads
  parallel(stretches.count, threads, [&](int64_t i) {
    const int64_t begin = stretches.begin(i);
    const int length = stretches.length(i);
    for (int t = 0; t < length; t++) {
      arrange_token<Way>(x + (begin + t) * cols, cols, arranged.get() + begin * words + t, length);
    }
  });
  return arranged;
}

template <class Lanes>
constexpr int kTileRows = 16 * Lanes::kTileVectors;

// Columns [begin, end) of `count` rows; rows that the tile has beyond are zeros. A row gives 128 columns at a time: rows
// often lie a multiple of a page apart, and then 16 of them push each other's lines out of the first-level cache.
template <class Way>
void fill_tile(typename Way::Row* row, int64_t count, int64_t begin, int64_t end, int64_t cols, Ahead ahead, float* tile) {
  using Lanes = typename Way::Lanes;
  constexpr int most = kPrefetchColumns / 32 * Way::kVectors;
  for (int64_t r = 0; r < count; r++) row[r].prefetch_tile(begin, ahead);
  for (int first = 0; first < kTileRows<Lanes>; first += 16) {
    for (int64_t c = begin; c < end; c += kPrefetchColumns) {
      const int chunks = int(std::min(kPrefetchColumns, end - c) + 31) / 32;
      typename Lanes::Floats vectors[most][16];
      for (int r = 0; r < 16; r++) {
        const bool exists = first + r < count;
        if (exists) row[first + r].prefetch_in_tile(ahead);
        for (int chunk = 0; chunk < chunks; chunk++) {
          typename Way::Piece piece = {};
          if (exists) piece = row[first + r].next_within(c + 32 * chunk, cols);
          for (int i = 0; i < Way::kVectors; i++) vectors[chunk * Way::kVectors + i][r] = piece.vectors[i];
        }
      }
      for (int v = 0; v < chunks * Way::kVectors; v++) {
        Lanes::transpose(vectors[v]);
        float* words = tile + ((c - begin) / 32 * Way::kVectors + v) * 16 * kTileRows<Lanes> + first;
        for (int word = 0; word < 16; word++) Lanes::store(words + word * kTileRows<Lanes>, vectors[v][word]);
      }
    }
  }
}

// sums [tokens][rows of the tile] += tile x the tokens
template <class Words, int tokens>
void multiply_tile(const float* tile, const float* x, int64_t words, float* sums) {
  using Lanes = typename Words::Lanes;
  constexpr int vectors = Lanes::kTileVectors;
  typename Lanes::Floats sum[tokens][vectors];
  for (int t = 0; t < tokens; t++) {
    for (int i = 0; i < vectors; i++) sum[t][i] = Lanes::fill(0);
  }
  for (int64_t word = 0; word < words; word++, tile += kTileRows<Lanes>, x += tokens) {
    typename Lanes::Floats rows[vectors];
    __builtin_prefetch(x + 16 * tokens);
    for (int i = 0; i < vectors; i++) {
      rows[i] = Lanes::load(tile + 16 * i);
      __builtin_prefetch(tile + 8 * kTileRows<Lanes> + 16 * i);
    }
    for (int t = 0; t < tokens; t++) {
      const auto of_token = Lanes::fill(x[t]);
      for (int i = 0; i < vectors; i++) sum[t][i] = Words::add(sum[t][i], rows[i], of_token);
    }
  }
  for (int t = 0; t < tokens; t++) {
    for (int i = 0; i < vectors; i++) {
      float* to = sums + t * kTileRows<Lanes> + 16 * i;
      Lanes::store(to, Lanes::add(Lanes::load(to), sum[t][i]));
    }
  }
}

// multiply_tile for a number of tokens that is known at run time, at most `most`.
template <class Words, int most>
void multiply_tile(int tokens, const float* tile, const float* x, int64_t words, float* sums) {
  if (tokens == most) return multiply_tile<Words, most>(tile, x, words, sums);
  if constexpr (most > 1) multiply_tile<Words, most - 1>(tokens, tile, x, words, sums);
}

// y of one token and `count` rows, at most 16, from their sums.
template <class Lanes, class T>
void store_rows(const PackedWeight& packed, const LinearArgs& args, int64_t token, int64_t row, int64_t count,
                typename Lanes::Floats sum) {
  if (count == 16) {
    if (packed.scale) sum = Lanes::mul(Lanes::load(packed.scale + row), sum);
    if (args.bias) sum = Lanes::add(sum, Lanes::load(static_cast<const T*>(args.bias) + row));
    return Lanes::store(static_cast<T*>(args.y) + token * packed.rows + row, sum);
  }
  float sums[16];
  Lanes::store(sums, sum);
  for (int64_t r = 0; r < count; r++) store_output<T>(packed, args, token, row + r, sums[r]);
}

template <class Lanes, class T>
void store_tile(const PackedWeight& packed, const LinearArgs& args, int64_t row, int64_t rows, const float* sums) {
  for (int64_t t = 0; t < args.tokens; t++, sums += kTileRows<Lanes>) {
    for (int64_t r = 0; r < rows; r += 16) {
      store_rows<Lanes, T>(packed, args, t, row + r, std::min<int64_t>(16, rows - r), Lanes::load(sums + r));
    }
  }
}

template <class Way, class T>
void multiply_by_tiles(const PackedWeight& packed, const LinearArgs& args, int threads) {
  using Lanes = typename Way::Lanes;
  constexpr int most = Lanes::kTileTokens;
  constexpr int64_t tile_rows = kTileRows<Lanes>, tile_cols = kTileWords / (16 * Way::kVectors) * 32;
  const int64_t words = words_of<Way>(packed.cols);
  const Stretches stretches{args.tokens, (args.tokens + most - 1) / most};
  const int64_t rows_ahead = tile_rows * threads;  // tasks are handed out in order
  const Ahead ahead{packed.value_count / std::max<int64_t>(packed.rows, 1) * rows_ahead,
                    (packed.cols + 7) / 8 * rows_ahead, args.tokens > 64};
  const auto x = arrange_stretches<Way>(static_cast<const T*>(args.x), stretches, packed.cols, threads);
  parallel((packed.rows + tile_rows - 1) / tile_rows, threads, [&](int64_t task) {
    thread_local std::vector<float> tile(kTileWords * tile_rows), sums;  // kept: fresh memory would cost page faults
    sums.assign(args.tokens * tile_rows, 0.f);
    const int64_t first = task * tile_rows, count = std::min(tile_rows, packed.rows - first);
    typename Way::Row row[tile_rows];
    for (int64_t r = 0; r < count; r++) row[r].start(packed, first + r);
    for (int64_t word = 0, c = 0; c < packed.cols; word += kTileWords, c += tile_cols) {
      const int64_t words_of_tile = std::min(kTileWords, words - word);
      fill_tile<Way>(row, count, c, std::min(c + tile_cols, packed.cols), packed.cols, ahead, tile.data());
      for (int64_t i = 0; i < stretches.count; i++) {
        const int64_t begin = stretches.begin(i);
        const int length = stretches.length(i);
        const float* of_stretch = x.get() + begin * words + word * length;
        multiply_tile<typename Way::Words, most>(length, tile.data(), of_stretch, words_of_tile, sums.data() + begin * tile_rows);
      }
    }
    store_tile<Lanes, T>(packed, args, first, count, sums.data());
  });
}

}  // namespace
}  // namespace wandapp
