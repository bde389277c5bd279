// y = x W^T + b for very many tokens in fp32 arithmetic: bound by arithmetic, so columns that a row does not keep are skipped.
//
//   x       column 0 of tokens 0 ... 127 | column 1 of tokens 0 ... 127 | ...        48 columns fit the first-level cache
//   W       what row 0 keeps of these 48 columns | what row 1 keeps of them | ...    values, and each one's column
//   sums    128 tokens of a row, in registers: a step multiplies a kept value by its column of all these tokens
//
// A step loads as many vectors as it multiplies, which processors with AVX2 or AVX-512 do side by side. A tile (sparse_tiles.h)
// loads far fewer, but multiplies the zeros, too. What is skipped never meets a NaN or Inf of x.
#pragma once

#include "cpu/load_up_to_16.h"
#include "cpu/sparse_tiles.h"

namespace wandapp {
namespace {

constexpr int64_t kSkipColumns = 48, kSkipRows = 128;
constexpr int64_t kChunkColumns = 12 * kSkipColumns;  // of one sum; more are sums of such sums: smaller rounding errors

// Vectors of x and of sums lie on whole cache lines: a load that straddles two takes twice as long.
struct alignas(64) Line {
  float at[16];
};

// What `rows` rows keep, 48 columns at a time: values[i] belongs to column columns[i] of these. For stretch s of columns and
// row r, they end before ends[s * rows + r].
struct Kept {
  std::vector<float> values;
  std::vector<uint8_t> columns;
  std::vector<int64_t> ends;
};

// The set bits of every byte, lowest first.
struct BitsOfByte {
  uint8_t at[256][8] = {};
  constexpr BitsOfByte() {
    for (int byte = 0; byte < 256; byte++) {
      for (int bit = 0, next = 0; bit < 8; bit++) {
        if (byte >> bit & 1) at[byte][next++] = uint8_t(bit);
      }
    }
  }
};
constexpr BitsOfByte kBitsOfByte;

// The set bits of `mask`, lowest first. Writes eight bytes at a time.
inline void append_columns(uint64_t mask, uint8_t* to) {
  for (uint64_t from = 0; mask; mask >>= 8, from += 0x0808080808080808) {
    uint64_t columns;
    std::memcpy(&columns, kBitsOfByte.at[mask & 0xff], 8);
    columns += from;
    std::memcpy(to, &columns, 8);
    to += count_bits(uint32_t(mask & 0xff));
  }
}

// No value is read that is not there, whatever the bitmask and the row offsets say.
template <class Lanes, class V>
void collect_kept(const PackedWeight& packed, int64_t first, int64_t rows, Kept& kept) {
  const V *values = static_cast<const V*>(packed.values), *next[kSkipRows];
  const int64_t mask_bytes = (packed.cols + 7) / 8;
  for (int64_t r = 0; r < rows; r++) next[r] = values + packed.row_begin(first + r);
  kept.values.resize(rows * packed.cols + 16);
  kept.columns.resize(rows * packed.cols + 8);
  kept.ends.clear();
  int64_t end = 0;
  for (int64_t c = 0; c < packed.cols; c += kSkipColumns) {
    const int64_t end_column = std::min(c + kSkipColumns, packed.cols);
    for (int64_t r = 0; r < rows; r++) {
      const uint8_t* mask = packed.bitmask + (first + r) * mask_bytes;
      const uint32_t low = mask_at(mask, c, end_column), high = c + 32 < end_column ? mask_at(mask, c + 32, end_column) : 0;
      const uint64_t bits = (low | uint64_t(high) << 32) & ((uint64_t(1) << (end_column - c)) - 1);
      const int64_t left = values + packed.value_count - next[r];
      const int64_t count = std::min<int64_t>(count_bits(uint32_t(bits)) + count_bits(uint32_t(bits >> 32)), left);
      append_columns(bits, kept.columns.data() + end);
      for (int64_t i = 0; i < count; i += 16) {
        Lanes::store(kept.values.data() + end + i, load_up_to_16<Lanes>(next[r] + i, left - i));
      }
      next[r] += count;
      kept.ends.push_back(end += count);
    }
  }
}

// x [tokens, cols] as [vectors of tokens][cols][16 * vectors]; tokens that do not exist are zeros.
template <class Lanes, class T>
std::unique_ptr<Line[]> turn_tokens(const T* x, int64_t tokens, int64_t cols, Stretches stretches, int threads) {
  std::unique_ptr<Line[]> turned(new Line[stretches.tokens * cols]);
  parallel(stretches.count, threads, [&](int64_t i) {
    const int64_t begin = stretches.begin(i);
    const int vectors = stretches.length(i);
    Line* to = turned.get() + begin * cols;
    for (int64_t c = 0; c < cols; c += 16) {
      const int64_t count = std::min<int64_t>(16, cols - c);
      for (int v = 0; v < vectors; v++) {
        typename Lanes::Floats square[16];
        for (int t = 0; t < 16; t++) {
          const int64_t token = (begin + v) * 16 + t;
          square[t] = token < tokens ? load_up_to_16<Lanes>(x + token * cols + c, count) : Lanes::fill(0);
        }
        Lanes::transpose(square);
        for (int64_t k = 0; k < count; k++) Lanes::store(to[(c + k) * vectors + v].at, square[k]);
      }
    }
  });
  return turned;
}

// sums [rows][vectors] += what these rows keep of 48 columns, times x [48 columns][vectors]
template <class Lanes, int vectors>
void multiply_kept(const float* value, const uint8_t* column, const int64_t* ends, int64_t begin, int64_t rows, const Line* x,
                   Line* sums) {
  for (int64_t r = 0; r < rows; r++, sums += vectors) {
    typename Lanes::Floats sum[vectors];
    for (int v = 0; v < vectors; v++) sum[v] = Lanes::load(sums[v].at);
#pragma GCC unroll 2
    for (; begin < ends[r]; begin++) {
      const auto weight = Lanes::fill(value[begin]);
      const Line* of_column = x + column[begin] * vectors;
      for (int v = 0; v < vectors; v++) sum[v] = Lanes::add_product(sum[v], weight, Lanes::load(of_column[v].at));
    }
    for (int v = 0; v < vectors; v++) Lanes::store(sums[v].at, sum[v]);
  }
}

// The same for a number of vectors that is known at run time, at most `most`.
template <class Lanes, int most>
void multiply_kept(int vectors, const Kept& kept, int64_t stretch, int64_t rows, const Line* x, Line* sums) {
  if constexpr (most > 1) {
    if (vectors < most) return multiply_kept<Lanes, most - 1>(vectors, kept, stretch, rows, x, sums);
  }
  const int64_t* ends = kept.ends.data() + stretch * rows;
  multiply_kept<Lanes, most>(kept.values.data(), kept.columns.data(), ends, stretch ? ends[-1] : 0, rows, x, sums);
}

template <class Lanes, class T>
void store_turned(const PackedWeight& packed, const LinearArgs& args, int64_t row, int64_t rows, int64_t token, int vectors,
                  const Line* sums) {
  for (int v = 0; v < vectors; v++, token += 16) {
    const int64_t tokens = std::min<int64_t>(16, args.tokens - token);
    for (int64_t r = 0; r < rows; r += 16) {
      const int64_t count = std::min<int64_t>(16, rows - r);
      typename Lanes::Floats square[16];
      for (int64_t i = 0; i < 16; i++) {
        square[i] = i < count ? Lanes::load(sums[(r + i) * vectors + v].at) : Lanes::fill(0);
      }
      Lanes::transpose(square);
      for (int64_t t = 0; t < tokens; t++) store_rows<Lanes, T>(packed, args, token + t, row + r, count, square[t]);
    }
  }
}

// Rows of one task: as many tasks for every thread, of at most kSkipRows and a multiple of 16.
inline int64_t rows_per_task(int64_t rows, int threads) {
  const int64_t tasks = std::max<int64_t>(1, threads * ((rows + kSkipRows * threads - 1) / (kSkipRows * threads)));
  return std::max<int64_t>(16, ((rows + tasks - 1) / tasks + 15) / 16 * 16);
}

template <class Lanes, class V, class T>
void multiply_skipping(const PackedWeight& packed, const LinearArgs& args, int threads) {
  constexpr int most = Lanes::kSkipVectors;
  const int64_t cols = packed.cols, groups = (args.tokens + 15) / 16, task_rows = rows_per_task(packed.rows, threads);
  const Stretches stretches{groups, (groups + most - 1) / most};
  const auto x = turn_tokens<Lanes>(static_cast<const T*>(args.x), args.tokens, cols, stretches, threads);
  parallel((packed.rows + task_rows - 1) / task_rows, threads, [&](int64_t task) {
    thread_local Kept kept;  // these two are kept: fresh memory would cost a page fault per 4 KiB
    thread_local std::vector<Line> total, chunk;
    const int64_t first = task * task_rows, rows = std::min(task_rows, packed.rows - first);
    collect_kept<Lanes, V>(packed, first, rows, kept);
    total.resize(rows * groups);
    chunk.resize(rows * most);
    for (int64_t begin = 0; begin < cols; begin += kChunkColumns) {
      for (int64_t i = 0; i < stretches.count; i++) {
        const int vectors = stretches.length(i);
        const Line* x_of_stretch = x.get() + stretches.begin(i) * cols;
        Line *total_sums = total.data() + stretches.begin(i) * rows, *sums = begin ? chunk.data() : total_sums;
        std::fill_n(sums, rows * vectors, Line{});
        for (int64_t c = begin; c < std::min(begin + kChunkColumns, cols); c += kSkipColumns) {
          multiply_kept<Lanes, most>(vectors, kept, c / kSkipColumns, rows, x_of_stretch + c * vectors, sums);
        }
        for (int64_t k = 0; begin && k < rows * vectors; k++) {
          Lanes::store(total_sums[k].at, Lanes::add(Lanes::load(total_sums[k].at), Lanes::load(sums[k].at)));
        }
      }
    }
    for (int64_t i = 0; i < stretches.count; i++) {
      const Line* sums = total.data() + stretches.begin(i) * rows;
      store_turned<Lanes, T>(packed, args, first, rows, stretches.begin(i) * 16, stretches.length(i), sums);
    }
  });
}

}  // namespace
}  // namespace wandapp
