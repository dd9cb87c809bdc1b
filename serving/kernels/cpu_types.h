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

// Sixteen fp32 values at any address; compilers map them to what the processor has.
typedef float Vector __attribute__((vector_size(64), aligned(4), may_alias));
typedef float Half __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(64)));
constexpr int64_t LANES = 16;

inline Vector load_vector(const float* p) { return *reinterpret_cast<const Vector*>(p); }
inline Vector load_vector(const uint16_t* p) {
  return (Vector)(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Words) << 16);
}
inline void store_vector(float* p, Vector v) { *reinterpret_cast<Vector*>(p) = v; }
inline float sum_of(Vector v) {
  float lanes[LANES], sum = 0;
  std::memcpy(lanes, &v, sizeof lanes);
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < LANES; ++i) sum += lanes[i];
  return sum;
}

inline float load(const float* p, int64_t i) { return p[i]; }
inline float load(const uint16_t* p, int64_t i) { return bf16_to_float(p[i]); }
inline void store(float* p, int64_t i, float value) { p[i] = value; }
inline void store(uint16_t* p, int64_t i, float value) { p[i] = float_to_bf16(value); }
