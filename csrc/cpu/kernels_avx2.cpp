// The kernels in AVX2. Everything below the pragma may use it; what is shared with other files stands above.
#include "cpu/includes.h"
#ifdef __x86_64__
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,popcnt,bmi,bmi2")
#include "cpu/lanes_portable.h"
//
#include "cpu/lanes_avx2.h"
//
#include "cpu/table.h"
#pragma GCC pop_options

namespace wandapp {
const Kernels avx2_kernels = table_of<Avx2>();
}
#endif
