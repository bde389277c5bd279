// The packed product and unpacking with vpexpandw; everything else is as in kernels_avx512.cpp.
#include "cpu/includes.h"
#ifdef __x86_64__
#define WANDAPP_VBMI2
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx2,fma,f16c,popcnt,bmi,bmi2")
#pragma GCC target("prefer-vector-width=512")
#include "cpu/lanes_avx512.h"
//
#include "cpu/pack.h"
//
#include "cpu/sparse_linear.h"
#pragma GCC pop_options

namespace wandapp {
void (*const sparse_linear_vbmi2)(const PackedWeight&, const LinearArgs&, int threads) = sparse_linear<Avx512Vbmi2>;
void (*const unpack_vbmi2)(const PackedWeight&, Dtype, int64_t first_row, int64_t end_row, void* out,
                           int threads) = unpack<Avx512Vbmi2>;
}
#endif
