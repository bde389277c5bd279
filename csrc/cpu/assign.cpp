// Shortest augmenting paths (Jonker and Volgenant, Computing 38, 1987): prices keep every slack
// row_price[i] + column_price[j] - gain[i][j] at or above zero, and a row takes only columns without slack. Rows that found
// none follow, one after another, the cheapest path of columns that their holders can give up.
#include "cpu/assign.h"

#include <algorithm>
#include <limits>
#include <vector>

namespace wandapp {
namespace {

constexpr int64_t kNone = -1;

class Assignment {
 public:
  Assignment(const float* gain, int64_t size, int64_t* taken)
      : gain_(gain), size_(size), taken_(taken), row_price_(size), column_price_(size), distance_(size),
        holder_(size, kNone), before_(size), is_done_(size) {}

  void solve() {
    std::vector<int64_t> left;
    for (int64_t row = 0; row < size_; row++) {
      if (!take_best(row)) left.push_back(row);
    }
    for (int64_t row : left) augment(row);
  }

 private:
  double slack(int64_t row, int64_t column) const {
    return row_price_[row] + column_price_[column] - gain_[row * size_ + column];
  }

  // The row prices itself by its best column and takes it, where it is free. Whether it did.
  bool take_best(int64_t row) {
    const float* own = gain_ + row * size_;
    const int64_t best = std::max_element(own, own + size_) - own;
    row_price_[row] = own[best];
    if (holder_[best] != kNone) return false;
    holder_[best] = row, taken_[row] = best;
    return true;
  }

  // The free column that is nearest to `row` in slack; `order` lists the taken ones that are nearer.
  int64_t nearest_free(int64_t row, std::vector<int64_t>& order) {
    std::fill(distance_.begin(), distance_.end(), std::numeric_limits<double>::infinity());
    std::fill(is_done_.begin(), is_done_.end(), 0);
    for (double so_far = 0;;) {
      int64_t nearest = kNone;
      double least = std::numeric_limits<double>::infinity();
      for (int64_t j = 0; j < size_; j++) {
        if (is_done_[j]) continue;
        const double through = so_far + slack(row, j);
        if (through < distance_[j]) distance_[j] = through, before_[j] = row;
        if (distance_[j] < least) least = distance_[j], nearest = j;
      }
      if (holder_[nearest] == kNone) return nearest;
      is_done_[nearest] = 1;
      order.push_back(nearest);
      so_far = least, row = holder_[nearest];
    }
  }

  void augment(int64_t start) {
    std::vector<int64_t> order;
    int64_t column = nearest_free(start, order);
    const double reached = distance_[column];
    row_price_[start] -= reached;
    for (int64_t j : order) {
      row_price_[holder_[j]] -= reached - distance_[j];
      column_price_[j] += reached - distance_[j];
    }
    for (int64_t row = kNone; row != start;) {  // back along the path, each row gives up its column for the next one
      row = before_[column];
      const int64_t given_up = row == start ? kNone : taken_[row];
      holder_[column] = row, taken_[row] = column;
      column = given_up;
    }
  }

  const float* gain_;
  int64_t size_;
  int64_t* taken_;
  std::vector<double> row_price_, column_price_, distance_;
  std::vector<int64_t> holder_, before_;  // of a column: the row that has it; the row from which the path came to it
  std::vector<char> is_done_;
};

}  // namespace

void assign(const float* gain, int64_t size, int64_t* taken) { Assignment(gain, size, taken).solve(); }

}  // namespace wandapp
