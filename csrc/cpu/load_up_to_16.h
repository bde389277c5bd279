// Loads at the end of a row.
#pragma once

namespace wandapp {
namespace {

// Sixteen values, the missing ones 0.
template <class Lanes, class T>
typename Lanes::Floats load_up_to_16(const T* from, int64_t count) {
  if (count >= 16) return Lanes::load(from);
  T padded[16] = {};
  std::copy_n(from, count, padded);
  return Lanes::load(padded);
}

}  // namespace
}  // namespace wandapp
