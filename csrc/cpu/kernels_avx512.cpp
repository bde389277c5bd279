// The kernels in AVX-512. Everything below the pragma may use it; what is shared with other files stands above.
#include "cpu/includes.h"
#ifdef __x86_64__
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt,bmi,bmi2,prefer-vector-width=512")
#include "cpu/lanes_avx512.h"
//
#include "cpu/table.h"
#pragma GCC pop_options

namespace wandapp {
const Kernels avx512_kernels = table_of<Avx512>();
}
#endif
