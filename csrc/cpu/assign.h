// Linear sum assignment: which of `size` channels each of `size` groups takes, so that the sum of gains is the largest.
#pragma once
#include <cstdint>

namespace wandapp {

// gain [size, size] row-major, finite; taken [size]: row i takes column taken[i], every column once.
void assign(const float* gain, int64_t size, int64_t* taken);

}  // namespace wandapp
