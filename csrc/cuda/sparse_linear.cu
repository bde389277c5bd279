// clang-format off
#include "cuda/device.cuh"
#include "cuda/sparse_linear.cuh"
#include "cuda/launch.h"
// clang-format on

namespace wandapp {

template <typename Type, int kTokenTiles, int kUnroll>
static cudaError_t launch(const SparseLinearArguments& arguments, const SparseLinearShape& shape, cudaStream_t stream) {
  const auto kernel = sparse_linear24_kernel<Type, kTokenTiles, kUnroll>;
  // Above 48 KB of shared memory only on request.
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxSharedBytes))
    return error;
  kernel<<<shape.blocks, shape.threads, shape.shared_bytes, stream>>>(arguments);
  return cudaGetLastError();
}

template <typename Type>
static cudaError_t launch(const SparseLinearArguments& arguments, const SparseLinearShape& shape, cudaStream_t stream) {
  return arguments.tokens <= 8 ? launch<Type, 1, kUnrollOne>(arguments, shape, stream)
                               : launch<Type, 2, kUnrollTwo>(arguments, shape, stream);
}

int sparse_linear24(uintptr_t x, uintptr_t values, uintptr_t bitmask, uintptr_t bias, uintptr_t y, int64_t tokens,
                    int64_t rows, int64_t cols, int dtype, int device, uintptr_t stream_handle) {
  if (tokens < 1 || tokens > kMaxTokens || cols % kStep || dtype == kFloat32) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  if (const cudaError_t error = cudaSetDevice(device)) return error;
  const SparseLinearShape shape = sparse_linear_shape(int(tokens), rows, cols);
  const SparseLinearArguments arguments{reinterpret_cast<const uint16_t*>(x),
                                        reinterpret_cast<const uint16_t*>(values),
                                        reinterpret_cast<const uint8_t*>(bitmask),
                                        reinterpret_cast<const uint16_t*>(bias),
                                        reinterpret_cast<uint16_t*>(y),
                                        int(tokens),
                                        rows,
                                        cols,
                                        shape.staged_steps};
  const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
  return dtype == kBFloat16 ? launch<BFloat16>(arguments, shape, stream) : launch<Float16>(arguments, shape, stream);
}

}  // namespace wandapp
