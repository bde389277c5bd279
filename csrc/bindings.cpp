// The module wandapp._C: addresses, sizes, strides in elements, dtype codes and a thread count in; nothing allocated
// for the caller. Every function releases the GIL. A null address means "absent".
#include <pybind11/pybind11.h>

#include "cpu/kernels.h"

namespace py = pybind11;
using namespace wandapp;
using Address = uintptr_t;

namespace {

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void column_sumsq(Address x, int dtype, int64_t batches, int64_t tokens, int64_t features, int64_t batch_stride,
                  int64_t token_stride, Address out, int threads, const std::string& isa) {
  kernels_of(isa).column_sumsq(at<void>(x), Dtype(dtype), batches, tokens, features, batch_stride, token_stride,
                               at<float>(out), threads);
}

ScoreTerms make_score_terms(Address weight, int64_t weight_stride, int dtype, Address scale, Address gradient,
                            int64_t gradient_stride, float alpha, int64_t rows, int64_t cols) {
  return {at<void>(weight), weight_stride, Dtype(dtype), at<float>(scale), at<float>(gradient),
          gradient_stride,  alpha,         rows,         cols};
}

int64_t select_nm(const ScoreTerms& terms, Address mask, bool in_place, int n, int m, int threads,
                  const std::string& isa) {
  return kernels_of(isa).select_nm(terms, {at<uint8_t>(mask), in_place}, n, m, threads);
}

int64_t select_rows(const ScoreTerms& terms, Address mask, bool in_place, int64_t keep, int threads,
                    const std::string& isa) {
  return kernels_of(isa).select_rows(terms, {at<uint8_t>(mask), in_place}, keep, threads);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "wandapp's compiled kernels";

  module.def("best_isa", &best_isa);
  module.def("isa_runs_here", &isa_runs_here, py::arg("isa"));

  py::class_<ScoreTerms>(module, "ScoreTerms", "|weight| * (alpha * gradient + scale); absent terms have address 0")
      .def(py::init(&make_score_terms), py::arg("weight"), py::arg("weight_stride"), py::arg("dtype"),
           py::arg("scale"), py::arg("gradient"), py::arg("gradient_stride"), py::arg("alpha"), py::arg("rows"),
           py::arg("cols"));

  using ReleaseGil = py::call_guard<py::gil_scoped_release>;
  module.def("column_sumsq", &column_sumsq, ReleaseGil());
  module.def("select_nm", &select_nm, ReleaseGil());
  module.def("select_rows", &select_rows, ReleaseGil());
}
