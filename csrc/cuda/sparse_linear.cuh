// y = x W^T for 1 to 16 tokens, W in 2:4 as values + bitmask: a matrix-vector product that is bound by reading W.
//
// Why the sparse tensor core for a memory-bound kernel? Not for its rate: because mma.sp takes kept values exactly as
// they lie in memory, so 16 loaded bytes become products with 8 tokens in one instruction and nothing is expanded. A
// loop over fused multiply-adds needs about 100 instructions for the same bytes at 8 tokens and reads 32 bytes of x
// from shared memory per weight; that is over both budgets of an H100 (8.8 instructions per byte of W, and shared memory
// is nine times as fast as DRAM). Here a lane spends about 70 instructions on 36 bytes of W, for 8 tokens as for 1.
//
// A warp owns 16 rows and takes 64 of their columns per step. The sum over columns may run in any order, so columns are
// dealt to the instruction's logical k as the 16-byte loads like it, and not the other way round:
//
//   lane = 4 row + quad      loads 16 columns (8 kept values) of `row` and of `row + 8`: columns 16 quad ... 16 quad + 15
//   its words 0, 1           groups 0, 1 of those columns: operands of the first instruction, logical groups quad, quad + 4
//   its words 2, 3           groups 2, 3: the second instruction
//
// The metadata that lane 0 of four must bring for the first instruction is group 0 of all four lanes' columns, lane 1:
// group 1; for the second instruction (selector 1), lane 2: group 2, lane 3: group 3. So lane `quad` needs group `quad` of
// every 16 columns: `metadata_of_lane`, about 30 instructions on 64 bits of bitmask for two rows.
//
// x is laid down in shared memory in the order in which the instruction wants it, once per block:
//
//   uint4 [step][instruction][token][quad] = for r = 0..3: columns 64 step + 16 j + 4 (2 instruction + r / 2) + 2 (quad % 2)
//                                            and the next one, where j = 2 (r % 2) + quad / 2 is the lane that has the weight
//
// Warps of a block share 16 rows and split the steps; their sums meet in shared memory, in a fixed order.
//
// A strip of 16 rows is 18 cols bytes of W, and x, which every block lays down, 2 tokens cols bytes from L2: at 8 tokens
// nearly as much. Measured on an H100, 11008 x 4096, one strip per block: 22.6 us for 1 token, 31.1 us for 8. The 45 MB of x
// in 688 copies take just that difference at L2's rate. So from a few tokens on, blocks walk: one large block on each
// multiprocessor lays down x once, 132 copies, and goes through the strips blockIdx, blockIdx + gridDim, ...
#pragma once

#include "group24.h"

namespace wandapp {

constexpr int kStep = 64;       // columns of one warp step
constexpr int kLinearRows = 16; // rows of one block
constexpr int kMaxWarps = 16;
constexpr int kMaxTokens = 16;
// Steps in flight per warp, for 1 to 8 and for 9 to 16 tokens. 32 warps x 2 steps x 1,152 bytes are 72 KB per SM; 3.3 TB/s at
// a latency of 700 ns asks for 18. More would spill: 64 registers is all that 1,024 threads per SM leave.
constexpr int kUnrollOne = 3, kUnrollTwo = 2;
// x staged at a time: two blocks of 16 warps stay on an SM of 228 KB, so that one streams W while the other stages.
constexpr int kMaxSharedBytes = 96 * 1024;

struct SparseLinearArguments {
  const uint16_t* x;       // [tokens, cols]
  const uint16_t* values;  // [rows, cols / 2]
  const uint8_t* bitmask;  // [rows, cols / 8]
  const uint16_t* bias;    // [rows] or null
  uint16_t* y;             // [tokens, rows]
  int tokens;
  int64_t rows, cols;
  int staged_steps;  // steps of x in shared memory at a time
};

constexpr int kWalkingWarps = 32;
// Steps in flight per warp of a walking block: 72 KB per SM.
constexpr int kWalkingUnroll = 2;

struct SparseLinearShape {
  unsigned blocks, threads, shared_bytes;
  int staged_steps;
};

inline SparseLinearShape sparse_linear_shape(int tokens, int64_t rows, int64_t cols) {
  const int steps = int(cols / kStep), step_bytes = tokens * kStep * 2;
  const int warps = steps < kMaxWarps ? steps : kMaxWarps;
  // Equal stages, so that the last is not a short one in which most warps have nothing to do.
  const int stages = (steps * step_bytes + kMaxSharedBytes - 1) / kMaxSharedBytes;
  const int staged_steps = (steps + stages - 1) / stages;
  const int sums_bytes = warps * kLinearRows * (tokens > 8 ? 16 : 8) * 4;
  const int x_bytes = staged_steps * step_bytes;
  return {unsigned((rows + kLinearRows - 1) / kLinearRows), unsigned(32 * warps),
          unsigned(x_bytes > sums_bytes ? x_bytes : sums_bytes), staged_steps};
}

// A walking block holds all of x, and the sums of two strips. Whether that is possible: shared_bytes <= the device's limit.
inline SparseLinearShape walking_shape(int tokens, int64_t rows, int64_t cols, int multiprocessors) {
  const int steps = int(cols / kStep), warps = steps < kWalkingWarps ? steps : kWalkingWarps;
  const int sums_bytes = 2 * warps * kLinearRows * (tokens > 8 ? 16 : 8) * 4;
  const int64_t strips = (rows + kLinearRows - 1) / kLinearRows;
  return {unsigned(strips < multiprocessors ? strips : multiprocessors), unsigned(32 * warps),
          unsigned(tokens * int(cols) * 2 + sums_bytes), steps};
}

// One lane's share of a step: 16 columns of two rows, and the bitmask of all 64 (the four lanes read the same 8 bytes).
struct StepWeights {
  uint4 upper, lower;
  uint2 upper_bits, lower_bits;
};

template <typename Type, int kTokenTiles>
__device__ __forceinline__ void multiply_step(float (&sums)[kTokenTiles][4], const StepWeights& w, const uint4* x,
                                              int tokens, int lane) {
  const int group = lane / 4, quad = lane % 4;
  const uint32_t metadata =
      metadata_of_lane(w.upper_bits.x, w.upper_bits.y, w.lower_bits.x, w.lower_bits.y, quad);
  const uint32_t first[4] = {w.upper.x, w.lower.x, w.upper.y, w.lower.y};
  const uint32_t second[4] = {w.upper.z, w.lower.z, w.upper.w, w.lower.w};
#pragma unroll
  for (int tile = 0; tile < kTokenTiles; ++tile) {
    const int token = 8 * tile + group;
    uint4 x_first = make_uint4(0, 0, 0, 0), x_second = x_first;
    if (token < tokens) {
      x_first = x[token * 4 + quad];
      x_second = x[(tokens + token) * 4 + quad];
    }
    mma_sparse<Type, 0>(sums[tile], first, x_first, metadata);
    mma_sparse<Type, 1>(sums[tile], second, x_second, metadata);
  }
}

// Shared memory from x, steps `first` to `end`. Thread number u fills uint4 2u and 2u + 1, which hold quads that differ in
// their lowest bit: the same 16 columns, in words turn by turn. Every other pair of slots is written in reverse: 8 lanes
// then cover all 32 banks at each of the two stores. A thread takes `kTurns` numbers at once, which wait for L2 together.
template <int kTurns>
__device__ __forceinline__ void stage_x(uint4* staged, const SparseLinearArguments& arguments, int first, int end) {
  const int tokens = arguments.tokens, count = (end - first) * tokens * 4;
  for (int start = threadIdx.x; start < count; start += kTurns * int(blockDim.x)) {
    uint4 near[kTurns], far[kTurns];
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int u = start + turn * int(blockDim.x);
      if (u >= count) break;
      const int slot = u / 2, token = slot % tokens, instruction = slot / tokens % 2, step = slot / tokens / 2;
      const uint4* x = reinterpret_cast<const uint4*>(arguments.x + token * arguments.cols +
                                                      int64_t(first + step) * kStep + 16 * (u % 2) + 8 * instruction);
      near[turn] = __ldg(x), far[turn] = __ldg(x + 4);  // 32 columns further
    }
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int u = start + turn * int(blockDim.x);
      if (u >= count) break;
      const uint4 even = make_uint4(near[turn].x, far[turn].x, near[turn].z, far[turn].z);
      const uint4 odd = make_uint4(near[turn].y, far[turn].y, near[turn].w, far[turn].w);
      const int reverse = u / 4 % 2;
      staged[2 * u + reverse] = reverse ? odd : even;
      staged[2 * u + 1 - reverse] = reverse ? even : odd;
    }
  }
}

// Into float [warp][row][token]: a lane holds tokens 2 quad, 2 quad + 1 of both its rows.
template <int kTokenTiles>
__device__ __forceinline__ void store_sums(float* partial, const float (&sums)[kTokenTiles][4]) {
  constexpr int kTokens = 8 * kTokenTiles;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int tile = 0; tile < kTokenTiles; ++tile) {
    float* at = partial + (warp * kLinearRows + lane / 4) * kTokens + 8 * tile + lane % 4 * 2;
    at[0] = sums[tile][0], at[1] = sums[tile][1];
    at[8 * kTokens] = sums[tile][2], at[8 * kTokens + 1] = sums[tile][3];
  }
}

template <typename Type, int kTokens>
__device__ __forceinline__ void reduce_sums(const float* partial, const SparseLinearArguments& arguments,
                                            int64_t first_row) {
  const int warps = blockDim.x / 32;
  for (int i = threadIdx.x; i < kLinearRows * kTokens; i += blockDim.x) {
    const int64_t row = first_row + i / kTokens;
    const int token = i % kTokens;
    if (row >= arguments.rows || token >= arguments.tokens) continue;
    float sum = arguments.bias ? Type::to_float(arguments.bias[row]) : 0.0f;
    for (int w = 0; w < warps; ++w) sum += partial[w * kLinearRows * kTokens + i];
    arguments.y[token * arguments.rows + row] = Type::from_float(sum);
  }
}

template <typename Type, int kTokenTiles, int kUnroll>
__global__ void __launch_bounds__(32 * kMaxWarps, 2) sparse_linear24_kernel(SparseLinearArguments arguments) {
  WANDAPP_DYNAMIC_SHARED(uint4, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int64_t rows = arguments.rows, cols = arguments.cols, first_row = int64_t(blockIdx.x) * kLinearRows;
  const int steps = int(cols / kStep);

  // A row past the end reads the last row, and its sums are dropped. A row is `steps` steps of 4 uint4 of values and one
  // uint2 of bitmask, so one 32-bit step number addresses both; pointers per row would cost 12 more registers.
  const int64_t upper_row = first_row + lane / 4, lower_row = upper_row + 8;
  const unsigned upper = unsigned(upper_row < rows ? upper_row : rows - 1) * steps;
  const unsigned lower = unsigned(lower_row < rows ? lower_row : rows - 1) * steps;
  const uint4* values = reinterpret_cast<const uint4*>(arguments.values) + lane % 4;
  const uint2* bitmask = reinterpret_cast<const uint2*>(arguments.bitmask);

  StepWeights weights[kUnroll];
  auto load = [&](int step, int end) {
#pragma unroll
    for (int i = 0; i < kUnroll; ++i, step += warps) {
      if (step >= end) return;
      weights[i].upper = load_streaming(values + size_t(upper + step) * 4);
      weights[i].lower = load_streaming(values + size_t(lower + step) * 4);
      weights[i].upper_bits = __ldg(bitmask + (upper + step));
      weights[i].lower_bits = __ldg(bitmask + (lower + step));
    }
  };

  float sums[kTokenTiles][4] = {};
  for (int first = 0; first < steps; first += arguments.staged_steps) {
    const int end = first + arguments.staged_steps < steps ? first + arguments.staged_steps : steps;
    load(first + warp, end);  // W is on its way while x is laid down
    if (first) __syncthreads();
    stage_x<1>(shared, arguments, first, end);
    __syncthreads();
    for (int step = first + warp; step < end; step += kUnroll * warps) {
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const int here = step + i * warps;
        if (here < end)
          multiply_step<Type, kTokenTiles>(sums, weights[i], shared + (here - first) * arguments.tokens * 8,
                                           arguments.tokens, lane);
      }
      load(step + kUnroll * warps, end);
    }
  }

  __syncthreads();
  float* partial = reinterpret_cast<float*>(shared);
  store_sums<kTokenTiles>(partial, sums);
  __syncthreads();
  reduce_sums<Type, 8 * kTokenTiles>(partial, arguments, first_row);
}

template <typename Type, int kTokenTiles>
__global__ void __launch_bounds__(32 * kWalkingWarps, 1) sparse_linear24_walking_kernel(SparseLinearArguments arguments) {
  WANDAPP_DYNAMIC_SHARED(uint4, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int steps = int(arguments.cols / kStep), strips = int((arguments.rows + kLinearRows - 1) / kLinearRows);
  constexpr int kTokens = 8 * kTokenTiles, kRound = kWalkingUnroll;
  float* partial = reinterpret_cast<float*>(shared + steps * arguments.tokens * 8);

  StepWeights weights[kRound];
  auto load = [&](StepWeights& w, int strip, int step) {  // addresses as above
    if (strip >= strips || step >= steps) return;
    const unsigned last = unsigned(arguments.rows) - 1, row = unsigned(strip) * kLinearRows + lane / 4;
    const unsigned upper = (row < last ? row : last) * steps + step;
    const unsigned lower = (row + 8 < last ? row + 8 : last) * steps + step;
    w.upper = load_streaming(reinterpret_cast<const uint4*>(arguments.values) + size_t(upper) * 4 + lane % 4);
    w.lower = load_streaming(reinterpret_cast<const uint4*>(arguments.values) + size_t(lower) * 4 + lane % 4);
    w.upper_bits = __ldg(reinterpret_cast<const uint2*>(arguments.bitmask) + upper);
    w.lower_bits = __ldg(reinterpret_cast<const uint2*>(arguments.bitmask) + lower);
  };

  // x should not queue behind more of W than keeps the memory busy: half of it before, half after.
  load(weights[0], blockIdx.x, warp);
  stage_x<2>(shared, arguments, 0, steps);
#pragma unroll
  for (int i = 1; i < kRound; ++i) load(weights[i], blockIdx.x, warp + i * warps);
  __syncthreads();

  int turn = 0;
  for (int strip = blockIdx.x; strip < strips; strip += gridDim.x, turn ^= 1) {
    float sums[kTokenTiles][4] = {};
    for (int first = 0; first < steps; first += kRound * warps) {
      // Each step multiplied makes room for a later one, at the end for one of the next strip.
      const bool last = first + kRound * warps >= steps;
      const int next_strip = last ? strip + int(gridDim.x) : strip, next = last ? 0 : first + kRound * warps;
#pragma unroll
      for (int i = 0; i < kRound; ++i) {
        const int step = first + warp + i * warps;
        if (step < steps)
          multiply_step<Type, kTokenTiles>(sums, weights[i], shared + step * arguments.tokens * 8, arguments.tokens, lane);
        load(weights[i], next_strip, next + warp + i * warps);
      }
    }
    // Two places for sums take turns, so one barrier is enough: who writes to this place again has passed the next barrier,
    // and so has everyone who read it now.
    float* here = partial + turn * warps * kLinearRows * kTokens;
    store_sums<kTokenTiles>(here, sums);
    __syncthreads();
    reduce_sums<Type, kTokens>(here, arguments, int64_t(strip) * kLinearRows);
  }
}

}  // namespace wandapp
