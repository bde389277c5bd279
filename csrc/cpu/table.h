// Included once per instruction set, after its lanes: the kernels, written once over `Lanes`. They are templates over a
// type of an unnamed namespace, so every object file has its own.
#pragma once
#include "cpu/column_sumsq.h"
//
#include "cpu/select.h"
//
#include "cpu/compensate.h"
#include "cpu/max_sum.h"
#include "cpu/pack.h"
#include "cpu/rmsprop.h"
//
#include "cpu/sparse_linear.h"

namespace wandapp {
namespace {

template <class Lanes>
constexpr Kernels table_of() {
  return {column_sumsq<Lanes>,   select_nm<Lanes>,     select_rows<Lanes>, compensate_block<Lanes>,
          pack_nm<Lanes>,        count_nonzeros<Lanes>, pack_nonzeros<Lanes>, unpack<Lanes>,
          sparse_linear<Lanes>,  dense_linear<Lanes>,  rmsprop<Lanes>,
          pairwise_max_sum<Lanes>};
}

}  // namespace
}  // namespace wandapp
