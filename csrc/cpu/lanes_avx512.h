// Sixteen lanes in one AVX-512 register; see lanes_portable.h for what each function means.
#pragma once

namespace wandapp {
namespace {

struct Avx512 {
  using Floats = __m512;
  using Bits = __m512i;

  static Floats load(const float* from) { return _mm512_loadu_ps(from); }
  static Floats load(const int8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
  static Floats load(const Bf16* from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_16bit(from)), 16));
  }
  static Floats load(const Half* from) { return _mm512_cvtph_ps(load_16bit(from)); }
  static Floats fill(float value) { return _mm512_set1_ps(value); }
  static void store(float* to, Floats a) { _mm512_storeu_ps(to, a); }
  static void store(Bf16* to, Floats a) {
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, even), _mm512_set1_epi32(0x7fff));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }
  static void store(Half* to, Floats a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
  static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
  static Floats sqrt(Floats a) { return _mm512_sqrt_ps(a); }
  static Floats add_product(Floats sum, Floats a, Floats b) { return _mm512_fmadd_ps(a, b, sum); }
  static float total(Floats a) { return _mm512_reduce_add_ps(a); }
  static Floats only(Floats a, uint32_t keep) { return _mm512_maskz_mov_ps(__mmask16(keep), a); }

  static constexpr int kTileVectors = 2, kTileTokens = 14;  // 28 sums, two vectors of weights, one of x
  static constexpr int kSkipVectors = 8;
  static constexpr bool kMultipliesPairs = false;
  static void transpose(Floats* a) {
    Floats pairs[16], fours[16];
    for (int i = 0; i < 16; i += 2) {
      pairs[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
      pairs[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // the 128 bits k of fours[i + j]: lane 4k + j of four vectors
      fours[i] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
      fours[i + 1] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
      fours[i + 2] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
      fours[i + 3] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
    }
    for (int j = 0; j < 4; j++) {
      const Floats even0 = _mm512_shuffle_f32x4(fours[j], fours[4 + j], 0x88);
      const Floats odd0 = _mm512_shuffle_f32x4(fours[j], fours[4 + j], 0xdd);
      const Floats even1 = _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], 0x88);
      const Floats odd1 = _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], 0xdd);
      a[j] = _mm512_shuffle_f32x4(even0, even1, 0x88);
      a[4 + j] = _mm512_shuffle_f32x4(odd0, odd1, 0x88);
      a[8 + j] = _mm512_shuffle_f32x4(even0, even1, 0xdd);
      a[12 + j] = _mm512_shuffle_f32x4(odd0, odd1, 0xdd);
    }
  }
  template <class T>
  static constexpr int column_of_place(int place) {
    return place;
  }
  // Widening first needs only AVX-512F: vpexpandw is younger.
  template <class T>
  static void expand(const T* values, uint32_t mask, Floats& low, Floats& high) {
    low = expand16(load(values), mask & 0xffff);
    high = expand16(load(values + __builtin_popcount(mask & 0xffff)), mask >> 16);
  }
  using Places = Bits;  // the permutation looks at two bits of each lane
  static Places places(uint32_t bits) {
    const Bits shifts = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    return _mm512_srlv_epi32(_mm512_set1_epi32(int(bits)), shifts);
  }
  static Floats pick(Floats low, Floats high, Places places) {
    return _mm512_mask_permutevar_ps(_mm512_permutevar_ps(low, places), 0xcccc, high, places);
  }
  static void spread16(const float* values, uint32_t mask, float* to) {
    _mm512_storeu_ps(to, expand16(load(values), mask));
  }
  template <class T>
  static void spread16(const T* values, uint32_t mask, T* to) {
    const __m512i widened = _mm512_cvtepu16_epi32(load_16bit(values));
    const __m512i columns = _mm512_mask_expand_epi32(cleared(), __mmask16(mask), in_register(widened));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(columns));
  }

  static Bits magnitude(Floats a) {
    return _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7fffffff));
  }
  static Bits load_bits(const int32_t* from) { return _mm512_loadu_si512(from); }
  static Bits fill_bits(int32_t value) { return _mm512_set1_epi32(value); }
  static Bits count_before(Bits rank, Bits other, bool lower, Bits own) {
    const __mmask16 before = _mm512_cmpgt_epi32_mask(_mm512_add_epi32(other, _mm512_set1_epi32(lower)), own);
    return _mm512_mask_add_epi32(rank, before, rank, _mm512_set1_epi32(1));
  }
  static void store_bits(int32_t* to, Bits a) { _mm512_storeu_si512(to, a); }
  static uint32_t above(Bits a, int32_t limit) { return _mm512_cmpgt_epi32_mask(a, _mm512_set1_epi32(limit)); }
  static uint32_t equal(Bits a, int32_t limit) { return _mm512_cmpeq_epi32_mask(a, _mm512_set1_epi32(limit)); }

  template <int m>
  static uint32_t keep_of_groups(Bits a, int n) {
    Bits rank = _mm512_setzero_si512();
    add_ranks<m, 1>(a, rank);
    return _mm512_cmplt_epi32_mask(rank, _mm512_set1_epi32(n));
  }

  static uint32_t nonzero(const float* weight) {
    return _mm512_test_epi32_mask(_mm512_loadu_si512(weight), _mm512_set1_epi32(0x7fffffff));
  }
  template <class T>
  static uint32_t nonzero(const T* weight) {
    return _mm256_test_epi16_mask(load_16bit(weight), _mm256_set1_epi16(0x7fff));
  }
  static void zero_removed(float* weight, uint32_t keep) {
    _mm512_storeu_ps(weight, _mm512_maskz_loadu_ps(__mmask16(keep & nonzero(weight)), weight));
  }
  template <class T>
  static void zero_removed(T* weight, uint32_t keep) {
    __m256i kept = _mm256_maskz_mov_epi16(__mmask16(keep & nonzero(weight)), load_16bit(weight));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(weight), kept);
  }
  static float* append(float* to, const float*, const float* weight, uint32_t mask) {
    const __m512 kept = _mm512_maskz_loadu_ps(__mmask16(nonzero(weight)), weight);
    _mm512_mask_storeu_ps(to, __mmask16(lanes_of_count(mask)), _mm512_maskz_compress_ps(__mmask16(mask), kept));
    return to + __builtin_popcount(mask);
  }
  // Compressing 16-bit lanes needs VBMI2; 32-bit ones do not.
  template <class T>
  static T* append(T* to, const T*, const T* weight, uint32_t mask) {
    const __m512i kept = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16(nonzero(weight)), weight));
    const __m256i values = _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(__mmask16(mask), kept));
    _mm256_mask_storeu_epi16(to, __mmask16(lanes_of_count(mask)), values);
    return to + __builtin_popcount(mask);
  }
  static void store_bools(uint8_t* to, uint32_t keep) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_maskz_set1_epi8(__mmask16(keep), 1));
  }

 protected:
  // The expand instructions are much slower on memory than on a register, and compilers fold the load into them.
  template <class Vector>
  static Vector in_register(Vector vector) {
    asm("" : "+v"(vector));
    return vector;
  }

  // A mask of the lowest lanes for as many values as `mask` has bits.
  static uint32_t lanes_of_count(uint32_t mask) { return _bzhi_u32(~0u, __builtin_popcount(mask)); }

  // They also wait for what their target held before, even if they overwrite all of it: so it is cleared first.
  static __m512i cleared() { return in_register(_mm512_setzero_si512()); }

  static __m512 expand16(__m512 values, uint32_t mask) {
    return _mm512_mask_expand_ps(_mm512_castsi512_ps(cleared()), __mmask16(mask), in_register(values));
  }

  template <class T>
  static __m256i load_16bit(const T* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }

 private:
  // Lane i meets lane j = (i + turn) mod m of its group. Past the group's end j < i, and then equals go before.
  template <int m, int turn>
  static void add_ranks(Bits a, Bits& rank) {
    if constexpr (turn < m) {
      const Bits lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
      const Bits place = _mm512_and_si512(lane, _mm512_set1_epi32(m - 1));
      const Bits other_place =
          _mm512_and_si512(_mm512_add_epi32(lane, _mm512_set1_epi32(turn)), _mm512_set1_epi32(m - 1));
      const Bits wins_ties = _mm512_srli_epi32(_mm512_sub_epi32(other_place, place), 31);  // 1 where j < i
      Bits other;
      if constexpr (m <= 4) {
        constexpr int order = m == 2 ? 0xb1 : turn == 1 ? 0x39 : turn == 2 ? 0x4e : 0x93;
        other = _mm512_shuffle_epi32(a, _MM_PERM_ENUM(order));
      } else {
        const Bits from = _mm512_or_si512(_mm512_andnot_si512(_mm512_set1_epi32(m - 1), lane), other_place);
        other = _mm512_permutexvar_epi32(from, a);
      }
      const __mmask16 before = _mm512_cmpgt_epi32_mask(_mm512_add_epi32(other, wins_ties), a);
      rank = _mm512_mask_add_epi32(rank, before, rank, _mm512_set1_epi32(1));
      add_ranks<m, turn + 1>(a, rank);
    }
  }
};

#ifdef WANDAPP_VBMI2
// vpexpandw places 32 16-bit values at once.
struct Avx512Vbmi2 : Avx512 {
  // bf16 is widened without moving lanes: even columns by a shift, odd ones by a mask. So x waits in that order.
  template <class T>
  static constexpr int column_of_place(int place) {
    if (!std::is_same<T, Bf16>::value) return place;
    return place < 16 ? 2 * place : 2 * (place - 16) + 1;
  }
  static void expand(const float* values, uint32_t mask, Floats& low, Floats& high) {
    Avx512::expand(values, mask, low, high);
  }
  static void expand(const Bf16* values, uint32_t mask, Floats& even, Floats& odd) {
    const __m512i columns = expand32(values, mask);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(columns, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(columns, _mm512_set1_epi32(int(0xffff0000))));
  }
  static void expand(const Half* values, uint32_t mask, Floats& low, Floats& high) {
    const __m512i columns = expand32(values, mask);
    low = _mm512_cvtph_ps(_mm512_castsi512_si256(columns));
    high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(columns, 1));
  }
  static void expand(const int8_t* values, uint32_t mask, Floats& low, Floats& high) {
    const __m256i next = in_register(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
    const __m256i columns = _mm256_mask_expand_epi8(_mm512_castsi512_si256(cleared()), mask, next);
    low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(columns)));
    high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(columns, 1)));
  }
  using Avx512::spread16;
  static void spread16(const Half* values, uint32_t mask, Half* to) {
    const __m256i next = in_register(load_16bit(values));
    const __m256i columns = _mm256_mask_expand_epi16(_mm512_castsi512_si256(cleared()), __mmask16(mask), next);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), columns);
  }

 protected:
  template <class T>
  static __m512i expand32(const T* values, uint32_t mask) {
    return _mm512_mask_expand_epi16(cleared(), mask, in_register(_mm512_loadu_si512(values)));
  }
};
#endif

#ifdef WANDAPP_BF16
// vdpbf16ps multiplies 32 bf16 columns at once. Denormal bf16 weights and inputs count as zero to it.
struct Avx512Bf16 : Avx512Vbmi2 {
  static constexpr bool kMultipliesPairs = true;
  static Floats expand_pairs(const Bf16* values, uint32_t mask) { return _mm512_castsi512_ps(expand32(values, mask)); }
  static Floats expand_pairs(const int8_t* values, uint32_t mask) {  // exact: bf16 holds integers up to 256
    Floats low, high;
    expand(values, mask, low, high);
    return _mm512_castsi512_ps(__m512i(_mm512_cvtne2ps_pbh(high, low)));
  }
  static Floats add_pairs(Floats sum, Floats a, Floats b) {
    return _mm512_dpbf16_ps(sum, __m512bh(_mm512_castps_si512(a)), __m512bh(_mm512_castps_si512(b)));
  }
};
#endif

}  // namespace
}  // namespace wandapp
