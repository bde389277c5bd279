// The arithmetic of 2:4 groups (four consecutive columns of a row, two kept), inline for host and device: what group.h says
// for any n:m, eight groups at a time and without loops, and the layouts of the GPU libraries.
//
// Everything works on the bits of a weight, so one text serves fp16, bf16 and fp32: a weight is zero when all its bits
// but the sign are. A group's pattern is a nibble, bit c = column c. Its kept pair is a nibble too, first | second << 2,
// first < second: the code that torch, cuSPARSELt and the mma.sp instruction all use.
#pragma once

#include "group.h"

namespace wandapp {

enum class Layout { kNeutral, kCutlass, kCusparselt };

// Eight groups at once, a nibble each; m0 ... m3 are the four bits of every nibble, moved to the nibble's lowest place.
struct Nibbles {
  static constexpr uint32_t kLowest = 0x11111111;
  uint32_t m0, m1, m2, m3;
  WANDAPP_HD explicit Nibbles(uint32_t word)
      : m0(word & kLowest), m1(word >> 1 & kLowest), m2(word >> 2 & kLowest), m3(word >> 3 & kLowest) {}
};

// Lowest bit of each nibble: more than two of its four bits are set.
WANDAPP_HD uint32_t too_many(uint32_t nonzero) {
  const Nibbles n(nonzero);
  return (n.m0 & n.m1 & (n.m2 | n.m3)) | (n.m2 & n.m3 & (n.m0 | n.m1));
}

// The neutral form's kept columns: all non-zeros, then the lowest zero columns up to two. Column 0 fills in when fewer than
// two of the others are set, column 1 when the columns behind it are empty.
WANDAPP_HD uint32_t neutral_masks(uint32_t nonzero) {
  const Nibbles n(nonzero);
  const uint32_t two_of_others = (n.m1 & n.m2) | (n.m1 & n.m3) | (n.m2 & n.m3);
  return nonzero | (~two_of_others & Nibbles::kLowest) | (~(n.m2 | n.m3) & Nibbles::kLowest) << 1;
}

// Masks with exactly two bits set -> pairs.
//   first & 1  = !m0 & m1      first & 2  = !m0 & !m1
//   second & 1 = m3 | m0 & m1  second & 2 = !(m0 & m1)
WANDAPP_HD uint32_t pairs_of_masks(uint32_t masks) {
  const Nibbles n(masks);
  const uint32_t both = n.m0 & n.m1;
  return (~n.m0 & n.m1) | (~(n.m0 | n.m1) & Nibbles::kLowest) << 1 | (n.m3 | both) << 2 | (~both & Nibbles::kLowest) << 3;
}

// Non-zeros -> pairs by the rule of torch's converters, which fill in from the other end: {}, {2} and {3} become (2, 3), {1}
// becomes (1, 2), {0} becomes (0, 2). It differs from the above in one term: no bit in 0 or 1 makes second = 3.
WANDAPP_HD uint32_t torch_pairs(uint32_t nonzero) {
  const Nibbles n(nonzero);
  const uint32_t neither = ~(n.m0 | n.m1) & Nibbles::kLowest;
  return pairs_of_masks(nonzero) | neither << 2;
}

// Bytes of the eight in {low, high} named by the selector's four nibbles: PRMT on the device.
WANDAPP_HD uint32_t select_bytes(uint32_t low, uint32_t high, uint32_t selector) {
#ifdef __CUDA_ARCH__
  return __byte_perm(low, high, selector);
#else
  uint64_t bytes = uint64_t(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= uint32_t(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
#endif
}

template <typename Word>
struct Group;

template <>
struct Group<uint16_t> {  // {column 0 | column 1 << 16, column 2 | column 3 << 16}
  static constexpr int kWords = 2, kKeptWords = 1;
  uint32_t words[kWords];

  // Bits 15 and 31: that half has a bit besides the sign. At most 0x7fff + 0x7fff, so nothing carries into the next half.
  static WANDAPP_HD uint32_t nonzero_halves(uint32_t word) { return (word & 0x7fff7fff) + 0x7fff7fff; }

  WANDAPP_HD uint32_t nonzero() const {
    const uint32_t spread = (nonzero_halves(words[0]) >> 15 & 0x00010001) | (nonzero_halves(words[1]) >> 13 & 0x00040004);
    return (spread | spread >> 15) & 15;
  }
  WANDAPP_HD void clear_negative_zeros() {
    for (int i = 0; i < kWords; ++i) words[i] &= nonzero_halves(words[i]) | 0x7fff7fff;
  }
  WANDAPP_HD void keep(unsigned mask) {
    words[0] &= (mask & 1 ? 0xffffu : 0) | (mask & 2 ? 0xffff0000u : 0);
    words[1] &= (mask & 4 ? 0xffffu : 0) | (mask & 8 ? 0xffff0000u : 0);
  }
  // Column c lies in bytes 2c and 2c + 1, so one byte selection moves both kept weights.
  WANDAPP_HD void gather(unsigned pair, uint32_t* kept) const {
    kept[0] = select_bytes(words[0], words[1], 0x1010 + 0x22 * (pair & 3) + 0x2200 * (pair >> 2));
  }
};

template <>
struct Group<uint32_t> {
  static constexpr int kWords = 4, kKeptWords = 2;
  uint32_t words[kWords];

  WANDAPP_HD uint32_t nonzero() const {
    uint32_t bits = 0;
    for (int column = 0; column < 4; ++column) bits |= uint32_t((words[column] & 0x7fffffff) != 0) << column;
    return bits;
  }
  WANDAPP_HD void clear_negative_zeros() {
    for (int i = 0; i < kWords; ++i) words[i] &= ((words[i] & 0x7fffffff) + 0x7fffffff) | 0x7fffffff;
  }
  WANDAPP_HD void keep(unsigned mask) {
    for (int column = 0; column < 4; ++column) words[column] = mask >> column & 1 ? words[column] : 0;
  }
  // Spelled as choices: an index known only at run time would push the words to local memory.
  WANDAPP_HD void gather(unsigned pair, uint32_t* kept) const {
    unsigned first = pair & 3, second = pair >> 2;
    kept[0] = first == 0 ? words[0] : first == 1 ? words[1] : words[2];
    kept[1] = second == 1 ? words[1] : second == 2 ? words[2] : words[3];
  }
};

// The metadata register of one lane of mma.sp.m16n8k32, from the bitmasks of 64 columns of two rows. `quad` is the lane's
// place in its group of four. Of every 16 columns it takes group number `quad`:
//   bits 0-15   upper row: that group of columns 0-15, of 16-31, of 32-47, of 48-63;   bits 16-31   lower row: the same
WANDAPP_HD uint32_t metadata_of_lane(uint32_t upper_low, uint32_t upper_high, uint32_t lower_low,
                                         uint32_t lower_high, int quad) {
  const uint32_t one_of_four = 0x000f000f;
  // After the or, nibbles from the bottom: columns 0-15, nothing, 32-47, nothing, 16-31, nothing, 48-63, nothing.
  uint32_t upper = (upper_low >> 4 * quad & one_of_four) | (upper_high >> 4 * quad & one_of_four) << 8;
  uint32_t lower = (lower_low >> 4 * quad & one_of_four) | (lower_high >> 4 * quad & one_of_four) << 8;
  upper |= upper >> 12, lower |= lower >> 12;  // the upper half drops into the gaps of the lower one
  return pairs_of_masks(select_bytes(upper, lower, 0x5410));
}

// Where the metadata word of (row, word column) lies inside its tile of 32 rows x 2 words (32 columns), for 16-bit types.
// A word is 16 columns. The order is what the lanes of mma.sp.m16n8k32 want: 32-bit word 4 g + j goes to lane 4 g + j,
//   j = 0: rows g, g + 8 of word 0   1: the same rows of word 1   2: rows g + 16, g + 24 of word 0   3: ... of word 1
WANDAPP_HD int metadata_offset_in_tile(int row, int word) {
  return 8 * (row % 8) + 4 * (row / 16) + 2 * word + row / 8 % 2;
}

// Word offset of tile (i, j); a tile is 64 words. CUTLASS: column after column of tiles. cuSPARSELt, assumed and not
// so on every GPU (wandapp/kernels/semi_structured.py asks the library): super-tiles of
// 128 rows x 64 columns, again one column of them after the other (rows a multiple of 128).
WANDAPP_HD int64_t metadata_tile_offset(Layout layout, int64_t rows, int64_t i, int64_t j) {
  if (layout == Layout::kCutlass) return j * 2 * rows + i * 64;
  return (j / 2 * (rows / 128) + i / 4) * 512 + j % 2 * 256 + i % 4 * 64;
}

}  // namespace wandapp
