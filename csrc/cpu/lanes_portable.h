// Sixteen lanes as plain arrays. This file also says what every set of lanes offers.
#pragma once

namespace wandapp {
namespace {

struct Portable {
  struct Floats {
    float at[16];
  };
  struct Bits {
    int32_t at[16];
  };

  template <class T>
  static Floats load(const T* from) {
    Floats out;
    for (int i = 0; i < 16; i++) out.at[i] = widen(from[i]);
    return out;
  }
  static Floats fill(float value) {
    Floats out;
    for (float& lane : out.at) lane = value;
    return out;
  }
  // Rounded to nearest, ties to even. The lanes are no NaN.
  template <class T>
  static void store(T* to, Floats a) {
    for (int i = 0; i < 16; i++) narrow(a.at[i], to[i]);
  }
  static Floats add(Floats a, Floats b) {
    for (int i = 0; i < 16; i++) a.at[i] += b.at[i];
    return a;
  }
  static Floats mul(Floats a, Floats b) {
    for (int i = 0; i < 16; i++) a.at[i] *= b.at[i];
    return a;
  }

  static Floats sub(Floats a, Floats b) {
    for (int i = 0; i < 16; i++) a.at[i] -= b.at[i];
    return a;
  }
  static Floats div(Floats a, Floats b) {
    for (int i = 0; i < 16; i++) a.at[i] /= b.at[i];
    return a;
  }
  static Floats max(Floats a, Floats b) {
    for (int i = 0; i < 16; i++) a.at[i] = a.at[i] > b.at[i] ? a.at[i] : b.at[i];
    return a;
  }
  static Floats sqrt(Floats a) {
    for (int i = 0; i < 16; i++) a.at[i] = std::sqrt(a.at[i]);
    return a;
  }
  // sum + a * b; rounded once where the instruction set has that.
  static Floats add_product(Floats sum, Floats a, Floats b) { return add(sum, mul(a, b)); }
  static float total(Floats a) {
    for (int half = 8; half > 0; half /= 2) {
      for (int i = 0; i < half; i++) a.at[i] += a.at[i + half];
    }
    return a.at[0];
  }
  // Lanes whose bit is clear become 0.
  static Floats only(Floats a, uint32_t keep) {
    for (int i = 0; i < 16; i++) a.at[i] = keep >> i & 1 ? a.at[i] : 0;
    return a;
  }

  // A tile's rows in vectors of 16, and the tokens whose sums with these fit the registers.
  static constexpr int kTileVectors = 1, kTileTokens = 4;
  // Vectors of tokens whose sums with one row fit the registers.
  static constexpr int kSkipVectors = 4;
  // Whether there are expand_pairs and add_pairs: a lane of the former is two bf16 columns, the latter adds both products.
  static constexpr bool kMultipliesPairs = false;
  // Lane j of vector i becomes lane i of vector j.
  static void transpose(Floats* vectors) {
    for (int i = 0; i < 16; i++) {
      for (int j = 0; j < i; j++) std::swap(vectors[i].at[j], vectors[j].at[i]);
    }
  }
  // Lane order in which `expand` hands out 32 columns: place i of 32 holds column order(i).
  template <class T>
  static constexpr int column_of_place(int place) {
    return place;
  }
  // 32 columns of a packed row: the next values at the places of the mask's bits, 0 elsewhere. Up to 32 values are read.
  template <class T>
  static void expand(const T* values, uint32_t mask, Floats& low, Floats& high) {
    for (int i = 0; i < 16; i++) low.at[i] = mask >> i & 1 ? widen(*values++) : 0;
    for (int i = 0; i < 16; i++) high.at[i] = mask >> (16 + i) & 1 ? widen(*values++) : 0;
  }

  // Lane i of `pick` is one of the four lanes of its 128 bits, which bits 2i and 2i + 1 of `bits` name: of `low` where i
  // is 0 or 1 within the four, of `high` where it is 2 or 3.
  using Places = uint32_t;
  static Places places(uint32_t bits) { return bits; }
  static Floats pick(const Floats& low, const Floats& high, Places places) {
    Floats out;
    for (int i = 0; i < 16; i++) out.at[i] = (i & 2 ? high : low).at[i / 4 * 4 + (places >> 2 * i & 3)];
    return out;
  }

  // The next values go to the places of the mask's 16 bits, zeros to the others. Wider lanes may read 16 values.
  template <class T>
  static void spread16(const T* values, uint32_t mask, T* to) {
    std::fill_n(to, 16, T{});
    for (; mask; mask &= mask - 1) to[__builtin_ctz(mask)] = *values++;
  }

  // The bits of |a|.
  static Bits magnitude(Floats a) {
    Bits out;
    std::memcpy(out.at, a.at, sizeof out.at);
    for (int32_t& lane : out.at) lane &= 0x7fffffff;
    return out;
  }
  static Bits load_bits(const int32_t* from) {
    Bits out;
    std::memcpy(out.at, from, sizeof out.at);
    return out;
  }
  static Bits fill_bits(int32_t value) {
    Bits out;
    for (int32_t& lane : out.at) lane = value;
    return out;
  }
  // rank + 1 where `other`, at a lower column or not, goes before `own`.
  static Bits count_before(Bits rank, Bits other, bool lower, Bits own) {
    for (int i = 0; i < 16; i++) rank.at[i] += other.at[i] + lower > own.at[i];
    return rank;
  }
  static void store_bits(int32_t* to, Bits a) { std::memcpy(to, a.at, sizeof a.at); }

  // Bit i of the results: a_i > limit, a_i == limit.
  static uint32_t above(Bits a, int32_t limit) {
    uint32_t mask = 0;
    for (int i = 0; i < 16; i++) mask |= uint32_t(a.at[i] > limit) << i;
    return mask;
  }
  static uint32_t equal(Bits a, int32_t limit) {
    uint32_t mask = 0;
    for (int i = 0; i < 16; i++) mask |= uint32_t(a.at[i] == limit) << i;
    return mask;
  }

  // Bit i: lane i is among the n that go first of its m lanes; m is 2, 4, 8 or 16.
  template <int m>
  static uint32_t keep_of_groups(Bits a, int n) {
    uint32_t mask = 0;
    for (int first = 0; first < 16; first += m) mask |= keep_of_group(a.at + first, n, m) << first;
    return mask;
  }

  // Bit i: the weight is neither +0.0 nor -0.0.
  static uint32_t nonzero(const float* weight) {
    uint32_t mask = 0;
    for (int i = 0; i < 16; i++) mask |= uint32_t(weight[i] != 0) << i;
    return mask;
  }
  template <class Half16>
  static uint32_t nonzero(const Half16* weight) {
    uint32_t mask = 0;
    for (int i = 0; i < 16; i++) mask |= uint32_t((weight[i].bits & 0x7fff) != 0) << i;
    return mask;
  }
  // Weights whose bit is clear become +0.0, and so does -0.0.
  template <class T>
  static void zero_removed(T* weight, uint32_t keep) {
    keep &= nonzero(weight);
    for (int i = 0; i < 16; i++) weight[i] = keep >> i & 1 ? weight[i] : T{};
  }
  // The weights whose bit is set go to `to`, one after another, -0.0 as +0.0; returns where the next one would go. It may read
  // all 16 weights, and write anything between those values and `end`, where the values of the row or tile end.
  template <class T>
  static T* append(T* to, const T*, const T* weight, uint32_t mask) {
    for (; mask; mask &= mask - 1) *to++ = stored(weight[__builtin_ctz(mask)]);
    return to;
  }
  // One byte, 0 or 1, per lane.
  static void store_bools(uint8_t* to, uint32_t keep) {
    for (int i = 0; i < 16; i++) to[i] = keep >> i & 1;
  }
};

}  // namespace
}  // namespace wandapp
