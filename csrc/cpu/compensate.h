// SparseGPT's column loop over one block. Rows are independent, so sixteen of them fill the lanes and walk through the
// columns together: no shuffles, one division for sixteen rows, and a group's scores are compared lane by lane.
//
// The textbook loop pushes each column's error to all columns on its right. Here a column pulls the errors of all
// columns on its left when its turn comes, four columns at a time in registers: the same operations in the same order
// per weight, so the same bits, with a quarter of the loads and no stores in between.
#pragma once

namespace wandapp {
namespace {

// Columns of sixteen rows: lane r of column c stands at [16 * c + r].
template <class Lanes>
struct RowTile {
  int64_t width;
  std::vector<float> weight, error;
  std::vector<uint32_t> keep;  // bit r: row r keeps column c

  explicit RowTile(int64_t width) : width(width), weight(16 * width), error(16 * width), keep(width) {}
  typename Lanes::Floats weight_at(int64_t c) const { return Lanes::load(&weight[16 * c]); }
};

// Columns [first, first + columns) pull the errors of columns [0, done). Row j of `transposed` holds U_0j, U_1j, ...
template <class Lanes, int columns>
void pull_errors(RowTile<Lanes>& tile, const float* transposed, int64_t first, int64_t done) {
  typename Lanes::Floats weight[columns];
  for (int i = 0; i < columns; i++) weight[i] = tile.weight_at(first + i);
  for (int64_t c = 0; c < done; c++) {
    const typename Lanes::Floats error = Lanes::load(&tile.error[16 * c]);
    for (int i = 0; i < columns; i++) {
      const typename Lanes::Floats factor = Lanes::fill(transposed[(first + i) * tile.width + c]);
      weight[i] = Lanes::sub(weight[i], Lanes::mul(error, factor));
    }
  }
  for (int i = 0; i < columns; i++) Lanes::store(&tile.weight[16 * (first + i)], weight[i]);
}

// The n of columns [begin, begin + m) with the largest w^2 / U_jj^2, for each of the sixteen rows.
template <class Lanes>
void choose_group(RowTile<Lanes>& tile, const float* transposed, int64_t begin, int n, int m, int32_t* scores) {
  for (int i = 0; i < m; i++) {
    const float diagonal = transposed[(begin + i) * (tile.width + 1)];
    const typename Lanes::Floats weight = tile.weight_at(begin + i);
    const auto score = Lanes::div(Lanes::mul(weight, weight), Lanes::fill(diagonal * diagonal));
    Lanes::store_bits(scores + 16 * i, Lanes::magnitude(score));
  }
  for (int i = 0; i < m; i++) {
    typename Lanes::Bits rank = Lanes::fill_bits(0);
    const typename Lanes::Bits own = Lanes::load_bits(scores + 16 * i);
    for (int j = 0; j < m; j++) {
      if (j != i) rank = Lanes::count_before(rank, Lanes::load_bits(scores + 16 * j), j < i, own);
    }
    tile.keep[begin + i] = ~Lanes::above(rank, n - 1) & 0xffff;
  }
}

// Prunes columns [begin, end) one after another; each pushes its error to those behind it.
template <class Lanes>
void prune_columns(RowTile<Lanes>& tile, const float* factor, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; c++) {
    const typename Lanes::Floats weight = tile.weight_at(c), kept = Lanes::only(weight, tile.keep[c]);
    const float* row = factor + c * tile.width;
    const typename Lanes::Floats error = Lanes::div(Lanes::sub(weight, kept), Lanes::fill(row[c]));
    Lanes::store(&tile.error[16 * c], error);
    Lanes::store(&tile.weight[16 * c], kept);
    for (int64_t j = c + 1; j < end; j++) {
      Lanes::store(&tile.weight[16 * j], Lanes::sub(tile.weight_at(j), Lanes::mul(error, Lanes::fill(row[j]))));
    }
  }
}

template <class Lanes>
void compensate_tile(RowTile<Lanes>& tile, const float* factor, const float* transposed, int n, int m, int32_t* scores) {
  const int64_t step = n > 0 ? m : 8;  // a choice needs its whole group up to date
  for (int64_t begin = 0; begin < tile.width; begin += step) {
    const int64_t end = std::min(begin + step, tile.width);
    int64_t c = begin;
    for (; c + 4 <= end; c += 4) pull_errors<Lanes, 4>(tile, transposed, c, begin);
    for (; c < end; c++) pull_errors<Lanes, 1>(tile, transposed, c, begin);
    if (n > 0) choose_group<Lanes>(tile, transposed, begin, n, m, scores);
    prune_columns<Lanes>(tile, factor, begin, end);
  }
}

// Copies `rows` rows into the tile's lanes; missing rows are zero.
template <class Lanes>
void load_rows(RowTile<Lanes>& tile, const CompensateArgs& args, int64_t first_row, int rows) {
  std::fill(tile.weight.begin(), tile.weight.end(), 0.f);
  for (int r = 0; r < rows; r++) {
    const float* weight = args.weight + (first_row + r) * args.weight_stride;
    for (int64_t c = 0; c < tile.width; c++) tile.weight[16 * c + r] = weight[c];
  }
  if (args.n > 0) return;
  std::fill(tile.keep.begin(), tile.keep.end(), 0);
  for (int r = 0; r < rows; r++) {
    const uint8_t* mask = args.given_mask + (first_row + r) * tile.width;
    for (int64_t c = 0; c < tile.width; c++) tile.keep[c] |= uint32_t(mask[c] != 0) << r;
  }
}

// Writes the tile back; returns the flat index of the first error that is NaN or Inf, or -1.
template <class Lanes>
int64_t store_rows(const RowTile<Lanes>& tile, const CompensateArgs& args, int64_t first_row, int rows) {
  int64_t offender = -1;
  for (int r = 0; r < rows; r++) {
    float* weight = args.weight + (first_row + r) * args.weight_stride;
    float* error = args.error + (first_row + r) * tile.width;
    uint8_t* mask = args.mask + (first_row + r) * tile.width;
    bool finite = true;
    for (int64_t c = 0; c < tile.width; c++) {
      weight[c] = tile.weight[16 * c + r];
      error[c] = tile.error[16 * c + r];
      mask[c] = tile.keep[c] >> r & 1;
      finite &= error[c] - error[c] == 0;
    }
    if (finite || offender >= 0) continue;
    const float* first = std::find_if(error, error + tile.width, [](float e) { return !(e - e == 0); });
    offender = (first_row + r) * tile.width + (first - error);
  }
  return offender;
}

template <class Lanes>
int64_t compensate_block(const CompensateArgs& args, int threads) {
  const int64_t width = args.width;
  std::vector<float> transposed(width * width);
  for (int64_t c = 0; c < width; c++) {
    for (int64_t j = 0; j < width; j++) transposed[j * width + c] = args.factor[c * width + j];
  }
  FirstOffender first;
  parallel((args.rows + 15) / 16, threads, [&](int64_t task) {
    RowTile<Lanes> tile(width);
    std::vector<int32_t> scores(16 * args.m);
    const int rows = int(std::min<int64_t>(16, args.rows - 16 * task));
    load_rows(tile, args, 16 * task, rows);
    compensate_tile(tile, args.factor, transposed.data(), args.n, args.m, scores.data());
    const int64_t offender = store_rows(tile, args, 16 * task, rows);
    if (offender >= 0) first.report(offender);
  });
  return first.index();
}

}  // namespace
}  // namespace wandapp
