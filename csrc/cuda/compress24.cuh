// Dense -> 2:4 in one pass over the weight: kept values, and a bitmask or the metadata of the GPU libraries.
//
// One thread owns 16 columns of a row, which is what makes everything come out even: 16 columns of 16-bit weights are
// two 16-byte loads, 8 kept values are one 16-byte store, and 4 groups of 4 pattern bits are one 16-bit word, of the
// bitmask as of the metadata. A warp takes 512 consecutive columns of a row, a block 32 rows of them: exactly the
// rows of a metadata tile. Metadata is scattered over its tile, so it is gathered in shared memory and written as 16-byte
// pieces; written directly, every 2-byte word would cost a 32-byte memory sector.
//
// Bytes per thread and 16-bit weight: 32 read, 16 + 2 written. The budget of 8.8 instructions per byte (DRAM rate over
// issue rate of an H100) leaves 440; about 200 are spent.
#pragma once

#include "group24.h"

namespace wandapp {

constexpr int kChunk = 16;                    // columns of one thread
constexpr int kTileRows = 32;                 // rows of one block
constexpr int kTileChunks = 32;               // chunks of a row in one block: one per lane
constexpr int kCompressThreads = 256;         // 8 warps, each takes 4 rows of the tile
constexpr int kRowsPerThread = kTileRows / (kCompressThreads / 32);
constexpr int64_t kNoOffender = INT64_MAX;

struct CompressArguments {
  const void* weight;           // [rows, cols]
  int64_t row_stride;           // in elements
  const uint8_t* keep;          // [rows, keep_pitch] bitmask of the weights that count, or null: all
  int64_t keep_pitch;           // ceil(cols / 8)
  int64_t rows, cols;           // cols a multiple of 4
  void* values;                 // [rows, cols / 2]
  void* metadata;               // neutral: uint8 [rows, ceil(cols / 8)]; else 16-bit words, one per 16 columns
  long long* offender;          // flat index of the first group with more than two non-zeros; starts at kNoOffender
  bool wide;                    // every chunk is whole and 16-byte aligned
};

struct CompressGrid {
  unsigned x, y;  // chunks of a row, rows
};

inline CompressGrid compress_grid(int64_t rows, int64_t cols) {
  return {unsigned((cols + kChunk * kTileChunks - 1) / (kChunk * kTileChunks)),
          unsigned((rows + kTileRows - 1) / kTileRows)};
}

inline CompressArguments compress_arguments(uintptr_t weight, int64_t row_stride, uintptr_t keep, int64_t rows,
                                            int64_t cols, int itemsize, uintptr_t values, uintptr_t metadata,
                                            uintptr_t offender) {
  const bool wide = cols % kChunk == 0 && row_stride * itemsize % 16 == 0 && (weight | values | metadata) % 16 == 0 &&
                    keep % 2 == 0;
  return {reinterpret_cast<const void*>(weight),   row_stride, reinterpret_cast<const uint8_t*>(keep),
          (cols + 7) / 8,                          rows,       cols,
          reinterpret_cast<void*>(values),         reinterpret_cast<void*>(metadata),
          reinterpret_cast<long long*>(offender),  wide};
}

template <typename Word, bool wide>
struct Chunk {
  Group<Word> groups[4];

  // The last chunk of a row may be short; what lies behind the row reads as zero.
  __device__ __forceinline__ void load(const Word* row, int64_t column, int64_t cols) {
    constexpr int kPerGroup = Group<Word>::kWords, kWords = 4 * kPerGroup;
    if constexpr (wide) {
      // Neighbouring lanes are 32 bytes apart: the second load finds the other half of each sector in L1.
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        uint4 vector = __ldg(reinterpret_cast<const uint4*>(row + column) + i / 4);
        const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) groups[(i + j) / kPerGroup].words[(i + j) % kPerGroup] = words[j];
      }
    } else {
      constexpr int kPerWord = 4 / sizeof(Word);
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        uint32_t& word = groups[i / kPerGroup].words[i % kPerGroup];
        word = 0;
#pragma unroll
        for (int j = 0; j < kPerWord; ++j)
          if (column + i * kPerWord + j < cols) word |= uint32_t(row[column + i * kPerWord + j]) << 16 * j;
      }
    }
  }
};

template <typename Word, bool wide>
__device__ __forceinline__ void store_kept(const uint32_t* kept, Word* row, int64_t column, int64_t cols) {
  constexpr int kWords = 4 * Group<Word>::kKeptWords, kPerWord = 4 / sizeof(Word);
  if constexpr (wide) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4)
      store_vector(reinterpret_cast<uint4*>(row + column / 2) + i / 4,
                   make_uint4(kept[i], kept[i + 1], kept[i + 2], kept[i + 3]));
  } else {
#pragma unroll
    for (int i = 0; i < kWords; ++i)
#pragma unroll
      for (int j = 0; j < kPerWord; ++j)
        if (column / 2 + i * kPerWord + j < cols / 2) row[column / 2 + i * kPerWord + j] = Word(kept[i] >> 16 * j);
  }
}

template <bool wide>
__device__ __forceinline__ unsigned load_bits(const uint8_t* row, int64_t column, int64_t cols) {
  if constexpr (wide)
    return *reinterpret_cast<const uint16_t*>(row + column / 8);
  else
    return row[column / 8] | (column + 8 < cols ? unsigned(row[column / 8 + 1]) << 8 : 0);
}

template <bool wide>
__device__ __forceinline__ void store_bits(unsigned bits, uint8_t* row, int64_t column, int64_t cols) {
  if constexpr (wide) {
    *reinterpret_cast<uint16_t*>(row + column / 8) = uint16_t(bits);
  } else {
    row[column / 8] = uint8_t(bits);
    if (column + 8 < cols) row[column / 8 + 1] = uint8_t(bits >> 8);
  }
}

template <typename Word, Layout layout, bool wide>
__global__ void __launch_bounds__(kCompressThreads) compress24_kernel(CompressArguments arguments) {
  constexpr bool kNeutral = layout == Layout::kNeutral;
  alignas(16) __shared__ uint16_t tiles[kNeutral ? 8 : kTileRows * kTileChunks];

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t rows = arguments.rows, cols = arguments.cols;
  const int64_t first_row = int64_t(blockIdx.y) * kTileRows;
  const int64_t column = (int64_t(blockIdx.x) * kTileChunks + lane) * kChunk;
  const Word* weight = static_cast<const Word*>(arguments.weight);

  // All loads of the thread first, so that they wait for memory together.
  Chunk<Word, wide> chunks[kRowsPerThread];
  unsigned keep[kRowsPerThread];
#pragma unroll
  for (int i = 0; i < kRowsPerThread; ++i) {
    const int64_t row = first_row + warp + i * (kCompressThreads / 32);
    if (row >= rows || column >= cols) continue;
    chunks[i].load(weight + row * arguments.row_stride, column, cols);
    keep[i] = arguments.keep ? load_bits<wide>(arguments.keep + row * arguments.keep_pitch, column, cols) : 0xffff;
  }

#pragma unroll
  for (int i = 0; i < kRowsPerThread; ++i) {
    const int tile_row = warp + i * (kCompressThreads / 32);
    const int64_t row = first_row + tile_row;
    if (row >= rows || column >= cols) continue;
    Group<Word>* groups = chunks[i].groups;
    uint32_t nonzero = 0;  // 4 bits per group
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (arguments.keep) groups[j].keep(keep[i] >> 4 * j);
      if (kNeutral) groups[j].clear_negative_zeros();
      nonzero |= groups[j].nonzero() << 4 * j;
    }
    if (const uint32_t crowded = too_many(nonzero))
      atomicMin(arguments.offender, (long long)(row * cols + column + (__ffs(crowded) - 1)));
    const uint32_t masks = neutral_masks(nonzero), pairs = kNeutral ? pairs_of_masks(masks) : torch_pairs(nonzero);
    uint32_t kept[4 * Group<Word>::kKeptWords];
#pragma unroll
    for (int j = 0; j < 4; ++j) groups[j].gather(pairs >> 4 * j & 15, kept + j * Group<Word>::kKeptWords);
    store_kept<Word, wide>(kept, static_cast<Word*>(arguments.values) + row * (cols / 2), column, cols);
    if (kNeutral)
      store_bits<wide>(wide || column + kChunk <= cols ? masks : masks & ((1u << (cols - column)) - 1), static_cast<uint8_t*>(arguments.metadata) + row * ((cols + 7) / 8), column, cols);
    else
      tiles[lane / 2 * 64 + metadata_offset_in_tile(tile_row, lane % 2)] = uint16_t(pairs);
  }
  if (kNeutral) return;

  // 16 tiles of 64 words; 8 threads write a tile, 16 bytes each.
  __syncthreads();
  const int tile = threadIdx.x / 8, piece = threadIdx.x % 8;
  const int64_t tile_column = int64_t(blockIdx.x) * (kTileChunks / 2) + tile;
  if (tile >= kTileChunks / 2 || tile_column * 2 * kChunk >= cols) return;
  uint16_t* words = static_cast<uint16_t*>(arguments.metadata) +
                    metadata_tile_offset(layout, rows, first_row / kTileRows, tile_column);
  reinterpret_cast<uint4*>(words)[piece] = reinterpret_cast<const uint4*>(tiles)[tile * 8 + piece];
}

// The kernel for `wide` or other rows; null for rows that a library's layout cannot have.
template <typename Word, Layout layout>
auto compress_kernel(bool wide) {
  constexpr bool kAnyRows = layout == Layout::kNeutral;
  const auto whole = &compress24_kernel<Word, layout, true>;
  return wide ? whole : kAnyRows ? &compress24_kernel<Word, layout, !kAnyRows> : nullptr;
}

}  // namespace wandapp
