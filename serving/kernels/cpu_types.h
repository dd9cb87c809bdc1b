// Element types of the compiled kernels: fp32 as it is, bf16 as its upper half.
#pragma once

#include <cstdint>
#include <cstring>

enum Dtype : int32_t { FLOAT32, BFLOAT16 };

inline float bf16_to_float(uint16_t half) {
  uint32_t bits = uint32_t(half) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline uint16_t float_to_bf16(float value) {  // to nearest, ties to even, NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40u);
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float load(const float* p, int64_t i) { return p[i]; }
inline float load(const uint16_t* p, int64_t i) { return bf16_to_float(p[i]); }
inline void store(float* p, int64_t i, float value) { p[i] = value; }
inline void store(uint16_t* p, int64_t i, float value) { p[i] = float_to_bf16(value); }
