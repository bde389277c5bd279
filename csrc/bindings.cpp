// The module wandapp._C: addresses, sizes, strides in elements, dtype codes and a thread count in; nothing allocated
// for the caller. Every function releases the GIL. A null address means "absent".
#include <pybind11/pybind11.h>

#include "cpu/assign.h"
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

int64_t select_nm(const ScoreTerms& terms, Address mask, bool in_place, Address values, int n, int m, int threads,
                  const std::string& isa) {
  return kernels_of(isa).select_nm(terms, {at<uint8_t>(mask), in_place, at<void>(values), terms.cols / m * n}, n, m,
                                   threads);
}

int64_t select_rows(const ScoreTerms& terms, Address mask, bool in_place, int64_t keep, int threads,
                    const std::string& isa) {
  return kernels_of(isa).select_rows(terms, {at<uint8_t>(mask), in_place, nullptr, 0}, keep, threads);
}

int64_t compensate_block(Address weight, int64_t weight_stride, int64_t rows, int64_t width, Address factor, int n, int m,
                         Address given_mask, Address mask, Address error, int threads, const std::string& isa) {
  return kernels_of(isa).compensate_block({at<float>(weight), weight_stride, rows, width, at<float>(factor), n, m,
                                           at<uint8_t>(given_mask), at<uint8_t>(mask), at<float>(error)},
                                          threads);
}

PackArgs make_pack_args(Address weight, int64_t weight_stride, int dtype, int64_t rows, int64_t cols, Address values,
                        Address bitmask) {
  return {at<void>(weight), weight_stride, Dtype(dtype), rows, cols, at<void>(values), at<uint8_t>(bitmask)};
}

int64_t pack_nm(const PackArgs& args, int n, int m, int threads, const std::string& isa) {
  return kernels_of(isa).pack_nm(args, n, m, threads);
}

void count_nonzeros(const PackArgs& args, Address counts, int threads, const std::string& isa) {
  kernels_of(isa).count_nonzeros(args, at<int64_t>(counts), threads);
}

void pack_nonzeros(const PackArgs& args, Address row_offsets, int threads, const std::string& isa) {
  kernels_of(isa).pack_nonzeros(args, at<int64_t>(row_offsets), threads);
}

PackedWeight make_packed_weight(Address values, Address bitmask, Address row_offsets, Address scale, int64_t value_count,
                                int64_t n, int64_t m, int dtype, int64_t rows, int64_t cols) {
  return {at<void>(values), at<uint8_t>(bitmask), at<int64_t>(row_offsets), at<float>(scale), value_count, n, m,
          Dtype(dtype),     rows,                 cols};
}

void unpack(const PackedWeight& packed, int dtype, int64_t first_row, int64_t end_row, Address out, int threads,
            const std::string& isa) {
  kernels_of(isa).unpack(packed, Dtype(dtype), first_row, end_row, at<void>(out), threads);
}

void sparse_linear(const PackedWeight& packed, int dtype, Address x, int64_t tokens, Address bias, Address y,
                   int threads, const std::string& isa) {
  kernels_of(isa).sparse_linear(packed, {Dtype(dtype), at<void>(x), tokens, at<void>(bias), at<void>(y)}, threads);
}

void dense_linear(Address weight, int dtype, int64_t rows, int64_t cols, Address x, Address bias, Address y, int threads,
                  const std::string& isa) {
  const LinearArgs args{Dtype(dtype), at<void>(x), 1, at<void>(bias), at<void>(y)};
  kernels_of(isa).dense_linear(at<void>(weight), rows, cols, args, threads);
}

void rmsprop(Address weight, Address gradient, int dtype, Address mean_square, int64_t count, float lr, float decay,
             float epsilon, int threads, const std::string& isa) {
  kernels_of(isa).rmsprop(at<float>(weight), at<void>(gradient), Dtype(dtype), at<float>(mean_square), count,
                          {lr, decay, epsilon}, threads);
}

void pairwise_max_sum(Address left, int64_t left_rows, Address right, int64_t right_rows, int64_t cols, Address out,
                      int threads, const std::string& isa) {
  kernels_of(isa).pairwise_max_sum(at<float>(left), left_rows, at<float>(right), right_rows, cols, at<float>(out),
                                   threads);
}

void assign_rows(Address gain, int64_t size, Address taken) { assign(at<float>(gain), size, at<int64_t>(taken)); }

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "wandapp's compiled kernels";

  module.def("best_isa", &best_isa);
  module.def("isa_runs_here", &isa_runs_here, py::arg("isa"));

  py::class_<ScoreTerms>(module, "ScoreTerms", "|weight| * (alpha * gradient + scale); absent terms have address 0")
      .def(py::init(&make_score_terms), py::arg("weight"), py::arg("weight_stride"), py::arg("dtype"),
           py::arg("scale"), py::arg("gradient"), py::arg("gradient_stride"), py::arg("alpha"), py::arg("rows"),
           py::arg("cols"));

  py::class_<PackArgs>(module, "PackArgs")
      .def(py::init(&make_pack_args), py::arg("weight"), py::arg("weight_stride"), py::arg("dtype"), py::arg("rows"),
           py::arg("cols"), py::arg("values"), py::arg("bitmask"));
  py::class_<PackedWeight>(module, "PackedWeight", "m 0: unstructured, with row_offsets")
      .def(py::init(&make_packed_weight), py::arg("values"), py::arg("bitmask"), py::arg("row_offsets"),
           py::arg("scale"), py::arg("value_count"), py::arg("n"), py::arg("m"), py::arg("dtype"), py::arg("rows"),
           py::arg("cols"));

  using ReleaseGil = py::call_guard<py::gil_scoped_release>;
  module.def("column_sumsq", &column_sumsq, ReleaseGil());
  module.def("select_nm", &select_nm, ReleaseGil());
  module.def("select_rows", &select_rows, ReleaseGil());
  module.def("compensate_block", &compensate_block, ReleaseGil());
  module.def("pack_nm", &pack_nm, ReleaseGil());
  module.def("count_nonzeros", &count_nonzeros, ReleaseGil());
  module.def("pack_nonzeros", &pack_nonzeros, ReleaseGil());
  module.def("unpack", &unpack, ReleaseGil());
  module.def("sparse_linear", &sparse_linear, ReleaseGil());
  module.def("rmsprop", &rmsprop, ReleaseGil());
  module.def("pairwise_max_sum", &pairwise_max_sum, ReleaseGil());
  module.def("assign", &assign_rows, ReleaseGil());
  module.def("dense_linear", &dense_linear, ReleaseGil(), "One token on a dense weight, for benchmarks");
}
