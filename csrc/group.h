// The arithmetic of one weight and of one group, written once for the CPU kernels, the CUDA kernels and the tests.
//
// A score is finite and >= 0, so its fp32 bits, read as an integer, order like the score itself. Every comparison of
// scores in this project is therefore an integer comparison of these bits, and ties are exact.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define WANDAPP_HD __host__ __device__ __forceinline__
#else
#define WANDAPP_HD inline
#endif

namespace wandapp {

constexpr int32_t kLargestFiniteBits = 0x7f7fffff;

// |weight| * (alpha * gradient + scale). Callers compile without contraction, so that each step is rounded.
WANDAPP_HD float score(float weight, float scale, float gradient, float alpha) {
  float product = weight * (alpha * gradient + scale);
  return product < 0 ? -product : product;
}

// Does the weight at column j go before the one at column i? Larger scores do; among equals, the lower column.
WANDAPP_HD bool goes_before(int32_t bits_j, int j, int32_t bits_i, int i) { return bits_j + (j < i) > bits_i; }

// Bit i = the i-th of m <= 32 weights is among the n that go first.
WANDAPP_HD uint32_t keep_of_group(const int32_t* bits, int n, int m) {
  uint32_t keep = 0;
  for (int i = 0; i < m; i++) {
    int rank = 0;
    for (int j = 0; j < m; j++) rank += j != i && goes_before(bits[j], j, bits[i], i);
    keep |= uint32_t(rank < n) << i;
  }
  return keep;
}

// Number of bits set below 2^32; __builtin_popcount and __popc by another name, so that both compilers accept it.
WANDAPP_HD int count_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

// The lowest `count` set bits.
WANDAPP_HD uint32_t lowest_bits(uint32_t bits, int count) {
  uint32_t rest = bits;
  for (int i = 0; i < count && rest; i++) rest &= rest - 1;
  return bits & ~rest;
}

// Of a 16-bit word in groups of m bits, m a power of two: the number of bits set in each, in the place of the group.
template <int m>
WANDAPP_HD uint32_t count_in_groups(uint32_t bits) {
  for (int width = 1; width < m; width *= 2) {  // neighbours of `width` bits are added
    const uint32_t lower = 0xffffu / ((1u << width) + 1);
    bits = (bits & lower) + (bits >> width & lower);
  }
  return bits;
}

// `count` in the place of each group.
template <int m>
WANDAPP_HD uint32_t in_every_group(int count) {
  return count * (0xffffu / ((1u << m) - 1));
}

// The n places a packed group stores: every non-zero, then the lowest zeros. More than n non-zeros come back as they are.
WANDAPP_HD uint32_t stored_of_group(uint32_t nonzero, int n, int m) {
  uint32_t zero = ~nonzero & (m == 32 ? ~0u : (1u << m) - 1);
  return nonzero | lowest_bits(zero, n - count_bits(nonzero));
}

}  // namespace wandapp
