// How a row's kept values and their x come together: see sparse_linear.h. A way has
//
//   column_of_place(p)   place p of 32 in the arranged x holds this column
//   Row::start           at a row's first column; false: some load might leave the values, so `next` must be guarded
//   Row::prefetch        asks for values that 128 columns take, some time before their turn
//   Row::next            what the next 32 columns need of the row, for any number of tokens: a Piece
//   add_products         sum + products of a Piece with x of these columns
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

inline uint32_t load_word(const void* from) {
  uint32_t word;
  std::memcpy(&word, from, 4);
  return word;
}

// For the next 128 columns, of which half are kept.
template <class V>
void prefetch_ahead(const V* values) {
  for (size_t byte = 0; byte < kPrefetchColumns / 2 * sizeof(V); byte += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(values) + kPrefetchBytes + byte, 0, 2);
  }
}

template <class Lanes_, class V>
struct Spread {
  using Lanes = Lanes_;
  struct Piece {
    typename Lanes::Floats low, high;
  };
  static constexpr int column_of_place(int place) { return Lanes::template column_of_place<V>(place); }

  struct Row {
    const uint8_t* mask;
    const V *values, *end_of_values;

    bool start(const PackedWeight& packed, int64_t row, std::vector<uint64_t>&) {
      const int64_t begin = packed.row_begin(row);
      mask = packed.bitmask + row * ((packed.cols + 7) / 8);
      values = static_cast<const V*>(packed.values) + begin;
      prefetch_masks(mask, packed.cols / 8);
      end_of_values = static_cast<const V*>(packed.values) + packed.value_count;
      return begin + packed.cols + 32 <= packed.value_count;  // even if every bit were set
    }
    void prefetch(int64_t) const { prefetch_ahead(values); }
    template <bool guarded>
    Piece next(int64_t c, int64_t cols) {
      Piece piece;
      uint32_t bits;
      if constexpr (guarded) {
        V padded[32] = {};
        std::copy_n(values, std::min<int64_t>(32, std::max<int64_t>(0, end_of_values - values)), padded);
        bits = mask_at(mask, c, cols);
        Lanes::expand(padded, bits, piece.low, piece.high);
      } else {
        bits = c + 32 <= cols ? load_word(mask + c / 8) : mask_at(mask, c, cols);
        Lanes::expand(values, bits, piece.low, piece.high);
      }
      values += count_bits(bits);
      return piece;
    }
  };

  static auto add_products(typename Lanes::Floats sum, Piece piece, typename Lanes::Floats x_low,
                           typename Lanes::Floats x_high) {
    return Lanes::add_product(Lanes::add_product(sum, piece.low, x_low), piece.high, x_high);
  }
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
// meet two groups' x: one in x_low, one in x_high.
template <class Lanes_, class V>
struct Pick {
  using Lanes = Lanes_;
  struct Piece {
    typename Lanes::Floats values;
    typename Lanes::Places places;
  };
  static constexpr int column_of_place(int place) { return place % 16 / 4 * 8 + place / 16 * 4 + place % 4; }

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

  static auto add_products(typename Lanes::Floats sum, Piece piece, typename Lanes::Floats x_low,
                           typename Lanes::Floats x_high) {
    return Lanes::add_product(sum, piece.values, Lanes::pick(x_low, x_high, piece.places));
  }
};

}  // namespace
}  // namespace wandapp
