// Headers whose functions are shared between object files. They must be compiled without an instruction set's pragma:
// the linker keeps one copy of an inline function, and it has to run everywhere.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif

// For the body of a loop over chunks, where a call would spill every vector register.
#define ALWAYS_INLINE __attribute__((always_inline)) inline
#define NEVER_INLINE __attribute__((noinline))

#include "cpu/first_offender.h"
#include "cpu/half.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "group.h"
