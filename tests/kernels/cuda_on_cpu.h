// CUDA's words in plain C++, so that a kernel's own text runs on a CPU, every thread of every block of a grid.
//
// The threads of a block are fibers that take turns on one OS thread and hand over where they must wait: at __syncthreads
// and inside mma.sp, whose operands lie with the 32 lanes of a warp. Where CUDA would deadlock, so does this (it throws).
// A warp runs as far as it can before the next one moves: what only a missing barrier keeps apart meets here.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#define __global__ static
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define WANDAPP_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(fibers::shared_memory)

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

struct Index {
  unsigned x = 0, y = 0;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

// A vector access on the GPU faults when its address is not a multiple of its size; x86 would let it pass.
template <typename T>
T __ldg(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T)) throw std::runtime_error("misaligned load");
  T value;
  std::memcpy(&value, address, sizeof value);
  return value;
}

inline int __ffs(uint32_t word) { return __builtin_ffs(int(word)); }

inline long long atomicMin(long long* address, long long value) {
  const long long old = *address;
  if (value < old) *address = value;
  return old;
}

namespace fibers {

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done, at_block_barrier;
};

struct Barrier {
  int arrived = 0, generation = 0;
};

struct Lane {  // operands of mma.sp
  uint32_t a[4], metadata;
  uint4 b;
};

constexpr size_t kStackBytes = 32 * 1024, kSharedBytes = 227 * 1024;
alignas(16) inline char shared_memory[kSharedBytes];
inline std::vector<Fiber> all;
inline std::vector<Barrier> warps;
inline std::vector<Lane> lanes;
inline Barrier block;
inline unsigned current;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline std::exception_ptr failure;

inline void wait(Barrier& barrier, int members) {
  const int generation = barrier.generation;
  if (++barrier.arrived == members) {
    barrier.arrived = 0, ++barrier.generation;
    return;
  }
  const unsigned me = current;
  all[me].at_block_barrier = &barrier == &block;
  while (barrier.generation == generation) swapcontext(&all[me].context, &scheduler);
  all[me].at_block_barrier = false;
}

inline void enter() {
  try {
    body();
  } catch (...) {
    failure = std::current_exception();
  }
  all[current].done = true;
  swapcontext(&all[current].context, &scheduler);
}

inline void run_block(unsigned threads) {
  std::memset(shared_memory, 0xff, kSharedBytes);  // NaN in every type: what a kernel reads, it must have written
  all.resize(threads), lanes.resize(threads), warps.assign((threads + 31) / 32, {}), block = {};
  for (Fiber& fiber : all) {
    if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    fiber.done = fiber.at_block_barrier = false;
    makecontext(&fiber.context, enter, 0);
  }
  unsigned turns = 0;
  for (bool running = true; running;) {
    running = false;
    for (unsigned first = 0; first < threads; first += 32) {
      for (bool moving = true; moving;) {
        if (++turns > 1000000) throw std::runtime_error("a barrier that not every thread reaches");
        moving = false;
        for (current = first; current < first + 32 && current < threads; ++current) {
          if (all[current].done) continue;
          threadIdx.x = current;
          swapcontext(&scheduler, &all[current].context);
          if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
          running |= !all[current].done;
          moving |= !all[current].done && !all[current].at_block_barrier;
        }
      }
    }
  }
}

template <typename Kernel, typename Arguments>
void launch(Kernel kernel, Index grid, unsigned threads, const Arguments& arguments) {
  body = [&] { kernel(arguments); };
  blockDim.x = threads, gridDim = grid;
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block(threads);
}

}  // namespace fibers

inline void __syncthreads() { fibers::wait(fibers::block, int(fibers::all.size())); }

namespace wandapp {

inline uint4 load_streaming(const uint4* address) { return __ldg(address); }

inline void store_vector(uint4* address, uint4 value) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof value) throw std::runtime_error("misaligned store");
  std::memcpy(address, &value, sizeof value);
}

struct BFloat16 {
  static float to_float(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
  static uint16_t from_float(float value) {  // round to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (std::isnan(value)) return 0x7fff;
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
};

struct Float16 {
  static float to_float(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float value = exponent == 31 ? (fraction ? NAN : INFINITY)
                  : exponent     ? std::ldexp(float(1024 + fraction), exponent - 25)
                                 : std::ldexp(float(fraction), -24);
    return bits >> 15 ? -value : value;
  }
  static uint16_t from_float(float value) {
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    if (std::isnan(value)) return 0x7fff;
    const float magnitude = std::fabs(value);
    if (magnitude >= 65520.0f) return sign | 0x7c00;
    int exponent;
    std::frexp(magnitude, &exponent);
    if (exponent < -13) exponent = -13;  // denormal
    const int fraction = int(std::nearbyint(std::ldexp(magnitude, 11 - exponent)));  // 11 bits, may round up to 2048
    return magnitude == 0 ? sign : uint16_t(sign | (((exponent + 13) << 10) + fraction));
  }
};

// mma.sp.m16n8k32, written from the PTX manual's fragment tables and not from the kernel: a dense A is rebuilt from all
// lanes' values and metadata, then multiplied.
template <typename Type, int selector>
void mma_sparse(float (&sums)[4], const uint32_t (&a)[4], const uint4& b, uint32_t metadata) {
  const unsigned me = threadIdx.x, warp = me / 32, group = me % 32 / 4, quad = me % 4;
  fibers::Lane* lanes = &fibers::lanes[32 * warp];
  std::memcpy(lanes[me % 32].a, a, sizeof a);
  lanes[me % 32].metadata = metadata, lanes[me % 32].b = b;
  fibers::wait(fibers::warps[warp], 32);
  for (int i = 0; i < 4; ++i) {  // c0, c1: row group, tokens 2 quad, 2 quad + 1; c2, c3: row group + 8
    const unsigned row = group + i / 2 * 8, token = 2 * quad + i % 2;
    float dense[32] = {};
    for (unsigned j = 0; j < 8; ++j) {  // j-th group of four columns
      const uint32_t register_of_lane = lanes[4 * (row % 8) + 2 * selector + j / 4].metadata;
      const unsigned pair = register_of_lane >> (row / 8 * 16 + j % 4 * 4) & 15;
      const uint32_t kept = lanes[4 * (row % 8) + j % 4].a[j / 4 * 2 + row / 8];
      if ((pair & 3) >= (pair >> 2)) throw std::runtime_error("metadata is not ordered");
      dense[4 * j + (pair & 3)] = Type::to_float(uint16_t(kept));
      dense[4 * j + (pair >> 2)] = Type::to_float(uint16_t(kept >> 16));
    }
    for (unsigned k = 0; k < 32; ++k) {  // b: lane 4 token + k % 8 / 2, register k / 8, half k % 2
      const uint4& column = lanes[4 * token + k % 8 / 2].b;
      const uint32_t words[4] = {column.x, column.y, column.z, column.w};
      if (dense[k] != 0) sums[i] += dense[k] * Type::to_float(uint16_t(words[k / 8] >> 16 * (k % 2)));
    }
  }
  fibers::wait(fibers::warps[warp], 32);
}

}  // namespace wandapp
