// How a row's kept values and their x come together, 32 columns at a time:
//
//   Spread, any pattern                        Pick, 2:4
//   bitmask   1 0 0 1 1 0 ...                  bitmask   1 0 0 1   0 1 1 0 ...
//   values    a b c ...                        values    a b c d ...
//   spread    a 0 0 b c 0 ...                  picked    x0 x3 x5 x6 ...
//   times     x0 x1 x2 x3 x4 x5 ...            products are half as many, and nothing is counted
//
// A way has
//
//   kVectors, word       32 columns of x are so many vectors of 16 words; word w made of 32 columns of x
//   Row::start           at a row's first column; false: some load might leave the values, so `next` must be guarded
//   Row::prefetch        asks for values that 128 columns take, some time before their turn
//   Row::next            what the next 32 columns need of the row, for any number of tokens: a Piece
//   add_products         sum + products of a Piece with x of these columns
//
// and for tiles, where a Piece is the weights themselves in as many vectors as x,
//
//   Row::next_within     the same as `next`, guarded only where it has to be
//   Words::add           sum + products of a word of 16 rows with a word of x
#pragma once

namespace wandapp {
namespace {

// While a processor waits for memory it looks some 300 instructions ahead. That is too few cache lines under way when a
// line takes 20 instructions, so lines are asked for by hand: once each, a page ahead, and into the second-level cache, as
// the first has too few slots for misses (on Zen 4: 18 -> 33 GB/s of bf16; into the first level 24).
constexpr int64_t kPrefetchBytes = 4096;
constexpr int64_t kPrefetchColumns = 128;

// A bitmask's bytes from `mask` on, as much later rows will have them.
inline void prefetch_masks(const uint8_t* mask, int64_t bytes) {
  for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(mask + kPrefetchBytes / 2 + byte, 0, 2);
}

// What is asked for while a tile is filled. Later rows at the same place, so many values and bytes of the bitmask ahead
// (unstructured rows have about that many), from memory; and, where many tokens push even these out of the second-level
// cache until their turn comes, the values that come next.
struct Ahead {
  int64_t values, mask_bytes;
  bool next;
};

inline uint32_t load_word(const void* from) {
  uint32_t word;
  std::memcpy(&word, from, 4);
  return word;
}

// For the next 128 columns, of which half are kept.
template <class V>
void prefetch_ahead(const V* values, int64_t bytes = kPrefetchBytes) {
  for (size_t byte = 0; byte < kPrefetchColumns / 2 * sizeof(V); byte += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(values) + bytes + byte, 0, 2);
  }
}

// Words of one token: whole vectors.
template <class Way>
int64_t words_of(int64_t cols) {
  return (cols + 31) / 32 * 16 * Way::kVectors;
}

// One token's x, word by word, `stride` apart.
template <class Way, class T>
void arrange_token(const T* x, int64_t cols, float* words, int64_t stride) {
  for (int64_t c = 0; c < cols; c += 32) {
    T columns[32] = {};
    std::copy_n(x + c, std::min<int64_t>(32, cols - c), columns);
    for (int w = 0; w < 16 * Way::kVectors; w++, words += stride) *words = Way::word(columns, w);
  }
}

template <class T>
void store_output(const PackedWeight& packed, const LinearArgs& args, int64_t token, int64_t row, float sum) {
  if (packed.scale) sum = packed.scale[row] * sum;
  if (args.bias) sum += widen(static_cast<const T*>(args.bias)[row]);
  narrow(sum, static_cast<T*>(args.y)[token * packed.rows + row]);
}

// A row of which 32 columns at a time are spread by `Way::spread(values, bits)`.
template <class Way, class V>
struct SpreadRow {
  const uint8_t* mask;
  const V *values, *end_of_values;

  void start(const PackedWeight& packed, int64_t row) {
    mask = packed.bitmask + row * ((packed.cols + 7) / 8);
    values = static_cast<const V*>(packed.values) + packed.row_begin(row);
    end_of_values = static_cast<const V*>(packed.values) + packed.value_count;
  }
  bool start(const PackedWeight& packed, int64_t row, std::vector<uint64_t>&) {
    start(packed, row);
    prefetch_masks(mask, packed.cols / 8);
    return end_of_values - values >= packed.cols + 32;  // even if every bit were set
  }
  void prefetch(int64_t) const { prefetch_ahead(values); }
  // Before a tile that begins at column c is filled, and then for every 128 columns.
  void prefetch_tile(int64_t c, const Ahead& ahead) const {
    for (int64_t byte = 0; byte < 128; byte += 64) __builtin_prefetch(mask + c / 8 + ahead.mask_bytes + byte, 0, 2);
    if (!ahead.next) return;
    for (int64_t byte = 0; byte < 128; byte += 64) __builtin_prefetch(mask + c / 8 + byte);
    prefetch_next(0), prefetch_next(1);
  }
  void prefetch_in_tile(const Ahead& ahead) const {
    prefetch_ahead(values, ahead.values * sizeof(V));
    if (ahead.next) prefetch_next(2);
  }
  void prefetch_next(int64_t turns) const {
    constexpr int64_t bytes = kPrefetchColumns / 2 * sizeof(V);
    const char* from = reinterpret_cast<const char*>(values) + turns * bytes;
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(from + byte);
  }
  template <bool guarded>
  auto next(int64_t c, int64_t cols) {
    const uint32_t bits = c + 32 <= cols ? load_word(mask + c / 8) : mask_at(mask, c, cols);
    const V* from = values;
    V padded[32] = {};
    if constexpr (guarded) {
      from = padded;
      std::copy_n(values, std::min<int64_t>(32, std::max<int64_t>(0, end_of_values - values)), padded);
    }
    const auto piece = Way::spread(from, bits);
    values += count_bits(bits);
    return piece;
  }
  auto next_within(int64_t c, int64_t cols) {
    return end_of_values - values >= 32 ? next<false>(c, cols) : next<true>(c, cols);
  }
};

template <class Lanes_>
struct FloatWords {
  using Lanes = Lanes_;
  using Floats = typename Lanes::Floats;
  static Floats add(Floats sum, Floats weights, Floats x) { return Lanes::add_product(sum, weights, x); }
};

template <class Lanes_>
struct PairWords {
  using Lanes = Lanes_;
  using Floats = typename Lanes::Floats;
  static Floats add(Floats sum, Floats weights, Floats x) { return Lanes::add_pairs(sum, weights, x); }
};

template <class Lanes_, class V>
struct Spread {
  using Lanes = Lanes_;
  using Floats = typename Lanes::Floats;
  using Row = SpreadRow<Spread, V>;
  using Words = FloatWords<Lanes>;
  static constexpr int kVectors = 2;
  struct Piece {
    Floats vectors[2];
  };
  template <class T>
  static float word(const T* columns, int w) {
    return widen(columns[Lanes::template column_of_place<V>(w)]);
  }
  static Piece spread(const V* values, uint32_t bits) {
    Piece piece;
    Lanes::expand(values, bits, piece.vectors[0], piece.vectors[1]);
    return piece;
  }
  static Floats add_products(Floats sum, Piece piece, const Floats* x) {
    return Words::add(Words::add(sum, piece.vectors[0], x[0]), piece.vectors[1], x[1]);
  }
};

// The same with bf16 columns in pairs, for lanes that multiply these.
template <class Lanes_, class V>
struct SpreadPairs {
  using Lanes = Lanes_;
  using Floats = typename Lanes::Floats;
  using Row = SpreadRow<SpreadPairs, V>;
  using Words = PairWords<Lanes>;
  static constexpr int kVectors = 1;
  struct Piece {
    Floats vectors[1];
  };
  static float word(const Bf16* columns, int w) {
    return float_of_bits(load_word(columns + 2 * w));
  }
  static Piece spread(const V* values, uint32_t bits) { return {{Lanes::expand_pairs(values, bits)}}; }
  static Floats add_products(Floats sum, Piece piece, const Floats* x) { return Words::add(sum, piece.vectors[0], x[0]); }
};

// For 16 groups of 2:4 at a time, their two columns: two bits each instead of the four bits of the bitmask. A group with
// other than two bits gives some columns, too.
inline uint64_t columns_of_groups(uint64_t bitmask) {
  const uint64_t ones = 0x1111111111111111;
  const uint64_t bit0 = bitmask & ones, bit1 = bitmask >> 1 & ones, bit2 = bitmask >> 2 & ones, bit3 = bitmask >> 3 & ones;
  const uint64_t not0 = bit0 ^ ones, not1 = bit1 ^ ones, not2 = bit2 ^ ones;
  const uint64_t first = (not0 & bit1) | (not0 & not1) << 1;     // the lowest set bit: 0, 1, else 2
  const uint64_t second = (bit3 | not2) | (bit3 | bit2) << 1;    // the highest set bit: 3, 2, else 1
  return first | second << 2;
}

// Sixteen values are those of eight groups. Vectors are picked from within 128 bits, where the four values of two groups
// meet two groups' x: one in x[0], one in x[1].
template <class Lanes_, class V>
struct Pick {
  using Lanes = Lanes_;
  using Floats = typename Lanes::Floats;
  static constexpr int kVectors = 2;
  struct Piece {
    Floats values;
    typename Lanes::Places places;
  };
  template <class T>
  static float word(const T* columns, int w) {
    return widen(columns[w % 16 / 4 * 8 + w / 16 * 4 + w % 4]);
  }

  static bool can_multiply(const PackedWeight& packed) {
    const bool half_of_four = packed.m == 4 && packed.n == 2, half_of_two = packed.m == 2 && packed.n == 1;
    return (half_of_four || half_of_two) && packed.cols % 32 == 0;  // two groups of 1:2 make one of 2:4
  }

  struct Row {
    const V* values;
    const uint64_t* columns;

    bool start(const PackedWeight& packed, int64_t row, std::vector<uint64_t>& scratch) {
      const uint8_t* mask = packed.bitmask + row * (packed.cols / 8);
      prefetch_masks(mask, packed.cols / 8);
      scratch.resize((packed.cols + 63) / 64);
      std::memcpy(scratch.data(), mask, packed.cols / 8);
      for (uint64_t& word : scratch) word = columns_of_groups(word);
      columns = scratch.data();
      values = static_cast<const V*>(packed.values) + packed.row_begin(row);
      return true;
    }
    void prefetch(int64_t c) const { prefetch_ahead(values + c / 2); }
    template <bool guarded>
    Piece next(int64_t c, int64_t) {
      return {Lanes::load(values + c / 2), Lanes::places(load_word(reinterpret_cast<const char*>(columns) + c / 8))};
    }
  };

  static Floats add_products(Floats sum, Piece piece, const Floats* x) {
    return Lanes::add_product(sum, piece.values, Lanes::pick(x[0], x[1], piece.places));
  }
};

}  // namespace
}  // namespace wandapp
