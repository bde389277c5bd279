// The packed form: values in row order and one bit per column.
#pragma once

namespace wandapp {
namespace {

// Bits [c, c + 32) of a row's bitmask; beyond the row 0.
inline uint32_t mask_at(const uint8_t* row_mask, int64_t c, int64_t cols) {
  uint32_t mask = 0;
  std::memcpy(&mask, row_mask + c / 8, std::min<int64_t>(4, (cols - c + 7) / 8));
  return mask;
}

template <class Lanes, class T>
uint32_t nonzero_at(const T* weight, int64_t c, int64_t cols) {
  if (cols - c >= 16) return Lanes::nonzero(weight + c);
  T padded[16] = {};
  std::copy_n(weight + c, cols - c, padded);
  return Lanes::nonzero(padded);
}

// Appends the row's weights at columns c + (the mask's bits) to its values, which end at `end`.
template <class Lanes, class T>
T* append_at(T* values, const T* end, const T* weight, int64_t c, int64_t cols, uint32_t mask) {
  if (cols - c >= 16) return Lanes::append(values, end, weight + c, mask);
  T padded[16] = {};
  std::copy_n(weight + c, cols - c, padded);
  return Lanes::append(values, end, padded, mask);
}

// One row, m a divisor of 16. Returns the first column of the first group with more than n non-zeros, or -1.
template <class Lanes, int m, class T>
int64_t pack_row_nm(const T* weight, int64_t cols, int n, T* values, uint8_t* row_mask) {
  const uint32_t full = in_every_group<m>(n);
  const T* end = values + cols / m * n;
  for (int64_t c = 0; c < cols; c += 16) {
    const uint32_t nonzero = nonzero_at<Lanes>(weight, c, cols);
    const int lanes = int(std::min<int64_t>(16, cols - c));
    uint32_t mask = nonzero;
    if (count_in_groups<m>(nonzero) != full) {  // some group is not full, or too full, or missing: one by one
      for (int first = 0; first < lanes; first += m) {
        const uint32_t group = nonzero >> first & ((1u << m) - 1);
        if (count_bits(group) > n) return c + first;
        mask |= stored_of_group(group, n, m) << first;
      }
    }
    values = append_at<Lanes>(values, end, weight, c, cols, mask);
    std::memcpy(row_mask + c / 8, &mask, (lanes + 7) / 8);
  }
  return -1;
}

// One row, any m.
template <class T>
int64_t pack_row_any(const T* weight, int64_t cols, int n, int m, T* values, uint8_t* row_mask) {
  std::memset(row_mask, 0, (cols + 7) / 8);
  for (int64_t first = 0; first < cols; first += m) {
    int64_t zeros_wanted = n;
    for (int i = 0; i < m; i++) zeros_wanted -= widen(weight[first + i]) != 0;
    if (zeros_wanted < 0) return first;
    for (int64_t c = first; c < first + m; c++) {
      const bool zero = widen(weight[c]) == 0;
      if (zero && zeros_wanted-- <= 0) continue;
      *values++ = stored(weight[c]);
      row_mask[c / 8] |= uint8_t(1 << c % 8);
    }
  }
  return -1;
}

constexpr int64_t kPackRows = 16;  // rows of one task

template <class Lanes, class T>
int64_t pack_nm_of(const PackArgs& args, int n, int m, int threads) {
  FirstOffender first;
  const int64_t values_per_row = args.cols / m * n;
  parallel((args.rows + kPackRows - 1) / kPackRows, threads, [&](int64_t task) {
    for (int64_t row = task * kPackRows; row < std::min((task + 1) * kPackRows, args.rows); row++) {
      const T* weight = static_cast<const T*>(args.weight) + row * args.weight_stride;
      T* values = static_cast<T*>(args.values) + row * values_per_row;
      uint8_t* row_mask = args.bitmask + row * ((args.cols + 7) / 8);
      const int64_t offender = m == 1    ? pack_row_nm<Lanes, 1>(weight, args.cols, n, values, row_mask)
                               : m == 2  ? pack_row_nm<Lanes, 2>(weight, args.cols, n, values, row_mask)
                               : m == 4  ? pack_row_nm<Lanes, 4>(weight, args.cols, n, values, row_mask)
                               : m == 8  ? pack_row_nm<Lanes, 8>(weight, args.cols, n, values, row_mask)
                               : m == 16 ? pack_row_nm<Lanes, 16>(weight, args.cols, n, values, row_mask)
                                         : pack_row_any(weight, args.cols, n, m, values, row_mask);
      if (offender >= 0) return first.report(row * args.cols + offender);
    }
  });
  return first.index();
}

// counts[row] = non-zeros of the row.
template <class Lanes, class T>
void count_nonzeros_of(const PackArgs& args, int64_t* counts, int threads) {
  parallel((args.rows + kPackRows - 1) / kPackRows, threads, [&](int64_t task) {
    for (int64_t row = task * kPackRows; row < std::min((task + 1) * kPackRows, args.rows); row++) {
      const T* weight = static_cast<const T*>(args.weight) + row * args.weight_stride;
      int64_t count = 0;
      for (int64_t c = 0; c < args.cols; c += 16) count += count_bits(nonzero_at<Lanes>(weight, c, args.cols));
      counts[row] = count;
    }
  });
}

template <class Lanes, class T>
void pack_nonzeros_of(const PackArgs& args, const int64_t* row_offsets, int threads) {
  parallel((args.rows + kPackRows - 1) / kPackRows, threads, [&](int64_t task) {
    for (int64_t row = task * kPackRows; row < std::min((task + 1) * kPackRows, args.rows); row++) {
      const T* weight = static_cast<const T*>(args.weight) + row * args.weight_stride;
      T* values = static_cast<T*>(args.values) + row_offsets[row];
      const T* end = static_cast<T*>(args.values) + row_offsets[row + 1];
      uint8_t* row_mask = args.bitmask + row * ((args.cols + 7) / 8);
      for (int64_t c = 0; c < args.cols; c += 16) {
        const uint32_t mask = nonzero_at<Lanes>(weight, c, args.cols);
        values = append_at<Lanes>(values, end, weight, c, args.cols, mask);
        std::memcpy(row_mask + c / 8, &mask, std::min<int64_t>(2, (args.cols - c + 7) / 8));
      }
    }
  });
}

// Whether column c takes the next value: a damaged bitmask may have bits beyond the values' end.
template <class T>
bool takes_value(const uint8_t* row_mask, int64_t c, const T* values, const T* end_of_values) {
  return row_mask[c / 8] >> c % 8 & 1 && values < end_of_values;
}

// One row, dense. Sixteen columns at a time while so many values follow that a full load stays inside them.
template <class Lanes, class T>
void unpack_row(const T* values, const T* end_of_values, const uint8_t* row_mask, int64_t cols, T* row) {
  int64_t c = 0;
  for (; c + 16 <= cols && end_of_values - values >= 16; c += 16) {
    uint16_t mask;
    std::memcpy(&mask, row_mask + c / 8, 2);
    Lanes::spread16(values, mask, row + c);
    values += count_bits(mask);
  }
  for (; c < cols; c++) row[c] = takes_value(row_mask, c, values, end_of_values) ? *values++ : T{};
}

// The same of int8 values: weight = scale * value, rounded to T.
template <class Lanes, class T>
void dequantise_row(const int8_t* values, const int8_t* end_of_values, const uint8_t* row_mask, int64_t cols, float scale,
                    T* row) {
  int64_t c = 0;
  for (; c + 32 <= cols && end_of_values - values >= 32; c += 32) {
    const uint32_t mask = mask_at(row_mask, c, cols);
    typename Lanes::Floats low, high;
    Lanes::expand(values, mask, low, high);
    Lanes::store(row + c, Lanes::mul(low, Lanes::fill(scale)));
    Lanes::store(row + c + 16, Lanes::mul(high, Lanes::fill(scale)));
    values += count_bits(mask);
  }
  for (; c < cols; c++) narrow(takes_value(row_mask, c, values, end_of_values) ? scale * widen(*values++) : 0, row[c]);
}

// Rows [first_row, end_row) of a packed weight of V values to `out` [end_row - first_row, cols].
template <class Lanes, class V, class T>
void unpack_of(const PackedWeight& packed, int64_t first_row, int64_t end_row, T* out, int threads) {
  const int64_t rows = end_row - first_row;
  const V* all_values = static_cast<const V*>(packed.values);
  const V* end_of_values = all_values + packed.value_count;
  parallel((rows + kPackRows - 1) / kPackRows, threads, [&](int64_t task) {
    for (int64_t i = task * kPackRows; i < std::min((task + 1) * kPackRows, rows); i++) {
      const int64_t row = first_row + i;
      const uint8_t* row_mask = packed.bitmask + row * ((packed.cols + 7) / 8);
      const V* values = all_values + packed.row_begin(row);
      if constexpr (std::is_same<V, int8_t>::value) {
        dequantise_row<Lanes>(values, end_of_values, row_mask, packed.cols, packed.scale[row], out + i * packed.cols);
      } else {
        unpack_row<Lanes>(values, end_of_values, row_mask, packed.cols, out + i * packed.cols);
      }
    }
  });
}

template <class Lanes>
int64_t pack_nm(const PackArgs& args, int n, int m, int threads) {
  switch (args.dtype) {
    case kBfloat16: return pack_nm_of<Lanes, Bf16>(args, n, m, threads);
    case kFloat16: return pack_nm_of<Lanes, Half>(args, n, m, threads);
    default: return pack_nm_of<Lanes, float>(args, n, m, threads);
  }
}

template <class Lanes>
void count_nonzeros(const PackArgs& args, int64_t* counts, int threads) {
  switch (args.dtype) {
    case kBfloat16: return count_nonzeros_of<Lanes, Bf16>(args, counts, threads);
    case kFloat16: return count_nonzeros_of<Lanes, Half>(args, counts, threads);
    default: return count_nonzeros_of<Lanes, float>(args, counts, threads);
  }
}

template <class Lanes>
void pack_nonzeros(const PackArgs& args, const int64_t* row_offsets, int threads) {
  switch (args.dtype) {
    case kBfloat16: return pack_nonzeros_of<Lanes, Bf16>(args, row_offsets, threads);
    case kFloat16: return pack_nonzeros_of<Lanes, Half>(args, row_offsets, threads);
    default: return pack_nonzeros_of<Lanes, float>(args, row_offsets, threads);
  }
}

template <class Lanes>
void unpack(const PackedWeight& packed, Dtype dtype, int64_t first, int64_t end, void* out, int threads) {
  if (packed.dtype == kInt8) {
    switch (dtype) {
      case kBfloat16: return unpack_of<Lanes, int8_t>(packed, first, end, static_cast<Bf16*>(out), threads);
      case kFloat16: return unpack_of<Lanes, int8_t>(packed, first, end, static_cast<Half*>(out), threads);
      default: return unpack_of<Lanes, int8_t>(packed, first, end, static_cast<float*>(out), threads);
    }
  }
  if (packed.dtype == kFloat32) return unpack_of<Lanes, float>(packed, first, end, static_cast<float*>(out), threads);
  return unpack_of<Lanes, Half>(packed, first, end, static_cast<Half*>(out), threads);  // 16 bits are 16 bits
}

}  // namespace
}  // namespace wandapp
