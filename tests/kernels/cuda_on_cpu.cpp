// The CUDA kernels as a CPU module: the kernels' own text, grid arithmetic and signatures, on CPU memory.
#include "cuda_on_cpu.h"

#include <pybind11/pybind11.h>

#include "cuda/compress24.cuh"
#include "cuda/sparse_linear.cuh"

using namespace wandapp;

template <typename Word, Layout layout>
static void run_compress(const CompressArguments& arguments) {
  const CompressGrid grid = compress_grid(arguments.rows, arguments.cols);
  const auto kernel = compress_kernel<Word, layout>(arguments.wide);
  if (!kernel) throw std::runtime_error("a layout of the libraries needs aligned rows");
  fibers::launch(kernel, {grid.x, grid.y}, kCompressThreads, arguments);
}

static void compress24(uintptr_t weight, int64_t row_stride, uintptr_t keep, int64_t rows, int64_t cols, int dtype,
                       int layout, uintptr_t values, uintptr_t metadata, uintptr_t offender, int, uintptr_t) {
  const CompressArguments arguments = compress_arguments(weight, row_stride, keep, rows, cols, dtype == 0 ? 4 : 2, values,
                                                         metadata, offender);
  if (dtype == 0) return run_compress<uint32_t, Layout::kNeutral>(arguments);
  if (layout == 0) return run_compress<uint16_t, Layout::kNeutral>(arguments);
  if (layout == 1) return run_compress<uint16_t, Layout::kCutlass>(arguments);
  run_compress<uint16_t, Layout::kCusparselt>(arguments);
}

template <typename Type>
static void run_linear(const SparseLinearArguments& arguments, const SparseLinearShape& shape, bool walking) {
  const bool few = arguments.tokens <= 8;
  const auto kernel = walking ? (few ? sparse_linear24_walking_kernel<Type, 1> : sparse_linear24_walking_kernel<Type, 2>)
                              : (few ? sparse_linear24_kernel<Type, 1, kUnrollOne> : sparse_linear24_kernel<Type, 2, kUnrollTwo>);
  fibers::launch(kernel, {shape.blocks, 1}, shape.threads, arguments);
}

// `staged_steps`: how many steps of x are staged at a time; 0 leaves it to the launch. `blocks`: how many blocks walk, as
// many as there are multiprocessors; 0 is the kernel that does not walk.
static void staged_linear24(uintptr_t x, uintptr_t values, uintptr_t bitmask, uintptr_t bias, uintptr_t y, int64_t tokens,
                            int64_t rows, int64_t cols, int dtype, int staged_steps, int blocks) {
  const SparseLinearShape shape =
      blocks ? walking_shape(int(tokens), rows, cols, blocks) : sparse_linear_shape(int(tokens), rows, cols);
  const SparseLinearArguments arguments{reinterpret_cast<const uint16_t*>(x),
                                        reinterpret_cast<const uint16_t*>(values),
                                        reinterpret_cast<const uint8_t*>(bitmask),
                                        reinterpret_cast<const uint16_t*>(bias),
                                        reinterpret_cast<uint16_t*>(y),
                                        int(tokens),
                                        rows,
                                        cols,
                                        staged_steps ? staged_steps : shape.staged_steps};
  if (shape.shared_bytes > (blocks ? fibers::kSharedBytes : kMaxSharedBytes))
    throw std::runtime_error("more shared memory than the launch may ask for");
  dtype == 1 ? run_linear<BFloat16>(arguments, shape, blocks) : run_linear<Float16>(arguments, shape, blocks);
  for (size_t at = shape.shared_bytes; at < fibers::kSharedBytes; ++at)
    if (fibers::shared_memory[at] != char(0xff)) throw std::runtime_error("a write past the block's shared memory");
}

static void sparse_linear24(uintptr_t x, uintptr_t values, uintptr_t bitmask, uintptr_t bias, uintptr_t y, int64_t tokens,
                            int64_t rows, int64_t cols, int dtype, bool walking, int, uintptr_t) {
  staged_linear24(x, values, bitmask, bias, y, tokens, rows, cols, dtype, 0, walking ? 2 : 0);
}

PYBIND11_MODULE(cuda_on_cpu, module) {
  module.def("compress24", compress24);
  module.def("sparse_linear24", sparse_linear24);
  module.def("staged_linear24", staged_linear24);
  module.def("torch_pairs", torch_pairs);
  module.def("neutral_masks", neutral_masks);
  module.def("too_many", too_many);
  module.def("pairs_of_masks", pairs_of_masks);
  module.def("float16_bits", Float16::from_float);
  module.def("float16_value", Float16::to_float);
}
