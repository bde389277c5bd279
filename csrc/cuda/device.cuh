// The few device instructions that C++ has no word for. Tests that run kernels on the CPU bring their own definitions
// (tests/kernels/cuda_on_cpu.h), so kernels include neither.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define WANDAPP_DYNAMIC_SHARED(type, name) extern __shared__ type name[]

namespace wandapp {

// 16 bytes read once: no line of L1 for them, and the L2 fetches the 256 bytes around, which the warp wants too.
__device__ __forceinline__ uint4 load_streaming(const uint4* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

// Left to itself the compiler at times splits a 16-byte store in four.
__device__ __forceinline__ void store_vector(uint4* address, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

struct BFloat16 {
  static constexpr bool kIsBFloat16 = true;
  static __device__ __forceinline__ float to_float(uint16_t bits) { return __bfloat162float(__ushort_as_bfloat16(bits)); }
  static __device__ __forceinline__ uint16_t from_float(float v) { return __bfloat16_as_ushort(__float2bfloat16_rn(v)); }
};

struct Float16 {
  static constexpr bool kIsBFloat16 = false;
  static __device__ __forceinline__ float to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
  static __device__ __forceinline__ uint16_t from_float(float v) { return __half_as_ushort(__float2half_rn(v)); }
};

// sums [16 x 8] += A [16 x 32, 2:4] B [32 x 8], one warp. Metadata comes from lanes 2 selector and 2 selector + 1 of each
// four. "ordered_metadata" promises first < second, which our nibbles keep.
template <typename Type, int selector>
__device__ __forceinline__ void mma_sparse(float (&sums)[4], const uint32_t (&a)[4], const uint4& b, uint32_t metadata) {
#define WANDAPP_MMA_SPARSE(type)                                                                        \
  asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." type "." type ".f32 "      \
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"    \
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                             \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y), "r"(b.z), "r"(b.w),    \
                 "r"(metadata), "n"(selector))
  if constexpr (Type::kIsBFloat16)
    WANDAPP_MMA_SPARSE("bf16");
  else
    WANDAPP_MMA_SPARSE("f16");
#undef WANDAPP_MMA_SPARSE
}

}  // namespace wandapp
