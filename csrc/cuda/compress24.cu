// clang-format off
#include "cuda/device.cuh"
#include "cuda/compress24.cuh"
#include "cuda/launch.h"
// clang-format on

namespace wandapp {

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

template <typename Word, Layout layout>
static cudaError_t launch(const CompressArguments& arguments, cudaStream_t stream) {
  const auto kernel = compress_kernel<Word, layout>(arguments.wide);
  if (!kernel) return cudaErrorMisalignedAddress;
  const CompressGrid grid = compress_grid(arguments.rows, arguments.cols);
  kernel<<<dim3(grid.x, grid.y), kCompressThreads, 0, stream>>>(arguments);
  return cudaGetLastError();
}

int compress24(uintptr_t weight, int64_t row_stride, uintptr_t keep, int64_t rows, int64_t cols, int dtype, int layout,
               uintptr_t values, uintptr_t metadata, uintptr_t offender, int device, uintptr_t stream_handle) {
  if (rows == 0 || cols == 0) return cudaSuccess;
  if (const cudaError_t error = cudaSetDevice(device)) return error;
  const CompressArguments arguments = compress_arguments(weight, row_stride, keep, rows, cols, dtype == kFloat32 ? 4 : 2,
                                                         values, metadata, offender);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
  if (dtype == kFloat32) return layout ? cudaErrorInvalidValue : launch<uint32_t, Layout::kNeutral>(arguments, stream);
  if (layout == 0) return launch<uint16_t, Layout::kNeutral>(arguments, stream);
  if (layout == 1) return launch<uint16_t, Layout::kCutlass>(arguments, stream);
  return launch<uint16_t, Layout::kCusparselt>(arguments, stream);
}

}  // namespace wandapp
