#include "cpu/kernels.h"

#include <stdexcept>

namespace wandapp {

bool isa_runs_here(const std::string& isa) {
#ifdef __x86_64__
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == "avx2") return avx2;
  if (isa == "avx512vbmi2") return isa_runs_here("avx512") && __builtin_cpu_supports("avx512vbmi2");
  if (isa == "avx512bf16") return isa_runs_here("avx512vbmi2") && __builtin_cpu_supports("avx512bf16");
  if (isa == "avx512") {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return isa == "portable";
}

const char* best_isa() {
  static const char* best = [] {
    for (const char* isa : {"avx512bf16", "avx512vbmi2", "avx512", "avx2"}) {
      if (isa_runs_here(isa)) return isa;
    }
    return "portable";
  }();
  return best;
}

const Kernels& kernels_of(const std::string& requested) {
  const std::string isa = requested == "auto" ? best_isa() : requested;
  if (!isa_runs_here(isa)) {
    throw std::invalid_argument("instruction set '" + isa + "' cannot run on this machine; the widest is " + best_isa());
  }
#ifdef __x86_64__
  static const Kernels with_vbmi2 = [] {
    Kernels kernels = avx512_kernels;
    kernels.sparse_linear = sparse_linear_vbmi2;
    kernels.unpack = unpack_vbmi2;
    return kernels;
  }();
  static const Kernels with_bf16 = [] {
    Kernels kernels = with_vbmi2;
    kernels.sparse_linear = sparse_linear_bf16;
    return kernels;
  }();
  if (isa == "avx512bf16") return with_bf16;
  if (isa == "avx512vbmi2") return with_vbmi2;
  if (isa == "avx512") return avx512_kernels;
  if (isa == "avx2") return avx2_kernels;
#endif
  return portable_kernels;
}

}  // namespace wandapp
