#pragma once
#include <atomic>
#include <cstdint>

namespace wandapp {

// The lowest flat index that any task reports.
class FirstOffender {
 public:
  void report(int64_t index) {
    int64_t seen = first_;
    while (index < seen && !first_.compare_exchange_weak(seen, index)) {
    }
  }
  int64_t index() const { return first_ == kNone ? -1 : first_.load(); }

 private:
  static constexpr int64_t kNone = INT64_MAX;
  std::atomic<int64_t> first_{kNone};
};

}  // namespace wandapp
