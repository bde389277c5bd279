// The 16-bit storage types and their exact widening to fp32.
#pragma once
#include <cstdint>
#include <cstring>

namespace wandapp {

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float widen(float value) { return value; }
inline float widen(int8_t value) { return value; }
inline float widen(Bf16 value) { return float_of_bits(uint32_t(value.bits) << 16); }

inline float widen(Half value) {
  uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
  uint32_t exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
  if (exponent == 31) return float_of_bits(sign | 0x7f800000 | fraction << 13);
  if (exponent != 0) return float_of_bits(sign | (exponent + 112) << 23 | fraction << 13);
  float magnitude = float(fraction) * 0x1p-24f;  // zero and denormals; exact
  return float_of_bits(sign | bits_of_float(magnitude));
}

// The value as the packed form stores it: +0.0 for -0.0.
inline float stored(float value) { return value == 0 ? 0 : value; }
template <class Half16>
Half16 stored(Half16 value) {
  return value.bits == 0x8000 ? Half16{0} : value;
}

// To nearest, ties to even; NaN stays NaN.
inline void narrow(float value, float& out) { out = value; }

inline void narrow(float value, Bf16& out) {
  uint32_t bits = bits_of_float(value);
  if (value != value) {
    out.bits = uint16_t(bits >> 16 | 0x40);
  } else {
    out.bits = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}

inline void narrow(float value, Half& out) {
  uint32_t bits = bits_of_float(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    out.bits = uint16_t(sign | 0x7e00);
  } else if (magnitude >= 0x477ff000) {  // rounds beyond 65504
    out.bits = uint16_t(sign | 0x7c00);
  } else if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 leaves the denormal's fraction in the low bits
    out.bits = uint16_t(sign | (bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000));
  } else {
    out.bits = uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
  }
}

}  // namespace wandapp
