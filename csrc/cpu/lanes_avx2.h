// Sixteen lanes in two AVX2 registers; see lanes_portable.h for what each function means.
#pragma once

namespace wandapp {
namespace {

// What AVX2 has no instruction for, by tables over the masks of eight lanes.
struct PlacesOfMask {
  int8_t value_of_lane[256][8] = {};  // expanding: which of the next values a lane takes, -1 for none
  int8_t lane_of_value[256][8] = {};  // compressing: which lane the next values come from; behind the last one any
  constexpr PlacesOfMask() {
    for (int mask = 0; mask < 256; mask++) {
      for (int lane = 0, next = 0; lane < 8; lane++) {
        const bool set = mask >> lane & 1;
        value_of_lane[mask][lane] = int8_t(set ? next : -1);
        if (set) lane_of_value[mask][next++] = int8_t(lane);
      }
    }
  }
};
constexpr PlacesOfMask kPlaces;

struct Avx2 {
  struct Floats {
    __m256 low, high;
  };
  struct Bits {
    __m256i low, high;
  };

  static Floats load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
  static Floats load(const int8_t* from) { return {widen8(from), widen8(from + 8)}; }
  static Floats load(const Bf16* from) { return {widen8(from), widen8(from + 8)}; }
  static Floats load(const Half* from) {
    return {_mm256_cvtph_ps(load_128(from)), _mm256_cvtph_ps(load_128(from + 8))};
  }
  static Floats fill(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
  static void store(float* to, Floats a) {
    _mm256_storeu_ps(to, a.low);
    _mm256_storeu_ps(to + 8, a.high);
  }
  static void store(Bf16* to, Floats a) {
    const __m256i words = _mm256_packus_epi32(rounded_bf16(a.low), rounded_bf16(a.high));  // 128 bits at a time
    store_256(to, _mm256_permute4x64_epi64(words, 0xd8));
  }
  static void store(Half* to, Floats a) {
    store_128(to, _mm256_cvtps_ph(a.low, _MM_FROUND_TO_NEAREST_INT));
    store_128(to + 8, _mm256_cvtps_ph(a.high, _MM_FROUND_TO_NEAREST_INT));
  }
  static Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
  static Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
  static Floats mul(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
  static Floats sub(Floats a, Floats b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
  static Floats div(Floats a, Floats b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
  static Floats sqrt(Floats a) { return {_mm256_sqrt_ps(a.low), _mm256_sqrt_ps(a.high)}; }
  static Floats add_product(Floats sum, Floats a, Floats b) {
    return {_mm256_fmadd_ps(a.low, b.low, sum.low), _mm256_fmadd_ps(a.high, b.high, sum.high)};
  }
  static float total(Floats a) {
    const __m256 eight = _mm256_add_ps(a.low, a.high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static Floats only(Floats a, uint32_t keep) {
    return {_mm256_and_ps(a.low, _mm256_castsi256_ps(lanes_of_bits(keep))),
            _mm256_and_ps(a.high, _mm256_castsi256_ps(lanes_of_bits(keep >> 8)))};
  }

  static constexpr int kTileVectors = 1, kTileTokens = 6;
  static constexpr int kSkipVectors = 4;
  static constexpr bool kMultipliesPairs = false;
  static void transpose(Floats* vectors) {
    __m256 blocks[4][8];
    for (int i = 0; i < 8; i++) {
      blocks[0][i] = vectors[i].low;
      blocks[1][i] = vectors[i].high;
      blocks[2][i] = vectors[i + 8].low;
      blocks[3][i] = vectors[i + 8].high;
    }
    for (auto& block : blocks) transpose8(block);
    for (int i = 0; i < 8; i++) {
      vectors[i] = {blocks[0][i], blocks[2][i]};
      vectors[i + 8] = {blocks[1][i], blocks[3][i]};
    }
  }
  template <class T>
  static constexpr int column_of_place(int place) {
    return place;
  }
  template <class T>
  static void expand(const T* values, uint32_t mask, Floats& low, Floats& high) {
    low.low = expand8(values, mask & 255);
    low.high = expand8(values, mask >> 8 & 255);
    high.low = expand8(values, mask >> 16 & 255);
    high.high = expand8(values, mask >> 24);
  }
  using Places = Bits;  // the permutation looks at two bits of each lane
  static Places places(uint32_t bits) {
    const __m256i all = _mm256_set1_epi32(int(bits));
    return {_mm256_srlv_epi32(all, _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14)),
            _mm256_srlv_epi32(all, _mm256_setr_epi32(16, 18, 20, 22, 24, 26, 28, 30))};
  }
  static Floats pick(Floats low, Floats high, Places places) {
    return {pick8(low.low, high.low, places.low), pick8(low.high, high.high, places.high)};
  }
  static void spread16(const float* values, uint32_t mask, float* to) {
    _mm256_storeu_ps(to, expand8(values, mask & 255));
    _mm256_storeu_ps(to + 8, expand8(values, mask >> 8));
  }
  template <class T>
  static void spread16(const T* values, uint32_t mask, T* to) {
    const __m128i low = bytes_of_places(kPlaces.value_of_lane[mask & 255]);
    const __m128i high = bytes_of_places(kPlaces.value_of_lane[mask >> 8]);
    store_128(to, _mm_shuffle_epi8(load_128(values), low));
    store_128(to + 8, _mm_shuffle_epi8(load_128(values + __builtin_popcount(mask & 255)), high));
  }

  static Bits magnitude(Floats a) {
    const __m256i positive = _mm256_set1_epi32(0x7fffffff);
    return {_mm256_and_si256(_mm256_castps_si256(a.low), positive),
            _mm256_and_si256(_mm256_castps_si256(a.high), positive)};
  }
  static Bits load_bits(const int32_t* from) { return {load_256(from), load_256(from + 8)}; }
  static Bits fill_bits(int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
  static Bits count_before(Bits rank, Bits other, bool lower, Bits own) {
    const __m256i tie = _mm256_set1_epi32(lower);
    return {_mm256_sub_epi32(rank.low, _mm256_cmpgt_epi32(_mm256_add_epi32(other.low, tie), own.low)),
            _mm256_sub_epi32(rank.high, _mm256_cmpgt_epi32(_mm256_add_epi32(other.high, tie), own.high))};
  }
  static void store_bits(int32_t* to, Bits a) {
    store_256(to, a.low);
    store_256(to + 8, a.high);
  }
  static uint32_t above(Bits a, int32_t limit) {
    const __m256i limits = _mm256_set1_epi32(limit);
    return mask_of(_mm256_cmpgt_epi32(a.low, limits), _mm256_cmpgt_epi32(a.high, limits));
  }
  static uint32_t equal(Bits a, int32_t limit) {
    const __m256i limits = _mm256_set1_epi32(limit);
    return mask_of(_mm256_cmpeq_epi32(a.low, limits), _mm256_cmpeq_epi32(a.high, limits));
  }

  template <int m>
  static uint32_t keep_of_groups(Bits a, int n) {
    if constexpr (m == 16) {  // rotations would cross the registers; rare enough for plain code
      return Portable::keep_of_groups<16>(to_array(a), n);
    } else {
      const __m256i limit = _mm256_set1_epi32(-n);  // ranks are counted downwards: a comparison that holds is -1
      return mask_of(_mm256_cmpgt_epi32(rank8<m, 1>(a.low), limit), _mm256_cmpgt_epi32(rank8<m, 1>(a.high), limit));
    }
  }

  static uint32_t nonzero(const float* weight) {
    const Bits bits = magnitude(load(weight));
    return above(bits, 0);
  }
  template <class T>
  static uint32_t nonzero(const T* weight) {
    const __m256i zero = is_zero16(load_256(weight));
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(zero, zero), 0x08);
    return ~uint32_t(_mm_movemask_epi8(_mm256_castsi256_si128(bytes))) & 0xffff;
  }
  static void zero_removed(float* weight, uint32_t keep) {
    for (int half = 0; half < 2; half++, weight += 8, keep >>= 8) {
      const __m256i kept = lanes_of_bits(keep);
      const __m256i bits = load_256(weight);
      store_256(weight, _mm256_and_si256(_mm256_andnot_si256(is_zero32(bits), kept), bits));
    }
  }
  template <class T>
  static void zero_removed(T* weight, uint32_t keep) {
    const __m256i bit = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
    const __m256i kept = _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16(int16_t(keep)), bit), bit);
    const __m256i bits = load_256(weight);
    store_256(weight, _mm256_and_si256(_mm256_andnot_si256(is_zero16(bits), kept), bits));
  }
  // Whole registers are stored, and what lies behind the kept weights is overwritten by the next ones: masked stores are slow.
  template <class T>
  static T* append(T* to, const T* end, const T* weight, uint32_t mask) {
    if (end - to < 16) return Portable::append(to, end, weight, mask);
    to = append8(to, weight, mask & 255);
    return append8(to, weight + 8, mask >> 8);
  }
  static void store_bools(uint8_t* to, uint32_t keep) {
    const __m128i bit = _mm_set1_epi64x(int64_t(0x8040201008040201));
    const __m128i spread = _mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const __m128i bytes = _mm_and_si128(_mm_shuffle_epi8(_mm_cvtsi32_si128(int(keep)), spread), bit);
    store_128(to, _mm_min_epu8(bytes, _mm_set1_epi8(1)));
  }

 private:
  static __m128i load_64(const int8_t* from) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)); }
  template <class T>
  static __m128i load_128(const T* from) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  }
  template <class T>
  static __m256i load_256(const T* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
  template <class T>
  static void store_256(T* to, __m256i bits) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
  }
  template <class T>
  static void store_128(T* to, __m128i bits) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bits);
  }
  // All ones in the lanes of the lowest eight bits.
  static __m256i lanes_of_bits(uint32_t bits) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), bit), bit);
  }
  static void transpose8(__m256* a) {
    __m256 pairs[8], fours[8];
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
      pairs[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {  // fours[i + j], 128 bits at a time: lane j of four vectors, then lane 4 + j
      fours[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
      fours[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
      fours[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
      fours[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
    }
    for (int j = 0; j < 4; j++) {
      a[j] = _mm256_permute2f128_ps(fours[j], fours[4 + j], 0x20);
      a[4 + j] = _mm256_permute2f128_ps(fours[j], fours[4 + j], 0x31);
    }
  }
  // The next values go to the lanes of the mask's bits; the sign of a place blanks its lane.
  template <class T>
  static __m256 expand8(const T*& values, uint32_t mask) {
    const __m256i take = _mm256_cvtepi8_epi32(load_64(kPlaces.value_of_lane[mask]));
    const __m256 placed = _mm256_permutevar8x32_ps(widen8(values), take);
    values += __builtin_popcount(mask);
    return _mm256_blendv_ps(placed, _mm256_setzero_ps(), _mm256_castsi256_ps(take));
  }
  // Writes eight weights; those of the mask's bits come first, -0.0 as +0.0.
  static float* append8(float* to, const float* weight, uint32_t mask) {
    const __m256i bits = load_256(weight);
    const __m256i positive = _mm256_andnot_si256(is_zero32(bits), bits);
    const __m256i lanes = _mm256_cvtepi8_epi32(load_64(kPlaces.lane_of_value[mask]));
    store_256(to, _mm256_permutevar8x32_epi32(positive, lanes));
    return to + __builtin_popcount(mask);
  }
  template <class T>
  static T* append8(T* to, const T* weight, uint32_t mask) {
    const __m128i bits = load_128(weight);
    const __m128i zero = _mm_cmpeq_epi16(_mm_slli_epi16(bits, 1), _mm_setzero_si128());
    store_128(to, _mm_shuffle_epi8(_mm_andnot_si128(zero, bits), bytes_of_places(kPlaces.lane_of_value[mask])));
    return to + __builtin_popcount(mask);
  }
  // The two bytes of each of eight 16-bit places; both of place -1 have the bit with which pshufb blanks a byte.
  static __m128i bytes_of_places(const int8_t* places) {
    const __m128i place = load_64(places), low = _mm_add_epi8(place, place);
    return _mm_unpacklo_epi8(low, _mm_add_epi8(low, _mm_set1_epi8(1)));
  }
  static __m256 pick8(__m256 low, __m256 high, __m256i places) {
    return _mm256_blend_ps(_mm256_permutevar_ps(low, places), _mm256_permutevar_ps(high, places), 0xcc);
  }
  static __m256 widen8(const float* from) { return _mm256_loadu_ps(from); }
  static __m256 widen8(const Half* from) { return _mm256_cvtph_ps(load_128(from)); }
  static __m256 widen8(const Bf16* from) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_128(from)), 16));
  }
  static __m256 widen8(const int8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load_64(from)));
  }
  static __m256i rounded_bf16(__m256 a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, even), _mm256_set1_epi32(0x7fff)), 16);
  }
  static __m256i is_zero32(__m256i bits) {
    return _mm256_cmpeq_epi32(_mm256_slli_epi32(bits, 1), _mm256_setzero_si256());
  }
  static __m256i is_zero16(__m256i bits) {
    return _mm256_cmpeq_epi16(_mm256_slli_epi16(bits, 1), _mm256_setzero_si256());
  }
  static uint32_t mask_of(__m256i low, __m256i high) {
    return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(low))) |
           uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(high))) << 8;
  }
  static Portable::Bits to_array(Bits a) {
    Portable::Bits out;
    store_bits(out.at, a);
    return out;
  }

  // Minus the number of lanes that go before each lane; turns as in lanes_avx512.h.
  template <int m, int turn>
  static __m256i rank8(__m256i a) {
    if constexpr (turn == m) {
      return _mm256_setzero_si256();
    } else {
      const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
      const __m256i within = _mm256_set1_epi32(m - 1);
      const __m256i place = _mm256_and_si256(lane, within);
      const __m256i other_place = _mm256_and_si256(_mm256_add_epi32(lane, _mm256_set1_epi32(turn)), within);
      const __m256i wins_ties = _mm256_srli_epi32(_mm256_sub_epi32(other_place, place), 31);
      const __m256i other =
          _mm256_permutevar8x32_epi32(a, _mm256_or_si256(_mm256_andnot_si256(within, lane), other_place));
      const __m256i before = _mm256_cmpgt_epi32(_mm256_add_epi32(other, wins_ties), a);
      return _mm256_add_epi32(before, rank8<m, turn + 1>(a));
    }
  }
};

}  // namespace
}  // namespace wandapp
