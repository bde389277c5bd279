// clang-format off
#include "cuda/device.cuh"
#include "cuda/sparse_linear.cuh"
#include "cuda/launch.h"
// clang-format on

namespace wandapp {

template <typename Kernel>
static cudaError_t launch(Kernel kernel, SparseLinearArguments arguments, const SparseLinearShape& shape,
                          int shared_limit, cudaStream_t stream) {
  // Above 48 KB of shared memory only on request; always the same request, so that threads do not undo each other's.
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_limit))
    return error;
  arguments.staged_steps = shape.staged_steps;
  kernel<<<shape.blocks, shape.threads, shape.shared_bytes, stream>>>(arguments);
  return cudaGetLastError();
}

template <typename Type>
static cudaError_t launch(const SparseLinearArguments& arguments, bool walking, int device, cudaStream_t stream) {
  const int tokens = arguments.tokens;
  if (walking) {
    int multiprocessors = 0, shared_limit = 0;
    if (const cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device))
      return error;
    if (const cudaError_t error =
            cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device))
      return error;
    const SparseLinearShape shape = walking_shape(tokens, arguments.rows, arguments.cols, multiprocessors);
    if (shape.shared_bytes <= unsigned(shared_limit))
      return tokens <= 8 ? launch(sparse_linear24_walking_kernel<Type, 1>, arguments, shape, shared_limit, stream)
                         : launch(sparse_linear24_walking_kernel<Type, 2>, arguments, shape, shared_limit, stream);
  }
  const SparseLinearShape shape = sparse_linear_shape(tokens, arguments.rows, arguments.cols);
  return tokens <= 8
             ? launch(sparse_linear24_kernel<Type, 1, kUnrollOne>, arguments, shape, kMaxSharedBytes, stream)
             : launch(sparse_linear24_kernel<Type, 2, kUnrollTwo>, arguments, shape, kMaxSharedBytes, stream);
}

int sparse_linear24(uintptr_t x, uintptr_t values, uintptr_t bitmask, uintptr_t bias, uintptr_t y, int64_t tokens,
                    int64_t rows, int64_t cols, int dtype, bool walking, int device, uintptr_t stream_handle) {
  if (tokens < 1 || tokens > kMaxTokens || cols % kStep || dtype == kFloat32) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  if (const cudaError_t error = cudaSetDevice(device)) return error;
  const SparseLinearArguments arguments{reinterpret_cast<const uint16_t*>(x),
                                        reinterpret_cast<const uint16_t*>(values),
                                        reinterpret_cast<const uint8_t*>(bitmask),
                                        reinterpret_cast<const uint16_t*>(bias),
                                        reinterpret_cast<uint16_t*>(y),
                                        int(tokens),
                                        rows,
                                        cols,
                                        0};
  const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
  return dtype == kBFloat16 ? launch<BFloat16>(arguments, walking, device, stream)
                            : launch<Float16>(arguments, walking, device, stream);
}

}  // namespace wandapp
