// The module wandapp._CUDA: what stands in launch.h, as functions that raise. A module of its own, so that wandapp._C
// stays the same binary with and without nvcc.
#include "cuda/launch.h"

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

namespace py = pybind11;

template <typename... Arguments>
static auto checked(const char* name, int (*launch)(Arguments...)) {
  return [name, launch](Arguments... arguments) {
    int error;
    {
      py::gil_scoped_release release;
      error = launch(arguments...);
    }
    if (error) throw std::runtime_error(std::string(name) + ": CUDA refused the launch: " + wandapp::error_text(error));
  };
}

PYBIND11_MODULE(_CUDA, module) {
  module.doc() = "wandapp's CUDA kernels";
  module.def("compress24", checked("compress24", wandapp::compress24));
  module.def("sparse_linear24", checked("sparse_linear24", wandapp::sparse_linear24));
}
