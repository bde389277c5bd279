// Included once per instruction set, after its lanes: the kernels, written once over `Lanes`. They are templates over a
// type of an unnamed namespace, so every object file has its own.
#pragma once
#include "cpu/column_sumsq.h"
#include "cpu/select.h"

namespace wandapp {
namespace {

template <class Lanes>
constexpr Kernels table_of() {
  return {column_sumsq<Lanes>, select_nm<Lanes>, select_rows<Lanes>};
}

}  // namespace
}  // namespace wandapp
