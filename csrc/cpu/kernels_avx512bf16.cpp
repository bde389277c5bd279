// The packed product with vdpbf16ps; everything else is as in kernels_avx512vbmi2.cpp.
#include "cpu/includes.h"
#ifdef __x86_64__
#define WANDAPP_VBMI2
#define WANDAPP_BF16
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx512bf16,avx2,fma,f16c,popcnt,bmi,bmi2")
#pragma GCC target("prefer-vector-width=512")
#include "cpu/lanes_avx512.h"
//
#include "cpu/pack.h"
//
#include "cpu/sparse_linear.h"
#pragma GCC pop_options

namespace wandapp {
void (*const sparse_linear_bf16)(const PackedWeight&, const LinearArgs&, int threads) = sparse_linear<Avx512Bf16>;
}
#endif
