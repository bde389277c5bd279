// The module wandapp._C: addresses, sizes, strides in elements, dtype codes and a thread count in; nothing allocated
// for the caller. Every function releases the GIL.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C, module) {
  module.doc() = "wandapp's compiled kernels";
  module.attr("HAS_CUDA") = false;
}
