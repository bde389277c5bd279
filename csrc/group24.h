// The arithmetic of one 2:4 group (four consecutive columns of a row, two kept), inline for host and device.
//
// Everything works on the bits of a weight, so one text serves fp16, bf16 and fp32: a weight is zero when all its bits
// but the sign are. A group's pattern is a nibble, bit c = column c. Its kept pair is a nibble too, first | second << 2,
// first < second: the code that torch, cuSPARSELt and the mma.sp instruction all use.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define WANDAPP_CONSTEXPR __host__ __device__ constexpr
#define WANDAPP_INLINE __host__ __device__ __forceinline__
#else
#define WANDAPP_CONSTEXPR constexpr
#define WANDAPP_INLINE inline
#endif

namespace wandapp {

// What stands in for the missing column when a group has fewer than two non-zeros.
enum class ZeroFill {
  kLowestZeros,  // the neutral form: all non-zeros, then the lowest zero columns
  kTorch,        // torch's converters: {} and {3} and {2} -> (2, 3), {1} -> (1, 2), {0} -> (0, 2)
};

enum class Layout { kNeutral, kCutlass, kCusparselt };

WANDAPP_CONSTEXPR unsigned kept_pair_of(unsigned nonzero, ZeroFill fill) {
  unsigned pair[2] = {0, 0}, count = 0;
  for (unsigned column = 0; column < 4 && count < 2; ++column)
    if (nonzero >> column & 1) pair[count++] = column;
  if (count < 2 && fill == ZeroFill::kLowestZeros) {
    unsigned only = count ? pair[0] : 4, spare = only == 0 ? 1 : 0;
    pair[0] = count ? (only < spare ? only : spare) : 0;
    pair[1] = count ? (only < spare ? spare : only) : 1;
  } else if (count < 2) {
    unsigned only = count ? pair[0] : 3;
    pair[0] = only < 2 ? only : 2;
    pair[1] = only < 2 ? 2 : 3;
  }
  return pair[0] | pair[1] << 2;
}

// Sixteen answers of four bits each: the table is one 64-bit constant, a look-up is one shift.
WANDAPP_CONSTEXPR uint64_t kept_pair_table(ZeroFill fill) {
  uint64_t table = 0;
  for (unsigned nonzero = 0; nonzero < 16; ++nonzero) table |= uint64_t(kept_pair_of(nonzero, fill)) << 4 * nonzero;
  return table;
}

template <ZeroFill fill>
WANDAPP_INLINE unsigned kept_pair(unsigned nonzero) {
  constexpr uint64_t table = kept_pair_table(fill);
  return unsigned(table >> 4 * nonzero) & 15;
}

WANDAPP_INLINE unsigned mask_of_pair(unsigned pair) { return 1u << (pair & 3) | 1u << (pair >> 2); }

// More than two of four bits set: no pair may be left after the lowest two set bits are cleared.
WANDAPP_INLINE bool too_many(unsigned nonzero) {
  nonzero &= nonzero - 1;
  return nonzero & (nonzero - 1);
}

// Bytes of the eight in {low, high} named by the selector's four nibbles: PRMT on the device.
WANDAPP_INLINE uint32_t select_bytes(uint32_t low, uint32_t high, uint32_t selector) {
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

  WANDAPP_INLINE unsigned nonzero() const {
    return unsigned((words[0] & 0x7fff) != 0) | unsigned((words[0] & 0x7fff0000) != 0) << 1 |
           unsigned((words[1] & 0x7fff) != 0) << 2 | unsigned((words[1] & 0x7fff0000) != 0) << 3;
  }
  WANDAPP_INLINE void keep(unsigned mask) {
    words[0] &= (mask & 1 ? 0xffffu : 0) | (mask & 2 ? 0xffff0000u : 0);
    words[1] &= (mask & 4 ? 0xffffu : 0) | (mask & 8 ? 0xffff0000u : 0);
  }
  // Column c lies in bytes 2c and 2c + 1, so one byte selection moves both kept weights.
  WANDAPP_INLINE void gather(unsigned pair, uint32_t* kept) const {
    kept[0] = select_bytes(words[0], words[1], 0x1010 + 0x22 * (pair & 3) + 0x2200 * (pair >> 2));
  }
};

template <>
struct Group<uint32_t> {
  static constexpr int kWords = 4, kKeptWords = 2;
  uint32_t words[kWords];

  WANDAPP_INLINE unsigned nonzero() const {
    unsigned bits = 0;
    for (int column = 0; column < 4; ++column) bits |= unsigned((words[column] & 0x7fffffff) != 0) << column;
    return bits;
  }
  WANDAPP_INLINE void keep(unsigned mask) {
    for (int column = 0; column < 4; ++column) words[column] = mask >> column & 1 ? words[column] : 0;
  }
  // Spelled as choices: an index known only at run time would push the words to local memory.
  WANDAPP_INLINE void gather(unsigned pair, uint32_t* kept) const {
    unsigned first = pair & 3, second = pair >> 2;
    kept[0] = first == 0 ? words[0] : first == 1 ? words[1] : words[2];
    kept[1] = second == 1 ? words[1] : second == 2 ? words[2] : words[3];
  }
};

// Eight groups at once: nibbles of a bitmask with exactly two bits set -> nibbles first | second << 2.
//   first & 1  = !m0 & m1      first & 2  = !m0 & !m1
//   second & 1 = m3 | m0 & m1  second & 2 = !(m0 & m1)
WANDAPP_INLINE uint32_t pairs_of_masks(uint32_t masks) {
  const uint32_t lowest = 0x11111111, m0 = masks & lowest, m1 = masks >> 1 & lowest, m3 = masks >> 3 & lowest;
  return (~m0 & m1) | (~(m0 | m1) & lowest) << 1 | (m3 | (m0 & m1)) << 2 | (~(m0 & m1) & lowest) << 3;
}

// The metadata register of one lane of mma.sp.m16n8k32, from the bitmasks of 64 columns of two rows. `quad` is the lane's
// place in its group of four. Of every 16 columns it takes group number `quad`:
//   bits 0-15   upper row: that group of columns 0-15, of 16-31, of 32-47, of 48-63;   bits 16-31   lower row: the same
WANDAPP_INLINE uint32_t metadata_of_lane(uint32_t upper_low, uint32_t upper_high, uint32_t lower_low,
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
WANDAPP_INLINE int metadata_offset_in_tile(int row, int word) {
  return 8 * (row % 8) + 4 * (row / 16) + 2 * word + row / 8 % 2;
}

// Word offset of tile (i, j); a tile is 64 words. CUTLASS: column after column of tiles. cuSPARSELt: super-tiles of
// 128 rows x 64 columns, again one column of them after the other (rows a multiple of 128).
WANDAPP_INLINE int64_t metadata_tile_offset(Layout layout, int64_t rows, int64_t i, int64_t j) {
  if (layout == Layout::kCutlass) return j * 2 * rows + i * 64;
  return (j / 2 * (rows / 128) + i / 4) * 512 + j % 2 * 256 + i % 4 * 64;
}

}  // namespace wandapp
